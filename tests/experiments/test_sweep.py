"""Sweeps: what they try, in which folders, and that every trial is done once whatever becomes of the sweep."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from experiments.cli import app
from experiments.folder import read_metrics
from experiments.sweep import _try_all
from experiments.sweep_folder import SweepFolder
from experiments.sweep_live import SweepReporter
from experiments.sweep_plan import read_sweep
from experiments.sweep_pools import Job, Processes, RayTasks, Reply, do
from fedclip.account import read_ledger
from fedclip.model_file import load_model
from fedclip.options import ConfigError

BASE = """
[run]
name = "small"
rounds = 3

[task]
name = "vision"

[population]
size = 60

[sampler]
cohort = 9

[local]
lr = 0.1
steps = 2
batch_size = 4
clip_norm = 1.0

[strategy]
client = [{ top_k = { density = 0.5 } }, { clip_per_layer = { max_norm = 0.5 } }]
server = [{ lamb = { lr = 0.02 } }]

[evaluation]
every = 0
"""

SWEEP = """
base = "base.toml"
seeds = [1, 2]

[[cases]]
name = "dense"
strategy.client = [{ clip_per_layer = { max_norm = 0.5 } }]

[[cases]]
name = "sparse"
codec.name = "packed"
strategy.client.top_k.density = 0.1

[grid]
privacy.noise_multiplier = ["default", 0.05]
"""

NAMES = [f"{case}-noise_multiplier={z}-seed={seed}" for case in ("dense", "sparse") for z in ("default", "0.05") for seed in (1, 2)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE, encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(SWEEP, encoding="utf-8")
    return path


def fedclip(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep.json").read_text(encoding="utf-8"))


def statuses(out: Path) -> dict[str, str]:
    return {trial["name"]: trial["status"] for trial in record(out)["trials"]}


def test_trials_are_cases_by_grid_by_seeds_and_set_what_they_say(file: Path) -> None:
    sweep = read_sweep(file, ["local.lr=0.2"])
    assert [trial.name for trial in sweep.trials] == NAMES
    assert sweep.keys == ("strategy.client", "codec.name", "strategy.client.top_k.density", "privacy.noise_multiplier")
    noiseless, noisy = sweep.trials[4], sweep.trials[7]
    assert noisy.settings == {"codec.name": "packed", "strategy.client.top_k.density": 0.1, "privacy.noise_multiplier": 0.05}
    assert (noisy.case, noisy.seed, noisy.experiment.run.seed) == ("sparse", 2, 2)
    assert noisy.experiment.strategy.model_extra["client"][0]["top_k"]["density"] == 0.1
    assert (noisy.experiment.privacy.noise_multiplier, noiseless.experiment.privacy.noise_multiplier) == (0.05, None)
    assert [trial.private for trial in sweep.trials] == [False, False, True, True] * 2
    assert {trial.experiment.local["lr"] for trial in sweep.trials} == {0.2}
    assert {trial.experiment.run.engine for trial in sweep.trials} == {"process"}
    dense = sweep.trials[0].experiment.strategy.model_extra["client"]
    assert [next(iter(stage)) for stage in dense] == ["clip_per_layer"], "a case must not change the next one's base"


def test_settings_that_go_together_are_a_list_of_the_grid(file: Path) -> None:
    noise = '[grid]\nnoise = [{ name = "none" }, { name = "some", privacy.noise_multiplier = 1.0, privacy.noise_cohort_size = 30 }]\n'
    file.write_text(f'base = "base.toml"\n{noise}local.lr = [0.1, 0.2]\n', encoding="utf-8")
    trials = read_sweep(file).trials
    assert [trial.name for trial in trials] == [f"noise={noise}-lr={lr}" for noise in ("none", "some") for lr in (0.1, 0.2)]
    assert trials[0].settings == {"local.lr": 0.1}
    assert trials[2].settings == {"privacy.noise_multiplier": 1.0, "privacy.noise_cohort_size": 30, "local.lr": 0.1}
    assert [trial.case for trial in trials] == [None] * 4


def test_names_tell_trials_apart_and_fit_a_folder(file: Path) -> None:
    text = 'base = "base.toml"\n[grid]\n"local.lr" = [0.1, 0.2]\nstrategy.server = [[{ lamb = { lr = 0.1 } }], [{ sgd = { lr = 0.1 } }]]\n'
    file.write_text(text + 'local.optimizer = ["sgd", "adam"]\n"strategy.server.sgd.lr" = ["default"]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="no stage 'sgd'"):  # of the trials with LAMB
        read_sweep(file)
    file.write_text(text + 'population.size = [60, 61]\ncodec.name = ["packed"]\n', encoding="utf-8")
    names = [trial.name for trial in read_sweep(file).trials]
    assert len(set(names)) == len(names) == 8
    assert names[0].startswith("lr=0.1-server=lamb")
    assert all(len(name) <= 120 and "/" not in name and not name.startswith(".") for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds =", "sedes ="), "sedes: unknown key.*Did you mean 'seeds'"),
        (("privacy.noise_multiplier", "privacy.noise_multiplyer"), "(?s)and 3 more: privacy.noise_multiplyer.*mean 'noise_multiplier'"),
        (('["default", 0.05]', "0.05"), "grid.privacy.noise_multiplier: expected a list"),
        (("0.05]", "-1]"), r"trial dense-noise_multiplier=-1-seed=1, and 3 more: privacy.noise_multiplier"),
        (("top_k.density", "top_q.density"), "sparse.*no stage 'top_q' in the list; it has .'top_k', 'clip_per_layer'"),
        (('"sparse"', '"dense"'), "cases: two of them have the name 'dense'"),
        (("[grid]", "[grid]\ncodec.name = ['packed']"), "codec.name: both cases and grid"),
        (("[grid]", "[grid]\nprivaci.delta = [1e-6]"), "grid.privaci.delta: 'privaci' is no known section.*Did you mean 'privacy'"),
        (("[grid]", "[grid]\nrun.out = ['a']"), "run.out: a sweep sets it itself"),
        (("[1, 2]", "[1, 1]"), r"(?s)dense-noise_multiplier=default-seed=1 and dense-noise_multiplier=default-seed=1-2 \(and 3 more\)"),
        (("0.05]", "0.05, 5e-2]"), "noise_multiplier=0.05-seed=1 and dense-noise_multiplier=0.05-seed=1-2 .* are the same experiment"),
        (
            ("strategy.client.top_k.density = 0.1", "'strategy.client.top_k.density' = 0.1\n'strategy.client' = []"),
            r"trial sparse.*and 3 more: strategy.client.top_k.density: lost, as strategy.client is set after it",
        ),
        (
            ("seeds = [1, 2]", "set = { strategy.client.clip_per_layer.max_norm = 0.3 }"),
            r"trial dense.*strategy.client.clip_per_layer.max_norm: lost, as strategy.client is set after it",
        ),
        (('"base.toml"', '"none.toml"'), "No such experiment file: .*none.toml"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_anything_is(file: Path, change: tuple[str, str], message: str) -> None:
    file.write_text(SWEEP.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_sweep(file)


def test_a_key_on_the_command_line_is_never_lost_behind_its_section(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"client\.clip_per_layer\.max_norm: lost, as strategy\.client is set after it"):
        read_sweep(file, ["strategy.client.clip_per_layer.max_norm=0.3"])


def test_a_table_on_the_command_line_is_its_keys_and_the_sweep_goes_on_by_its_own_file(file: Path, tmp_path: Path) -> None:
    table = ["local={lr=0.2, steps=3}", "strategy={server=[{sgd={lr=1.0}}]}"]
    sweep = read_sweep(file, table)
    assert [sweep.options.set[key] for key in ("local.lr", "local.steps")] == [0.2, 3]
    assert {trial.experiment.local["clip_norm"] for trial in sweep.trials} == {1.0}, "a table adds to its section"
    SweepFolder(tmp_path / "out", sweep).close()
    again = read_sweep(tmp_path / "out" / "sweep.toml")
    assert again == sweep
    SweepFolder(tmp_path / "out", again, resume=True).close()
    with pytest.raises(ConfigError, match=r"run\.out: a sweep sets it itself"):
        read_sweep(file, ["run={out='a'}"])


def test_a_sweep_file_that_is_called_as_those_of_a_sweep_folder_is_never_replaced(file: Path, tmp_path: Path) -> None:
    own = file.rename(tmp_path / "sweep.toml")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for arguments in ((own, "--resume"), (own, "--out", tmp_path), (own, "--resume", "--out", tmp_path)):
        status, output = fedclip("sweep", *arguments)
        assert status == 2, output
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for name in ("base.toml", "sweep.json"):
        place = tmp_path / f"with-{name}"
        place.mkdir()
        (place / name).write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match=f"has a {name} already"):
            SweepFolder(place, read_sweep(own))
        assert [path.name for path in place.iterdir()] == [name]


def test_a_damaged_record_says_what_to_do_and_nothing_is_lost(file: Path, tmp_path: Path) -> None:
    out, sweep = tmp_path / "out", read_sweep(file)
    SweepFolder(out, sweep).close()
    for damage in ("", "null", '{"trials": [{}]}', '{"trials'):
        (out / "sweep.json").write_text(damage, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"sweep\.json is damaged; delete it"):
            SweepFolder(out, sweep, resume=True)
    (out / "sweep.json").unlink()
    SweepFolder(out, sweep, resume=True).close()
    assert [*statuses(out)] == NAMES


def test_a_dry_run_prints_the_trials_and_imports_no_torch(file: Path) -> None:
    code = (
        "import sys\nfrom experiments.cli import app\ntry:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, "sweep", str(file), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in NAMES)
    assert "costs privacy" in result.stdout
    assert "is a sweep; try its experiments by: fedclip sweep" in fedclip("run", file)[1]
    assert [p.name for p in file.parent.iterdir() if p.is_dir()] == []


class Here:
    """A pool that does its jobs in this process, which has PyTorch already."""

    size = 1

    def start(self, job: Job) -> None:
        self._reply = do(job)

    def replies(self, seconds: float) -> list[Reply]:
        return [self._reply]

    def close(self) -> None:
        pass


def test_trials_are_ordinary_runs_and_one_that_fails_ends_nothing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / "trials").mkdir(parents=True)
    (out / "trials" / NAMES[1]).write_text("in the way", encoding="utf-8")
    status, output = fedclip("sweep", file, "--out", out, "--parallel", 2)
    assert status == 1, output
    assert output.count("costs privacy") == 1
    assert f"{NAMES[1]} failed: NotADirectoryError" in output
    assert f"sweep {out}/sweep.toml --resume" in output
    assert statuses(out) == {name: "failed" if name == NAMES[1] else "done" for name in NAMES}
    first = record(out)
    assert first["note"]
    assert first["trials"][7] | {"settings": {}} == {
        "name": NAMES[7],
        "folder": f"trials/{NAMES[7]}",
        "settings": {},
        "case": "sparse",
        "seed": 2,
        "status": "done",
        "error": "",
    }

    settings = ["privacy.noise_multiplier=0.05", "codec.name=packed", "strategy.client.top_k.density=0.1", "run.engine=process"]
    changed = [word for setting in settings for word in ("--set", setting)]
    assert fedclip("run", tmp_path / "base.toml", *changed, "--seed", 2, "--out", tmp_path / "alone")[0] == 0
    (_, alone), (_, trial) = (load_model(p / "checkpoints/model.safetensors") for p in (tmp_path / "alone", out / "trials" / NAMES[7]))
    assert all(alone[name].equal(trial[name]) for name in alone)
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {p.name for p in (out / "trials" / NAMES[7]).iterdir()}

    assert fedclip("sweep", file, "--out", out)[0] == 2, "a folder with a sweep is not begun anew"
    assert fedclip("sweep", file, "--out", out, "--resume", "--set", "local.lr=0.2")[0] == 2, "another sweep is not gone on with"
    file.write_text(SWEEP.replace("[1, 2]", "[1]"), encoding="utf-8")
    status, output = fedclip("sweep", file, "--out", out, "--resume")
    assert (status, f"{NAMES[1]} is not of the sweep any more" in output) == (2, True)
    assert record(out) == first

    (out / "trials" / NAMES[1]).unlink()
    monkeypatch.setattr("experiments.sweep._pool", lambda *_: Here())
    before = {name: (out / "trials" / name / "summary.json").stat().st_mtime_ns for name in NAMES if name != NAMES[1]}
    status, output = fedclip("sweep", out / "sweep.toml", "--resume", "--quiet")
    assert status == 0, output
    assert set(statuses(out).values()) == {"done"}
    assert {name: (out / "trials" / name / "summary.json").stat().st_mtime_ns for name in before} == before


def test_more_trials_join_a_sweep(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    SweepFolder(out, read_sweep(file)).close()
    file.write_text(SWEEP.replace("[1, 2]", "[1, 2, 3]"), encoding="utf-8")
    folder = SweepFolder(out, read_sweep(file), resume=True)
    with pytest.raises(ConfigError, match="is in use by the process"):
        SweepFolder(out, read_sweep(file), resume=True)
    folder.close()
    assert [trial["seed"] for trial in record(out)["trials"]] == [1, 2, 3] * 4
    assert read_sweep(out / "sweep.toml") == read_sweep(file)
    (tmp_path / "base.toml").write_text(BASE.replace("0.1", "0.2"), encoding="utf-8")
    with pytest.raises(ConfigError, match="the base experiment differs"):
        SweepFolder(out, read_sweep(file), resume=True)


class Scripted:
    """A pool of two whose jobs end as a function says, the oldest first."""

    size = 2

    def __init__(self, end: Any) -> None:
        self.jobs, self.begun, self.most, self._end, self.interrupted = list[Job](), list[str](), 0, end, 0

    def start(self, job: Job) -> None:
        self.jobs.append(job)
        self.begun.append(job.name)
        self.most = max(self.most, len(self.jobs))

    def replies(self, seconds: float) -> list[Reply]:
        return [self._end(self.jobs.pop(0))]

    def interrupt(self) -> None:
        self.interrupted += 1

    def close(self) -> None:
        pass


def test_a_sweep_that_is_told_to_stop_begins_nothing_more(file: Path, tmp_path: Path) -> None:
    folder, stop = SweepFolder(tmp_path / "out", read_sweep(file)), threading.Event()

    def end(job: Job) -> Reply:
        if job.name == NAMES[0]:
            return Reply(job.name, 1, "no luck")
        stop.set()
        return Reply(job.name, 130)

    pool = Scripted(end)
    with SweepReporter(folder, quiet=True, console=Console(file=StringIO())) as reporter:
        assert _try_all(pool, folder, reporter, stop) == 130
    folder.close()
    assert (pool.begun, pool.most, pool.interrupted) == (NAMES[:3], 2, 1)
    assert list(statuses(tmp_path / "out").values()) == ["failed", "interrupted", "interrupted", *["waiting"] * 5]
    assert record(tmp_path / "out")["trials"][0]["error"] == "no luck"


def test_a_trial_that_another_ended_failed_and_so_did_the_sweep(file: Path, tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path / "out", read_sweep(file))
    pool = Scripted(lambda job: Reply(job.name, 130))
    with SweepReporter(folder, quiet=True, console=Console(file=StringIO())) as reporter:
        assert _try_all(pool, folder, reporter, threading.Event()) == 1
    folder.close()
    assert (pool.begun, pool.interrupted) == (NAMES, 0)
    assert {(trial["status"], trial["error"]) for trial in record(tmp_path / "out")["trials"]} == {
        ("failed", "its process was told to end")
    }


def test_what_went_wrong_with_a_trial_while_the_sweep_ended_is_kept(file: Path, tmp_path: Path) -> None:
    folder, stop = SweepFolder(tmp_path / "out", read_sweep(file)), threading.Event()

    def end(job: Job) -> Reply:
        stop.set()
        return Reply(job.name, 1, "no room") if job.name == NAMES[0] else Reply(job.name, 130)

    with SweepReporter(folder, quiet=True, console=Console(file=StringIO())) as reporter:
        assert _try_all(Scripted(end), folder, reporter, stop) == 130
    folder.close()
    assert [(t["status"], t["error"]) for t in record(tmp_path / "out")["trials"][:2]] == [("failed", "no room"), ("interrupted", "")]


class Deadly:
    """What kills the process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.abort, ()


def test_a_process_that_dies_is_replaced(file: Path, tmp_path: Path) -> None:
    pool = Processes(1)
    pool.start(Job("deadly", Deadly()))  # type: ignore[arg-type]
    dead = pool.replies(300.0)
    done = tmp_path / "done"
    done.mkdir()
    (done / "summary.json").write_text('{"status": "done"}')
    pool.start(Job("done", read_sweep(file).trials[0].experiment, done, tmp_path / "log.txt"))
    assert pool.replies(300.0) == [Reply("done", 0)]
    _, idle = pool._idle[0]
    idle.kill()
    idle.join()
    pool.start(Job("done", read_sweep(file).trials[0].experiment, done, tmp_path / "log.txt"))
    assert pool.replies(300.0) == [Reply("done", 0)]
    pool.close()
    assert [(reply.name, reply.status) for reply in dead] == [("deadly", 1)]
    assert f"ended by signal {signal.SIGABRT:d}" in dead[0].error


@pytest.mark.usefixtures("ray_session")
def test_trials_are_tasks_of_a_ray_cluster(file: Path, tmp_path: Path) -> None:
    trial = read_sweep(file, on_ray=True).trials[4]
    pool = RayTasks("auto", 1)
    pool.start(Job(trial.name, trial.experiment, tmp_path / "run", tmp_path / "log.txt"))
    replies = pool.replies(500.0)
    pool.close()
    assert replies == [Reply(trial.name, 0)], (tmp_path / "log.txt").read_text()
    assert [row["round"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"run\.engine: a trial on a Ray cluster is one task"):
        read_sweep(file, ["run.engine=ray"], on_ray=True)


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_does_every_trial_once(file: Path, tmp_path: Path) -> None:
    """Killed at random times, its processes with it; what the trials leave is what an unbroken sweep leaves."""
    command = [sys.executable, "-m", "experiments.cli", "sweep", str(file), "--parallel", "2", "--out"]
    root, draw, seen, workers = Path(__file__).parents[2], random.Random(), [], set[int]()

    def begin(out: Path, *more: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([*command, str(out), *more], cwd=root, stdout=subprocess.DEVNULL)

    def rounds(out: Path) -> int:
        return sum(len(p.read_bytes().splitlines()) for p in (out / "trials").glob("*/metrics.jsonl"))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for limit in (draw.randint(0, 10), draw.randint(11, 22)):
        process = begin(broken, *(["--resume"] if (broken / "sweep.toml").exists() else []))
        while rounds(broken) < limit or not (broken / "sweep.json").exists():
            assert process.poll() is None, f"it ended before {limit} rounds"
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        workers |= _children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append((limit, rounds(broken), statuses(broken)))
    terminated = begin(broken, "--resume")
    while rounds(broken) < 23 or not _children(terminated.pid):  # before it has workers it is only starting, and may end by any signal
        assert terminated.poll() is None
        time.sleep(0.01)
    workers |= _children(terminated.pid)
    terminated.send_signal(signal.SIGTERM)
    assert terminated.wait() in (0, 130)
    assert begin(broken, "--resume").wait() == 0
    assert begin(whole).wait() == 0
    print(seen)
    assert set(statuses(broken).values()) == {"done"}
    assert {p.name for p in (broken / "trials").iterdir()} == set(NAMES)
    for name in NAMES:
        runs = whole / "trials" / name, broken / "trials" / name
        assert [row["round"] for row in read_metrics(runs[1])] == [1, 2, 3], name
        ledger = runs[1] / "ledger.jsonl"
        if ledger.exists() and len(read_ledger(ledger)) > 3:
            continue  # killed between a line of the ledger and its release: that round was drawn anew, and both count
        (_, one), (_, two) = (load_model(run / "checkpoints/model.safetensors") for run in runs)
        assert all(one[key].equal(two[key]) for key in one), name
    assert len(workers) >= 3, "each sweep had a worker at least"
    deadline = time.monotonic() + 10
    while left := {pid for pid in workers if _lives(pid)}:
        assert time.monotonic() < deadline, f"the processes {left} outlived their sweep"
        time.sleep(0.05)


def _children(pid: int) -> set[int]:
    """Return the workers of a sweep."""
    listed = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return {int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line}


def _lives(pid: int) -> bool:
    """Return whether a process is there and no worker's remains."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
