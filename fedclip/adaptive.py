"""Adaptive clipping (arXiv 1905.03871): clip bounds follow a quantile of the users' norms, learnt from one noised bit a bound and user.

A bit says whether a norm was within its bound. The bits are a channel beside the update: they are summed like it, noised like it, and
share one joint noise multiplier with it, so that adaptive bounds cost no epsilon of their own. Imports no PyTorch.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from fedclip.options import Options

LARGEST_SPREAD = 1e5
"""A layer's bound stays within this factor of the largest one; the clip allows ten times as much."""

SMALLEST, LARGEST = 1e-20, 1e20
"""Bounds stay in this range."""


class AdaptiveClip(Options):
    """`C <- C exp(-lr (b - quantile))`, b the noised fraction of users within the bound; one C, or one for each layer.

    The bits are centred: a user adds b - 1/2 to the sum, so that one more user changes it by 1/2 and not by 1, and someone who
    fails adds nothing. Their noise has the standard deviation `bits_noise * S` on the sum.

    Attributes:
        quantile: gamma, the fraction of users that shall be within the bound.
        lr: eta, the step on the logarithm of the bound.
        bits_noise: standard deviation of the noise on the fraction; the paper's S/20 on the sum is 0.05. Without noise on the
            update there is none on the bits either.
    """

    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    lr: Annotated[float, Field(gt=0, le=10)] = 0.2
    bits_noise: Annotated[float, Field(gt=0, le=1)] = 0.05

    def delta_multiplier(self, noise_multiplier: float, cohort: float, bounds: int) -> float:
        """Return the part of a joint noise multiplier z that is left for the update: `(z^-2 - H (2 s)^-2)^(-1/2)`.

        Args:
            noise_multiplier: z of update and bits together.
            cohort: S, expected users a round; the bits' noise on the sum is s = bits_noise S.
            bounds: H, how many bounds adapt. A user's H centred bits have an L2 norm of sqrt(H) / 2.

        Raises:
            ValueError: the bits alone would spend all of z; the message names the smallest cohort.
        """
        least = noise_multiplier * math.sqrt(bounds) / (2 * self.bits_noise)
        if not cohort > least:
            raise ValueError(
                f"Expected a cohort over {least:.6g} for a noise multiplier of {noise_multiplier:g} with {bounds} adaptive bounds and "
                f"bits_noise = {self.bits_noise:g}, got {cohort:g}; enlarge the cohort, or adapt fewer bounds."
            )
        return float((noise_multiplier**-2 - bounds * (2 * self.bits_noise * cohort) ** -2) ** -0.5)

    def fractions(self, total: np.ndarray, users: float, cohort: float | None, rng: np.random.Generator) -> np.ndarray | None:
        """Return the fraction of users within each bound, noised where the update is.

        Args:
            total: the sum over users of 2 b - 1, shape (H,).
            users: how many sent bits; read only without noise.
            cohort: S, the public expected cohort, under noise; None without.
            rng: the stream of the noise.

        Returns:
            float64, shape (H,), not confined to [0, 1]; None without noise where nobody sent any.
        """
        if cohort is None:
            return 0.5 + total / (2 * users) if users else None
        return 0.5 + (total / 2 + rng.standard_normal(total.size) * (self.bits_noise * cohort)) / cohort

    def step(self, thresholds: Sequence[float], fractions: Sequence[float] | None) -> tuple[float, ...]:
        """Return the bounds of the next round."""
        if fractions is None:
            return tuple(thresholds)
        moved = [c * math.exp(-self.lr * (b - self.quantile)) for c, b in zip(thresholds, fractions, strict=True)]
        least = max(SMALLEST, max(moved) / LARGEST_SPREAD)
        return tuple(min(max(c, least), LARGEST) for c in moved)
