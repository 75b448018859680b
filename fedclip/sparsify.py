"""Stages that send some coordinates and drop the others: the largest ones, or a support that everybody knows beforehand.

What they drop is lost, unless they stand inside `with_error_feedback`. Values that are kept keep their bits. A support that does not
depend on anybody's data of the round costs no bytes for indices, and noise is needed on it alone.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import numpy as np
import torch

from fedclip.choices import Extent
from fedclip.layout import Layout
from fedclip.selection import largest
from fedclip.transform import UNBOUNDED, Bound, Ctx, State, Step, Transform
from fedclip.update import Dense, Sparse, Update, norm, pieces, scale, to_dense, values_of

RANDOM_K, COMMON_MASK = 1, 2
"""First numbers of the public seeds, so that two stages with one seed do not choose the same coordinates."""


def kept_count(density: float, size: int) -> int:
    """Return how many of `size` coordinates a density keeps: `density * size`, rounded, and at least one where there is any.

    >>> kept_count(0.001, 54_120), kept_count(0.001, 10), kept_count(0.001, 0)
    (54, 1, 0)
    """
    return min(size, max(1, round(density * size)))


def largest_of_each(vectors: tuple[torch.Tensor, ...], counts: list[int]) -> torch.Tensor:
    """Return where the largest magnitudes of each of some vectors lie in all of them laid end to end: int64, ascending."""
    found, start = [], 0
    for vector, k in zip(vectors, counts, strict=True):
        found.append(largest(vector, min(k, vector.numel())) + start)
        start += vector.numel()
    return torch.cat(found)


@dataclass(frozen=True)
class TopK(Transform):
    """Keep the coordinates of largest magnitude: `k = max(1, round(density n))` of n, of equal ones those that come first.

    What is dropped are the smallest values, never those of some position. Biased, so that it wants error feedback around it
    (arXiv 1809.07599, 1901.09847).

    Attributes:
        density: part that is kept, in (0, 1].
        by: choose in each tensor by itself, so that none is left out, or in the whole model.
    """

    stage_name: ClassVar[str] = "top_k"
    density: float
    by: Extent = "tensor"

    def __post_init__(self) -> None:
        check_density(self.density)
        check_choice("by", self.by, get_args(Extent))

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the coordinates kept, sparse; measures `density` and `compression_error`."""
        values = values_of(update)
        if self.by == "model":
            places = largest(values, min(values.numel(), kept_count(self.density, ctx.layout.size)))
        else:
            places = largest_of_each(pieces(update, ctx.layout), [kept_count(self.density, n) for n in ctx.layout.sizes])
        indices = places if isinstance(update, Dense) else update.indices[places]
        return _kept(update, Sparse(indices, values[places]), ctx.layout)

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int:
        """Return k, or what comes in where that is less."""
        k = sum(kept_count(self.density, n) for n in ([layout.size] if self.by == "model" else layout.sizes))
        return k if incoming is None else min(k, incoming)

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return the incoming bound: dropping only shrinks."""
        return incoming


@dataclass(frozen=True)
class RandomK(Transform):
    """Keep `k = max(1, round(density d))` coordinates drawn by a public seed, the same for all users of a round (arXiv 1610.05492).

    With `scale` the kept values are multiplied by d / k: the expectation over rounds is then the update itself. Scaled, the stage
    bounds nothing: a clip that stands before it would take the factor back, so that clip after it; and it belongs under no
    error feedback, which keeps what is dropped already.

    Attributes:
        density: part that is kept, in (0, 1].
        seed: public; a round's support follows from it, the round and d.
        scale: multiply by d / k.
    """

    stage_name: ClassVar[str] = "random_k"
    density: float
    seed: int = 0
    scale: bool = False

    def __post_init__(self) -> None:
        check_density(self.density)
        _check_seed(self.seed)

    def support(self, round: int, layout: Layout, average: torch.Tensor | None = None) -> torch.Tensor:
        """Return the coordinates of a round: int64, ascending, shape (k,)."""
        rng = np.random.default_rng([RANDOM_K, self.seed, round])
        chosen = rng.choice(layout.size, kept_count(self.density, layout.size), replace=False, shuffle=False)
        return torch.from_numpy(np.sort(chosen).astype(np.int64))

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the coordinates of the round, sparse; measures `density` and `compression_error` (before the scaling)."""
        step = _on_support(update, _support(self, ctx), ctx.layout)
        k = kept_count(self.density, ctx.layout.size)
        return Step(scale(step.update, ctx.layout.size / k), None, step.measurements) if self.scale and k else step

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return the incoming bound, `UNBOUNDED` where values are scaled."""
        return UNBOUNDED if self.scale and self.density < 1 else incoming


@dataclass(frozen=True)
class CommonMask(Transform):
    """Keep one part of a random partition of the coordinates, the same for all users of a round, another part in each round.

    The partition has `P = ceil(1 / (fresh density))` parts (at most d); within P rounds every coordinate is kept at least once, and
    then another partition is drawn. Of each P consecutive coordinates `P g .. P g + P - 1` one is kept a round, `(r_g + round) mod P`
    with r_g by public seed: each tensor has its share, and finding a support takes time and memory O(k).

    With `fresh` under 1 only that part of the k coordinates is of the partition. The others are the largest magnitudes of an average of
    what was released before: coordinates that moved most go on moving, and the fresh ones find those that should. Neither depends on
    anybody's data of this round, so that the noise need not cover the other coordinates: its norm falls by sqrt(k / d). The server tells
    clients the support then, which counts as bytes on the way down.

    Attributes:
        density: part that is kept at most, in (0, 1]. With `fresh = 1` it is one over a whole number, 1 / P.
        seed: public; with the round and d it gives the fresh part.
        fresh: part of the k that comes from the partition, in (0, 1].
    """

    stage_name: ClassVar[str] = "common_mask"
    density: float
    seed: int = 0
    fresh: float = 1.0

    def __post_init__(self) -> None:
        check_density(self.density)
        _check_seed(self.seed)
        if not 0 < self.fresh <= 1:
            raise ValueError(f"Expected 0 < fresh <= 1, got {self.fresh}; without fresh coordinates the first ones would stay for good.")

    @property
    def needs_average(self) -> bool:
        """Whether the support depends on what was released before."""
        return self.fresh < 1

    def period(self, layout: Layout) -> int:
        """Return P: after so many rounds every coordinate was kept."""
        # A density of 1/3 is no float number: the ceiling of its inverse must not be 4.
        return max(1, min(layout.size, math.ceil(1 / (self.fresh * self.density) - 1e-9)))

    def support(self, round: int, layout: Layout, average: torch.Tensor | None = None) -> torch.Tensor:
        """Return the coordinates of a round: int64, ascending. What both parts choose counts once."""
        fresh = self._fresh(round, layout)
        if not self.needs_average or average is None:
            return fresh
        top = largest(average, max(0, kept_count(self.density, layout.size) - fresh.numel()))
        return torch.from_numpy(np.union1d(fresh.numpy(), top.cpu().numpy()))

    def _fresh(self, round: int, layout: Layout) -> torch.Tensor:
        parts = self.period(layout)
        cycle, part = divmod(round - 1, parts)
        groups = -(-layout.size // parts)
        shifts = np.random.default_rng([COMMON_MASK, self.seed, cycle]).integers(parts, size=groups)
        chosen = np.arange(groups, dtype=np.int64) * parts + (shifts + part) % parts
        return torch.from_numpy(chosen[chosen < layout.size])

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the coordinates of the round, sparse; measures `density` and `compression_error`."""
        return _on_support(update, _support(self, ctx), ctx.layout)

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return the incoming bound: dropping only shrinks."""
        return incoming


def check_density(density: float) -> None:
    """Refuse a density that is none.

    Raises:
        ValueError: it is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"Expected 0 < density <= 1, got {density}; it is the part of the coordinates that is sent, 0.001 for 0.1 %.")


def check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is none of those allowed.

    Raises:
        ValueError: names the key, the value and the allowed ones.
    """
    if value not in allowed:
        raise ValueError(f"Expected {key} to be one of {', '.join(allowed)}; got '{value}'.")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"Expected seed >= 0, got {seed}; the seed is public, any number will do.")


def _support(stage: RandomK | CommonMask, ctx: Ctx) -> torch.Tensor:
    """Return the coordinates of a round: those that were found for all users of it, where they were."""
    return stage.support(ctx.round, ctx.layout) if ctx.support is None else ctx.support


def _on_support(update: Update, support: torch.Tensor, layout: Layout) -> Step:
    vector = to_dense(update, layout)
    support = support.to(vector.device)
    return _kept(update, Sparse(support, vector[support]), layout)


def _kept(before: Update, after: Sparse, layout: Layout) -> Step:
    """Return a step that dropped some coordinates: what was lost follows from the norms, as both parts are orthogonal."""
    whole, kept = norm(before), norm(after)
    lost = math.sqrt(max(0.0, 1 - (kept / whole) ** 2)) if whole else 0.0
    return Step(after, None, {"density": after.values.numel() / max(1, layout.size), "compression_error": lost})
