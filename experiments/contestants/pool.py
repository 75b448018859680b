"""Processes under a loop without a framework: the users of a round go out by a queue, sums come back by another."""

import multiprocessing
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from experiments.contestants.turns import Answer

LOOK_SECONDS = 5.0

Worker = Callable[..., None]
"""Called as `worker(inbox, outbox, *arguments)`: answers each share of a round, until None comes."""


class Pool:
    """Worker processes, each of which adds up the updates of its share of a round.

    Args:
        workers: how many.
        worker: what each runs.
        arguments: what it is called with besides the queues.
    """

    def __init__(self, workers: int, worker: Worker, *arguments: object) -> None:
        spawn = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that its parent has touched
        self._outbox: Any = spawn.Queue()
        self._inboxes: list[Any] = [spawn.Queue() for _ in range(workers)]
        self._processes = [spawn.Process(target=worker, args=(inbox, self._outbox, *arguments), daemon=True) for inbox in self._inboxes]
        for process in self._processes:
            process.start()

    def round(self, shares: Sequence[Any], users: int) -> Answer:
        """Send each worker its share, divide the sum of what comes back by the number of users, and say how long that took."""
        begin = time.perf_counter()
        for inbox, share in zip(self._inboxes, shares, strict=True):
            inbox.put(share)
        sums = [self._sum() for _ in self._inboxes]
        [sum(tensors) / max(users, 1) for tensors in zip(*sums, strict=True)]
        return {"seconds": time.perf_counter() - begin, "users": users}

    def _sum(self) -> Any:
        while True:
            with suppress(queue.Empty):
                return self._outbox.get(timeout=LOOK_SECONDS)
            if not all(process.is_alive() for process in self._processes):
                raise RuntimeError("a worker process has died; what it said is above")

    def close(self) -> None:
        """Let the workers end."""
        for inbox in self._inboxes:
            inbox.put(None)
