"""Where users train: one task and its resident models, which train one user after another and measure held-out units."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedclip.process import settle_thread
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.tasks.base import Counts, Task

WORTH_A_THREAD = 1e-3
"""Seconds that reading the user before took, from which on the next one is read by a thread."""

GROUP_BYTES, GROUP_USERS = 16 << 20, 8
"""So many users of a small model are trained, each in a model of its own, before their updates are clipped and added: that code and the
sum then come to a core's caches once for all of them. Together their models, frozen weights too, have at most so many bytes."""


@dataclass(eq=False)
class Site:
    """Where users train: one task and one resident model, used for one user after another; of a small model, up to `group` of them.

    Attributes:
        task: the task.
        replica: the model.
        group: users whose updates may lie here before they are clipped and added, at least 1.
        load_seconds: what reading the data of the last user took.
    """

    task: Task
    replica: Replica
    group: int = GROUP_USERS
    _ahead: "tuple[tuple[int, Streams], Future[Sequence[Any]]] | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._replicas = [self.replica]
        self.load_seconds = 0.0

    def load(self, user: int, streams: Streams) -> Sequence[Any]:
        """Return a user's examples."""
        start = time.perf_counter()
        examples = self.task.load_user(user, streams.generator("data", user))
        self.load_seconds = time.perf_counter() - start
        return examples

    def read_ahead(self, user: int, streams: Streams) -> None:
        """Begin to read, on a thread, the data of the user who is to be the first here in the round after that of `streams`."""
        following, thread = replace(streams, round=streams.round + 1, attempt=0), ThreadPoolExecutor(1, "fedclip-reader", settle_thread)
        self._ahead = (user, following), thread.submit(self.load, user, following)
        thread.shutdown(wait=False)  # it ends with what it was given

    def was_read(self, user: int, streams: Streams) -> "Future[Sequence[Any]] | None":
        """Return the data of a user that are read ahead; None where they are not. Others that were are done with: one reads at a time."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] == (user, streams):
            return ahead and ahead[1]
        ahead[1].exception()
        return None

    def settle(self) -> None:
        """Wait until nothing is being read: a task is asked for one thing at a time."""
        if self._ahead is not None:
            self._ahead[1].exception()

    def replicas(self, users: int) -> list[Replica]:
        """Return the models that a group of users trains in: as many as there are users, at most, and always `replica` first."""
        wanted = max(1, min(users, self.group, GROUP_BYTES // self.replica.bytes))
        if len(self._replicas) < wanted:
            self.settle()
        while len(self._replicas) < wanted:
            twin = self.replica.twin(self.task)
            if twin is None:
                self.group = len(self._replicas)
                break
            self._replicas.append(twin)
        return self._replicas[:wanted]


def evaluate_units(site: Site, params: torch.Tensor, units: Iterable[int]) -> list[tuple[int, Counts]]:
    """Return what each held-out unit adds to the metrics of a model with parameters `params`, shape (d,)."""
    site.settle()
    site.replica.load(params.to(site.replica.params.device))
    site.replica.model.eval()
    with torch.inference_mode():
        return [(unit, site.task.evaluate(site.replica.model, unit)) for unit in units]
