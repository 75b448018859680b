"""`Release`: the one place that sees the raw sum. Noise and division happen here; what leaves is all that the server chain sees.

Nothing of the sum may reach the server chain by another way: no norm of it, no count of who took part under noise.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedclip.transform import Bound


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise on every coordinate of the sum, standard deviation `noise_multiplier * bound`.

    The noise is sampled in float64; guarantees hold under real arithmetic (float sampling is not hardened).

    Attributes:
        noise_multiplier: z, the standard deviation on the sum in units of the bound C. On the mean it is `z C / S`.
    """

    stage_name: ClassVar[str] = "gaussian"
    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(
                f"Expected a finite noise_multiplier over 0, got {self.noise_multiplier}; leave the mechanism out for no noise."
            )

    def noise(self, size: int, bound: Bound, rng: np.random.Generator) -> np.ndarray:
        """Return the noise on a sum of `size` coordinates, float64, shape (size,).

        Raises:
            ValueError: the bound is infinite, so that no noise makes the sum private.
        """
        if not math.isfinite(bound.total):
            raise ValueError("Expected a bounded chain under noise, got an infinite bound; end the client chain with a clip.")
        return rng.standard_normal(size) * (self.noise_multiplier * bound.total)


Denominator = Literal["weights"] | float


@dataclass(frozen=True)
class Release:
    """The step from the raw sum to the released mean.

    Attributes:
        mechanism: what adds noise; None releases the sum as it is.
        denominator: what the sum is divided by. `"weights"`: the sum of the weights of those who took part (true FedAvg), refused
            under noise, since it depends on who came; else a public number, the expected cohort.
    """

    mechanism: Gaussian | None = None
    denominator: Denominator = "weights"

    def __post_init__(self) -> None:
        if self.mechanism is not None and self.denominator == "weights":
            raise ValueError(
                "Expected a public denominator under noise, got 'weights': their sum depends on who took part; give the expected cohort."
            )
        if self.denominator != "weights" and not self.denominator > 0:
            raise ValueError(f"Expected a denominator over 0, got {self.denominator}.")

    def apply(self, total: np.ndarray, weight: float, bound: Bound, rng: np.random.Generator) -> np.ndarray:
        """Return the released mean.

        Args:
            total: the sum over users, float64, shape (d,).
            weight: the sum of the users' weights; read only where it is the denominator.
            bound: the bound that the guard enforced on each user.
            rng: the stream of the noise of this attempt.

        Returns:
            float64, shape (d,). Without noise and with nobody there it is zero; under noise an empty cohort releases noise on zero.
        """
        if self.mechanism is not None:
            total = total + self.mechanism.noise(total.size, bound, rng)
        denominator = weight if self.denominator == "weights" else self.denominator
        return total / denominator if denominator else np.zeros_like(total)
