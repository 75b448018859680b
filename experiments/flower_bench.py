"""`fedclip bench flower`: rounds of a Flower app with few and many registered nodes, on `RayGrid` and on Flower's own engine."""

import io
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from experiments.flower_app import FlowerApp, import_app, open_grid, read_app
from fedclip.options import ConfigError

ROUNDS_A_TURN = 3


class RoundClock(logging.Handler):
    """Times rounds by what Flower's strategies log, which is the same on any grid, and counts the replies."""

    def __init__(self) -> None:
        """Start with no rounds."""
        super().__init__(logging.INFO)
        self.seconds: list[float] = []
        self.replies: list[set[tuple[int, int]]] = []  # results and failures of the exchanges of each round
        self.error = ""
        self._begun: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Note when a round begins, and thereby the one before ends."""
        text = record.getMessage()
        if text.startswith(("[ROUND ", "Strategy execution finished")):
            now = time.perf_counter()
            if self._begun is not None:
                self.seconds.append(now - self._begun)
            self._begun = now if text.startswith("[ROUND ") else None
            self.replies.append(set())
        elif found := re.search(r"Received (\d+) results and (\d+) failures", text):
            self.replies[-1].add((int(found[1]), int(found[2])))
        elif "Received error in reply" in text:
            self.error = text.strip()


def sized(app: FlowerApp, cohort: int, nodes: int, rounds: int) -> FlowerApp:
    """Return an app with the rounds and the fractions of a cohort in its run config, as far as it has such keys."""
    if "num-server-rounds" not in app.run_config:
        raise ConfigError(
            f"{app.folder}: expected num-server-rounds in [tool.flwr.app.config], it has {', '.join(app.run_config) or 'none'}."
        )
    wanted = {"num-server-rounds": rounds, "fraction-train": share(cohort, nodes), "fraction-evaluate": share(cohort, nodes)}
    return replace(app, run_config=app.run_config | {key: value for key, value in wanted.items() if key in app.run_config})


def share(cohort: int, nodes: int) -> float:
    """Return the fraction of the nodes that Flower, which rounds down, makes the cohort of."""
    return min(1.0, (cohort + 0.5) / nodes)


@contextmanager
def default_fractions(fraction: float) -> Iterator[None]:
    """Let FedAvg ask a fraction of the nodes unless told: by default it asks everybody, and an app may set one fraction of the two."""
    init: Any = FedAvg.__init__
    before = init.__defaults__
    init.__defaults__ = (fraction, fraction, *before[2:])  # `fraction_train` and `fraction_evaluate`, by place
    try:
        yield
    finally:
        init.__defaults__ = before


def timed(run: Callable[[], object], cohort: int, nodes: int, skip: int = 0) -> list[float]:
    """Return the seconds of each round of a ServerApp after the first `skip`; what it prints and writes is thrown away.

    Raises:
        ConfigError: A round was not of the cohort, or a reply was an error.
    """
    logger, clock = logging.getLogger("flwr"), RoundClock()
    before, logger.handlers = logger.handlers, [clock]
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            chdir(folder),
            redirect_stdout(io.StringIO()),
            default_fractions(share(cohort, nodes)),
        ):
            run()
    finally:
        logger.handlers = before
    kept = clock.seconds[skip:]
    if not kept or any(replies != {(min(cohort, nodes), 0)} for replies in clock.replies[skip : len(clock.seconds)]):
        raise ConfigError(
            f"Expected rounds of {cohort} results and no failures, got {clock.replies}. "
            f"Run the app by `fedclip flower`, which shows its log.\n"
            f"{clock.error}"
        )
    return kept


def on_ray_grid(app: FlowerApp, sizes: list[int], cohort: int, workers: int, rounds: int) -> dict[int, list[float]]:
    """Return the seconds of rounds by the number of nodes, of grids that take turns; the first turn of each is not counted."""
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a change to come
    seconds: dict[int, list[float]] = {nodes: [] for nodes in sizes}
    server, _ = import_app(app)
    with ExitStack() as stack:
        ray.init(address="local", num_cpus=workers * len(sizes), num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=40)
        stack.callback(ray.shutdown)
        grids = {n: stack.enter_context(open_grid(sized(app, cohort, n, ROUNDS_A_TURN), n, workers)) for n in sizes}
        for turn in range(1 + -(-rounds // ROUNDS_A_TURN)):
            for nodes in sizes[turn % len(sizes) :] + sizes[: turn % len(sizes)]:
                grid = grids[nodes]
                taken = timed(lambda grid=grid: server(grid, grid.context()), cohort, nodes)  # type: ignore[misc]  # no type for the default
                seconds[nodes] += taken if turn else []
    return seconds


class _Configured(ClientApp):
    """An app with a run config; `run_simulation` has no place for one."""

    def __init__(self, app: FlowerApp) -> None:
        super().__init__()
        self._of = app

    def __call__(self, message: Message, context: Context) -> Message:
        return import_app(self._of)[1](message, _configured(context, self._of))


def _configured(context: Context, app: FlowerApp) -> Context:
    """Return a context with the app's run config and the state of the given one, which Flower's engine lets nobody change."""
    return Context(context.run_id, context.node_id, context.node_config, context.state, dict(app.run_config))


def on_flowers_engine(app: FlowerApp, nodes: int, cohort: int, workers: int, rounds: int) -> list[float]:
    """Return the seconds of rounds on `flwr.simulation.run_simulation`, without its first: that may begin before all nodes are there."""
    from flwr.simulation import run_simulation

    configured = sized(app, cohort, nodes, rounds + 1)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        import_app(configured)[0](grid, _configured(context, configured))

    backend: Any = {
        "client_resources": {"num_cpus": 1, "num_gpus": 0},
        "init_args": {"num_cpus": workers, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False, "logging_level": 40},
    }
    return timed(lambda: run_simulation(server, _Configured(configured), nodes, backend_config=backend), cohort, nodes, skip=1)


def flower_bench(
    folder: Path, sizes: list[int], beside: list[int], cohort: int, workers: int, rounds: int, beside_rounds: int, as_json: bool
) -> int:
    """Time rounds of the app in a folder, print them, and return the exit status."""
    app = read_app(folder)
    rows = [("RayGrid", n, taken) for n, taken in on_ray_grid(app, sizes, cohort, workers, rounds).items()]
    rows += [("Flower's engine", n, on_flowers_engine(app, n, cohort, workers, beside_rounds)) for n in beside]
    found: list[dict[str, Any]] = [
        {"grid": grid, "nodes": nodes, "rounds": len(taken), "median_round_seconds": statistics.median(taken), "fastest": min(taken)}
        for grid, nodes, taken in rows
    ]
    if as_json:
        print(json.dumps(found))
        return 0
    for row in found:
        print(
            f"{row['grid']:16} {row['nodes']:>10,} nodes, {cohort} asked: {row['median_round_seconds']:.2f} s a round "
            f"(median of {row['rounds']}; fastest {row['fastest']:.2f})"
        )
    return 0
