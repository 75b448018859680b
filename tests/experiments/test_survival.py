"""A run that is killed goes on: after every operation on the disk, whatever became of what was not synced."""

import dataclasses
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.ray_grid import RayGrid
from experiments.engines import OnGrid, secret_of
from experiments.folder import CHECKPOINTS, LEDGER, STATES, read_metrics
from experiments.live import Reporter
from experiments.prepare import Prepared, prepare, read_experiment
from experiments.run import Run
from fedclip.account import Account, read_ledger
from fedclip.rng import Streams
from fedclip.sealed import read_sealed
from fedclip.simulation import InProcess
from fedclip.storage import Storage
from fedclip.user_states import StatesInFolder
from strategies.naming import run_digest
from tests.simulated_disk import WAYS, Recorder, after_crash

ROUNDS = 3
Z, DELTA = 1.0, 1e-5

EXPERIMENT = """
[run]
rounds = 3
engine = "ENGINE"

[task]
name = "vision"

[population]
size = 12

[sampler]
cohort = 4

[local]
lr = 0.1
steps = 1

[strategy]
client = [INNER, { clip_by_global_norm = { max_norm = 0.5 } }]
server = [{ lamb = { lr = 0.02 } }]
adaptive = { bits_noise = 0.5 }

[privacy]
noise_multiplier = 1.0
delta = 1e-5

[evaluation]
every = EVERY
"""


INNER = '{ "tests.stages_of_tests:TopK" = { k = 50 } }'
KINDS = {
    "remembers": {"INNER": f"{{ with_error_feedback = {{ inner = {INNER} }} }}"},
    "forgets": {},
    "evaluates": {"ENGINE": "ray", "EVERY": "1"},
}
NODES = list[RayGrid]()
"""Of the runs on Ray."""


def experiment_of(kind: str) -> str:
    text = EXPERIMENT
    for name, value in ({"INNER": INNER, "ENGINE": "process", "EVERY": "0"} | KINDS[kind]).items():
        text = text.replace(name, value)
    return text


@pytest.fixture(scope="module", params=KINDS)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """Give a run with noise and adaptive bounds.

    Its chain remembers its users; or not, so that checkpoints are written beside; or rounds end beside the next one, too, after nodes
    have evaluated their model.
    """
    file = tmp_path_factory.mktemp("experiment") / "run.toml"
    file.write_text(experiment_of(request.param))
    prepared = prepare(read_experiment(file, []))
    if prepared.experiment.run.engine == "process":
        yield prepared
        return
    request.getfixturevalue("ray_session")
    with RayGrid("clients.app:app", nodes=None, workers=2) as grid:
        NODES.append(grid)
        yield prepared
        NODES.clear()


def run_of(prepared: Prepared, path: Path, storage: Storage | None = None, *, resume: bool = False) -> Run:
    method, storage = prepared.method, storage or Storage()
    account = Account(method.sampler, Z, DELTA, path=path / LEDGER, storage=storage)
    if prepared.experiment.run.engine == "ray":
        return Run(prepared, OnGrid(prepared, NODES[0], account), path, resume=resume, storage=storage)
    states = StatesInFolder(path / STATES, storage)
    names = (secret_of(prepared), run_digest(prepared.experiment))
    engine = InProcess(method, prepared.task, *names, account=account, states=states)
    return Run(prepared, engine, path, resume=resume, storage=storage)


def to_the_end(run: Run) -> torch.Tensor:
    status = run.rounds(Reporter(ROUNDS, quiet=True))
    run.folder.close()
    assert status == "done"
    assert run.engine.state.round == ROUNDS
    return run.engine.state.params


def test_a_closed_run_leaves_no_writer_behind(prepared: Prepared, tmp_path: Path) -> None:
    """One that went on would write into a folder that may be gone."""
    before = set(threading.enumerate())
    to_the_end(run_of(prepared, tmp_path / "run"))
    assert set(threading.enumerate()) <= before


def states_of(path: Path) -> dict[str, str]:
    files = (path / STATES).rglob("*.state")
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def evaluated(path: Path) -> list[tuple[int, float | None]]:
    return [(row["round"], row.get("accuracy")) for row in read_metrics(path)]


@dataclasses.dataclass(frozen=True)
class Uninterrupted:
    path: Path
    params: torch.Tensor
    log: list[tuple]
    began: int
    """Operations before the first round."""

    @property
    def window(self) -> set[int]:
        """The operations after which a line may be on the disk and its release not: the only ones that may cost another attempt."""
        lines = [n for n, entry in enumerate(self.log, 1) if entry[0] == "append" and entry[1].name == LEDGER]
        releases = [n for n, entry in enumerate(self.log, 1) if entry[0] == "rename" and entry[2].suffix == ".sum"]
        return {n for line, release in zip(lines, releases, strict=True) for n in range(line, release + 1)}


@pytest.fixture(scope="module")
def whole(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    path, disk = tmp_path_factory.mktemp("whole") / "run", Recorder()
    run = run_of(prepared, path, disk)
    began = len(disk.log)
    return Uninterrupted(path, to_the_end(run), disk.log, began)


def crash(whole: Uninterrupted, operations: int, way: str, path: Path) -> str:
    """Make the run folder that the crash left, and return what names its content."""
    files = after_crash(whole.log[:operations], way)
    digest = hashlib.sha256()
    path.mkdir()
    (path / CHECKPOINTS).mkdir()
    for name in ("config.toml", "environment.json"):
        shutil.copy(whole.path / name, path / name)
    for file, content in sorted(files.items()):
        place = path / file.relative_to(whole.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        digest.update(f"{place.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def was_charged_and_not_released(path: Path) -> bool:
    """Whether the last line of the ledger has no release and no checkpoint: the one window in which a round is drawn anew."""
    lines = (path / LEDGER).read_bytes().rpartition(b"\n")[0].splitlines() if (path / LEDGER).exists() else []
    checkpoint = max(int(p.stem) for p in (path / CHECKPOINTS).glob("*.ckpt"))
    released = {p.stem for p in (path / CHECKPOINTS).glob("*.sum")}
    return len(lines) > checkpoint and f"{len(lines):08d}-0" not in released


def check_crash(whole: Uninterrupted, prepared: Prepared, operations: int, way: str, path: Path) -> bool:
    """Resume after a crash and check the end; return whether a round was drawn anew."""
    again = was_charged_and_not_released(path)
    params = to_the_end(run_of(prepared, path, resume=True))
    ledger = read_ledger(path / LEDGER)
    where = f"after operation {operations}, {whole.log[operations - 1][:2]}, {way}"
    assert not again or operations in whole.window, f"{where}: a round is drawn anew though its release was durable"
    if not again:
        assert torch.equal(params, whole.params), where
        assert len(ledger) == ROUNDS, where
        assert states_of(path) == states_of(whole.path), where
        assert evaluated(path) == evaluated(whole.path), where
    else:
        assert not torch.equal(params, whole.params), where
        assert sorted((c.round, c.attempt) for c in ledger) == sorted(
            {(c.round, 0) for c in ledger} | {(ledger[-1].round, 0)} | {(c.round, 1) for c in ledger if c.attempt}
        ), where
        assert len(ledger) == ROUNDS + 1, where
    return again


def crash_points(whole: Uninterrupted) -> list[tuple[int, str]]:
    return [(n, way) for n in range(whole.began, len(whole.log) + 1) for way in WAYS]


def check_points(whole: Uninterrupted, prepared: Prepared, tmp_path: Path, points: list[tuple[int, str]]) -> tuple[int, int]:
    seen, anew = set(), 0
    for operations, way in points:
        path = tmp_path / f"{operations}-{way}"
        content = crash(whole, operations, way, path)
        if content not in seen:
            seen.add(content)
            anew += check_crash(whole, prepared, operations, way, path)
        shutil.rmtree(path)
    return len(seen), anew


def test_a_crash_around_every_ledger_line_release_and_checkpoint(whole: Uninterrupted, prepared: Prepared, tmp_path: Path) -> None:
    """The second round's durable operations, each with one way of crashing in turn."""
    names = [(n, entry[1].name) for n, entry in enumerate(whole.log, 1)]
    near = [n for n, name in names if name.startswith(("00000002", LEDGER)) and n > whole.began]
    points = [(n, WAYS[i % len(WAYS)]) for i, n in enumerate(near)]
    tried, anew = check_points(whole, prepared, tmp_path, points)
    assert tried > 10
    assert anew > 0, "the window between a line and its release was not hit"


@pytest.mark.slow
def test_a_crash_after_every_operation_in_every_way(whole: Uninterrupted, prepared: Prepared, tmp_path: Path) -> None:
    points = crash_points(whole)
    tried, anew = check_points(whole, prepared, tmp_path, points)
    print(f"{len(points)} crash points, {tried} different disks, {anew} in the window in which a round is drawn anew")
    assert tried > 40
    assert anew > 5


class Held(Recorder):
    """A disk that writes the first round's checkpoint only when the next round trains, and then takes its time, or fails."""

    def __init__(self, error: OSError | None) -> None:
        super().__init__()
        self.trains, self.error, self.beside = threading.Event(), error, False

    def write(self, path, chunks):
        if path.name.startswith("00000001.ckpt"):
            self.beside = self.trains.wait(20)
            time.sleep(0.2)
            if self.error is not None:
                raise self.error
        super().write(path, chunks)

    def done(self) -> list[tuple[str, str]]:
        """Return what was done to which file."""
        return [(entry[0], entry[-1].name if entry[0] == "rename" else entry[1].name) for entry in self.log]


@pytest.fixture(params=["noise", "no noise"])
def forgetful(request: pytest.FixtureRequest, tmp_path: Path) -> Prepared:
    """Return a run that keeps no states of users, with noise and without."""
    text = experiment_of("forgets")
    if request.param == "no noise":
        text = text.replace("adaptive = { bits_noise = 0.5 }", "").replace("noise_multiplier = 1.0\ndelta = 1e-5", "")
    (tmp_path / "run.toml").write_text(text)
    return prepare(read_experiment(tmp_path / "run.toml", []))


def held_run(prepared: Prepared, path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> tuple[Run, Held]:
    method, disk, load = prepared.method, Held(error), prepared.task.load_user
    account = Account(method.sampler, Z, DELTA, path=path / LEDGER, storage=disk) if method.private else None
    engine = InProcess(method, prepared.task, secret_of(prepared), run_digest(prepared.experiment), account=account)

    def load_user(*arguments: object) -> object:
        if engine.state.round == 1:
            disk.trains.set()
        return load(*arguments)

    monkeypatch.setattr(prepared.task, "load_user", load_user)
    return Run(prepared, engine, path, storage=disk), disk


def test_a_checkpoint_is_written_while_the_next_round_trains_and_before_anything_of_it_is(
    forgetful: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk = held_run(forgetful, tmp_path / "run", monkeypatch)
    to_the_end(run)
    assert disk.beside, "the second round did not begin before the first checkpoint was durable"
    done = disk.done()
    lines = [n for n, (what, _) in enumerate(done) if what == "append"]
    of_a_round = len(lines) // ROUNDS
    assert of_a_round == (2 if forgetful.method.private else 1)
    for round in range(1, ROUNDS + 1):
        durable = done.index(("rename", f"{round:08d}.ckpt")) + 1
        assert done[durable] == ("sync_folder", CHECKPOINTS)
        assert lines[of_a_round * round - 1] < durable < min(lines[of_a_round * round :], default=len(done))
    if not forgetful.method.private:  # what was written is the state after its round, whatever came of it meanwhile
        fresh = InProcess(forgetful.method, forgetful.task, secret_of(forgetful), run_digest(forgetful.experiment))
        for _ in range(ROUNDS - 1):
            fresh.round()
        _, tensors = read_sealed(disk, tmp_path / "run" / CHECKPOINTS / f"{ROUNDS - 1:08d}.ckpt", "checkpoint")
        assert torch.equal(tensors["params"], fresh.state.params)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_before_anything_of_the_next_round_is_durable(
    forgetful: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk = held_run(forgetful, tmp_path / "run", monkeypatch, OSError(28, "no space"))
    with pytest.raises(OSError, match="no space"):
        run.rounds(Reporter(ROUNDS, quiet=True))
    run.folder.close()
    assert run.engine.state.round == 1
    lines = [name for what, name in disk.done() if what == "append"]
    assert lines == ([LEDGER] if forgetful.method.private else []) + ["metrics.jsonl"]


def test_a_round_that_is_drawn_anew_has_other_users_and_other_noise(whole: Uninterrupted, prepared: Prepared, tmp_path: Path) -> None:
    line = [n for n, entry in enumerate(whole.log, 1) if entry[0] == "sync" and entry[1].name == LEDGER][1]
    path = tmp_path / "run"
    crash(whole, line, "kept", path)
    run = run_of(prepared, path, resume=True)
    to_the_end(run)
    assert [(c.round, c.attempt) for c in read_ledger(path / LEDGER)] == [(1, 0), (2, 0), (2, 1), (3, 0)]
    streams = [Streams(secret_of(prepared), run_digest(prepared.experiment), 2, attempt) for attempt in (0, 1)]
    cohorts = [prepared.method.sampler.draw(s.generator("cohort")) for s in streams]
    assert cohorts[0] != cohorts[1]
    layout, now = run.engine.layout, prepared.method
    first, second = (now.release.mechanism.noise(now.bound(layout), layout, s.generator("noise")) for s in streams)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(layout.size)


def test_five_rounds_extended_to_more_equal_as_many_at_once(prepared: Prepared, whole: Uninterrupted, tmp_path: Path) -> None:
    def rounds(count: int) -> Prepared:
        options = prepared.experiment.run.model_copy(update={"rounds": count})
        return dataclasses.replace(prepared, experiment=prepared.experiment.model_copy(update={"run": options}))

    once, extended = run_of(rounds(10), tmp_path / "ten"), run_of(rounds(5), tmp_path / "five")
    for run in (once, extended):
        assert run.rounds(Reporter(10, quiet=True)) == "done"
        run.folder.close()
    again = run_of(rounds(10), tmp_path / "five", resume=True)
    assert again.engine.state.round == 5
    assert again.rounds(Reporter(10, quiet=True)) == "done"
    again.folder.close()
    assert torch.equal(again.engine.state.params, once.engine.state.params)
    assert again.engine.state.thresholds == once.engine.state.thresholds
    assert again.progress.users == once.progress.users
    assert len(read_ledger(tmp_path / "five" / LEDGER)) == 10
    assert states_of(tmp_path / "five") == states_of(tmp_path / "ten")
    assert len(os.listdir(tmp_path / "five" / CHECKPOINTS)) <= 5
