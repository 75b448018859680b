"""`Claim`: what a method says of its noise on a layout, worked out here a second time and not by the mechanism that draws it."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedclip.layout import Layout
from fedclip.method import Method
from fedclip.release import Gaussian
from fedclip.transform import Bound

Support = Callable[[int], np.ndarray | None]
"""The coordinates on which users may send anything in a round, bool, shape (d,): public, the same whoever takes part. None: all."""


@dataclass(frozen=True, eq=False)
class Claim:
    """The noise that a release must have.

    Attributes:
        noise_multiplier: z of update and clip bits together.
        bound: the bound on one user's update.
        layers: for each coordinate its layer in `names`, int64, shape (d,).
        names: the layers.
        deviations: standard deviation on the sum for each layer.
        clip_bits: how many clip bits each user says, H.
        bits_deviation: standard deviation on the sum of the bits, each centred (1/2 or -1/2); 0 without bits.
        mechanism: what it is a claim of.
        update_multiplier: z of the update alone.
    """

    noise_multiplier: float
    bound: Bound
    layers: np.ndarray
    names: tuple[str, ...]
    deviations: tuple[float, ...]
    clip_bits: int
    bits_deviation: float
    mechanism: Gaussian
    update_multiplier: float

    def on(self, support: np.ndarray) -> "Claim":
        """Return the claim where only some coordinates are sent, bool, shape (d,): layers that have none of them get no part of z."""
        sizes = np.bincount(self.layers[support], minlength=len(self.names)).tolist()
        return dataclasses.replace(self, deviations=_deviations(self.mechanism, self.update_multiplier, self.bound, sizes))

    @property
    def by_coordinate(self) -> np.ndarray:
        """The standard deviation on the sum for each coordinate, float64, shape (d,)."""
        return np.asarray(np.asarray(self.deviations)[self.layers])

    @property
    def largest_update(self) -> np.ndarray:
        """The norm in each layer of a user that uses all of the bound, shape (H,); spread evenly where only the total is bounded."""
        there = np.bincount(self.layers, minlength=len(self.names)) > 0
        if self.bound.per_layer is not None:
            return np.where(there, self.bound.per_layer, 0.0)
        return np.where(there, self.bound.total / math.sqrt(max(1, there.sum())), 0.0)

    @property
    def update_shift(self) -> float:
        """How far one user moves the released update, in units of its noise: `sqrt(sum (C_h / sigma_h)^2)`."""
        return math.hypot(*(c / s for c, s in zip(self.largest_update, self.deviations, strict=True) if c))

    @property
    def bits_shift(self) -> float:
        """How far one user moves the released clip bits, in units of their noise: `sqrt(H) / (2 s)`."""
        return math.sqrt(self.clip_bits) / (2 * self.bits_deviation) if self.clip_bits else 0.0


def claim_of(method: Method, layout: Layout) -> Claim:
    """Return what a method under noise claims on a layout in its first round.

    Raises:
        ValueError: the method has no noise.
    """
    mechanism, thresholds = mechanism_of(method), method.thresholds(layout)
    bound = method.for_round(thresholds, layout).bound(layout)
    grouped = layout.grouped(bound.layers)
    layers = np.repeat(np.asarray(grouped.layer_of, dtype=np.int64), np.asarray(grouped.sizes, dtype=np.int64))
    bits_deviation = method.adaptive.bits_noise * method.sampler.expected_cohort if method.adaptive is not None else 0.0
    z = mechanism.noise_multiplier
    if thresholds:  # what the bits spend of z is left over for the update
        z = 1 / math.sqrt(z**-2 - len(thresholds) / (2 * bits_deviation) ** 2)
    deviations = _deviations(mechanism, z, bound, grouped.layer_sizes)
    names, joint = grouped.layer_names, mechanism.noise_multiplier
    return Claim(joint, bound, layers, names, deviations, len(thresholds), bits_deviation, mechanism, z)


def mechanism_of(method: Method) -> Gaussian:
    """Return what adds the noise.

    Raises:
        ValueError: nothing does.
    """
    if method.release.mechanism is None:
        raise ValueError("Expected a method under noise, got one without: it claims nothing that an audit could look at.")
    return method.release.mechanism


def with_noise(method: Method, noise_multiplier: float) -> Method:
    """Return the method with another z."""
    changed = dataclasses.replace(mechanism_of(method), noise_multiplier=noise_multiplier)
    return dataclasses.replace(method, release=dataclasses.replace(method.release, mechanism=changed))


def _deviations(mechanism: Gaussian, z: float, bound: Bound, sizes: Sequence[int]) -> tuple[float, ...]:
    """Return `sigma_h` such that `sum (C_h / sigma_h)^2 = z^-2`; the same for all layers where only the total is bounded."""
    if mechanism.split == "isotropic" or bound.per_layer is None:
        return tuple(z * bound.total for _ in sizes)
    there = [c for c, d in zip(bound.per_layer, sizes, strict=True) if d]
    if mechanism.split == "bounds":
        return tuple(z * c * math.sqrt(len(there)) for c in bound.per_layer)
    shares = [c / w for c, w, d in zip(bound.per_layer, mechanism.weights, sizes, strict=True) if d]
    return tuple(z * w * math.sqrt(math.fsum(s**2 for s in shares)) for w in mechanism.weights)
