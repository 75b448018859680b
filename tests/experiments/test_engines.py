"""The same bits whatever computes the rounds: in process, on Ray with any number of workers, in both reply modes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

from clients.ray_grid import RayGrid
from experiments.engines import Engine, OnGrid, account_of, open_engine
from experiments.folder import STATES
from experiments.prepare import Prepared, prepare, read_experiment
from fedclip.client import train_blocks
from fedclip.round import begin, deal, finish
from fedclip.simulation import InProcess
from strategies.naming import run_digest

ROUNDS = 3


Grids = Callable[[int], RayGrid]


@pytest.fixture(scope="module")
def grids(ray_session: None) -> Iterator[Grids]:
    """Give the grid of so many workers, each started once: they take the tests in turn."""
    with ExitStack() as stack:
        yield cache(lambda workers: stack.enter_context(RayGrid("clients.app:app", nodes=None, workers=workers)))


def opened(prepared: Prepared, folder: Path | None = None, grid: RayGrid | None = None) -> AbstractContextManager[Engine]:
    """Return the engine on these workers, or in this process."""
    if grid is None:
        assert prepared.experiment.run.engine == "process"
        return open_engine(prepared, folder)
    states = folder / STATES if folder is not None else None
    return nullcontext(OnGrid(prepared, grid, account_of(prepared, folder), states))


def params_after(path: Path, *overrides: str, grid: RayGrid | None = None) -> torch.Tensor:
    prepared = prepare(read_experiment(path, list(overrides)))
    with opened(prepared, grid=grid) as engine:
        for _ in range(ROUNDS):
            engine.round()
        return engine.state.params


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    from tests.experiments.conftest import VISION

    path = tmp_path_factory.mktemp("reference") / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    return params_after(path, "run.engine=process")


def test_same_seed_twice_gives_the_same_bits(vision: Path, reference: torch.Tensor) -> None:
    assert torch.equal(params_after(vision, "run.engine=process"), reference)


def test_another_seed_gives_other_parameters(vision: Path, reference: torch.Tensor) -> None:
    assert not torch.equal(params_after(vision, "run.engine=process", "run.seed=2"), reference)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("reply", ["sums", "updates"])
def test_ray_gives_the_bits_of_one_process(vision: Path, reference: torch.Tensor, grids: Grids, workers: int, reply: str) -> None:
    assert torch.equal(params_after(vision, f"run.reply={reply}", grid=grids(workers)), reference)


def test_blocks_in_any_order_and_number_of_shares_give_the_same_bits(vision: Path, reference: torch.Tensor) -> None:
    prepared = prepare(read_experiment(vision, ["run.engine=process"]))
    with open_engine(prepared) as engine:
        assert isinstance(engine, InProcess)
        state = engine.state
        for shares in (1, 2, 5):
            plan = begin(prepared.method, state, engine.layout, f"seed:{prepared.experiment.run.seed}", run_digest(prepared.experiment))
            dealt = [list(reversed(share)) for share in reversed(deal(plan.blocks, shares, prepared.task))]
            state = finish(prepared.method, state, engine.layout, plan, [train_blocks(engine.site, plan.spec, s) for s in dealt]).state
    assert torch.equal(state.params, reference)


def test_evaluation_on_ray_gives_the_metrics_of_one_process(vision: Path, grids: Grids) -> None:
    prepared = prepare(read_experiment(vision, ["run.engine=process"]))
    measured = []
    for grid in (grids(2), None):
        with opened(prepared, grid=grid) as engine:
            measured.append(prepared.task.summarise(engine.evaluate_units(), 0))
    assert measured[0] == measured[1]


def test_flower_start_runs_the_strategy_from_round_one(vision: Path, reference: torch.Tensor, grids: Grids) -> None:
    prepared, grid = prepare(read_experiment(vision, [])), grids(2)
    strategy = OnGrid(prepared, grid).strategy
    result = strategy.start(grid, strategy.arrays(), num_rounds=ROUNDS)
    assert torch.equal(strategy.state.params, reference)
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}
    with pytest.raises(ValueError, match="Expected round 4, got 1"):
        strategy.start(grid, strategy.arrays(), num_rounds=1)


STATEFUL = (
    "strategy={client=[{with_error_feedback={inner={clip_by_global_norm={max_norm=0.2}}}}, {clip_per_layer={max_norm=0.5}}], "
    "server=[{lamb={lr=0.02}}], adaptive={bits_noise=0.9}}"
)
"""A chain that remembers users, and bounds that adapt: 12 of the 60 users come each round, so that many come again."""


@pytest.mark.parametrize(("workers", "reply"), [(1, "sums"), (3, "sums"), (2, "updates")])
def test_states_of_users_and_adaptive_bounds_have_the_bits_of_one_process(
    vision: Path, tmp_path: Path, grids: Grids, workers: int, reply: str
) -> None:
    def ends(folder: Path, *overrides: str, grid: RayGrid | None = None) -> tuple[torch.Tensor, tuple[float, ...], dict[str, bytes]]:
        common = [STATEFUL, "sampler.cohort=12", "privacy.noise_multiplier=0.5"]
        with opened(prepare(read_experiment(vision, [*common, *overrides])), folder, grid) as engine:
            folder.mkdir()
            for _ in range(ROUNDS):
                engine.round()
            states = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.state")}
            return engine.state.params, engine.state.thresholds, states

    here = ends(tmp_path / "process", "run.engine=process")
    there = ends(tmp_path / "ray", f"run.reply={reply}", grid=grids(workers))
    assert torch.equal(here[0], there[0])
    assert here[1:] == there[1:]
    assert len(here[2]) > 20
    assert len({Path(name).parent for name in here[2]}) < len(here[2]), "nobody came twice"


COMPRESSED = {
    "a common mask that follows what was released": (
        "strategy={client=[{common_mask={density=0.1, fresh=0.5}}, {clip_per_layer={max_norm=0.5}}, {quantize={bits=8}}], "
        "server=[{lamb={lr=0.02}}]}",
        "codec.name=packed",
        "downlink.stages=[{quantize={bits=8}}]",
    ),
    "DGC, differences on the way down": (
        "strategy={client=[{dgc={density=0.01, grid='int8'}}, {clip_per_layer={max_norm=0.5}}], server=[{sgd={lr=1.0, momentum_1d=0.9}}]}",
        "codec.name=packed",
        "downlink.stages=[{top_k={density=0.1}}, {fp16={}}]",
        "downlink.differences=true",
        "sampler.cohort=12",
        "states.precision=float16",
    ),
    "control variates, 8 bits down": (
        "strategy={method='scaffold', max_norm=0.5}",
        "downlink.stages=[{quantize={bits=8}}]",
        "sampler.cohort=12",
    ),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_rounds_have_the_bits_of_one_process(vision: Path, tmp_path: Path, grids: Grids, name: str) -> None:
    def ends(folder: Path, *overrides: str, grid: RayGrid | None = None) -> tuple[torch.Tensor, list[float]]:
        with opened(prepare(read_experiment(vision, [*COMPRESSED[name], *overrides])), folder, grid) as engine:
            folder.mkdir()
            outcomes = [engine.round() for _ in range(ROUNDS)]
            return engine.state.params, [o.tally["uplink_bytes"] for o in outcomes]

    here = ends(tmp_path / "process", "run.engine=process")
    for reply in ("sums", "updates"):
        there = ends(tmp_path / reply, f"run.reply={reply}", grid=grids(2))
        assert torch.equal(here[0], there[0])
        assert here[1] == there[1]


def test_on_ray_a_chain_that_remembers_users_needs_a_folder(vision: Path) -> None:
    from strategies.federated import Federated

    prepared = prepare(read_experiment(vision, [STATEFUL, "sampler.cohort=12", "privacy.noise_multiplier=0.5"]))
    with pytest.raises(ValueError, match="give a folder"):
        Federated(prepared.method, prepared.task, prepared.recipe, "s", "r")
