"""Stages that round values onto a grid of few bits, which the codec then writes and loses nothing.

They come last in a chain: a stage that scales the update after them takes it off its grid. Rounding may enlarge an update a little;
where it was clipped before, the chain's guard takes that back after decoding.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedclip.layout import Layout
from fedclip.transform import Bound, Ctx, State, Step, Transform
from fedclip.update import Codes, Dense, Grid, Half, Sparse, Update, block_lengths, decoded, norm, pieces, values_of

LARGEST_HALF = 65504.0

SMALLEST_FLOAT = 2.0**-149
"""The smallest subnormal float32 number over 0."""

LARGEST_CODE = 127


class Rounding(Transform):
    """A stage that rounds. It gives back the incoming bound, which the guard of the chain enforces after decoding."""

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return the incoming bound."""
        return incoming

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int | None:
        """Return what comes in: rounding changes no form."""
        return incoming


@dataclass(frozen=True)
class Fp16(Rounding):
    """Round to the nearest float16 number: 11 significant bits, relative error up to 2^-11 = 0.05 % from 6.1e-5 to 65504.

    Under 6.1e-5 steps are 6e-8, whatever the value: updates as small as a low clip bound makes them are better off with
    `quantize`, whose blocks have scales. Values over 65504 become 65504.
    """

    stage_name: ClassVar[str] = "fp16"

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the rounded update; measures `compression_error`."""
        values = values_of(update)
        return rounded(update, values.clamp(-LARGEST_HALF, LARGEST_HALF).half().float(), Half())


@dataclass(frozen=True)
class Quantize(Rounding):
    """Round to whole multiples of a scale for each block of values: `q s`, `|q| <= 2^(bits-1) - 1`, `s = max |x| / (2^(bits-1) - 1)`.

    Stochastic rounding takes `floor(x / s)` or the next number, so that the expectation is x (QSGD, arXiv 1610.02132). The nearest
    number errs less, by a factor of about sqrt 2, but is biased. Codes are symmetric: -2^(bits-1) is never used. 8 bits in blocks of
    32 is the integer microscaling format with a float32 scale in the place of a power of two: 9 bits a value. Blocks begin anew at
    each tensor, and hold the values that are stored: of a sparse update only the kept ones.

    The scale of a block is that of its largest value: a single large one makes the others of its block coarse.

    Attributes:
        bits: of a code, 2 to 8.
        block: values that share a scale, which is 32 bits.
        stochastic: unbiased rounding; else to the nearest, ties to even.
    """

    stage_name: ClassVar[str] = "quantize"
    bits: int = 8
    block: int = 32
    stochastic: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Expected 2 <= bits <= 8, got {self.bits}; for one bit take sign, for sixteen fp16.")
        if self.block < 1:
            raise ValueError(f"Expected block >= 1, got {self.block}; 32 and 256 are usual.")

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the rounded update; measures `compression_error`."""
        values, top = values_of(update), 2 ** (self.bits - 1) - 1
        scales = _scales(_block_maxima(update, ctx.layout, self.block), top)
        lengths = block_lengths(update, ctx.layout, self.block)
        ratios = _ratios(values, scales, lengths)
        if self.stochastic:
            below = ratios.floor()
            coins = torch.from_numpy(ctx.rng.random(values.numel(), dtype=np.float32)).to(values.device)
            whole = below + (coins < ratios - below)
        else:
            whole = ratios.round()
        codes = _codes(whole, top, scales, lengths)
        return rounded(update, decoded(codes, scales, lengths), Codes(codes, scales, self.block, self.bits))


@dataclass(frozen=True)
class Sign(Rounding):
    """One bit a value: `sign(x) * mean |x|`, the mean over each tensor's stored values (arXiv 1802.04434, 1901.09847).

    The sign of 0 is +1. Biased, so that it wants error feedback around it. It never enlarges the L2 norm, in real arithmetic.
    """

    stage_name: ClassVar[str] = "sign"

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the signs times the scale; measures `compression_error`."""
        parts = pieces(update, ctx.layout)
        block = max([1, *(p.numel() for p in parts)])
        means = [p.abs().mean(dtype=torch.float64).float() for p in parts if p.numel()]
        values = values_of(update)
        scales = torch.stack(means) if means else values.new_zeros(0)
        codes = torch.where(values >= 0, 1, -1).to(torch.int8)
        return rounded(update, decoded(codes, scales, block_lengths(update, ctx.layout, block)), Codes(codes, scales, block, 1))


@dataclass(frozen=True)
class Entropy(Rounding):
    """Round to the nearest multiple of one step for the whole model, and send what is not 0: few coordinates, and small numbers.

    Uniform quantisation with an entropy coder behind it is close to the rate-distortion bound of updates (arXiv 2201.02664). Here
    the step is `step` times the root mean square of the stored values, and the coder is that of the codec, so that a `packed` codec is
    needed to gain from it. A tensor with a value over 127 steps has a larger step of its own, `max |x| / 127`. Biased, as small values
    are dropped: with error feedback around it they come later.

    Attributes:
        step: in units of the RMS; 2 drops about two thirds of normally distributed values, 4 drops 95 %.
    """

    stage_name: ClassVar[str] = "entropy"
    step: float = 2.0

    def __post_init__(self) -> None:
        if not (self.step > 0 and math.isfinite(self.step)):
            raise ValueError(f"Expected step > 0, got {self.step}; it is in units of the update's root mean square, 1 to 4 are usual.")

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the coordinates that do not round to 0, sparse; measures `density` and `compression_error`."""
        values, layout = values_of(update), ctx.layout
        step = self.step * norm(update) / math.sqrt(max(1, values.numel()))
        block = max([1, *(p.numel() for p in pieces(update, layout))])
        scales = _scales(_block_maxima(update, layout, block), LARGEST_CODE, step)
        lengths = block_lengths(update, layout, block)
        every = _codes(_ratios(values, scales, lengths).round(), LARGEST_CODE, scales, lengths)
        places = every.nonzero().flatten()
        kept = Sparse(places if isinstance(update, Dense) else update.indices[places], values[places])
        # A tensor of which nothing is left has no block, and no scale.
        owners = [p.numel() > 0 for p in pieces(update, layout)]
        left = [p.numel() > 0 for p, owned in zip(pieces(kept, layout), owners, strict=True) if owned]
        scales, codes = scales[torch.tensor(left, dtype=torch.bool, device=scales.device)], every[places]
        values = decoded(codes, scales, block_lengths(kept, layout, block))
        after = Sparse(kept.indices, values, Codes(codes, scales, block, _bits(codes)))
        measured = {"density": places.numel() / max(1, layout.size), "compression_error": _sparse_error(update, kept, values)}
        return Step(after, None, measured)

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int:
        """Return what comes in, all of it where nothing rounds to 0."""
        return layout.size if incoming is None else incoming


def rounded(update: Update, values: torch.Tensor, grid: Grid) -> Step:
    """Return the step of a stage that rounded an update's stored values; measures `compression_error`, the relative L2 error."""
    before = norm(update)
    error = norm(Dense(values_of(update) - values)) / before if before else 0.0
    after = Dense(values, grid) if isinstance(update, Dense) else Sparse(update.indices, values, grid)
    return Step(after, None, {"compression_error": error})


def _block_maxima(update: Update, layout: Layout, block: int) -> torch.Tensor:
    """Return the largest magnitude of each block of stored values, float32, shape (blocks,)."""
    found = []
    for piece in pieces(update, layout):
        full = piece.numel() // block * block
        if full:
            found.append(piece[:full].view(-1, block).abs().amax(1))
        if full < piece.numel():
            found.append(piece[full:].abs().amax().reshape(1))
    return torch.cat(found) if found else values_of(update).new_zeros(0)


def _scales(maxima: torch.Tensor, top: int, least: float = 0.0) -> torch.Tensor:
    """Return the float32 scale of each block: `max(largest / top, least)`, 0 only where all of the block is 0."""
    scales = (maxima.double() / top).clamp_min(max(least, SMALLEST_FLOAT)).float()
    return torch.where(maxima > 0, scales, 0.0)


def _ratios(values: torch.Tensor, scales: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return each value over the scale of its block, 0 where that is 0."""
    divisors = torch.where(scales > 0, scales, 1.0)
    return values / divisors.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=scales.device))


def _codes(whole: torch.Tensor, top: int, scales: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Return whole numbers as codes, within -top .. top, and nearer to 0 where the product with the scale would be infinite."""
    codes = whole.clamp(-top, top).to(torch.int8)
    if bool((scales * top).isinf().any()):
        codes = torch.where(decoded(codes, scales, lengths).isinf(), codes - codes.sign(), codes)
    return codes


def _bits(codes: torch.Tensor) -> int:
    """Return 1, 4 or 8: the fewest bits for codes without 0 of which a byte holds a whole number, so that bytes repeat as codes do."""
    largest = int(codes.abs().amax()) if codes.numel() else 1
    return 1 if largest <= 1 else 4 if largest <= 7 else 8


def _sparse_error(before: Update, kept: Sparse, after: torch.Tensor) -> float:
    """Return the relative L2 error where some values were dropped and the others rounded."""
    whole = norm(before)
    if not whole:
        return 0.0
    dropped = max(0.0, 1 - (norm(kept) / whole) ** 2)
    return math.sqrt(dropped + (norm(Dense(kept.values - after)) / whole) ** 2)
