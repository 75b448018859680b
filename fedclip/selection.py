"""Which coordinates of a vector are largest: exact, deterministic, and little more than one pass over the memory."""

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 1 << 18
"""Coordinates looked at in one step: few enough for a core's caches, and so many that the steps themselves cost little."""

SPARE = 1 << 16
"""Coordinates that may be collected over 4 k."""

SAMPLE = 1 << 15
"""Coordinates, about, that the first threshold is guessed from."""

RUN = 16
"""Neighbours sampled together: one line of the cache."""

SMALL = 1 << 17
"""Up to this size, and where over an eighth is kept, one partition of all magnitudes is faster than a threshold."""

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def largest(vector: torch.Tensor, k: int) -> torch.Tensor:
    r"""Return where the k largest magnitudes are; of equal ones, those with the lowest indices.

    On a CPU: a sample of the magnitudes gives a threshold t that is low on purpose. One pass in blocks
    collects `{i : |x_i| > t}`, some 1.5 k coordinates, and a partition of these alone finds the k-th. Three things can go
    wrong with a guess, and none costs more than another pass:

    * Far more than k exceed t: whenever over 4 k + 65,536 are collected, all but the k largest are dropped, and t becomes the
      k-th of them. That is a lower bound of the true threshold, so that nothing is lost and the memory stays bounded.
    * Fewer than k exceed t, but enough are equal to it (a constant vector, zeros, values of a coarse grid): the first of
      these fill the places that are left.
    * Fewer than k reach t: the pass is repeated from a threshold below zero, which is raised as above.

    Elsewhere `torch.topk` finds the k-th magnitude.

    Args:
        vector: float32, shape (d,), without NaN.
        k: how many, at least 0; over d means d.

    Returns:
        int64 indices, ascending, shape (min(k, d),), on the vector's device.

    Raises:
        ValueError: another shape or type, or a negative k.

    >>> largest(torch.tensor([1.0, -3.0, 2.0, 3.0]), 2).tolist()
    [1, 3]
    """
    if vector.ndim != 1 or vector.dtype != torch.float32:
        raise ValueError(f"Expected a float32 vector, got {vector.dtype} of shape {tuple(vector.shape)}; flatten or convert it first.")
    if k < 0:
        raise ValueError(f"Expected k >= 0, got {k}.")
    k = min(k, vector.numel())
    if k == 0:
        return torch.zeros(0, dtype=torch.int64, device=vector.device)
    if k == vector.numel():
        return torch.arange(k, device=vector.device)
    if vector.device.type != "cpu":
        return largest_elsewhere(vector, k)
    values = vector.detach().numpy()
    if values.size <= SMALL or 8 * k > values.size:
        return torch.from_numpy(_top(np.abs(values), k)[0])
    return torch.from_numpy(_by_threshold(values, k))


def largest_elsewhere(vector: torch.Tensor, k: int) -> torch.Tensor:
    """Return the same for 0 < k <= d by PyTorch's operations alone, on any device."""
    magnitudes = vector.detach().abs()
    kth = magnitudes.topk(k, sorted=False).values.amin()
    above = (magnitudes > kth).nonzero().flatten()
    ties = (magnitudes == kth).nonzero().flatten()[: k - above.numel()]
    return torch.cat([above, ties]).sort().values


def _by_threshold(values: Floats, k: int) -> Indices:
    """Return the indices of the k largest magnitudes, 0 < k < d, by a guessed threshold."""
    guess = _low_threshold(values, k)
    found = _above(values, k, guess)
    if found.size == k:
        return found
    ties = _equal(values, guess, k - found.size)
    if found.size + ties.size == k:
        return np.sort(np.concatenate([found, ties]))
    return _above(values, k, np.float32(-1.0))


def _low_threshold(values: Floats, k: int) -> np.float32:
    """Return a magnitude that more than k coordinates exceed, if the sample tells the truth: four deviations over the expected rank."""
    runs = values[: values.size // RUN * RUN].reshape(-1, RUN)
    sample = np.abs(runs[:: max(1, runs.shape[0] * RUN // SAMPLE)]).ravel()
    expected = k / values.size * sample.size
    rank = min(sample.size, int(expected + 4 * expected**0.5) + 4)
    return np.float32(np.partition(sample, sample.size - rank)[sample.size - rank])


def _above(values: Floats, k: int, threshold: np.float32) -> Indices:
    """Return the indices of the k largest of the magnitudes over a threshold, or of all of them where they are fewer."""
    size = min(BLOCK, values.size)
    magnitudes, marks = np.empty(size, np.float32), np.empty(size, np.bool_)
    indices: list[Indices] = []
    kept: list[Floats] = []
    held, room = 0, 4 * k + SPARE
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        size = block.size
        np.abs(block, out=magnitudes[:size])
        np.greater(magnitudes[:size], threshold, out=marks[:size])
        places = marks[:size].nonzero()[0]
        if places.size:
            kept.append(magnitudes[places])
            indices.append(places + start)
            held += places.size
        if held > room:
            index, kept_now, threshold = _prune(indices, kept, k)
            indices, kept, held = [index], [kept_now], k
    if held > k:
        return _prune(indices, kept, k)[0]
    return np.concatenate(indices) if indices else np.zeros(0, np.int64)


def _prune(indices: list[Indices], kept: list[Floats], k: int) -> tuple[Indices, Floats, np.float32]:
    """Return the k largest of the collected magnitudes, where they are, and the least of them."""
    index, magnitudes = np.concatenate(indices), np.concatenate(kept)
    places, kth = _top(magnitudes, k)
    return index[places], magnitudes[places], kth


def _top(magnitudes: Floats, k: int) -> tuple[Indices, np.float32]:
    """Return the ascending places of the k largest magnitudes, ties by the lowest place, and the k-th magnitude."""
    kth = np.float32(np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k])
    marks = magnitudes > kth
    missing = k - int(np.count_nonzero(marks))
    marks[np.flatnonzero(magnitudes == kth)[:missing]] = True
    return np.flatnonzero(marks), kth


def _equal(values: Floats, magnitude: np.float32, most: int) -> Indices:
    """Return the indices of the first coordinates of a magnitude, at most `most`."""
    found: list[Indices] = []
    for start in range(0, values.size, BLOCK):
        places = np.flatnonzero(np.abs(values[start : start + BLOCK]) == magnitude)[:most]
        found.append(places + start)
        most -= places.size
        if most == 0:
            break
    return np.concatenate(found)
