"""The exact sum: every user's update goes onto one fixed-point grid of 64-bit integers, whose sum does not know any order.

Each update is rounded toward zero on its own, so that what one user adds is an integer vector that no other user can change, and
its norm is at most the norm of the update: a bound that held before the grid holds on it. Sums of integers are exact, so the
result has the same bits for every number of workers and every order.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fedclip.update import SPAN, Dense, Scaled, Update, is_float32_factor, values_of, zeros

CAPACITY_BITS = 20
"""A bounded sum has room for 2^20 users, whoever comes: the grid of a private sum must not depend on the cohort."""

UNBOUNDED_RANGE = 64.0
"""Without a clip, a coordinate of an update may not exceed this: parameters that move by more in one round have diverged."""

SUM_BITS = 62


class FoldOverflow(ArithmeticError):  # noqa: N818 - named like Python's own ArithmeticErrors
    """An update that does not fit the grid. The sum is left as it was."""


@dataclass(frozen=True)
class Grid:
    """Fixed-point numbers with a resolution of `2 ** -exponent`, and the limits that keep their sum from wrapping.

    Attributes:
        exponent: binary digits after the point.
        largest: greatest absolute value of one user's coordinate.
        capacity: most users in a sum.
    """

    exponent: int
    largest: float
    capacity: int

    @classmethod
    def for_bound(cls, bound: float, users: int, largest_weight: float = 1.0) -> "Grid":
        """Return the finest grid that holds a sum.

        Args:
            bound: bound on the norm of one user's update, hence on each coordinate; infinite: `UNBOUNDED_RANGE` is the limit.
            users: most users of an unbounded sum; a bounded one has room for 2^20 and ignores this.
            largest_weight: greatest weight that multiplies an update.
        """
        bounded = math.isfinite(bound)
        largest = (bound if bounded else UNBOUNDED_RANGE) * largest_weight
        capacity = 1 << (CAPACITY_BITS if bounded else max(1, users).bit_length())
        return cls(SUM_BITS - (capacity.bit_length() - 1) - math.ceil(math.log2(largest)), largest, capacity)

    def check(self, update: Update, weight: float = 1.0) -> None:
        """Refuse an update that does not fit when it is multiplied by a weight.

        Raises:
            FoldOverflow: a coordinate exceeds the limit.
        """
        values = values_of(update)
        top = float(values.abs().amax()) * weight if values.numel() else 0.0
        if not top <= self.largest:
            raise FoldOverflow(
                f"Expected coordinates up to {self.largest:g}, got {top:g}; training diverged: lower the local rate, "
                "or add a clip to the client chain."
            )


@dataclass(frozen=True, eq=False)
class Addend:
    """What a user adds to a sum: `weight` times an update; `within`: its norm is within the bound that the grid is for, so that it fits."""

    update: Update
    weight: float = 1.0
    within: bool = False


class Fold:
    """A running sum on a grid. Two folds of the same grid merge exactly, in any order.

    Args:
        size: coordinates d.
        grid: the grid.
        device: where the sum lies.
    """

    def __init__(self, size: int, grid: Grid, device: str = "cpu") -> None:
        self.grid = grid
        self.total = zeros(size, np.int64).to(device)
        self.users = 0

    def add(self, update: Update, weight: float = 1.0, *, within: bool = False) -> None:
        """Add `weight` times an update; `within`: it is known to fit, because its norm is within the bound that the grid is for.

        Raises:
            FoldOverflow: a coordinate exceeds the grid's limit, or more users than it has room for; nothing was added.
        """
        for overflow in self.add_all([Addend(update, weight, within)]):
            if overflow is not None:
                raise overflow

    def add_all(self, addends: Sequence[Addend]) -> list[FoldOverflow | None]:
        """Add what some users add, in one pass over the sum where all are dense; return for each why it was not added, or None."""
        refused, dense = list[FoldOverflow | None](), list[tuple[Dense, float]]()
        for addend in addends:
            try:
                if not addend.within:
                    self.grid.check(addend.update, addend.weight)
                self._check_room(1)
            except FoldOverflow as overflow:
                refused.append(overflow)
                continue
            refused.append(None)
            self.users += 1
            if isinstance(addend.update, Dense) and self.total.device.type == "cpu":
                dense.append((addend.update, addend.weight))
            else:
                self._add(addend.update, addend.weight)
        if dense:
            self._add_dense(dense)
        return refused

    def _add(self, update: Update, weight: float) -> None:
        digits = self._digits(values_of(update).to(self.total.device), weight)
        if isinstance(update, Dense):
            self.total += digits
        else:
            self.total.scatter_add_(0, update.indices.to(self.total.device), digits)

    def _add_dense(self, addends: Sequence[tuple[Dense, float]]) -> None:
        # By NumPy into buffers that are kept: it adds int64 numbers in less than half of torch's time, and all stays in caches.
        parts = [self._parts(update, weight) for update, weight in addends]
        sources = [values.numpy() for values, _ in parts]
        total, (rounded, exact, digits), start = self.total.numpy(), self._scratch, 0
        for spans in zip(*(_spans(scales) for _, scales in parts), strict=True):
            end = start + spans[0][-1][1]
            n, place = digits[: end - start], total[start:end]
            for source, cuts in zip(sources, spans, strict=True):
                x = (rounded if isinstance(cuts[0][2], np.float32) else exact)[: end - start]
                for first, last, scale in cuts:
                    if isinstance(scale, np.float32):
                        np.multiply(source[start + first : start + last], scale, out=x[first:last])
                    else:
                        np.copyto(x[first:last], source[start + first : start + last])
                        x[first:last] *= scale
                np.copyto(n, x, casting="unsafe")
                place += n
            start = end

    def _parts(self, update: Dense, weight: float) -> tuple[torch.Tensor, list[tuple[int, np.floating]]]:
        """Return values, and the length of each part with what brings it onto the grid: float32 where that has the same digits.

        They have, as a power of two only moves the exponent of what a factor gives. What float32 holds with fewer than 24 bits, under
        2^-126, is rounded otherwise, but is 0 on any grid up to 1e30.
        """
        unit = 2.0**self.grid.exponent
        parts = update.parts if isinstance(update, Scaled) else ((len(update.vector), 1.0),)
        scales = [factor * unit for _, factor in parts]
        if weight != 1.0 or not all(is_float32_factor(s) for s in [unit, *scales]):
            return update.vector.cpu(), [(len(update.vector), np.float64(weight * unit))]
        values = (update.unscaled if isinstance(update, Scaled) else update.vector).cpu()
        return values, [(size, np.float32(scale)) for (size, _), scale in zip(parts, scales, strict=True)]

    @cached_property
    def _scratch(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.empty(SPAN, dtype=np.float32), np.empty(SPAN), np.empty(SPAN, dtype=np.int64)

    def _digits(self, values: torch.Tensor, weight: float) -> torch.Tensor:
        exact = values.double() * weight if weight != 1.0 else values.double()
        return exact.mul_(2.0**self.grid.exponent).to(torch.int64)

    def merge(self, total: np.ndarray, users: int) -> None:
        """Add the sum of another fold on the same grid: `total` int64, shape (d,), over `users` users.

        Raises:
            FoldOverflow: more users than the grid has room for; nothing was added.
            ValueError: the sum has another shape or type, so that it is not of this grid.
        """
        if total.shape != self.total.shape or total.dtype != np.int64:
            raise ValueError(f"Expected an int64 sum of shape {tuple(self.total.shape)}, got {total.dtype} {total.shape}.")
        self._check_room(users)
        if self.total.device.type == "cpu":
            np.add(self.total.numpy(), total, out=self.total.numpy())  # a sum as it came, which may not be written to
        else:
            self.total += torch.from_numpy(total.copy()).to(self.total.device)
        self.users += users

    def result(self) -> torch.Tensor:
        """Return the sum as float64, shape (d,)."""
        return self.total.double().mul_(2.0**-self.grid.exponent)

    def _check_room(self, users: int) -> None:
        if self.users + users > self.grid.capacity:
            raise FoldOverflow(f"Expected at most {self.grid.capacity} users in a sum, got {self.users + users}; lower the cohort.")


def _spans(parts: Sequence[tuple[int, np.floating]]) -> Iterator[list[tuple[int, int, np.floating]]]:
    """Yield for each span of a vector what parts of it have which scale: first, one past the last, scale."""
    filled, cuts = 0, list[tuple[int, int, np.floating]]()
    for length, scale in parts:
        left = length
        while left:
            taken = min(left, SPAN - filled)
            cuts.append((filled, filled + taken, scale))
            filled, left = filled + taken, left - taken
            if filled == SPAN:
                yield cuts
                filled, cuts = 0, []
    if cuts:
        yield cuts
