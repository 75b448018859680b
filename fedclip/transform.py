"""`Transform`: one pure stage of a client chain; `chain` composes them; the bound on what leaves is derived, never typed in."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from fedclip.choices import Grouping
from fedclip.layout import Layout
from fedclip.update import LARGEST_FLOAT, Dense, Update, add, subtract, unmeasured, values_of, zeros

State = Any
"""A transform's state: None, a tensor, or a tuple of states. A state is never changed in place."""

Measurements = Mapping[str, float | tuple[float, ...]]
"""What a stage measured of one user, by name: a number, or one number a layer. Not private."""


@dataclass(frozen=True)
class Bound:
    """A bound on the L2 norm of one user's update.

    Attributes:
        total: bound on the norm of the whole vector; infinite when nothing bounds it.
        per_layer: bounds on the norms of the layers, where each is bounded by itself; None otherwise.
        layers: what those layers are.
    """

    total: float
    per_layer: tuple[float, ...] | None = None
    layers: Grouping = "tensor"


UNBOUNDED = Bound(math.inf)

LARGEST_RESIDUAL = 100.0
"""How many times what came in, or what went out, error feedback keeps at most. What a top-k of density p leaves is at most
`sqrt(1 / p - 1)` times what it sends, so that one of a ten-thousandth or more loses nothing."""

PROBE = Layout(("probe",), ((),), ("probe",))
"""A layout of one number, to ask stages what they are."""


@dataclass(frozen=True, eq=False)
class Ctx:
    """What a stage may know of the round beside the update and its own state.

    Attributes:
        layout: how the vector is made up.
        stream: this user's stream for the chain, or what gives it, the same object whenever it is called: most chains never draw.
        round: round number, from 1.
        params: the parameters that the user started from, shape (d,).
        weight: this user's weight, in (0, 1] under privacy.
        support: the coordinates that are sent in this round, where the server says which; None: the stage itself knows.
    """

    layout: Layout
    stream: np.random.Generator | Callable[[], np.random.Generator]
    round: int
    params: torch.Tensor
    weight: float = 1.0
    support: torch.Tensor | None = None

    @property
    def rng(self) -> np.random.Generator:
        """This user's stream for the chain."""
        return self.stream if isinstance(self.stream, np.random.Generator) else self.stream()


@dataclass(frozen=True, eq=False)
class Step:
    """What a stage gives back: the new update, its new state, what it measured, and of a clip whether the norm was within each bound."""

    update: Update
    state: State = None
    measurements: Measurements = field(default_factory=dict)
    clip_bits: tuple[bool, ...] = ()


class Transform(ABC):
    """One pure stage: inputs stay unchanged, no global random state, nothing hidden.

    Subclasses are frozen dataclasses whose fields are the numbers of an experiment file; that is all that travels.
    """

    stage_name: ClassVar[str] = ""
    """The name in experiment files; empty for a stage that comes through a door."""

    @property
    def name(self) -> str:
        """The name by which messages know the stage."""
        return self.stage_name or type(self).__name__

    def init(self, layout: Layout) -> State:
        """Return the state of a user that was never seen. A stage without state keeps None."""
        return None

    @abstractmethod
    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return the transformed update, the next state and the measurements."""

    @abstractmethod
    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return the bound on what this stage lets out, given the bound on what comes in.

        A stage that rounds may give back the incoming bound: the guard of the chain enforces it after decoding. A stage
        that can enlarge an update without limit gives `UNBOUNDED`.
        """

    @property
    def guard(self) -> "Transform | None":
        """The stateless projection that enforces this stage's bound, None when the stage is no clip.

        On an update that this stage has clipped it is the identity.
        """
        return None

    def unbounded_stage(self) -> "Transform | None":
        """Return what inside this stage undoes its own clip; None for a stage that holds no others."""
        return None

    def has_momentum(self, ndim: int) -> bool:
        """Return whether this stage keeps a momentum for tensors of `ndim` dimensions."""
        return False

    def support(self, round: int, layout: Layout, average: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the only coordinates that this stage lets out in a round, the same for all users; None: any.

        It depends on nothing but public numbers and what was released before. So it needs no bytes on the wire, and noise on these
        coordinates alone hides a user.

        Args:
            round: round number, from 1.
            layout: how the vector is made up.
            average: of what was released before, shape (d,), where `needs_average`; None before the first release.

        Returns:
            int64, ascending and distinct, shape (k,).
        """
        return None

    @property
    def needs_average(self) -> bool:
        """Whether the support depends on what was released before, so that the server has to tell it to clients."""
        return False

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int | None:
        """Return how many values a sparse update stores at most that this stage lets out; None: what it lets out is dense.

        A stage that says nothing lets out any. A server takes no longer payloads than the codec makes of so many.

        Args:
            round: round number, from 1.
            layout: how the vector is made up.
            incoming: the same of what comes in.
        """
        return layout.size


@dataclass(frozen=True)
class Chain(Transform):
    """Stages applied one after another. Its state is the tuple of theirs, its guard that of its last clip.

    Raises:
        ValueError: one of them is no `Transform`.
    """

    stages: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        for stage in self.stages:
            if not isinstance(stage, Transform):
                raise ValueError(f"Expected stages that transform an update, got {stage!r}; is it a stage of another section?")
        # A chain in a chain is its stages: none of them may hide behind the guard of another.
        flat = (s.stages if isinstance(s, Chain) else (s,) for s in self.stages)
        object.__setattr__(self, "stages", tuple(stage for part in flat for stage in part))

    @property
    def name(self) -> str:
        """The names of the stages."""
        return "chain(" + ", ".join(s.name for s in self.stages) + ")"

    def init(self, layout: Layout) -> State:
        """Return the initial states of the stages."""
        return tuple(s.init(layout) for s in self.stages)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Apply each stage to what the one before let out; measurements of one name, and clip bits, keep the last."""
        states, measured, bits = [], dict[str, float | tuple[float, ...]](), tuple[bool, ...]()
        for stage, before in zip(self.stages, state, strict=True):
            # What was measured of an update is for clips alone: another stage may hand it on though it has changed the values.
            step = stage.apply(update if stage.guard is stage else unmeasured(update), before, ctx)
            update = unmeasured(step.update)
            states.append(step.state)
            measured.update(step.measurements)
            bits = step.clip_bits or bits
        return Step(update, tuple(states), measured, bits)

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return what the guard enforces; `UNBOUNDED` where a stage after the last clip can enlarge the update without limit."""
        if self.guard is not None:
            return UNBOUNDED if self.unbounded_stage() else self.guard.bound(incoming, layout)
        for stage in self.stages:
            incoming = stage.bound(incoming, layout)
        return incoming

    @property
    def guard(self) -> Transform | None:
        """The guard of the last stage that has one."""
        return next((s.guard for s in reversed(self.stages) if s.guard is not None), None)

    def unbounded_stage(self) -> Transform | None:
        """Return the first stage after the last clip that bounds nothing, whatever comes in; None where there is none."""
        clips = [i for i, s in enumerate(self.stages) if s.guard is not None]
        probe = Bound(1.0)
        after = self.stages[clips[-1] + 1 :] if clips else self.stages
        within = self.stages[clips[-1]].unbounded_stage() if clips else None
        return within or next((s for s in after if not math.isfinite(s.bound(probe, PROBE).total)), None)

    def has_momentum(self, ndim: int) -> bool:
        """Return whether any stage keeps a momentum for tensors of `ndim` dimensions."""
        return any(s.has_momentum(ndim) for s in self.stages)

    def support(self, round: int, layout: Layout, average: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the support of the last stage that has one."""
        found = (s.support(round, layout, average) for s in reversed(self.stages))
        return next((s for s in found if s is not None), None)

    @property
    def needs_average(self) -> bool:
        """Whether any stage's support depends on what was released before."""
        return any(s.needs_average for s in self.stages)

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int | None:
        """Return what the last stage lets out, given what the others do."""
        for stage in self.stages:
            incoming = stage.stored(round, layout, incoming)
        return incoming


def chain(*stages: Transform) -> Chain:
    """Return the stages as one transform, applied from left to right; `chain()` is the identity."""
    return Chain(stages)


@dataclass(frozen=True)
class ErrorFeedback(Transform):
    """Adds what `inner` did not let through to the next update of the same user (Seide et al. 2014; arXiv 1901.09847).

    `x = inner(update + e)`, `e <- update + e - x`, where `e` is cut to `LARGEST_RESIDUAL` times the norm of `x` or of the update,
    whichever is larger: one update that is far too large, before a clip, is not sent for ever after. The residual may grow, so that
    nothing bounds what goes into `inner`: the bound of the whole is what `inner` enforces on an unbounded input, and a clip that comes
    before counts for nothing.

    Raises:
        ValueError: `inner` can enlarge an update without limit, so that the residual would grow for ever.
    """

    stage_name: ClassVar[str] = "with_error_feedback"
    inner: Transform

    def __post_init__(self) -> None:
        if self.inner.guard is None and not math.isfinite(self.inner.bound(Bound(1.0), PROBE).total):
            raise ValueError(
                f"Expected error feedback around a stage that only loses something, got {self.inner.name}, which can enlarge an update: "
                "the residual would grow from round to round."
            )

    @property
    def name(self) -> str:
        """The wrapper and what it wraps."""
        return f"with_error_feedback({self.inner.name})"

    def init(self, layout: Layout) -> State:
        """Return a zero residual, shape (d,), and the state of `inner`."""
        return zeros(layout.size), self.inner.init(layout)

    def apply(self, update: Update, state: State, ctx: Ctx) -> Step:
        """Return what `inner` lets through of the update plus the residual."""
        residual, before = state
        whole = add(update, Dense(residual.to(values_of(update).device)), ctx.layout)
        whole.vector.clamp_(-LARGEST_FLOAT, LARGEST_FLOAT)  # two finite numbers may add up to infinity
        step = self.inner.apply(whole, before, ctx)
        left = subtract(whole, step.update, ctx.layout).vector
        came, went, there = (torch.linalg.vector_norm(v, dtype=torch.float64) for v in (values_of(update), values_of(step.update), left))
        most = LARGEST_RESIDUAL * torch.maximum(came, went)
        left.mul_(torch.where(there > most, most / there, 1.0))
        return Step(step.update, (left, step.state), step.measurements, step.clip_bits)

    def bound(self, incoming: Bound, layout: Layout) -> Bound:
        """Return the bound of `inner` alone."""
        return self.inner.bound(UNBOUNDED, layout)

    @property
    def guard(self) -> Transform | None:
        """The guard of `inner`."""
        return self.inner.guard

    def unbounded_stage(self) -> Transform | None:
        """Return what `inner` returns."""
        return self.inner.unbounded_stage()

    def has_momentum(self, ndim: int) -> bool:
        """Return whether `inner` keeps a momentum for tensors of `ndim` dimensions."""
        return self.inner.has_momentum(ndim)

    def support(self, round: int, layout: Layout, average: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the support of `inner`."""
        return self.inner.support(round, layout, average)

    @property
    def needs_average(self) -> bool:
        """Whether the support of `inner` depends on what was released before."""
        return self.inner.needs_average

    def stored(self, round: int, layout: Layout, incoming: int | None = None) -> int | None:
        """Return what `inner` lets out of a dense update, as the residual makes it one."""
        return self.inner.stored(round, layout)


def with_error_feedback(inner: Transform) -> ErrorFeedback:
    """Return `inner` with error feedback around it."""
    return ErrorFeedback(inner)


def has_content(state: State) -> bool:
    """Return whether a state holds anything: whether there is something to keep between rounds."""
    return any(has_content(s) for s in state) if isinstance(state, tuple) else state is not None
