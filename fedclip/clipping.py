"""Clipping a user's update to an L2 bound: the whole vector at once, or layer by layer."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, get_args

from fedclip.choices import Grouping, Mode, Split
from fedclip.layout import Layout
from fedclip.transform import Bound, Ctx, State, Step, Transform
from fedclip.update import NORM_ERROR, Update, layer_norms, norm, quick_layer_norms, scale, scale_layers

SLACK = 1e-6
"""A clipped update ends this much under its bound, relatively: more than float32 rounding can add, so that a guard finds nothing to do."""

MOST = 1 + NORM_ERROR
"""What a norm that was summed quickly is multiplied by to be no less than the exact one: the bound holds whatever was rounded. Whether a
norm is over its bound is decided by the exact one where the quick one cannot tell."""

SMALLEST_BOUND = 1e-30
LARGEST_BOUND = 1e30

LARGEST_SPREAD = 1e6
"""Greatest ratio of two layers' weights: a bound far below the whole's could be under what float32 numbers resolve."""


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that brings a norm under its bound: 1 when `norm <= max_norm`, else `max_norm (1 - 1e-6) / norm`.

    | norm | max_norm | factor |
    | --- | --- | --- |
    | 0 | any | 1 |
    | at most max_norm | any | 1, so that the update keeps its bits |
    | over max_norm | 0 (an empty layer) | 0 |
    | over max_norm | over 0 | under 1 |
    """
    return 1.0 if norm <= max_norm else max_norm * (1 - SLACK) / norm


@dataclass(frozen=True)
class ClipByGlobalNorm(Transform):
    """`delta * min(1, C / ||delta||)`, the norm over the whole vector (arXiv 1710.06963).

    Guarantees: the result's norm, summed in float64, is at most `max_norm` for every finite update, up to 3e38 a value; an
    update within the bound keeps its bits; clipping twice is clipping once. A NaN or an infinity must not come in (the
    engine makes such an update the zero vector first).

    Attributes:
        max_norm: C, from 1e-30 to 1e30.
    """

    stage_name: ClassVar[str] = "clip_by_global_norm"
    max_norm: float

    def __post_init__(self) -> None:
        _check_max_norm(self.max_norm)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the clipped update; measures `update_norm` (before) and `clipped` (0 or 1)."""
        before, at_most = math.hypot(*quick_layer_norms(update, ctx.layout)), MOST
        if _near(before, self.max_norm):
            before, at_most = norm(update), 1.0
        clipped = before > self.max_norm
        measured = {"update_norm": before, "clipped": float(clipped)}
        return Step(scale(update, clip_factor(before * at_most, self.max_norm)), state, measured, (not clipped,))

    def thresholds(self, layout: Layout) -> tuple[float, ...]:
        """Return what adaptive clipping moves: C."""
        return (self.max_norm,)

    def with_thresholds(self, thresholds: tuple[float, ...], layout: Layout) -> "ClipByGlobalNorm":
        """Return the clip with another C."""
        return ClipByGlobalNorm(*thresholds)

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return C in total, nothing for single layers."""
        return Bound(self.max_norm)

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int | None:
        """Return what comes in: a factor changes no form."""
        return incoming

    @property
    def guard(self) -> Transform:
        """Itself."""
        return self


@dataclass(frozen=True)
class ClipPerLayer(Transform):
    """Clip each layer to its part of the bound: `sum_h C_h^2 = C^2` (arXiv 2310.00098, section 3 and Definition 3).

    Splits of C over H layers with d_h elements: `uniform`: `C / sqrt(H)`; `dim`: `C sqrt(d_h / sum d)`, which makes the
    signal-to-noise ratio of isotropic noise the same for all layers; `weights`: in proportion to given numbers.

    Modes: `clip` is the paper's: `delta_h * min(1, C_h / ||delta_h||)`. `normalize` is what the authors' code does: an update
    with `||delta|| < C` stays as it is, else every layer is scaled to C_h, small ones up; layers of norm 0 stay 0. Both keep
    the whole under C, but in `normalize` a layer may exceed its C_h, so that only the total is bounded.

    Attributes:
        max_norm: C, from 1e-30 to 1e30.
        split: how C is split over the layers.
        mode: `"clip"` or `"normalize"`.
        layers: what a layer is: each tensor (the paper's) or each block.
        weights: for `split = "weights"`: one number over 0 for each layer of the model, in order.
    """

    stage_name: ClassVar[str] = "clip_per_layer"
    max_norm: float
    split: Split = "dim"
    mode: Mode = "clip"
    layers: Grouping = "tensor"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_max_norm(self.max_norm)
        for key, value, allowed in (("split", self.split, Split), ("mode", self.mode, Mode), ("layers", self.layers, Grouping)):
            if value not in get_args(allowed):
                raise ValueError(f"Expected {key} to be one of {', '.join(get_args(allowed))}; got '{value}'.")
        object.__setattr__(self, "weights", tuple(float(w) for w in self.weights))
        if (self.split == "weights") != bool(self.weights):
            raise ValueError(
                f"Expected weights with split = 'weights' and only then, got split = '{self.split}' and weights {self.weights}."
            )
        if any(not (w > 0 and math.isfinite(w)) for w in self.weights):
            raise ValueError(f"Expected weights over 0, got {self.weights}.")
        if self.weights and max(self.weights) > LARGEST_SPREAD * min(self.weights):
            raise ValueError(f"Expected weights within a factor of {LARGEST_SPREAD:g} of each other, got {self.weights}.")

    def bounds(self, layout: Layout) -> tuple[float, ...]:
        """Return C_h for each layer of a layout; a layer without elements gets 0.

        Raises:
            ValueError: the number of weights is not the number of layers.
        """
        sizes = layout.layer_sizes
        if self.split == "weights" and len(self.weights) != len(sizes):
            names = ", ".join(layout.layer_names)
            raise ValueError(f"Expected {len(sizes)} weights, one for each of the layers {names}; got {len(self.weights)}.")
        return _bounds(self.max_norm, self.split, self.weights, sizes)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the clipped update; measures `update_norm`, `clipped` (of any layer), `layer_norm` and `layer_clipped`."""
        layout = ctx.layout.grouped(self.layers)
        bounds, norms, at_most = self.bounds(layout), quick_layer_norms(update, layout), MOST
        if _near(math.hypot(*norms), self.max_norm) or any(map(_near, norms, bounds)):
            norms, at_most = layer_norms(update, layout), 1.0
        total = math.hypot(*norms)
        if self.mode == "clip":
            factors = [clip_factor(n * at_most, c) for n, c in zip(norms, bounds, strict=True)]
        elif total < self.max_norm:
            factors = [1.0] * len(norms)
        else:
            factors = [c * (1 - SLACK) / (n * at_most) if n else 1.0 for n, c in zip(norms, bounds, strict=True)]
        clipped = tuple(float(n > c) for n, c in zip(norms, bounds, strict=True))
        measured: dict[str, float | tuple[float, ...]] = {
            "update_norm": total,
            "clipped": float(any(clipped)),
            "layer_norm": tuple(norms),
            "layer_clipped": clipped,
        }
        bits = tuple(n <= c for n, c, d in zip(norms, bounds, layout.layer_sizes, strict=True) if d)
        return Step(scale_layers(update, layout, factors), state, measured, bits if self.mode == "clip" else ())

    def thresholds(self, layout: Layout) -> tuple[float, ...]:
        """Return what adaptive clipping moves: C_h for each layer that has elements."""
        layout = layout.grouped(self.layers)
        return tuple(c for c, d in zip(self.bounds(layout), layout.layer_sizes, strict=True) if d)

    def with_thresholds(self, thresholds: tuple[float, ...], layout: Layout) -> "ClipPerLayer":
        """Return the clip with another C_h for each layer that has elements, in order."""
        given = iter(thresholds)
        weights = tuple(next(given) if d else min(thresholds) for d in layout.grouped(self.layers).layer_sizes)
        return ClipPerLayer(math.hypot(*thresholds), "weights", self.mode, self.layers, weights)

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return C in total, and C_h for each layer in `clip` mode."""
        per_layer = self.bounds(layout.grouped(self.layers))
        return Bound(math.hypot(*per_layer) or self.max_norm, per_layer if self.mode == "clip" else None, self.layers)

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int | None:
        """Return what comes in: a factor changes no form."""
        return incoming

    @property
    def guard(self) -> Transform:
        """The same projection in `clip` mode, the global one in `normalize` mode."""
        return self if self.mode == "clip" else ClipByGlobalNorm(self.max_norm)


@lru_cache(maxsize=64)
def _bounds(max_norm: float, split: Split, weights: tuple[float, ...], sizes: tuple[int, ...]) -> tuple[float, ...]:
    """Return each layer's part of a bound, for layers of so many elements; kept, as it is asked for with every user."""
    if split == "weights":
        largest = max(weights)
        squares = [(w / largest) ** 2 if d else 0.0 for w, d in zip(weights, sizes, strict=True)]
    elif split == "dim":
        squares = [float(d) for d in sizes]
    else:
        squares = [float(d > 0) for d in sizes]
    total = math.fsum(squares) or 1.0
    return tuple(max_norm * math.sqrt(s / total) for s in squares)


def _near(norm: float, max_norm: float) -> bool:
    """Return whether it takes the exact norm to say if one that was summed quickly is over a bound."""
    return norm / MOST <= max_norm <= norm * MOST


def _check_max_norm(max_norm: float) -> None:
    if not SMALLEST_BOUND <= max_norm <= LARGEST_BOUND:
        raise ValueError(
            f"Expected {SMALLEST_BOUND:g} <= max_norm <= {LARGEST_BOUND:g}, got {max_norm}; leave the clip out to have no bound."
        )
