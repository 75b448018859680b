"""Where rounds are computed: this process, or Flower messages to Ray actors. The bits of the result are the same."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from experiments.folder import LEDGER, STATES
from experiments.prepare import Prepared
from fedclip.account import Account, BudgetSpent, LedgerError
from fedclip.layout import Layout
from fedclip.method import ServerState
from fedclip.options import ConfigError
from fedclip.round import Outcome, Released
from fedclip.tasks.base import Counts
from strategies.naming import run_digest
from strategies.privacy import build_account

if TYPE_CHECKING:
    from flwr.serverapp import Grid


class Engine(Protocol):
    """A run's rounds, one after another.

    Attributes:
        keep: called with what was released before the server step, to make it durable; None: nothing is.
        command: of `fedclip`, which makes such runs and goes on with them.
    """

    keep: Callable[[Released], None] | None
    command: str

    @property
    def workers(self) -> int:
        """How many processes train users at a time."""

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

    def replay(self, released: Released) -> Outcome:
        """Take the server step of a round that was released before."""

    def restore(self, state: ServerState) -> None:
        """Go on from another state."""

    def evaluate_units(self) -> list[Counts]:
        """Return what each held-out unit adds to the metrics of the current model, in their order."""


class OnGrid:
    """Rounds of the Flower strategy on a Flower grid.

    Args:
        prepared: the experiment.
        grid: the nodes.
        account: what the releases are charged to; None without noise.
        states: the folder, shared by all workers, of what the client chain keeps of users; or a place that `clients.states` lends.
    """

    command = "run"

    def __init__(self, prepared: Prepared, grid: "Grid", account: Account | None = None, states: Path | str | None = None) -> None:
        from strategies.federated import Federated

        options = prepared.experiment.run
        names = (secret_of(prepared), run_digest(prepared.experiment))
        self.strategy = Federated(
            prepared.method,
            prepared.task,
            prepared.recipe,
            *names,
            device=options.device,
            reply=options.reply,
            account=account,
            states=states,
        )
        self.account, self._grid = account, grid

    @property
    def workers(self) -> int:
        """How many processes train users at a time: on a cluster they may come and go."""
        return int(getattr(self._grid, "workers", 0)) or len(list(self._grid.get_node_ids()))

    def watch(self, show: Callable[[str, int, float], None]) -> None:
        """Tell `show` of each worker that is done with its part of a round: its name, users, and seconds spent on them."""
        name = getattr(self._grid, "node_name", lambda node: f"node {node}")
        self.strategy.watch = lambda node, users, seconds: show(name(node), users, seconds)

    @property
    def keep(self) -> Callable[[Released], None] | None:
        """Makes what was released durable before the server step; None: nothing does."""
        return self.strategy.keep

    @keep.setter
    def keep(self, keep: Callable[[Released], None] | None) -> None:
        self.strategy.keep = keep

    @property
    def state(self) -> ServerState:
        """The state after the last round."""
        return self.strategy.state

    @property
    def layout(self) -> Layout:
        """The layout of the model."""
        return self.strategy.layout

    @property
    def ordered(self) -> bool:
        """Whether nodes do messages in the order in which they are sent."""
        return hasattr(self._grid, "stream")

    def round(self, evaluated: Callable[[list[Counts]], None] | None = None) -> Outcome:
        """Do one more round and return what it made; `evaluated`: as `Federated.round`."""
        return self.strategy.round(self._grid, evaluated)

    def replay(self, released: Released) -> Outcome:
        """Take the server step of a round that was released before."""
        return self.strategy.replay(released)

    def restore(self, state: ServerState) -> None:
        """Go on from another state."""
        self.strategy.state = state

    def evaluate_units(self) -> list[Counts]:
        """Return what each held-out unit adds to the metrics of the current model, in their order."""
        return self.strategy.evaluate_units(self._grid)


def secret_of(prepared: Prepared) -> str:
    """Return the master secret of a simulation, which follows from the seed so that a run can be repeated."""
    return f"seed:{prepared.experiment.run.seed}"


def account_of(prepared: Prepared, folder: Path | None = None) -> Account | None:
    """Return the privacy account of a run, its ledger in the run folder or in memory; None without noise.

    Raises:
        ConfigError: the budget does not allow even one round, or the ledger that is there cannot be trusted.
    """
    ledger = folder / LEDGER if folder is not None else None
    try:
        account = build_account(prepared.experiment, prepared.method.sampler.population, ledger)
    except LedgerError as error:
        raise ConfigError(str(error)) from error
    if account is not None and not account.charges:
        try:
            account.check()
        except BudgetSpent as spent:
            raise ConfigError(f"privacy: {spent} Raise epsilon_budget, or the noise.") from spent
    return account


@contextmanager
def open_engine(prepared: Prepared, folder: Path | None = None) -> Iterator[Engine]:
    """Start the engine that the experiment names, and end what was started.

    The ledger and the users' states are in the run folder; without one they are in memory, and Ray refuses chains with states.
    """
    experiment = prepared.experiment
    if experiment.deployment is not None:
        raise ConfigError("deployment: this experiment is for real devices, which Flower starts: flwr run . SUPERLINK (docs/devices.md).")
    account, states = account_of(prepared, folder), folder / STATES if folder is not None else None
    if experiment.run.engine == "process":
        from fedclip.simulation import InProcess
        from fedclip.user_states import StatesInFolder

        kept = StatesInFolder(states) if states is not None else None
        yield InProcess(prepared.method, prepared.task, secret_of(prepared), run_digest(experiment), experiment.run.device, account, kept)
        return
    from clients.ray_grid import RayGrid, Resources
    from clients.states import lent

    ray = experiment.ray
    joined = (ray.address or os.environ.get("RAY_ADDRESS") or "local") != "local"
    try:
        grid = RayGrid(
            "clients.app:app",
            nodes=None,
            workers=experiment.run.workers or (None if joined else len(os.sched_getaffinity(0))),
            fewest=1 if joined else None,  # the others come when there is room for them
            nodes_per_worker=ray.messages_per_worker,
            resources=Resources(ray.cpus_per_worker, ray.gpus_per_worker),
            address=ray.address,
            deadline=ray.deadline_seconds,
            retries=ray.retries,
        )
    except (ValueError, RuntimeError, ConnectionError) as error:
        raise ConfigError(f"ray: {error}") from error
    shared = lent(states) if joined and states is not None and prepared.method.stateful else nullcontext(states)
    with grid, shared as place:
        yield OnGrid(prepared, grid, account, place)
