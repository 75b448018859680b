"""Going on with a run from the command line: after kill -9, SIGTERM and a full disk; and what is refused, with nothing changed."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.engines import secret_of
from experiments.folder import CHECKPOINTS, LEDGER
from experiments.live import Reporter
from experiments.prepare import Prepared, prepare, read_experiment
from experiments.run import Run
from fedclip.account import Account, LedgerError, read_ledger
from fedclip.model_file import load_model
from fedclip.options import ConfigError
from fedclip.simulation import InProcess
from fedclip.storage import Storage
from strategies.naming import run_digest

PROJECT = Path(__file__).parents[2]
runner = CliRunner()


def run(*arguments: str | Path) -> tuple[int, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def quick(vision: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(vision), "--out", str(out), "--set", "run.engine=process", "--set", "evaluation.every=0", "--quiet", *more]


def params_of(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path / CHECKPOINTS / "model.safetensors")[1]


def same(a: Path, b: Path) -> bool:
    first, second = params_of(a), params_of(b)
    return all(torch.equal(first[n], second[n]) for n in first)


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "experiments.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PROJECT)


def wait_for_rounds(out: Path, rounds: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (out / "metrics.jsonl").exists() and len((out / "metrics.jsonl").read_text().splitlines()) >= rounds:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {rounds} rounds after a minute")


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_kill_9_again_and_again_and_the_run_goes_on(vision: Path, tmp_path: Path, kills: int) -> None:
    """Kills at arbitrary moments of one run; it ends as if nothing had been, but for the attempts that were charged twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    rounds = ["--rounds", "60"]
    assert run(*quick(vision, whole, *rounds))[0] == 0
    chance = random.Random(0)
    process = start(*quick(vision, killed, *rounds))
    for kill in range(kills):
        wait_for_rounds(killed, 3 * kill + 1)
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
        process = start("run", "--resume", str(killed), "--quiet")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    ledger = read_ledger(killed / LEDGER)
    assert sorted({c.round for c in ledger}) == list(range(1, 61))
    again = [c for c in ledger if c.attempt]
    assert len(ledger) == 60 + len(again)
    assert same(whole, killed) == (not again)
    rows = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rows] == list(range(1, 61))
    assert json.loads((killed / "summary.json").read_text())["users_total"] == sum(r["users"] for r in rows)


def test_sigterm_ends_in_order_and_says_how_to_go_on(vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*quick(vision, out, "--rounds", "100000"))
    wait_for_rounds(out, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert f"to go on: fedclip run --resume {out}" in output
    assert json.loads((out / "summary.json").read_text())["status"] == "interrupted"
    beat = json.loads((out / "heartbeat.json").read_text())
    assert (beat["status"], beat["round"]) == ("interrupted", json.loads((out / "summary.json").read_text())["rounds"])


def test_a_finished_run_is_extended_and_nothing_is_trained_twice(vision: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert run(*quick(vision, once, "--rounds", "6"))[0] == 0
    assert run(*quick(vision, twice, "--rounds", "3"))[0] == 0
    status, output = run("run", "--resume", twice, "--rounds", "6")
    assert status == 0, output
    assert same(once, twice)
    users = [json.loads((p / "summary.json").read_text())["users_total"] for p in (once, twice)]
    assert users[0] == users[1]
    assert "rounds = 6" in (twice / "config.toml").read_text()
    before = params_of(twice)
    status, output = run("run", "--resume", twice)
    assert status == 0, output
    assert all(torch.equal(before[n], t) for n, t in params_of(twice).items()), "a finished run was trained on"


KEPT = {
    "a mask that follows what was released, and differences": (
        "strategy={client=[{with_error_feedback={inner={common_mask={density=0.1, fresh=0.5}}}}, {clip_per_layer={max_norm=0.5}}], "
        "server=[{lamb={lr=0.02}}]}",
        "codec.name=packed",
        "downlink.stages=[{top_k={density=0.2}}]",
        "downlink.differences=true",
        "states.precision=float16",
    ),
    "control variates": ("strategy={method='scaffold', max_norm=0.5}", "sampler.cohort=20"),
}


@pytest.mark.parametrize("name", KEPT)
def test_all_that_is_kept_between_rounds_goes_on(vision: Path, tmp_path: Path, name: str) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    sets = [word for option in KEPT[name] for word in ("--set", option)]
    assert run(*quick(vision, once, *sets, "--rounds", "6"))[0] == 0
    assert run(*quick(vision, twice, *sets, "--rounds", "3"))[0] == 0
    status, output = run("run", "--resume", twice, "--rounds", "6")
    assert status == 0, output
    assert same(once, twice)
    totals = [{k: v for k, v in json.loads((p / "summary.json").read_text()).items() if k.endswith("_total")} for p in (once, twice)]
    assert totals[0].pop("saving_seconds_total") != totals[1].pop("saving_seconds_total")
    assert totals[0] == totals[1]


def test_a_spent_budget_stays_spent(vision: Path, tmp_path: Path) -> None:
    from fedclip.accounting import guarantee
    from fedclip.sampling import Poisson

    out, budget = tmp_path / "run", guarantee(Poisson(60, 9.0), 2.0, 2, 1e-9).epsilon * 1.001
    sets = ("--set", "privacy.noise_multiplier=2.0", "--set", f"privacy.epsilon_budget={budget}")
    assert run(*quick(vision, out, *sets, "--rounds", "9"))[0] == 0
    for more in ([], ["--rounds", "50"]):
        status, output = run("run", "--resume", out, *more)
        assert status == 0
        assert "budget spent: 2 rounds" in output
        assert len(read_ledger(out / LEDGER)) == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder of three rounds."""
    from tests.experiments.conftest import VISION

    folder = tmp_path_factory.mktemp("finished")
    (folder / "vision.toml").write_text(VISION)
    assert run(*quick(folder / "vision.toml", folder / "run"))[0] == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "local.lr=0.2"], ["local.lr was 0.1 and is to be 0.2", "another run"]),
        (["--set", "privacy.noise_multiplier=0.01"], ["privacy.noise_multiplier", "another run"]),
        (["--set", "privacy.epsilon_budget=1e9"], ["privacy.epsilon_budget", "another run"]),
        (["--set", "sampler.cohort=3"], ["sampler.cohort", "another run"]),
        (["--seed", "3"], ["keeps its seed"]),
        (["--out", "elsewhere"], ["stays in its folder"]),
        (["vision.toml"], ["Give an experiment file, or --resume"]),
    ],
)
def test_what_would_be_another_run_is_refused(finished: Path, arguments: list[str], said: list[str]) -> None:
    before = content(finished)
    status, output = run("run", "--resume", finished, *arguments)
    assert status == 2, output
    assert all(part in output for part in said), output
    assert content(finished) == before


def test_a_configuration_that_was_edited_is_refused(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    config = path / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.1\n", "lr = 0.2\n"))
    status, output = run("run", "--resume", path, "--rounds", "5")
    assert status == 2
    assert "was changed since the run began" in output
    status, output = run("run", "--resume", tmp_path / "none")
    assert status == 2
    assert "holds no run" in output


def test_a_folder_in_use_is_refused(vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*quick(vision, out, "--rounds", "100000"))
    try:
        wait_for_rounds(out, 1)
        status, output = run("run", "--resume", out)
        assert status == 2
        assert f"in use by the process {process.pid}" in output
    finally:
        process.kill()
        process.communicate()
    assert run("run", "--resume", out, "--rounds", "1", "--quiet")[0] in (0, 2)


def test_a_run_begins_with_the_weights_of_another(vision: Path, finished: Path, tmp_path: Path) -> None:
    sets = ["--set", f"run.init_from='{finished}'"]
    assert run(*quick(vision, tmp_path / "tuned", *sets, "--rounds", "1"))[0] == 0
    assert len(read_ledger(tmp_path / "tuned" / LEDGER)) == 1, "a new ledger"
    environments = [json.loads((p / "environment.json").read_text()) for p in (finished, tmp_path / "tuned")]
    assert environments[1]["init_from"] == str(finished)
    assert environments[0]["run"] != environments[1]["run"]
    config = (tmp_path / "tuned" / "config.toml").read_text()
    assert "init_digest" in config
    # Gone on with, it needs the other model no more.
    moved = Path(shutil.copytree(tmp_path / "tuned", tmp_path / "moved"))
    (moved / "config.toml").write_text(config.replace(str(finished), str(tmp_path / "gone")))
    assert run("run", "--resume", moved, "--rounds", "2")[0] == 0
    # From its own configuration, on other weights, it is refused.
    other = tmp_path / "other"
    assert run(*quick(vision, other, "--rounds", "1"))[0] == 0
    (tmp_path / "again.toml").write_text(config.replace(str(finished), str(other)))
    status, output = run("run", tmp_path / "again.toml", "--out", tmp_path / "again")
    assert status == 2
    assert "holds other weights" in output


def prepared_of(path: Path) -> Prepared:
    return prepare(read_experiment(path / "config.toml", []), resume=True)


def open_run(prepared: Prepared, path: Path, storage: Storage | None = None) -> Run:
    z = prepared.experiment.privacy.noise_multiplier
    storage = storage or Storage()
    account = Account(prepared.method.sampler, z, 1e-9, path=path / LEDGER, storage=storage)
    names = (secret_of(prepared), run_digest(prepared.experiment))
    return Run(prepared, InProcess(prepared.method, prepared.task, *names, account=account), path, resume=True, storage=storage)


@pytest.fixture(scope="module")
def stopped(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was stopped after the release of its third round, before the checkpoint."""
    path = Path(shutil.copytree(finished, tmp_path_factory.mktemp("stopped") / "run"))
    prepared = prepared_of(path)
    (path / CHECKPOINTS / "00000003.ckpt").unlink()
    lines = (path / LEDGER).read_text().splitlines(keepends=True)
    (path / LEDGER).write_text("".join(lines[:2]))
    run = open_run(prepared, path)
    run.engine.keep, kept = None, run.engine.keep

    def stop(released: object) -> None:
        kept(released)
        raise KeyboardInterrupt

    run.engine.keep = stop
    with pytest.raises(KeyboardInterrupt):
        run.rounds(Reporter(3, quiet=True))
    run.folder.close()
    assert (path / CHECKPOINTS / "00000003-0.sum").exists()
    assert len(read_ledger(path / LEDGER)) == 3
    return path


def damaged(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Damage a file's content in one of the ways that disks, copies and people do."""
    at, kind = chance.randrange(len(data)), chance.choice(["flip", "cut", "zeros", "insert", "empty"])
    if kind == "flip":
        return kind, data[:at] + bytes([data[at] ^ (1 << chance.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return kind, data[:at]
    if kind == "zeros":
        changed = data[:at] + bytes(min(16, len(data) - at)) + data[at + 16 :]
        return kind, changed if changed != data else b""
    return kind, data[:at] + b"x" + data[at:] if kind == "insert" else b""


def check_corruptions(stopped: Path, tmp_path: Path, count: int) -> None:
    path = Path(shutil.copytree(stopped, tmp_path / "run"))
    prepared, chance = prepared_of(path), random.Random(1)
    files = [path / CHECKPOINTS / "00000002.ckpt", path / CHECKPOINTS / "00000003-0.sum", path / LEDGER]
    for n in range(count):
        file = files[n % 3]
        whole = file.read_bytes()
        kind, changed = damaged(whole, chance)
        file.write_bytes(changed)
        before = content(path)
        try:
            with pytest.raises((ConfigError, LedgerError)) as refused:
                open_run(prepared, path)
        except BaseException:
            print(f"corruption {n} ({kind}) of {file.name} was accepted")
            raise
        assert str(path) in str(refused.value), refused.value
        assert content(path) == before, f"{kind} of {file.name}: something was changed"
        file.write_bytes(whole)
    run = open_run(prepared, path)
    assert run.rounds(Reporter(3, quiet=True)) == "done"
    run.folder.close()


def test_no_corruption_is_accepted(stopped: Path, tmp_path: Path) -> None:
    check_corruptions(stopped, tmp_path, 150)


@pytest.mark.slow
def test_no_corruption_of_a_thousand_is_accepted(stopped: Path, tmp_path: Path) -> None:
    check_corruptions(stopped, tmp_path, 1000)


def test_a_damaged_checkpoint_names_the_last_good_one_and_the_ledger_goes_on(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    last = path / CHECKPOINTS / "00000003.ckpt"
    last.write_bytes(last.read_bytes()[:-1])
    status, output = run("run", "--resume", path, "--rounds", "4")
    assert status == 2
    assert "00000002.ckpt; take the other away" in output
    last.unlink()
    assert run("run", "--resume", path, "--rounds", "4")[0] == 0
    assert [(c.round, c.attempt) for c in read_ledger(path / LEDGER)] == [(1, 0), (2, 0), (3, 0), (3, 1), (4, 0)]


def test_files_of_another_run_and_version_are_refused(vision: Path, finished: Path, tmp_path: Path) -> None:
    assert run(*quick(vision, tmp_path / "other", "--seed", "2"))[0] == 0
    for name, said in ((f"{CHECKPOINTS}/00000003.ckpt", "files were swapped"), (LEDGER, "taken from another run")):
        path = Path(shutil.copytree(finished, tmp_path / Path(name).name))
        shutil.copy(tmp_path / "other" / name, path / name)
        status, output = run("run", "--resume", path, "--rounds", "4")
        assert status == 2
        assert said in output
    path = Path(shutil.copytree(finished, tmp_path / "swapped"))
    shutil.copy(path / CHECKPOINTS / "00000002.ckpt", path / CHECKPOINTS / "00000003.ckpt")
    assert "round 2, expected 3; files were swapped" in run("run", "--resume", path, "--rounds", "4")[1]
    path = Path(shutil.copytree(finished, tmp_path / "version"))
    last = path / CHECKPOINTS / "00000003.ckpt"
    import hashlib

    body = last.read_bytes()[:-32].replace(b"checkpoint 1\n", b"checkpoint 9\n", 1)
    last.write_bytes(body + hashlib.blake2b(body, digest_size=32).digest())
    status, output = run("run", "--resume", path, "--rounds", "4")
    assert status == 2
    assert "'fedclip checkpoint 9', expected 'fedclip checkpoint 1'" in output


class FullDisk(Storage):
    """A disk that takes half of a write to a file of some name, and has no room for the rest."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, path: Path, chunks: object) -> None:
        data = b"".join(bytes(c) for c in chunks)
        self._fill(path, data, "wb")

    def append(self, path: Path, data: bytes) -> None:
        self._fill(path, data, "ab")

    def _fill(self, path: Path, data: bytes, mode: str) -> None:
        full = path.name.startswith(self.name)
        with path.open(mode) as file:
            file.write(data[: len(data) // 2] if full else data)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))


@pytest.mark.parametrize("name", ["00000003.ckpt", "00000003-0.sum", LEDGER, "metrics.jsonl"])
def test_a_full_disk_loses_nothing(finished: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    (path / CHECKPOINTS / "00000003.ckpt").unlink()
    lines = (path / LEDGER).read_text().splitlines(keepends=True)
    (path / LEDGER).write_text("".join(lines[:2]))
    prepared = prepared_of(path)
    full = open_run(prepared, path, FullDisk(name))
    with pytest.raises(OSError, match="No space left"):
        full.rounds(Reporter(3, quiet=True))
    full.folder.close()
    again = open_run(prepared, path)
    assert again.rounds(Reporter(3, quiet=True)) == "done"
    again.folder.close()
    redrawn = name == "00000003-0.sum"  # the line was durable, its release was not
    assert [(c.round, c.attempt) for c in read_ledger(path / LEDGER)] == [(1, 0), (2, 0), (3, 0)] + [(3, 1)] * redrawn
    expected = params_of(finished)
    ends = again.engine.layout.split(again.engine.state.params)
    equal = all(torch.equal(expected[n].flatten(), t) for n, t in zip(again.engine.layout.names, ends, strict=True))
    assert equal == (not redrawn)
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser may make a small file system")
def test_a_small_file_system_that_fills_up(vision: Path, tmp_path: Path) -> None:
    """The same on a real file system of 600 kB: a clear end, and after room is made the run goes on to the same model."""
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        assert run(*quick(vision, whole, "--rounds", "6"))[0] == 0
        (disk / "ballast").write_bytes(bytes(400_000))
        status, output = run(*quick(vision, disk / "run", "--rounds", "6"))
        assert status in (1, 2), output
        assert "No space left on device" in output, (status, output)
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert (disk / "run" / "config.toml").exists()
        status, output = run("run", "--resume", disk / "run")
        assert status == 0, output
        again = any(c.attempt for c in read_ledger(disk / "run" / LEDGER))
        assert same(whole, disk / "run") == (not again)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
