"""`Bench`: rounds of a method whose releases can be seen, through the functions that every run goes through, which `System` names."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedclip.client import train_blocks as train
from fedclip.collector import Collector, Contribution, Partial, pack_bits
from fedclip.layout import Layout
from fedclip.method import Method, ServerState
from fedclip.optimizers import SGD
from fedclip.round import Outcome, Plan, begin, finish
from fedclip.schedules import Schedule
from fedclip.site import Site
from fedclip.spec import Block, RoundSpec
from fedclip.tally import Tally
from fedclip.transform import PROBE, Chain, ErrorFeedback, Transform
from fedclip.update import Dense
from fedclip.user_states import UserStates
from fedclip.wire import Wire


@dataclass(frozen=True)
class System:
    """The functions of a round that an audit drives: by default the ones that every run goes through.

    A test of the audit itself puts a wrong one in the place of a right one.

    Attributes:
        begin: draws the cohort and says what clients are to do.
        collector: decodes, guards and folds.
        train: trains the users of some blocks, with what is kept of them, and returns their sum.
        finish: releases the mean and takes the server step.
    """

    begin: Callable[[Method, ServerState, Layout, str, str], Plan] = begin
    collector: Callable[[RoundSpec, Layout], Collector] = Collector
    train: Callable[[Site, RoundSpec, Iterable[Block], UserStates], Partial] = train
    finish: Callable[[Method, ServerState, Layout, Plan, Iterable[Partial]], Outcome] = finish


@dataclass(frozen=True, eq=False)
class Bench:
    """A method on zero parameters whose server takes the released mean as its step, so that the next parameters are its negative.

    Attributes:
        method: the method; its server chain is replaced.
        layout: of the vectors.
        system: the functions of a round.
        secret: the master secret of the random streams.
    """

    method: Method
    layout: Layout
    system: System = field(default_factory=System)
    secret: str = "audit"

    def __post_init__(self) -> None:
        seen = dataclasses.replace(self.method, server=Chain((SGD(Schedule.of(1.0)),)))
        object.__setattr__(self, "method", seen)

    @property
    def denominator(self) -> float:
        """The public number that the sum is divided by."""
        if self.method.release.denominator == "weights":
            raise ValueError("Expected a method under noise, whose denominator is public; this one divides by the weights of who came.")
        return float(self.method.release.denominator)

    def state(self, round: int, attempt: int = 0) -> ServerState:
        """Return the state before an attempt at a round."""
        initial = ServerState.initial(torch.zeros(self.layout.size), self.method, self.layout)
        return dataclasses.replace(initial, round=round - 1, attempt=attempt, average=self._average(round))

    def _average(self, round: int) -> torch.Tensor | None:
        """Return what was released before, as far as a common mask is concerned: numbers of no user, others in each round."""
        if not self.method.client.needs_average:
            return None
        return torch.randn(self.layout.size, generator=torch.Generator().manual_seed(round))

    def plan(self, round: int, attempt: int = 0) -> Plan:
        """Return what an attempt at a round is to do."""
        return self.system.begin(self.method, self.state(round, attempt), self.layout, self.secret, "audit")

    def outcome(self, plan: Plan, partials: Iterable[Partial] = ()) -> Outcome:
        """Return what the attempt makes of these sums."""
        streams = plan.spec.streams
        return self.system.finish(self.method, self.state(streams.round, streams.attempt), self.layout, plan, partials)

    def released(self, plan: Plan, partials: Iterable[Partial] = ()) -> np.ndarray:
        """Return the released sum: the mean that the server sees times the public denominator; float64, shape (d,)."""
        return self.seen(self.outcome(plan, partials))

    def seen(self, outcome: Outcome) -> np.ndarray:
        """Return the released sum of an outcome."""
        return -outcome.state.params.double().numpy() * self.denominator

    def contributions(self, plan: Plan, vectors: Iterable[np.ndarray], clip_bits: Sequence[bool] | None = None) -> list[Contribution]:
        """Return what clients send who state what they like: these vectors, clip bits (by default all within the bound), any weight."""
        bits = pack_bits(clip_bits if clip_bits is not None else (True,) * plan.spec.clip_bits)
        updates = (Dense(torch.from_numpy(vector.astype(np.float32))) for vector in vectors)
        wire = Wire.of(plan.spec, self.method.client, self.layout)
        payloads = (wire.encode(update) for update in updates)
        return [Contribution(user, payload, 2.0, {"users": 1.0}, clip_bits=bits) for user, payload in enumerate(payloads)]

    def sums_of(self, plan: Plan, vectors: Iterable[np.ndarray], clip_bits: Sequence[bool] | None = None) -> Partial:
        """Return the sum over such contributions, decoded and guarded as any other."""
        collector = self.system.collector(plan.spec, self.layout)
        for contribution in self.contributions(plan, vectors, clip_bits):
            collector.take(0, contribution)
        return collector.partial()

    def support(self, round: int) -> np.ndarray | None:
        """Return the coordinates that users may send in a round, bool, shape (d,); None: all of them."""
        indices = self.method.client.support(round, self.layout, self._average(round))
        if indices is None:
            return None
        there = np.zeros(self.layout.size, dtype=bool)
        there[indices.numpy()] = True
        return there

    def nobody(self, plan: Plan, users: int) -> Partial:
        """Return the sum over users whose updates are zero, and whose clip bits cancel."""
        total = np.zeros(self.layout.size, dtype=np.int64)
        tallies: dict[int, Tally] = {0: {"users": float(users), "weight": float(users)}} if users else {}
        return Partial(total, users, tallies, (), (0,) * plan.spec.clip_bits)


def unmasked(method: Method) -> Method:
    """Return the method with all coordinates sent, where it has a common mask: the same mechanism on more coordinates."""

    def without(stage: Transform) -> Transform:
        if isinstance(stage, Chain):
            return Chain(tuple(without(s) for s in stage.stages))
        if isinstance(stage, ErrorFeedback):
            return ErrorFeedback(without(stage.inner))
        return stage if stage.support(1, PROBE) is None else Chain()

    client = Chain((without(method.client),))
    return dataclasses.replace(method, client=client) if method.client.support(1, PROBE) is not None else method


def users_of(plan: Plan) -> list[int]:
    """Return the cohort of a plan."""
    return [user for _, users in plan.blocks for user in users]


def compact(layout: Layout, elements: int) -> Layout:
    """Return the same tensors with so many elements each; empty ones stay empty."""
    return Layout(layout.names, tuple((elements,) if size else (0,) for size in layout.sizes), layout.layers)


def capped(layout: Layout, elements: int) -> Layout:
    """Return the same tensors with at most so many elements each."""
    return Layout(layout.names, tuple((min(size, elements),) for size in layout.sizes), layout.layers)
