"""Server optimizers: the last stage of the server chain. Each turns a released mean update into the step `theta <- theta - step`.

Updates are old parameters minus new ones, so that they point like gradients. State is float32, shape (d,), on the server only.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from fedclip.choices import Grouping
from fedclip.layout import Layout
from fedclip.schedules import Schedule
from fedclip.transform import UNBOUNDED, Bound, Ctx, State, Step, Transform
from fedclip.update import Dense, Update, blockwise, layer_norms, scale_layers, times, to_dense


class Optimizer(Transform):
    """A server stage that sets the size of the step itself: nothing of what comes in bounds it."""

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return `UNBOUNDED`."""
        return UNBOUNDED

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> None:
        """Return None: a step is dense."""
        return


@dataclass(frozen=True)
class SGD(Optimizer):
    """`b <- momentum b + g; step = lr b`, with Nesterov `lr (g + momentum b)` (the definition of `torch.optim.SGD`).

    Attributes:
        lr: server learning rate by round.
        momentum: in [0, 1).
        nesterov: look ahead; needs momentum.
        momentum_1d: for tensors of one dimension or none; None: as for the others. Deep Gradient Compression sends these densely and
            has their momentum here, and that of the others on the clients (arXiv 1712.01887).
    """

    stage_name: ClassVar[str] = "sgd"
    lr: Schedule
    momentum: float = 0.0
    nesterov: bool = False
    momentum_1d: float | None = None

    def __post_init__(self) -> None:
        if self.nesterov and not (self.momentum or self.momentum_1d):
            raise ValueError(f"Expected momentum over 0 with nesterov = true, got {self.momentum}.")

    def init(self, layout: Layout) -> State:
        """Return a zero momentum, None where there is none."""
        return torch.zeros(layout.size) if self.momentum or self.momentum_1d else None

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the step and the next momentum."""
        g, lr = to_dense(update, ctx.layout), self.lr(ctx.round)
        if state is None:
            return Step(Dense(g * lr))
        momentum = self._momentum(ctx.layout)
        buffer = momentum * state + g
        direction = g + momentum * buffer if self.nesterov else buffer
        return Step(Dense(direction * lr), buffer)

    def has_momentum(self, ndim: int) -> bool:
        """Return whether momentum is on for tensors of `ndim` dimensions."""
        return (self.momentum if ndim > 1 or self.momentum_1d is None else self.momentum_1d) > 0

    def _momentum(self, layout: Layout) -> float | torch.Tensor:
        if self.momentum_1d is None:
            return self.momentum
        of_tensor = [self.momentum_1d if len(shape) <= 1 else self.momentum for shape in layout.shapes]
        return torch.tensor(of_tensor).repeat_interleave(torch.tensor(layout.sizes))


@dataclass(frozen=True)
class Moments:
    """Adam's state: steps taken, and the averages of g and g^2, shape (d,)."""

    steps: int
    first: torch.Tensor
    second: torch.Tensor

    @classmethod
    def zero(cls, layout: Layout) -> "Moments":
        """Return the state before the first step."""
        return cls(0, torch.zeros(layout.size), torch.zeros(layout.size))

    def next(self, g: torch.Tensor, betas: tuple[float, float]) -> "Moments":
        """Return the averages with g taken in."""
        b1, b2 = betas
        first = blockwise(lambda m, new: m * b1 + new * (1 - b1), self.first, g)
        return Moments(self.steps + 1, first, blockwise(lambda v, new: v * b2 + new * new * (1 - b2), self.second, g))

    def direction(self, betas: tuple[float, float], eps: float) -> torch.Tensor:
        """Return `m / (sqrt(v) + eps)` of the bias-corrected averages."""
        b1, b2 = betas
        of_first, of_second = 1 - b1**self.steps, 1 - b2**self.steps
        return blockwise(lambda m, v: (m / of_first) / ((v / of_second).sqrt() + eps), self.first, self.second)


@dataclass(frozen=True)
class Adam(Optimizer):
    """`step = lr (m / (sqrt(v) + eps) + weight_decay theta)` (arXiv 1412.6980; the decay is decoupled as in 1711.05101).

    Attributes:
        lr: server learning rate by round.
        betas: decay of the first and second moment.
        eps: added outside the root. Mean updates under a small clip bound are as small as the usual 1e-8: it is a real knob.
        weight_decay: 0 is Adam, over 0 is AdamW.
    """

    stage_name: ClassVar[str] = "adam"
    lr: Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def init(self, layout: Layout) -> State:
        """Return zero moments."""
        return Moments.zero(layout)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the step and the next moments."""
        moments = state.next(to_dense(update, ctx.layout), self.betas)
        direction = moments.direction(self.betas, self.eps)
        if self.weight_decay:
            direction = blockwise(lambda u, theta: u + self.weight_decay * theta, direction, ctx.params)
        return Step(Dense(direction.mul_(self.lr(ctx.round))), moments)  # a vector of this step alone

    def has_momentum(self, ndim: int) -> bool:
        """Return whether the first moment averages over rounds."""
        return self.betas[0] > 0


@dataclass(frozen=True)
class LAMB(Optimizer):
    """`step_h = lr r_h u_h`, `u = m / (sqrt(v) + eps) + weight_decay theta`, `r_h = ||theta_h|| / ||u_h||` (arXiv 1904.00962).

    `r_h` is 1 where either norm is 0, and then kept within `trust_bounds`. With r unbounded and no tensor exempt it is the server
    step of arXiv 2310.00098, Algorithm 1; the theory there assumes a bound.

    Attributes:
        lr: server learning rate by round.
        betas: decay of the first and second moment.
        eps: added outside the root; under small clip bounds it exceeds the moments, and LAMB acts as layer-normalised momentum.
        weight_decay: pulls parameters to 0 inside u.
        trust_bounds: least and greatest r_h.
        layers: what a layer is: each tensor (the paper's) or each block.
    """

    stage_name: ClassVar[str] = "lamb"
    lr: Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    trust_bounds: tuple[float, float] = (0.0, float("inf"))
    layers: Grouping = "tensor"

    def __post_init__(self) -> None:
        if not 0 <= self.trust_bounds[0] <= self.trust_bounds[1]:
            raise ValueError(f"Expected trust_bounds = [least, greatest] with 0 <= least <= greatest, got {list(self.trust_bounds)}.")

    def init(self, layout: Layout) -> State:
        """Return zero moments."""
        return Moments.zero(layout)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the step and the next moments; measures `trust_ratio` of each layer."""
        layout = ctx.layout.grouped(self.layers)
        moments = state.next(to_dense(update, layout), self.betas)
        direction = moments.direction(self.betas, self.eps)
        if self.weight_decay:
            direction = blockwise(lambda u, theta: u + self.weight_decay * theta, direction, ctx.params)
        u, theta = layer_norms(Dense(direction), layout), layer_norms(Dense(ctx.params), layout)
        least, greatest = self.trust_bounds
        ratios = tuple(min(max(t / n if t and n else 1.0, least), greatest) for t, n in zip(theta, u, strict=True))
        lr = self.lr(ctx.round)
        for layer, piece in zip(layout.layer_of, layout.split(direction), strict=True):  # a vector of this step alone
            piece.copy_(times(piece, lr * ratios[layer]))
        return Step(Dense(direction), moments, {"trust_ratio": ratios})

    def has_momentum(self, ndim: int) -> bool:
        """Return whether the first moment averages over rounds."""
        return self.betas[0] > 0


@dataclass(frozen=True)
class LARS(Optimizer):
    """`b_h <- momentum b_h + lr trust r_h (g_h + weight_decay theta_h); step = b` (arXiv 1708.03888, Algorithm 1).

    `r_h = ||theta_h|| / (||g_h|| + weight_decay ||theta_h||)`, the sum of the two norms as in the paper, and 1 where one is 0.

    Attributes:
        lr: server learning rate by round.
        momentum: in [0, 1); the paper's is 0.9. It averages steps, so that a rate that falls does not reach back.
        trust: the paper's eta: the norm of a layer's step over that of the layer, at a rate of 1 and without momentum.
        weight_decay: pulls parameters to 0; the paper's beta.
        layers: what a layer is: each tensor (the paper's) or each block.
    """

    stage_name: ClassVar[str] = "lars"
    lr: Schedule
    momentum: float = 0.9
    trust: float = 1e-3
    weight_decay: float = 0.0
    layers: Grouping = "tensor"

    def init(self, layout: Layout) -> State:
        """Return a zero momentum, None where there is none."""
        return torch.zeros(layout.size) if self.momentum else None

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the step and the next momentum; measures `trust_ratio` of each layer, without `trust`."""
        layout = ctx.layout.grouped(self.layers)
        g = to_dense(update, layout)
        sizes, lengths = layer_norms(Dense(ctx.params), layout), layer_norms(Dense(g), layout)
        if self.weight_decay:
            g = g + self.weight_decay * ctx.params
        ratios = tuple(t / (n + self.weight_decay * t) if t and n else 1.0 for t, n in zip(sizes, lengths, strict=True))
        lr = self.lr(ctx.round) * self.trust
        step = to_dense(scale_layers(Dense(g), layout, [lr * r for r in ratios]), layout)
        buffer = step if state is None else self.momentum * state + step
        return Step(Dense(buffer), None if state is None else buffer, {"trust_ratio": ratios})

    def has_momentum(self, ndim: int) -> bool:
        """Return whether steps are averaged over rounds."""
        return self.momentum > 0


@dataclass(frozen=True)
class Yogi(Optimizer):
    """`v <- v - (1 - b2) g^2 sign(v - g^2); step = lr m / (sqrt(v) + eps)` (FedYogi, arXiv 2003.00295, Algorithm 2).

    As there, nothing corrects the bias of the averages, and v begins over 0.

    Attributes:
        lr: server learning rate by round.
        betas: decay of the first and second moment.
        eps: the paper's tau, outside the root.
        initial: v before the first round; None: `eps^2`, the least that the paper allows.
    """

    stage_name: ClassVar[str] = "yogi"
    lr: Schedule
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-3
    initial: float | None = None

    def init(self, layout: Layout) -> State:
        """Return a zero first moment and the initial second one."""
        return torch.zeros(layout.size), torch.full((layout.size,), self.eps**2 if self.initial is None else self.initial)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the step and the next moments."""
        g, (m, v), (b1, b2) = to_dense(update, ctx.layout), state, self.betas
        m, v = m * b1 + g * (1 - b1), v - (1 - b2) * g * g * torch.sign(v - g * g)
        return Step(Dense(m / (v.sqrt() + self.eps) * self.lr(ctx.round)), (m, v))

    def has_momentum(self, ndim: int) -> bool:
        """Return whether the first moment averages over rounds."""
        return self.betas[0] > 0


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """`v <- v + g^2; step = lr g / (sqrt(v) + eps)` (FedAdagrad, arXiv 2003.00295, with its beta1 of 0).

    Attributes:
        lr: server learning rate by round.
        eps: the paper's tau, outside the root.
        initial: v before the first round; None: `eps^2`, the least that the paper allows.
    """

    stage_name: ClassVar[str] = "adagrad"
    lr: Schedule
    eps: float = 1e-3
    initial: float | None = None

    def init(self, layout: Layout) -> State:
        """Return the initial sum of squares."""
        return torch.full((layout.size,), self.eps**2 if self.initial is None else self.initial)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the step and the next sum of squares."""
        g = to_dense(update, ctx.layout)
        v = state + g * g
        return Step(Dense(g / (v.sqrt() + self.eps) * self.lr(ctx.round)), v)
