"""A whole run in one process: no Flower, no Ray, the same bits."""

import dataclasses
from collections.abc import Callable

import torch

from fedclip.account import Account
from fedclip.client import train_blocks
from fedclip.layout import Layout
from fedclip.method import Method, ServerState
from fedclip.process import settle_process, trim_memory
from fedclip.replica import Replica
from fedclip.round import Outcome, Released, begin, finish, replay
from fedclip.site import Site, evaluate_units
from fedclip.tasks.base import Counts, Task
from fedclip.user_states import StatesInMemory, UserStates


class InProcess:
    """Rounds of a method on a task, one user after another in this process.

    Args:
        method: the method.
        task: the task.
        secret: the master secret of the random streams.
        run: the name of the run in the random streams.
        device: where to train.
        account: what the releases are charged to; None keeps no account.
        states: where the states of users are; None: in memory.

    Attributes:
        state: the state after the last round.
        keep: makes what was released durable before the server step; None: nothing does.
    """

    command = "run"
    workers = 1

    def __init__(
        self,
        method: Method,
        task: Task,
        secret: str,
        run: str,
        device: str = "cpu",
        account: Account | None = None,
        states: UserStates | None = None,
    ) -> None:
        settle_process()
        self.method, self.site = method, Site(task, Replica.of(task, device))
        self.state = ServerState.initial(initial_params(task), method, self.layout)
        trim_memory()
        self._secret, self._run, self.account = secret, run, account
        self._states = states or StatesInMemory()
        self.keep: Callable[[Released], None] | None = None

    @property
    def layout(self) -> Layout:
        """The layout of the model."""
        return self.site.replica.layout

    def round(self) -> Outcome:
        """Do one more round and return what it made."""
        plan = begin(self.method, self.state, self.layout, self._secret, self._run, self.account)
        # Of a large model each vector is gigabytes: nothing here may hold the model as it was sent, nor the sum.
        told, plan = [plan.spec], dataclasses.replace(plan, spec=plan.spec.without_vectors())
        partials = (train_blocks(self.site, told.pop(), plan.blocks, self._states) for _ in range(1))
        outcome = finish(self.method, self.state, self.layout, plan, partials, self.account, self.keep)
        self.state = outcome.state
        return outcome

    def replay(self, released: Released) -> Outcome:
        """Take the server step of a round that was released before."""
        outcome = replay(self.method, self.state, self.layout, self._secret, self._run, released)
        self.state = outcome.state
        return outcome

    def restore(self, state: ServerState) -> None:
        """Go on from another state."""
        self.state = state

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the current model on all held-out units."""
        return self.site.task.summarise(self.evaluate_units(), 0)

    def evaluate_units(self) -> list[Counts]:
        """Return what each held-out unit adds to these metrics, in their order."""
        return [c for _, c in evaluate_units(self.site, self.state.params, range(self.site.task.held_out_units))]


def initial_params(task: Task) -> torch.Tensor:
    """Return the flat initial parameters of a task's model, float32, shape (d,)."""
    return Replica(task.make_model()).params


def simulate(method: Method, task: Task, *, rounds: int, seed: int = 1, each_round: Callable[[Outcome], None] | None = None) -> Outcome:
    """Run a method on a task from its initial weights and return the last outcome.

    Args:
        method: the method.
        task: the task.
        rounds: rounds to run, at least 1.
        seed: all randomness follows from it.
        each_round: called after each round.

    Raises:
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError(f"Expected at least 1 round, got {rounds}.")
    engine = InProcess(method, task, f"seed:{seed}", "simulate")
    for _ in range(rounds):
        outcome = engine.round()
        if each_round is not None:
            each_round(outcome)
    return outcome
