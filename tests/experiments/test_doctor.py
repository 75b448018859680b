"""`fedclip doctor`: what is well, what is not, and what to do about it; also where PyTorch cannot be imported."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from experiments import doctor
from experiments.cli import app
from experiments.doctor import FLOWER, RAY, TORCH, TORCHAUDIO, Finding, doctor_command, examine, run_python
from tests.corpora_folders import librispeech
from tests.idx_folder import write_idx_folder

WELL = {TORCH: (0, 'a warning\n{"sum": 3.0, "cuda": null, "gpus": []}\n'), TORCHAUDIO: (0, ""), FLOWER: (0, ""), RAY: (0, "")}


def found(probes: dict[str, tuple[int | None, str]] | None = None, data_dir: Path | None = None) -> dict[str, Finding]:
    return {f.name: f for f in examine(data_dir, lambda code, seconds: (WELL | (probes or {}))[code])}


def test_a_well_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command(None, False, lambda code, seconds: WELL[code]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("0 that fail")
    assert doctor_command(None, True, lambda code, seconds: WELL[code]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["status"] in ("ok", "warn")
    names = [row["name"] for row in told["findings"]]
    assert {"python", "packages", "cores", "memory", "disk", "shared memory", "torch", "gpu", "torchaudio", "flower", "ray"} <= {*names}
    assert all({*row} == {"name", "status", "said", "remedy"} for row in told["findings"])


def test_what_fails_says_why_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    other = (1, "Traceback ...\nOSError: libcudart.so.13: cannot open shared object file\n")
    findings = found({TORCHAUDIO: other, RAY: (None, "starting\n"), FLOWER: (-11, "")})
    failed = {name: finding for name, finding in findings.items() if finding.status == "fail"}
    assert {*failed} == {"torchaudio", "ray", "flower"}
    assert failed["torchaudio"].said == "OSError: libcudart.so.13: cannot open shared object file"
    assert "--index-url https://download.pytorch.org/whl/cpu;" in failed["torchaudio"].remedy
    assert failed["ray"].said == "took more than 120 s; it last said: starting"
    assert "run.engine = 'process'" in failed["ray"].remedy
    assert failed["flower"].said == "ended with status -11"
    assert doctor_command(None, False, lambda code, seconds: (WELL | {RAY: other})[code]) == 1
    assert "\n                      room and a short path" in capsys.readouterr().out
    gpu = found({TORCH: (0, '{"cuda": "13.0", "gpus": ["T4"]}'), TORCHAUDIO: other})
    assert gpu["gpu"].said.startswith("T4")
    assert "/whl/cu130;" in gpu["torchaudio"].remedy


def test_a_package_of_another_version_a_full_disk_and_a_check_that_breaks_down_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["numpy>=99", "no-such-package>=1", "scipy>=1", 'torch>=99; extra == "dev"']
    monkeypatch.setattr(doctor, "requires", lambda package: needed)
    full = SimpleNamespace(total=10**12, used=96 * 10**10, free=4 * 10**10)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: full)
    monkeypatch.setattr(doctor, "_free_memory", lambda: 10**9)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0, 2})
    findings = found()
    said = findings["requirements"].said
    assert (findings["requirements"].status, "numpy>=99 (there is " in said, "no-such-package>=1 (there is none)" in said) == (
        "fail",
        True,
        True,
    )
    assert "scipy" not in said
    assert "torch" not in said
    assert {name: findings[name].status for name in ("disk", "temporary", "shared memory")} == {
        "disk": "ok",
        "temporary": "warn",
        "shared memory": "ok",
    }
    assert findings["memory"].status == "warn"
    assert findings["cores"].said.startswith("2")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: (_ for _ in ()).throw(RuntimeError("no such disk")))
    findings = found()
    assert findings["disk"] == Finding("disk", "fail", "could not be looked at: RuntimeError: no such disk", doctor.BROKEN)
    assert findings["ray"].status == "ok"


def test_a_broken_extra_is_said_and_the_others_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(package: str) -> bool:
        if package.startswith("flashlight"):
            raise ImportError("undefined symbol")
        return False

    monkeypatch.setattr(doctor, "installed", broken)
    findings = found()
    assert findings["extra decoder"].status == "fail"
    assert "flashlight.lib.text.decoder is broken: ImportError: undefined symbol" in findings["extra decoder"].said
    assert findings["extra wandb"].status == findings["ray"].status == "ok"
    assert all(finding.remedy for finding in findings.values() if finding.status != "ok")


def test_data_are_named_by_their_layout_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = found(data_dir=librispeech(tmp_path / "books"))["data"]
    assert read.status == "ok"
    assert read.said.startswith("librispeech: ")
    assert " speakers to train on, " in read.said
    images = tmp_path / "images"
    images.mkdir()
    write_idx_folder(images, train=60, test=20)
    assert found(data_dir=images)["data"].said == "images in idx files: 60 to train on, 20 held out"
    (tmp_path / "nothing").mkdir()
    for folder, said in ((tmp_path / "nothing", "No known layout"), (tmp_path / "none", "there is no folder")):
        finding = found(data_dir=folder)["data"]
        assert (finding.status, finding.said.startswith(said)) == ("fail", True)


def test_another_python_gives_its_status_and_words_and_is_ended_when_the_time_is_up_with_what_it_started(tmp_path: Path) -> None:
    status, output = run_python("import sys; print('out', flush=True); sys.stderr.write('err'); sys.exit(3)", 60)
    assert (status, sorted(output.split())) == (3, ["err", "out"])
    assert run_python("import experiments.doctor as d; print(d.__name__)", 60) == (0, "experiments.doctor\n")
    note = tmp_path / "pid"
    code = f"""
import pathlib, subprocess, time
child = subprocess.Popen(["sleep", "600"])
pathlib.Path({str(note)!r}).write_text(str(child.pid))
print("waiting", flush=True)
time.sleep(600)
"""
    begin = time.monotonic()
    status, output = run_python(code, 3)
    assert (status, output, time.monotonic() - begin < 60) == (None, "waiting\n", True)
    child = int(note.read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"the process {child} is still there")


def test_it_works_where_pytorch_and_ray_cannot_be_imported(tmp_path: Path) -> None:
    for package, error in (("torch", "OSError('libcudart.so.13: cannot open')"), ("ray", "ImportError('no ray')")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise {error}")
    project = Path(__file__).parents[2]
    books = librispeech(tmp_path / "books")
    result = subprocess.run(
        [sys.executable, "-m", "experiments.cli", "doctor", "--json", "--data-dir", str(books)],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    findings = {row["name"]: row for row in json.loads(result.stdout)["findings"]}
    assert {name for name, row in findings.items() if row["status"] == "fail"} == {"torch", "ray"}
    assert findings["torch"]["said"] == "OSError: libcudart.so.13: cannot open"
    assert findings["flower"]["status"] == "ok"
    assert (findings["data"]["status"], findings["data"]["said"].startswith("librispeech, not counted: OSError")) == ("warn", True)


@pytest.mark.slow
def test_this_machine_is_well() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
