"""Where users train: one task and its resident models, which train one user after another and measure held-out units."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedclip.process import flushed, settle_thread, stand_back
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.tasks.base import Counts, Task

WORTH_A_THREAD = 1e-3
"""Seconds that reading the user before took, from which on the next one is read by a thread."""

GROUP_BYTES, GROUP_USERS = 16 << 20, 8
"""So many users of a small model are trained, each in a model of its own, before their updates are clipped and added: that code and the
sum then come to a core's caches once for all of them. Together their models, frozen weights too, have at most so many bytes."""


@dataclass(frozen=True, eq=False)
class Read:
    """A user's examples, and the seconds that reading them took."""

    examples: Sequence[Any]
    seconds: float


@dataclass(eq=False)
class Site:
    """Where users train: one task and one resident model, used for one user after another; of a small model, up to `group` of them.

    Attributes:
        task: the task.
        replica: the model.
        group: users whose updates may lie here before they are clipped and added, at least 1.
    """

    task: Task
    replica: Replica
    group: int = GROUP_USERS
    _ahead: "tuple[Streams, dict[int, Future[Read]]] | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._replicas = [self.replica]
        self._readers: dict[bool, ThreadPoolExecutor] = {}
        self._reading = set[Future[Read]]()

    def load(self, user: int, streams: Streams) -> Read:
        """Read a user's examples."""
        start = time.perf_counter()
        return Read(self.task.load_user(user, streams.generator("data", user)), time.perf_counter() - start)

    def read(self, user: int, streams: Streams, *, ahead: bool = False) -> "Future[Read]":
        """Begin to read a user's examples on a thread; `ahead`: of another round, when nothing else is to be done on the machine."""
        if ahead not in self._readers:
            self._readers[ahead] = ThreadPoolExecutor(1, "fedclip-reader", stand_back if ahead else settle_thread)
        reading = self._readers[ahead].submit(self.load, user, streams)
        self._reading.add(reading)
        reading.add_done_callback(self._reading.discard)
        return reading

    def read_ahead(self, users: Sequence[int], streams: Streams) -> None:
        """Begin to read the data of those who are to be the first here in the round after that of `streams`, as many as time permits."""
        following = replace(streams, round=streams.round + 1, attempt=0)
        self._ahead = following, {user: self.read(user, following, ahead=True) for user in users}

    def were_read(self, users: Sequence[int], streams: Streams) -> "dict[int, Future[Read]]":
        """Return the data that are read ahead of the first of some users in a round, once; nothing more is begun to be read for others."""
        (following, read), self._ahead = self._ahead or (streams, {}), None
        begun = [user for user in reversed(read) if not read[user].cancel()][::-1]  # from the end: the thread goes the other way
        if begun and following == streams and begun == list(users[: len(begun)]):
            return {user: read[user] for user in begun}
        self.settle()
        return {}

    def settle(self) -> None:
        """Wait until nothing is being read, and let nothing more be: a task is asked for one thing at a time."""
        for reading in list(self._reading):
            if not reading.cancel():
                reading.exception()

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
    with flushed(), torch.inference_mode():
        return [(unit, site.task.evaluate(site.replica.model, unit)) for unit in units]
