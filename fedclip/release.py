"""`Release`: the one place that sees the raw sum. Noise and division happen here; what leaves is all that the server chain sees.

Nothing of the sum may reach the server chain by another way: no norm of it, no count of who took part under noise.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np

from fedclip.choices import NoiseSplit
from fedclip.layout import Layout
from fedclip.transform import Bound


class Normals(Protocol):
    """What noise is made of: a NumPy generator, or one `DrawnAhead`."""

    def standard_normal(self, size: int) -> np.ndarray:
        """Return the next standard normal numbers, float64, shape (size,)."""


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise on every coordinate of the sum.

    Layer h gets the standard deviation `sigma_h = z s_h`, where the scales meet `sum_h (C_h / s_h)^2 = 1`: then the whole is one
    Gaussian mechanism with the noise multiplier z, `z = (sum_h (C_h / sigma_h)^2)^(-1/2)`. Splits: `isotropic`: `s_h = C`, the same
    noise on all coordinates; `bounds`: `s_h = C_h sqrt(H)`, noise in proportion to each layer's bound; `weights`: in proportion to given
    numbers. All but the first need a bound for each layer.

    The noise is sampled in float64; guarantees hold under real arithmetic (float sampling is not hardened).

    Attributes:
        noise_multiplier: z. With `isotropic` the standard deviation on the sum is `z C`, and on the mean `z C / S`.
        split: how the noise is split over the layers.
        weights: for `split = "weights"`: one number over 0 for each layer, in order.
    """

    stage_name: ClassVar[str] = "gaussian"
    noise_multiplier: float
    split: NoiseSplit = "isotropic"
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (self.noise_multiplier > 0 and math.isfinite(self.noise_multiplier)):
            raise ValueError(
                f"Expected a finite noise_multiplier over 0, got {self.noise_multiplier}; leave the mechanism out for no noise."
            )
        if (self.split == "weights") != bool(self.weights):
            raise ValueError(f"Expected noise weights with split = 'weights' and only then, got '{self.split}' and {self.weights}.")
        if any(not (w > 0 and math.isfinite(w)) for w in self.weights):
            raise ValueError(f"Expected finite noise weights over 0, got {self.weights}.")

    def deviations(self, bound: Bound, layout: Layout) -> tuple[float, ...]:
        """Return the standard deviation on the sum for each layer of `layout.grouped(bound.layers)`.

        Raises:
            ValueError: the bound is infinite; there is no bound for each layer, and the split needs one; or the number of weights
                is not that of the layers.
        """
        if not math.isfinite(bound.total):
            raise ValueError("Expected a bounded chain under noise, got an infinite bound; end the client chain with a clip.")
        sizes = layout.grouped(bound.layers).layer_sizes
        if self.split == "isotropic":
            return (self.noise_multiplier * bound.total,) * len(sizes)
        if bound.per_layer is None:
            raise ValueError(
                f"Noise split by '{self.split}' needs a bound for each layer, and the last clip gives one for the whole; "
                "use clip_per_layer in mode clip, or the split 'isotropic'."
            )
        if self.split == "weights" and len(self.weights) != len(sizes):
            raise ValueError(f"Expected {len(sizes)} noise weights, one for each layer, got {len(self.weights)}.")
        weights = self.weights or bound.per_layer
        there = [(c, w) for c, w, d in zip(bound.per_layer, weights, sizes, strict=True) if d]
        scale = self.noise_multiplier * math.hypot(*(c / w for c, w in there))
        return tuple(scale * w for w in weights)

    def noise(self, bound: Bound, layout: Layout, rng: Normals) -> np.ndarray:
        """Return the noise on a sum, float64, shape (d,).

        Raises:
            ValueError: as `deviations`.
        """
        layout = layout.grouped(bound.layers)
        deviations = self.deviations(bound, layout)
        noise, start = rng.standard_normal(layout.size), 0
        for layer, size in zip(layout.layer_of, layout.sizes, strict=True):
            noise[start : start + size] *= deviations[layer]
            start += size
        return noise


class DrawnAhead:
    """A stream whose next standard normal numbers another thread draws meanwhile: the same numbers, there when they are asked for.

    Args:
        rng: the stream; it may be used again when the numbers have been asked for.
        size: how many numbers.
    """

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        thread = ThreadPoolExecutor(1, "fedclip-noise")
        self._numbers: Future[np.ndarray] | None = thread.submit(rng.standard_normal, size)
        thread.shutdown(wait=False)  # it ends with what it was given

    def standard_normal(self, size: int) -> np.ndarray:
        """Return the numbers, float64, shape (size,); once, as whoever gets them may write to them."""
        numbers, self._numbers = self._numbers, None
        if numbers is None or size != numbers.result().size:
            drawn = "none any more" if numbers is None else f"the {numbers.result().size} that were drawn ahead"
            raise ValueError(f"Expected to be asked for {drawn}, got {size}: noise falls on one sum alone.")
        return numbers.result()


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

    def apply(self, total: np.ndarray, weight: float, bound: Bound, layout: Layout, rng: Normals) -> np.ndarray:
        """Return the released mean.

        Args:
            total: the sum over users, float64, shape (d,).
            weight: the sum of the users' weights; read only where it is the denominator.
            bound: the bound that the guard enforced on each user.
            layout: how the vector is made up.
            rng: the stream of the noise of this attempt.

        Returns:
            float64, shape (d,). Without noise and with nobody there it is zero; under noise an empty cohort releases noise on zero.
        """
        if self.mechanism is not None:
            noised = self.mechanism.noise(bound, layout, rng)
            noised += total  # in place: of a large model each vector is gigabytes
            total = noised
        denominator = weight if self.denominator == "weights" else self.denominator
        if not denominator:
            return np.zeros_like(total)
        mean: np.ndarray = np.divide(total, denominator, out=total if self.mechanism is not None else None)
        return mean
