"""Deep Gradient Compression (arXiv 1712.01887): local clipping, momentum correction, factor masking and warm-up, in one stage."""

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch

from fedclip.choices import Extent, Memory, Normalization, Precision, SmallTensors
from fedclip.clipping import clip_factor
from fedclip.layout import Layout
from fedclip.quantize import Fp16, Quantize
from fedclip.sparsify import check_choice, check_density, kept_count, largest_of_each
from fedclip.stages import PAPER_WARMUP
from fedclip.transform import UNBOUNDED, Bound, Ctx, State, Step, Transform
from fedclip.update import LARGEST_FLOAT, Dense, Sparse, Update, layer_norms, norm, scale, scale_layers, to_dense, values_of, zeros

ROUNDINGS: dict[Precision, Transform | None] = {"float32": None, "float16": Fp16(), "int8": Quantize(8, 256)}
"""The stage that rounds what is sent; int8 is stochastic, with one scale for 256 values."""


@dataclass(frozen=True)
class DGC(Transform):
    r"""Send the largest of what a user's gradients, with momentum, have added up to; keep the rest for later (arXiv 1712.01887).

    For each user and tensor, with g the update and I the `max(1, round(density n))` largest magnitudes of v:

        g <- g min(1, c / ||g||)                          local clipping, over the whole model or each tensor
        u <- m u + g          Nesterov: u <- m (u + g)    momentum correction
        v <- v + u            Nesterov: v <- v + u + g    local accumulation
        send s = v[I], rounded if asked
        v[I] <- v[I] - s                                  0 unless rounded
        u[I] <- 0                                         momentum factor masking

    The local threshold c follows from `clip_norm`, the one of the global gradient, and N = `nodes`: gradients of N nodes that
    are independent have a sum sqrt(N) times as long as one of them. Where the server takes the mean of undivided gradients
    (fedclip does), `c = clip_norm sqrt(N)`; where each node divides its gradient by N and the server sums, as in the paper,
    `c = clip_norm / sqrt(N)`. Both make the same step. The norm is that of the gradient before accumulation.

    Tensors with one dimension or none are sent whole by default, without momentum here: they have it on the server
    (`sgd = { lr = .., momentum_1d = 0.9 }`), and the other tensors must have none there. Whatever rounding takes off is kept in v,
    theirs too. Sums saturate at the largest float32 number.

    **The paper's configuration**: `local_sgd(lr = 1, steps = 1)` without momentum, everybody in every round (a cohort as large as
    the population), weights uniform, and server SGD with the learning rate, as a schedule where it moves. Then g is the gradient
    of one batch, and a round is an iteration of the paper's Algorithm. With more local steps, or a local rate of r, g is the
    whole local change: `clip_norm` is then in units of that, r times the gradient's. Weight decay belongs into the
    local step, before the accumulation.

    u and v are of the user: whoever takes part r times has sent about r density of what it holds, so that rare participants gain
    nothing from them, and two model copies are kept of each. With `state = "none"` nothing is kept: a user sends the largest of its
    clipped update, without momentum, and the rest is lost. The stage feeds its own losses back, and wants no error feedback around
    it. It can send any multiple of an update, so that nothing bounds it: clip after it.

    Attributes:
        density: part of a tensor that is sent once warmed up, in (0, 1]; the paper's is 0.001.
        momentum: m, in [0, 1).
        nesterov: look ahead; needs momentum.
        clip_norm: threshold of the global gradient's norm; None: no local clipping.
        clip_by: the norm is of the whole model, or `clip_norm` is for each tensor.
        nodes: N, how many users are in a round.
        normalization: what the server makes of the users' gradients: `"mean"` or `"sum"`.
        mask: momentum factor masking.
        warmup: pairs of a density and the number of rounds that it holds, from round 1 of the run; a density under `density` counts
            as that. The paper's last an epoch each; () begins with `density` at once.
        small: tensors with one dimension or none: `"dense"`, or `"sparse"` as the others.
        grid: what values are sent as: float32, float16 or int8 with a scale for 256 of them.
        state: keep u and v of each user, or of none.
    """

    stage_name: ClassVar[str] = "dgc"
    density: float = 0.001
    momentum: float = 0.9
    nesterov: bool = False
    clip_norm: float | None = None
    clip_by: Extent = "model"
    nodes: int = 1
    normalization: Normalization = "mean"
    mask: bool = True
    warmup: tuple[tuple[float, int], ...] = PAPER_WARMUP
    small: SmallTensors = "dense"
    grid: Precision = "float32"
    state: Memory = "user"

    def __post_init__(self) -> None:
        check_density(self.density)
        object.__setattr__(self, "warmup", tuple((float(density), int(rounds)) for density, rounds in self.warmup))
        for density, rounds in self.warmup:
            check_density(density)
            if rounds < 1:
                raise ValueError(f"Expected at least 1 round for each density of the warm-up, got {rounds} for {density}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"Expected 0 <= momentum < 1, got {self.momentum}.")
        if self.nesterov and not self.momentum:
            raise ValueError(f"Expected momentum over 0 with nesterov = true, got {self.momentum}.")
        if self.clip_norm is not None and not (self.clip_norm > 0 and math.isfinite(self.clip_norm)):
            raise ValueError(f"Expected clip_norm > 0, got {self.clip_norm}; leave it out to have no local clipping.")
        if self.nodes < 1:
            raise ValueError(f"Expected nodes >= 1, got {self.nodes}; it is the number of users in a round.")
        check_choice("clip_by", self.clip_by, get_args(Extent))
        check_choice("normalization", self.normalization, get_args(Normalization))
        check_choice("small", self.small, get_args(SmallTensors))
        check_choice("grid", self.grid, get_args(Precision))
        check_choice("state", self.state, get_args(Memory))
        if self.nesterov and self.state == "none":
            raise ValueError("Expected nesterov = false with state = 'none': there is no momentum to look ahead with.")

    def density_of(self, round: int) -> float:
        """Return the part of a tensor that is sent in a round, from 1."""
        last = 0
        for density, rounds in self.warmup:
            last += rounds
            if round <= last:
                return max(density, self.density)
        return self.density

    def threshold(self) -> float:
        """Return c, the threshold of one user's norm; infinite without `clip_norm`."""
        if self.clip_norm is None:
            return math.inf
        return self.clip_norm * (math.sqrt(self.nodes) if self.normalization == "mean" else 1 / math.sqrt(self.nodes))

    def init(self, layout: Layout) -> State:
        """Return u and v of zeros, float32, shape (d,) each; None where nothing is kept."""
        if self.state == "none":
            return None
        return zeros(layout.size), zeros(layout.size)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return what is sent, sparse, and the next u and v.

        Measures `density`, `compression_error` (the norm of what stays in v over that of v before), and with local clipping
        `local_clipped` (0 or 1).
        """
        layout = ctx.layout
        clipped = self._clip(update, layout)
        g = to_dense(clipped, layout)
        u, v = self._accumulate(g, state, layout) if state is not None else (g, g.clone())
        before = norm(Dense(v))
        indices = self._chosen(v, layout, self.density_of(ctx.round))
        sent: Update = Sparse(indices, v[indices])
        rounding = ROUNDINGS[self.grid]
        if rounding is not None:
            sent = rounding.apply(sent, None, ctx).update
        v.index_add_(0, indices, values_of(sent), alpha=-1)
        if self.mask and state is not None:
            u.index_fill_(0, indices, 0.0)
        measured = {
            "density": indices.numel() / max(1, layout.size),
            "compression_error": norm(Dense(v)) / before if before else 0.0,
        }
        if self.clip_norm is not None:
            measured["local_clipped"] = float(clipped is not update)
        return Step(sent, None if state is None else (u, v), measured)

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return `UNBOUNDED`: what was accumulated over many rounds may leave in one."""
        return UNBOUNDED

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int:
        """Return how many coordinates are sent in a round, of whatever comes in."""
        return sum(self._counts(layout, self.density_of(round)))

    def has_momentum(self, ndim: int) -> bool:
        """Return whether tensors of `ndim` dimensions have their momentum here: all but small ones that are sent whole."""
        return self.momentum > 0 and self.state == "user" and not self._is_whole(ndim)

    def _is_whole(self, ndim: int) -> bool:
        return ndim <= 1 and self.small == "dense"

    def _clip(self, update: Update, layout: Layout) -> Update:
        """Return the update within the local threshold; the same object where it is."""
        limit = self.threshold()
        if self.clip_by == "model":
            return scale(update, clip_factor(norm(update), limit))
        tensors = layout.grouped("tensor")
        return scale_layers(update, tensors, [clip_factor(n, limit) for n in layer_norms(update, tensors)])

    def _accumulate(self, g: torch.Tensor, state: State, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next u and v before anything is sent: new tensors."""
        u, v = (part.to(g.device, copy=True) for part in state)
        for shape, of_g, of_u, of_v in zip(layout.shapes, layout.split(g), layout.split(u), layout.split(v), strict=True):
            if self._is_whole(len(shape)):
                of_v.add_(of_g)
            elif self.nesterov:
                of_u.add_(of_g).mul_(self.momentum)
                of_v.add_(of_u).add_(of_g)
            else:
                of_u.mul_(self.momentum).add_(of_g)
                of_v.add_(of_u)
        return u.clamp_(-LARGEST_FLOAT, LARGEST_FLOAT), v.clamp_(-LARGEST_FLOAT, LARGEST_FLOAT)

    def _chosen(self, v: torch.Tensor, layout: Layout, density: float) -> torch.Tensor:
        """Return which coordinates are sent: int64, ascending, at least one of each tensor that has any."""
        return largest_of_each(layout.split(v), self._counts(layout, density))

    def _counts(self, layout: Layout, density: float) -> list[int]:
        tensors = zip(layout.shapes, layout.sizes, strict=True)
        return [size if self._is_whole(len(shape)) else kept_count(density, size) for shape, size in tensors]
