"""Where rounds are computed: this process, or Flower messages to Ray actors. The bits of the result are the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from experiments.prepare import Prepared
from fedclip.account import Account, BudgetSpent
from fedclip.layout import Layout
from fedclip.method import ServerState
from fedclip.options import ConfigError
from fedclip.round import Outcome
from strategies.recipes import build_account, run_digest

if TYPE_CHECKING:
    from flwr.serverapp import Grid


class Engine(Protocol):
    """A run's rounds, one after another."""

    @property
    def account(self) -> Account | None:
        """What the releases are charged to; None without noise."""

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
    """Rounds of the Flower strategy on a Flower grid, charged to an account under noise."""

    def __init__(self, prepared: Prepared, grid: "Grid", account: Account | None = None) -> None:
        from strategies.federated import Federated

        options = prepared.experiment.run
        names = (secret_of(prepared), run_digest(prepared.experiment))
        self.strategy = Federated(
            prepared.method, prepared.task, prepared.recipe, *names, device=options.device, reply=options.reply, account=account
        )
        self.account, self._grid = account, grid

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


def account_of(prepared: Prepared, ledger: Path | None = None) -> Account | None:
    """Return the privacy account of a run, its ledger in a file or in memory; None without noise.

    Raises:
        ConfigError: the budget does not allow even one round.
    """
    account = build_account(prepared.experiment, prepared.method.sampler.population, ledger)
    if account is not None:
        try:
            account.check()
        except BudgetSpent as spent:
            raise ConfigError(f"privacy: {spent} Raise epsilon_budget, or the noise.") from spent
    return account


@contextmanager
def open_engine(prepared: Prepared, ledger: Path | None = None) -> Iterator[Engine]:
    """Start the engine that the experiment names, and end what was started. Releases under noise are charged to the ledger's file."""
    experiment, account = prepared.experiment, account_of(prepared, ledger)
    if experiment.run.engine == "process":
        from fedclip.simulation import InProcess

        yield InProcess(prepared.method, prepared.task, secret_of(prepared), run_digest(experiment), experiment.run.device, account)
        return
    from clients.ray_grid import RayGrid, Resources

    workers = experiment.run.workers or len(os.sched_getaffinity(0))
    resources = Resources(experiment.ray.cpus_per_worker, experiment.ray.gpus_per_worker)
    try:
        grid = RayGrid("clients.app:app", nodes=workers, workers=workers, resources=resources, address=experiment.ray.address)
    except (ValueError, ConnectionError) as error:
        raise ConfigError(f"ray: {error}") from error
    with grid:
        yield OnGrid(prepared, grid, account)
