"""How a server learning rate moves with the round. Imports no PyTorch."""

from typing import Annotated, Literal

from pydantic import Field

from fedclip.options import Options


class Schedule(Options):
    """A learning rate by round t = 1, 2, …: a linear warm-up, then constant, decaying in steps or continuously.

    `rate(t) = value * min(1, t / warmup) * factor ** k`, with `k = 0` up to round `start`, then `(t - start) / every`, rounded
    down for `decay = "step"`. The recipe of arXiv 2310.00098 is exponential, factor 0.6, start 750, every 750.
    """

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    warmup: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "step", "exponential"] = "constant"
    factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    start: Annotated[int, Field(ge=0)] = 0
    every: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def of(cls, rate: "float | Schedule") -> "Schedule":
        """Return a constant schedule for a number, a schedule as it is."""
        return rate if isinstance(rate, Schedule) else cls(value=rate)

    def __call__(self, round: int) -> float:
        """Return the rate of a round, counted from 1."""
        rate = self.value * (min(1.0, round / self.warmup) if self.warmup else 1.0)
        if self.decay == "constant" or round <= self.start:
            return rate
        periods = (round - self.start) / self.every
        return rate * self.factor ** (int(periods) if self.decay == "step" else periods)
