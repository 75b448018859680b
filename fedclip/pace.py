"""How fast workers are, learned from what they did: for dealing out the next round, never for its result."""

import math
from collections.abc import Sequence


class Pace:
    """The predicted cost that each worker does in a second: half of it from its last round, half from before."""

    def __init__(self) -> None:
        self._speeds: dict[int, float] = {}

    def learn(self, worker: int, cost: float, seconds: float) -> None:
        """Take in that a worker did what was predicted to cost `cost` in `seconds`, which it says itself: no speed, no lesson."""
        speed = cost / seconds if seconds > 0 else 0.0
        if 0 < speed < math.inf:  # of infinite seconds it is 0
            self._speeds[worker] = (self._speeds.get(worker, speed) + speed) / 2

    def of(self, workers: Sequence[int]) -> list[float] | None:
        """Return the speed of each worker, the mean of the others for one that is new; None where nothing is known."""
        known = [self._speeds[w] for w in workers if w in self._speeds]
        return [self._speeds.get(w, sum(known) / len(known)) for w in workers] if known else None
