"""On Ray the model of a round is evaluated ahead of the next round's training, which changes no result and no file of a run."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import MessageType

from clients.ray_grid import RayGrid
from experiments.engines import OnGrid, account_of, open_engine
from experiments.folder import CHECKPOINTS, LEDGER, STATES, read_metrics
from experiments.live import Reporter
from experiments.prepare import prepare, read_experiment
from experiments.progress import Progress
from experiments.run import run_rounds
from fedclip.account import read_ledger
from fedclip.model_file import load_model
from fedclip.round import WorkerError
from fedclip.sealed import read_sealed
from fedclip.storage import Storage
from strategies.federated import Federated
from tests.tasks_that_fail import DIE_EVALUATING, RAISE_EVALUATING

ROUNDS = 5
"""The models of rounds 2 and 4 are evaluated ahead of the next round, that of the last at its end."""


@pytest.fixture(params=["beside", pytest.param("apart", marks=pytest.mark.slow)])
def beside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluate ahead of the next round's training, or apart, as on grids that keep no order."""
    if request.param == "apart":
        monkeypatch.setattr(OnGrid, "ordered", False)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what happens: of which type the messages are that are sent, `counted` and `summed` when something is taken of them."""
    seen, push, counts, partials = list[str](), RayGrid.push_messages, Federated._counts, Federated._partials

    def pushes(grid: RayGrid, messages: Any) -> Any:
        out = list(messages)
        seen.append(out[0].metadata.message_type)
        return push(grid, out)

    def counted(strategy: Federated, replies: Any) -> Any:
        seen.append("counted")
        return counts(strategy, replies)

    def summed(strategy: Federated, replies: Any, plan: Any) -> Any:
        seen.append("summed")
        yield from partials(strategy, replies, plan)

    for owner, name, spy in ((RayGrid, "push_messages", pushes), (Federated, "_counts", counted), (Federated, "_partials", summed)):
        monkeypatch.setattr(owner, name, spy)
    return seen


@pytest.fixture(scope="module")
def grid(ray_session: None) -> Iterator[RayGrid]:
    """Return two nodes, which all runs take in turn."""
    with RayGrid("clients.app:app", nodes=None, workers=2) as grid:
        yield grid


def run(file: Path, out: Path, *overrides: str, grid: RayGrid | None = None, resume: bool = False) -> int:
    """Run to the end on some nodes, or in this process, and return the exit status."""
    engine = "run.engine=process" if grid is None else "run.engine=ray"
    prepared = prepare(read_experiment(file, [f"run.rounds={ROUNDS}", engine, *overrides]), resume=resume)
    opened = open_engine(prepared, out) if grid is None else nullcontext(OnGrid(prepared, grid, account_of(prepared, out), out / STATES))
    with opened as engine:
        return run_rounds(prepared, engine, out, Reporter(ROUNDS, quiet=True), resume)


def evaluated(out: Path) -> list[tuple[int, bool]]:
    return [(row["round"], "accuracy" in row) for row in read_metrics(out)]


def timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if "second" not in name and name not in ("trainer_busy", "metrics_bytes")}


def left_by(out: Path) -> dict[str, Any]:
    """Return all that a run left, but for times and what follows from them."""
    left: dict[str, Any] = {"names": sorted(str(p.relative_to(out)) for p in out.rglob("*") if "tensorboard" not in str(p))}
    left["rows"] = [timeless(row) for row in read_metrics(out)]
    left["ledger"] = (out / LEDGER).read_bytes() if (out / LEDGER).exists() else b""
    summary = json.loads((out / "summary.json").read_text())
    left["summary"] = {name: value for name, value in timeless(summary).items() if not name.endswith("memory_bytes")}
    for file in sorted((out / CHECKPOINTS).iterdir()):
        if file.suffix == ".ckpt":
            data, tensors = read_sealed(Storage(), file, "checkpoint")
            data["notes"] = timeless(data["notes"])
            data["notes"]["progress"] = timeless(data["notes"]["progress"])
            data["notes"]["progress"]["metrics"] = timeless(data["notes"]["progress"]["metrics"])
            left[file.name] = data, {name: tensor.tolist() for name, tensor in tensors.items()}
        else:
            left[file.name] = {name: tensor.tolist() for name, tensor in load_model(file)[1].items()}
    return left


@pytest.mark.parametrize("noise", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_leaves_the_files_of_one_that_evaluates_between_rounds(
    vision: Path, tmp_path: Path, grid: RayGrid, sent: list[str], monkeypatch: pytest.MonkeyPatch, noise: bool
) -> None:
    if not noise:  # and so few users that not every node has one
        vision.write_text(vision.read_text().replace("noise_multiplier = 0.05", "").replace("cohort = 9", "cohort = 3"))
    assert run(vision, tmp_path / "process") == 0
    assert not sent
    whole = left_by(tmp_path / "process")
    assert whole["names"].count(f"{CHECKPOINTS}/best.safetensors") == 1
    with RayGrid("clients.app:app", nodes=None, workers=1) as alone:
        for nodes in (alone, grid):
            sent.clear()
            out = tmp_path / f"{nodes.workers}"
            assert run(vision, out, grid=nodes) == 0
            train, ahead = [MessageType.TRAIN, "summed"], [MessageType.EVALUATE, MessageType.TRAIN, "counted", "summed"]
            assert sent == train + train + ahead + train + ahead + [MessageType.EVALUATE, "counted"], "training was not sent before"
            assert left_by(out) == whole
    sent.clear()
    monkeypatch.setattr(OnGrid, "ordered", False)
    assert run(vision, tmp_path / "apart", grid=grid) == 0
    assert sent[4:7] == [MessageType.EVALUATE, "counted", MessageType.TRAIN]
    assert left_by(tmp_path / "apart") == whole


def failing(folder: Path) -> str:
    return f"task={{name='tests.tasks_that_fail:make', arguments={{folder='{folder}'}}}}"


@pytest.mark.usefixtures("beside")
def test_an_evaluation_that_fails_fails_the_run_and_its_round_is_kept(vision: Path, tmp_path: Path, grid: RayGrid) -> None:
    out = tmp_path / "run"
    (tmp_path / RAISE_EVALUATING).touch()
    assert run(vision, out, failing(tmp_path), grid=grid) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["rounds"]) == ("failed", 2)
    assert summary["error"].startswith("WorkerError: Node ")
    assert summary["error"].endswith("ValueError: no such unit")
    assert evaluated(out) == [(1, False), (2, False)]
    assert max(path.stem for path in (out / CHECKPOINTS).glob("*.ckpt")) == "00000002"
    assert [charge.round for charge in read_ledger(out / LEDGER)] == [1, 2], "nothing of the third round was released"
    assert run(vision, out, failing(tmp_path), grid=grid, resume=True) == 0
    assert run(vision, tmp_path / "whole", failing(tmp_path)) == 0
    assert torch.equal(params(out), params(tmp_path / "whole"))


def params(out: Path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in load_model(out / CHECKPOINTS / "model.safetensors")[1].values()])


def test_a_worker_that_dies_in_an_evaluation_changes_nothing(vision: Path, tmp_path: Path, grid: RayGrid) -> None:
    assert run(vision, tmp_path / "whole", failing(tmp_path)) == 0
    (tmp_path / DIE_EVALUATING).touch()
    assert run(vision, tmp_path / "run", failing(tmp_path), grid=grid) == 0
    assert not (tmp_path / DIE_EVALUATING).exists()
    whole, died = left_by(tmp_path / "whole"), left_by(tmp_path / "run")
    assert died["summary"].pop("workers_replaced_total") == 1
    assert died["rows"][2].pop("workers_replaced") == 1
    assert died["summary"].pop("workers_replaced", 1) == 1
    for key in ("rows", "summary", "ledger", "best.safetensors", "model.safetensors"):
        assert died[key] == whole[key]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("where", ["_counts", "_deal"])
def test_ctrl_c_in_an_evaluation_keeps_its_round(
    vision: Path, tmp_path: Path, grid: RayGrid, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, where: str
) -> None:
    out, before = tmp_path / "run", getattr(Federated, where)

    def interrupted(strategy: Federated, *args: Any) -> Any:
        return before(strategy, *args) if strategy.state.round < 2 else interrupt()

    with monkeypatch.context() as patch:
        patch.setattr(Federated, where, interrupted)
        assert run(vision, out, grid=grid) == 130
    # Apart, the evaluation is over before the next round is prepared.
    assert evaluated(out) == [(1, False), (2, where == "_deal" and request.node.callspec.params["beside"] == "apart")]
    assert json.loads((out / "heartbeat.json").read_text())["status"] == "interrupted"
    assert run(vision, out, grid=grid, resume=True) == 0
    assert [round for round, _ in evaluated(out)] == [1, 2, 3, 4, 5]
    assert evaluated(out)[2:] == [(3, False), (4, True), (5, True)]


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (WorkerError("Node 7 failed: lost"), 1)])
def test_a_training_that_ends_early_leaves_the_evaluation_of_the_round_before(
    vision: Path, tmp_path: Path, grid: RayGrid, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    out, partials = tmp_path / "run", Federated._partials

    def broken(strategy: Federated, replies: Any, plan: Any) -> Any:
        if strategy.state.round == 2:
            raise error
        yield from partials(strategy, replies, plan)

    with monkeypatch.context() as patch:
        patch.setattr(Federated, "_partials", broken)
        assert run(vision, out, grid=grid) == status
    assert evaluated(out) == [(1, False), (2, True)]
    assert json.loads((out / "summary.json").read_text()).get("error") == (None if status == 130 else "WorkerError: Node 7 failed: lost")
    assert run(vision, out, grid=grid, resume=True) == 0
    assert run(vision, tmp_path / "whole") == 0
    assert [timeless(row) for row in read_metrics(out)] == left_by(tmp_path / "whole")["rows"]


def test_training_that_nobody_waits_for_is_forgotten(vision: Path, grid: RayGrid) -> None:
    engine = OnGrid(prepare(read_experiment(vision, [])), grid)
    engine.round()
    with pytest.raises(KeyboardInterrupt):
        engine.round(interrupt)
    assert not grid._at_work._awaited
    assert engine.round().state.round == 2


@pytest.mark.usefixtures("beside")
def test_a_budget_that_is_spent_leaves_the_last_evaluation(vision: Path, tmp_path: Path, grid: RayGrid) -> None:
    from fedclip.accounting import guarantee
    from fedclip.sampling import Poisson

    budget = guarantee(Poisson(60, 9.0), 2.0, 2, 1e-9).epsilon * 1.001
    assert run(vision, tmp_path / "run", "privacy.noise_multiplier=2.0", f"privacy.epsilon_budget={budget}", grid=grid) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "budget spent"
    assert evaluated(tmp_path / "run") == [(1, False), (2, True)]


STATEFUL = "strategy={client=[{with_error_feedback={inner={clip_by_global_norm={max_norm=0.2}}}}], server=[{sgd={lr=1.0}}]}"
ONE_BY_ONE = [MessageType.TRAIN, "summed", MessageType.EVALUATE, "counted"]


def test_nobody_trains_for_nothing_where_users_that_failed_end_the_run(
    vision: Path, tmp_path: Path, grid: RayGrid, sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vision.write_text(vision.read_text().replace("noise_multiplier = 0.05", ""))
    monkeypatch.setattr(Progress, "too_many_failed", True)
    assert run(vision, tmp_path / "run", "evaluation.every=1", grid=grid) == 1
    assert sent == ONE_BY_ONE
    assert evaluated(tmp_path / "run") == [(1, True)]


def test_where_states_of_users_go_by_what_is_durable_rounds_end_before_the_next(
    vision: Path, tmp_path: Path, grid: RayGrid, sent: list[str]
) -> None:
    overrides = (STATEFUL, "sampler.cohort=12", "privacy.noise_multiplier=0.5", "evaluation.every=1", "run.rounds=2")
    assert run(vision, tmp_path / "run", *overrides, grid=grid) == 0
    assert sent == ONE_BY_ONE * 2
