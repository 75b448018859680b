"""What users have, in numbers: how many examples and seconds each, and how their labels differ. Plain NumPy, of all users or a sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BINS = 20
"""Bars of a histogram at most."""


@dataclass(frozen=True)
class Spread:
    """How a number is spread over users.

    Attributes:
        users: how many users it is of.
        minimum: the smallest; then the quartiles (linear interpolation), the largest, the mean and the sum.
        edges: of the bars of the histogram, one more than there are bars; each bar is without its upper edge, but for the last.
        counts: users in each bar.
    """

    users: int
    minimum: float
    lower_quartile: float
    median: float
    upper_quartile: float
    maximum: float
    mean: float
    total: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Spread":
        """Return the spread of at least one number; whole numbers get bars of whole width.

        Raises:
            ValueError: no numbers.
        """
        numbers = np.asarray(values, dtype=np.float64)
        if not numbers.size:
            raise ValueError("Expected at least one user, got none.")
        low, high = float(numbers.min()), float(numbers.max())
        if np.array_equal(numbers, np.round(numbers)):
            width = max(1, -(-int(high - low + 1) // BINS))
            edges = np.arange(low, high + width + 1, width) - 0.5
            edges = edges[: int(np.searchsorted(edges, high)) + 1]
        else:
            edges = np.histogram_bin_edges(numbers, BINS)
        first, median, third = np.quantile(numbers, (0.25, 0.5, 0.75)).tolist()
        ends, counts = tuple(edges.tolist()), tuple(np.histogram(numbers, edges)[0].tolist())
        return cls(len(numbers), low, first, median, third, high, float(numbers.mean()), float(numbers.sum()), ends, counts)


@dataclass(frozen=True, eq=False)
class Labels:
    """How the labels of users differ.

    Attributes:
        names: the labels that there are, ascending, shape (k,).
        counts: examples by user and label, int64, shape (users, k).
    """

    names: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, labels: Sequence[np.ndarray]) -> "Labels":
        """Return the counts of the labels of each user's examples."""
        names = np.unique(np.concatenate(labels))
        counts = [np.bincount(np.searchsorted(names, own), minlength=len(names)) for own in labels]
        return cls(names, np.stack(counts).astype(np.int64))

    @property
    def overall(self) -> np.ndarray:
        """The distribution over all these users' examples, shape (k,)."""
        share: np.ndarray = self.counts.sum(0) / max(1, int(self.counts.sum()))
        return share

    def distinct(self) -> np.ndarray:
        """Return how many labels each user has, shape (users,)."""
        distinct: np.ndarray = (self.counts > 0).sum(1)
        return distinct

    def entropy(self) -> np.ndarray:
        """Return the entropy of each user's labels in bits, of users with data, 0 to log2 k."""
        share = self._shares()
        terms = -share * np.log2(np.where(share > 0, share, 1.0))
        entropy: np.ndarray = terms.sum(1)
        return entropy

    def total_variation(self) -> np.ndarray:
        """Return the total variation distance of each user's labels to `overall`, of users with data, 0 to 1."""
        distance: np.ndarray = np.abs(self._shares() - self.overall).sum(1) / 2
        return distance

    def _shares(self) -> np.ndarray:
        there = self.counts[self.counts.sum(1) > 0]
        shares: np.ndarray = there / there.sum(1, keepdims=True)
        return shares


def sample(population: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return ids of users, ascending: everybody where there are no more than `size`, else so many of them, drawn without enumerating."""
    if population <= size:
        return np.arange(population)
    return np.sort(rng.choice(population, size=size, replace=False, shuffle=False))


def each(users: Sequence[int] | np.ndarray, number: Callable[[int], float]) -> np.ndarray:
    """Return a number of each user, float64, shape (users,)."""
    return np.array([number(int(user)) for user in users], dtype=np.float64)
