"""The actors of a `RayGrid`, by number: started, found to be up, replaced; as many as are wanted or as there is room for."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from clients.ray_worker import Resources, room_for_workers

FOLLOW_SECONDS = 1.0  # how often to look for nodes that came or went
FAILED_STARTS = 3  # in a row, of one worker, while no other is up: then the reason is no accident
LONGEST_REST = 30.0  # seconds between failed starts of a worker, which double from 1


@dataclass(frozen=True)
class Post:
    """Where a worker is: the id of its Ray node, the name of the machine, its process."""

    ray_node: str
    host: str
    pid: int


class Crew:
    """Starts workers and replaces them. Its grid guards it: one thread at a time.

    Args:
        start: starts an actor, without waiting for it.
        wanted: workers; None: as many as the cluster has room for, whatever comes and goes.
        resources: what each takes.

    Attributes:
        actors: by number, up or on their way.
        posts: where those are that are up.
        starting: of those on their way, what they answer when they are up -> number.
        replaced: how many were lost so far.
    """

    def __init__(self, start: Callable[[], Any], wanted: int | None, resources: Resources) -> None:
        self._start, self._wanted, self._resources = start, wanted, resources
        self.actors: dict[int, Any] = {}
        self.posts: dict[int, Post] = {}
        self.starting: dict[Any, int] = {}
        self.replaced = 0
        self._resting: dict[int, float] = {}  # number -> when it is started again
        self._failed: dict[int, int] = {}  # number -> starts that failed in a row
        self._looked = -FOLLOW_SECONDS

    @property
    def restless(self) -> bool:
        """Whether time alone may change something: nodes are followed, or a failed worker rests."""
        return self._wanted is None or bool(self._resting)

    def name(self, worker: int) -> str:
        """Return a worker's name for people."""
        post = self.posts.get(worker)
        return f"worker {worker}" + (f" (process {post.pid} on {post.host})" if post else "")

    def tend(self) -> list[int]:
        """Start whom there is room for or whose rest is over, and let go of whom there is no more room for; return the numbers begun."""
        now = time.monotonic()
        if self._wanted is None and now - self._looked < FOLLOW_SECONDS:
            target = len(self.actors) + len(self._resting)
        else:
            target, self._looked = self._wanted if self._wanted is not None else room_for_workers(self._resources), now
        rested = [number for number, until in self._resting.items() if until <= now]
        taken = self.actors.keys() | self._resting.keys()
        new = [number for number in range(target + len(taken)) if number not in taken][: max(0, target - len(taken))]
        for number in [*rested, *new]:
            self._resting.pop(number, None)
            self._begin(number)
        surplus = len(self.actors) + len(self._resting) - target
        for ref, number in list(self.starting.items())[::-1][: max(0, surplus)]:
            del self.starting[ref]
            ray.kill(self.actors.pop(number))
        return [*rested, *new]

    def arrived(self, ref: Any) -> int | None:
        """Return the number of a worker that is up now; None where its start failed, and it is to be tried again.

        Raises:
            RuntimeError: it failed time and again, and no other is up.
        """
        number = self.starting.pop(ref)
        try:
            self.posts[number] = Post(*ray.get(ref))
        except ray.exceptions.RayError as error:
            ray.kill(self.actors.pop(number))
            failed = self._failed[number] = self._failed.get(number, 0) + 1
            if failed >= FAILED_STARTS and not self.posts:
                raise RuntimeError(
                    f"A worker could not be started {failed} times in a row: {error}\nEach machine of the cluster needs the same Python "
                    "packages at the same paths, and memory for its workers."
                ) from error
            self._resting[number] = time.monotonic() + min(LONGEST_REST, 2.0 ** (failed - 1))
            return None
        self._failed.pop(number, None)
        return number

    def lose(self, worker: int) -> None:
        """End a worker that died or hangs, and start another in its place, or let the place go where there is no more room."""
        self.posts.pop(worker, None)
        self.replaced += 1
        ray.kill(self.actors.pop(worker))  # one that is dead already doesn't mind
        self._looked = -FOLLOW_SECONDS  # perhaps its node is gone
        self.tend()

    def _begin(self, number: int) -> None:
        actor = self._start()
        self.actors[number] = actor
        self.starting[actor.where.remote()] = number
