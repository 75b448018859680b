"""`Update`: what one user sends, dense or sparse, and the few operations that clipping, guards, folds and codecs need of it."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fedclip.layout import ROW, Layout

FLOAT32_FACTORS = (1e-30, 1e30)
"""Outside this range a scale factor would lose bits or overflow as a float32 number: the product is taken in float64."""

LARGEST_FLOAT: float = torch.finfo(torch.float32).max

BLOCK = 1 << 18
"""Coordinates that are packed, or unpacked, in one step."""

LARGE = 1 << 24
"""Coordinates from which on memory comes before time: 64 MB of float32."""

SPAN = 1 << 15
"""Coordinates that are summed, brought onto a grid, or looked at by `blockwise` in one step: what it takes, float64 numbers too, a core's
second cache holds."""

NORM_ERROR = 8e-6
"""What a quick norm is off by at most, relatively: half of the `ROW` = 256 roundings of 2^-24 of its squares' sum, however ordered."""

SMALLEST_QUICK = 1e-20
"""A sum of squares over this has lost nothing that matters to squares too small for float32; one that is finite, none too large."""


@dataclass(frozen=True, eq=False)
class Half:
    """The stored values are all exact as float16 numbers."""


@dataclass(frozen=True, eq=False)
class Codes:
    """The stored values are small integers times a scale a block: `value = code * scale`, the float32 product.

    Blocks are of `block` stored values each, and begin anew at every tensor; a tensor's last one may be shorter.

    Attributes:
        codes: int8, shape (k,), one a stored value.
        scales: float32, shape (blocks,).
        block: stored values in a block, at least 1.
        bits: how many bits hold a code, 1 to 8; codes are within -(2^(bits-1) - 1) .. 2^(bits-1) - 1 (for one bit: -1 and 1).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: int
    bits: int


Grid = Half | Codes
"""Where rounded values lie, so that a codec can write them in less than 32 bits and lose nothing."""


@dataclass(frozen=True, eq=False)
class Dense:
    """Every coordinate.

    Attributes:
        vector: float32, shape (d,).
        grid: where the values lie, None for any float32 numbers.
        energies: the sum of the squares of each whole row of `ROW` coordinates, as float32 arithmetic rounds it, float32, shape
            (d // ROW,), where `measured` has summed them. In a chain they go no further than a clip at its beginning.
    """

    vector: torch.Tensor
    grid: Grid | None = None
    energies: np.ndarray | None = field(default=None, init=False)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Some coordinates, the others zero.

    `indices`: int64, ascending and distinct, shape (k,); `values`: float32, shape (k,); `grid`: as for `Dense`.
    """

    indices: torch.Tensor
    values: torch.Tensor
    grid: Grid | None = None


class Scaled(Dense):
    """A dense update, parts of which are still to be multiplied by a factor each.

    Its vector is made when somebody asks for it. A sum on the CPU never does: it multiplies what it has in its caches anyway, and saves
    a pass over memory.

    Args:
        unscaled: float32, shape (d,); whoever overwrites it takes the update with it.
        parts: the length of each part and its factor, in order.
    """

    def __init__(self, unscaled: torch.Tensor, parts: Sequence[tuple[int, float]]) -> None:
        self.unscaled, self.parts = unscaled, parts

    @cached_property
    def vector(self) -> torch.Tensor:
        """The float32 products, shape (d,)."""
        vector, lengths = torch.empty_like(self.unscaled), [length for length, _ in self.parts]
        pairs = zip(torch.split(vector, lengths), torch.split(self.unscaled, lengths), strict=True)
        for (out, values), (_, factor) in zip(pairs, self.parts, strict=True):
            torch.mul(values, factor, out=out)
        return vector


Update = Dense | Sparse


def values_of(update: Update) -> torch.Tensor:
    """Return the stored values: all d of a dense update, the k kept ones of a sparse update."""
    return update.vector if isinstance(update, Dense) else update.values


def with_values(update: Update, values: torch.Tensor) -> Update:
    """Return the same kind of update with other values, on no grid, at the same places."""
    return Dense(values) if isinstance(update, Dense) else Sparse(update.indices, values)


def pieces(update: Update, layout: Layout) -> tuple[torch.Tensor, ...]:
    """Return the stored values of each tensor, in order: views, never copies."""
    if isinstance(update, Dense):
        return layout.split(update.vector)
    return torch.split(update.values, layout.counts(update.indices))


def block_lengths(update: Update, layout: Layout, block: int) -> list[int]:
    """Return how many stored values each block of a `Codes` grid holds: blocks begin anew at every tensor."""
    return lengths_of_blocks(layout.sizes if isinstance(update, Dense) else layout.counts(update.indices), block)


def lengths_of_blocks(counts: Sequence[int], block: int) -> list[int]:
    """Return how many stored values each block holds where tensors store so many."""
    stored = np.array(counts, dtype=np.int64)
    blocks = -(-stored // block)
    lengths = np.full(int(blocks.sum()), block, dtype=np.int64)
    some = stored > 0
    lengths[np.cumsum(blocks)[some] - 1] = (stored - (blocks - 1) * block)[some]
    found: list[int] = lengths.tolist()
    return found


def decoded(codes: torch.Tensor, scales: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return the float32 values of codes, shape (k,): each times the scale of its block."""
    return codes.float() * scales.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=scales.device))


def blockwise(function: Callable[..., torch.Tensor], *vectors: torch.Tensor) -> torch.Tensor:
    """Return an elementwise function of vectors of one shape and type, block by block, so that what it needs on the way takes no room."""
    result = torch.empty_like(vectors[0])
    for out, *parts in zip(torch.split(result, SPAN), *(torch.split(v, SPAN) for v in vectors), strict=True):
        out.copy_(function(*parts))
    return result


def zeros(size: int, dtype: type[np.generic] = np.float32) -> torch.Tensor:
    """Return zeros on the CPU, shape (size,), that take memory where they are first written."""
    return torch.from_numpy(np.zeros(size, dtype))


def measured(vector: torch.Tensor, filled: Iterable[int]) -> Dense:
    """Return a vector that is being filled, float32, shape (d,), as an update; on the CPU with its energies, summed part by part.

    Args:
        vector: what is filled.
        filled: fills the next part at each step, and says how many values are there.
    """
    if vector.device.type != "cpu":
        deque(filled, 0)
        return Dense(vector)
    energies, values, done = np.empty(len(vector) // ROW, dtype=np.float32), vector.numpy(), 0
    with np.errstate(over="ignore", invalid="ignore"):
        for there in filled:
            rows = there // ROW
            _sum_rows(values[done * ROW : rows * ROW], energies[done:rows])
            done = rows
    update = Dense(vector)
    object.__setattr__(update, "energies", energies)
    return update


def subtracted(before: torch.Tensor, after: torch.Tensor) -> Iterator[int]:
    """Put `before - after`, both float32, shape (d,), in the place of `after`; yield after each part how many values are there."""
    if after.device.type != "cpu":
        yield len(torch.sub(before, after, out=after))
        return
    minuend, result = before.numpy(), after.numpy()  # a span takes NumPy half of torch's time
    for start in range(0, len(result), SPAN):
        part = result[start : start + SPAN]
        np.subtract(minuend[start : start + SPAN], part, out=part)
        yield start + len(part)


def unmeasured(update: Update) -> Update:
    """Return an update without energies, for whoever cannot know that they are still those of its vector; the same object without."""
    return Dense(update.vector, update.grid) if isinstance(update, Dense) and update.energies is not None else update


def _sum_rows(values: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """Put the sum of the squares of each whole row of `ROW` values in its place, and return them all."""
    rows = values[: len(values) - len(values) % ROW].reshape(-1, ROW)
    return np.vecdot(rows, rows, out=energies)


def is_finite(update: Update) -> bool:
    """Return whether no stored value is NaN or infinite."""
    values = values_of(update)
    if isinstance(update, Dense) and update.energies is not None:  # squares may overflow though no value is infinite
        rest = values[len(update.energies) * ROW :].numpy()
        if np.isfinite(update.energies).all() and np.isfinite(rest).all():
            return True
    # Without a temporary of the vector's size: a NaN or an infinity survives each reduction; a sum may overflow without one.
    if not values.numel() or math.isfinite(float(values.sum())):
        return True
    return math.isfinite(float(values.amin())) and math.isfinite(float(values.amax()))


def finite_or_zero(update: Update) -> tuple[Update, bool]:
    """Return the update and True, or the zero update and False where any value is NaN or infinite."""
    if is_finite(update):
        return update, True
    return with_values(update, torch.zeros_like(values_of(update))), False


def energy(values: torch.Tensor) -> float:
    """Return the sum of the squares of float32 values, summed in float64, so that values up to 3e38 do not overflow."""
    if values.device.type != "cpu":  # where each number that comes back is waited for
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    total = 0.0
    for part in torch.split(values, SPAN) if values.numel() > SPAN else (values,):
        exact = part.double()
        total += float(torch.dot(exact, exact))
    return total


def layer_norms(update: Update, layout: Layout) -> list[float]:
    """Return the L2 norm of each layer, summed in float64."""
    if isinstance(update, Sparse) and update.values.device.type == "cpu":
        # A few operations in the place of some for each tensor, which keeps few values.
        owners = np.repeat(np.array(layout.layer_of, dtype=np.int64), layout.counts(update.indices))
        squared = np.square(update.values.detach().numpy().astype(np.float64))
        found: list[float] = np.sqrt(np.bincount(owners, squared, len(layout.layer_names))).tolist()
        return found
    squares = [0.0] * len(layout.layer_names)
    for layer, piece in zip(layout.layer_of, pieces(update, layout), strict=True):
        squares[layer] += energy(piece)
    return [s**0.5 for s in squares]


def quick_layer_norms(update: Update, layout: Layout) -> list[float]:
    """Return the L2 norm of each layer within `NORM_ERROR` of the exact one, relatively: a dense update's in a fifth of the time.

    Products and sums of a row of `ROW` values are float32 numbers, which need no copy and are half as large; rows are added in float64.
    """
    if isinstance(update, Sparse) or update.vector.device.type != "cpu":
        return layer_norms(update, layout)
    values, rows, layers, of_rows = update.vector.detach().numpy(), layout.rows, len(layout.layer_names), update.energies
    with np.errstate(over="ignore"):
        if of_rows is None:
            of_rows = _sum_rows(values, np.empty(len(values) // ROW, dtype=np.float32))
        energies = np.concatenate([of_rows, np.square(values[rows.loose], dtype=np.float64)])
    squares: list[float] = np.bincount(rows.owners, energies, layers + 1)[:layers].tolist()
    if not all(SMALLEST_QUICK < s < math.inf for s in squares):
        return layer_norms(update, layout)
    return [math.sqrt(s) for s in squares]


def layer_sparsity(update: Update, layout: Layout) -> list[float]:
    """Return the share of each layer's coordinates that are zero, 0 to 1; of a layer without coordinates 0."""
    there = [0] * len(layout.layer_names)
    if isinstance(update, Sparse):
        counts = layout.counts(update.indices[update.values != 0])
    else:
        counts = [int(torch.count_nonzero(piece)) for piece in pieces(update, layout)]
    for layer, count in zip(layout.layer_of, counts, strict=True):
        there[layer] += count
    return [1 - n / size if size else 0.0 for n, size in zip(there, layout.layer_sizes, strict=True)]


def norm(update: Update) -> float:
    """Return the L2 norm of the whole update, summed in float64."""
    return math.sqrt(energy(values_of(update)))


def scale(update: Update, factor: float) -> Update:
    """Return the update times a number; the same object where the factor is 1."""
    if factor == 1.0:
        return update
    if isinstance(update, Dense) and is_float32_factor(factor):
        return Scaled(update.vector, ((len(update.vector), factor),))
    return with_values(update, times(values_of(update), factor))


def scale_layers(update: Update, layout: Layout, factors: Sequence[float]) -> Update:
    """Return the update with each layer times its factor; the same object where all factors are 1."""
    if all(f == 1.0 for f in factors):
        return update
    lossless = all(is_float32_factor(f) for f in factors)
    if isinstance(update, Dense) and lossless:
        return Scaled(update.vector, [(size, factors[h]) for size, h in zip(layout.sizes, layout.layer_of, strict=True)])
    if isinstance(update, Sparse) and lossless:
        # A factor a value, in few operations: a tensor keeps few values. The products are those of `times`.
        each = torch.tensor([factors[h] for h in layout.layer_of], dtype=torch.float32)
        of_values = each.repeat_interleave(torch.tensor(layout.counts(update.indices), dtype=torch.int64))
        return with_values(update, update.values * of_values.to(update.values.device))
    parts = zip(layout.layer_of, pieces(update, layout), strict=True)
    return with_values(update, torch.cat([times(p, factors[h]) if factors[h] != 1.0 else p for h, p in parts]))


def add(a: Update, b: Update, layout: Layout) -> Dense:
    """Return a + b as a dense update."""
    return Dense(to_dense(a, layout) + to_dense(b, layout))


def subtract(a: Update, b: Update, layout: Layout) -> Dense:
    """Return a - b as a dense update."""
    return Dense(to_dense(a, layout) - to_dense(b, layout))


def to_dense(update: Update, layout: Layout) -> torch.Tensor:
    """Return all d coordinates, shape (d,); a dense update gives its own vector, not a copy."""
    if isinstance(update, Dense):
        return update.vector
    vector = torch.zeros(layout.size, dtype=update.values.dtype, device=update.values.device)
    return vector.index_copy_(0, update.indices, update.values)


def is_float32_factor(factor: float) -> bool:
    """Return whether a factor, taken as a float32 number, loses no bits and does not overflow."""
    smallest, largest = FLOAT32_FACTORS
    return factor == 0.0 or smallest <= factor <= largest


def times(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Return float32 values times a number of any size."""
    if is_float32_factor(factor):
        return values * factor
    return (values.double() * factor).float()
