"""Where rounds are computed: this process, or Flower messages to Ray actors. The bits of the result are the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from experiments.prepare import Prepared
from fedclip.layout import Layout
from fedclip.method import ServerState
from fedclip.options import ConfigError
from fedclip.round import Outcome
from strategies.recipes import run_digest

if TYPE_CHECKING:
    from flwr.serverapp import Grid


class Engine(Protocol):
    """A run's rounds, one after another."""

    @property
    def state(self) -> ServerState:
        """The state after the last round."""

    @property
    def layout(self) -> Layout:
        """The layout of the model."""

    def round(self) -> Outcome:
        """Do one more round and return what it made."""

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the current model on all held-out units."""


class OnGrid:
    """Rounds of the Flower strategy on a Flower grid."""

    def __init__(self, prepared: Prepared, grid: "Grid") -> None:
        from strategies.federated import Federated

        options = prepared.experiment.run
        names = (secret_of(prepared), run_digest(prepared.experiment))
        self.strategy = Federated(prepared.method, prepared.task, prepared.recipe, *names, device=options.device, reply=options.reply)
        self._grid = grid

    @property
    def state(self) -> ServerState:
        """The state after the last round."""
        return self.strategy.state

    @property
    def layout(self) -> Layout:
        """The layout of the model."""
        return self.strategy.layout

    def round(self) -> Outcome:
        """Do one more round and return what it made."""
        return self.strategy.round(self._grid)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the current model on all held-out units."""
        return self.strategy.evaluate(self._grid)


def secret_of(prepared: Prepared) -> str:
    """Return the master secret of a simulation, which follows from the seed so that a run can be repeated."""
    return f"seed:{prepared.experiment.run.seed}"


@contextmanager
def open_engine(prepared: Prepared) -> Iterator[Engine]:
    """Start the engine that the experiment names, and end what was started."""
    experiment = prepared.experiment
    if experiment.run.engine == "process":
        from fedclip.simulation import InProcess

        yield InProcess(prepared.method, prepared.task, secret_of(prepared), run_digest(experiment), experiment.run.device)
        return
    from clients.ray_grid import RayGrid, Resources

    workers = experiment.run.workers or len(os.sched_getaffinity(0))
    resources = Resources(experiment.ray.cpus_per_worker, experiment.ray.gpus_per_worker)
    try:
        grid = RayGrid("clients.app:app", nodes=workers, workers=workers, resources=resources, address=experiment.ray.address)
    except (ValueError, ConnectionError) as error:
        raise ConfigError(f"ray: {error}") from error
    with grid:
        yield OnGrid(prepared, grid)
