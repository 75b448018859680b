"""`Finding`: one claim against what was found of it, and the few tests of significance that decide. Imports no PyTorch."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Finding:
    """One row of an audit.

    Attributes:
        name: what was looked at.
        claim: the claimed number.
        found: the number that was found.
        passed: whether what was found is within the claim, chance considered.
        detail: what the two numbers are, and on how much they rest.
    """

    name: str
    claim: float
    found: float
    passed: bool
    detail: str

    def plain(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return dataclasses.asdict(self)


def two_sided(z: float | np.ndarray) -> np.ndarray:
    """Return how likely a standard normal number is at least so far from 0."""
    return np.asarray(2 * stats.norm.sf(np.abs(z)))


def of_squares(sums: float | np.ndarray, counts: float | np.ndarray) -> np.ndarray:
    """Return how likely the sums of squares of so many standard normal numbers are at least so far out, on either side."""
    return np.asarray(np.minimum(1.0, 2 * np.minimum(stats.chi2.cdf(sums, counts), stats.chi2.sf(sums, counts))))


def all_likely(p_values: np.ndarray | Sequence[float], level: float) -> bool:
    """Return whether none of several tests rejects. The chance that a right claim is rejected is at most `level` (Bonferroni, and Holm)."""
    p = np.asarray(p_values, dtype=np.float64)
    return bool(p.size == 0 or not p.min() < level / p.size)


def proportion_bounds(hits: int, trials: int, level: float) -> tuple[float, float]:
    """Return the Clopper-Pearson bounds on a probability; each is wrong with a probability of at most `level`."""
    low = float(stats.beta.ppf(level, hits, trials - hits + 1)) if hits else 0.0
    high = float(stats.beta.ppf(1 - level, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def bins_of(probabilities: np.ndarray, trials: int, least: float = 10.0) -> np.ndarray:
    """Return where to cut a discrete distribution so that every bin is expected `least` times or more.

    Args:
        probabilities: of the values 0, 1, …, shape (n,).
        trials: how many values are drawn.
        least: expected count of a bin, so that a chi-square test holds.

    Returns:
        The first value of each bin, int64, beginning with 0.
    """
    cuts, inside, left = [0], 0.0, math.fsum(probabilities) * trials
    for value, expected in enumerate(probabilities * trials):
        if inside >= least and left >= least:
            cuts.append(value)
            inside = 0.0
        inside += expected
        left -= expected
    if inside + max(left, 0.0) < least and len(cuts) > 1:
        cuts.pop()
    return np.array(cuts, dtype=np.int64)
