"""Remove one user and run again, for a client chain by itself: with the state of each user, hostile vectors, and any chain at all."""

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedclip.audit.findings import Finding
from fedclip.audit.hostile import KINDS, hostile_vector
from fedclip.audit.replay import CLOSE, Moved, ratio_to_bound
from fedclip.codec import Codec, DenseCodec
from fedclip.collector import Collector, Contribution, Partial, pack_bits
from fedclip.fold import Grid
from fedclip.layout import Layout
from fedclip.rng import Streams
from fedclip.spec import RoundSpec
from fedclip.stages import describe_stage
from fedclip.transform import UNBOUNDED, Bound, Chain, Ctx, State, Step, Transform
from fedclip.update import Dense, finite_or_zero, to_dense


def by_user(user: int, worker: int) -> Hashable:
    """Return the key of a state: the user that it is of."""
    return user


@dataclass(eq=False)
class World:
    """The clients of one world: a chain, and the states that it keeps from round to round.

    Attributes:
        chain: the client chain.
        layout: of the vectors.
        bound: the bound on what each user sends.
        key: under what a state is kept, by user and worker.
        codec: the wire format.
        collector: decodes, guards and folds.
        honest: whether clients apply the chain; else they send their vectors as they are.
        states: the states.
        sent: the most that an honest client sent, in units of the bound, before any guard.
    """

    chain: Chain
    layout: Layout
    bound: Bound
    key: Callable[[int, int], Hashable]
    codec: Codec
    collector: Callable[[RoundSpec, Layout], Collector]
    honest: bool = True
    states: dict[Hashable, State] = field(default_factory=dict)
    sent: float = 0.0

    def round(self, round: int, sent: Sequence[tuple[int, np.ndarray]]) -> Partial:
        """Return the sum over users with these vectors, dealt to two workers in turn."""
        spec = self.spec(round)
        collector = self.collector(spec, self.layout)
        for position, (user, vector) in enumerate(sent):
            step = self._step(Dense(torch.from_numpy(vector)), user, position % 2, spec)
            values = to_dense(finite_or_zero(step.update)[0], self.layout).double().numpy()
            self.sent = max(self.sent, ratio_to_bound(values, self.bound, self.layout))
            payload = self.codec.encode(step.update, self.layout)
            collector.take(0, Contribution(user, payload, 1.0, {"users": 1.0}, clip_bits=pack_bits(step.clip_bits)))
        return collector.partial()

    def _step(self, vector: Dense, user: int, worker: int, spec: RoundSpec) -> Step:
        """Return what a user sends."""
        if not self.honest:
            return Step(vector, clip_bits=(True,) * spec.clip_bits)
        key = self.key(user, worker)
        before = self.states[key] if key in self.states else self.chain.init(self.layout)
        ctx = Ctx(self.layout, spec.streams.generator("chain", user), spec.streams.round, torch.zeros(self.layout.size))
        step = self.chain.apply(finite_or_zero(vector)[0], before, ctx)
        self.states[key] = step.state
        return step

    def spec(self, round: int) -> RoundSpec:
        """Return the specification of a round; of the chain it has the guard, which is all that the collector makes of it."""
        zero = Dense(torch.zeros(self.layout.size))
        ctx = Ctx(self.layout, np.random.default_rng(0), round, zero.vector)
        return RoundSpec(
            streams=Streams("audit", "chain", round),
            local={},
            client=(describe_stage(self.chain.guard),) if self.chain.guard is not None else (),
            codec=describe_stage(self.codec),
            weighting="uniform",
            max_examples=None,
            private=True,
            clip_bits=len(self.chain.apply(zero, self.chain.init(self.layout), ctx).clip_bits),
            grid=Grid.for_bound(self.bound.total, 0),
            params=self.codec.encode(zero, self.layout),
        )


def audit_chain(
    chain: Transform,
    layout: Layout,
    *,
    rounds: int = 20,
    users: int = 8,
    removed: int = 2,
    seed: int = 0,
    key: Callable[[int, int], Hashable] = by_user,
    codec: Codec | None = None,
    collector: Callable[[RoundSpec, Layout], Collector] = Collector,
    support: np.ndarray | None = None,
    honest: bool = True,
) -> tuple[Finding, ...]:
    """Return how much a user's removal moves the sums of rounds of a client chain, stateful or not, on hostile vectors.

    Args:
        chain: the client chain, which must be bounded.
        layout: of the vectors.
        rounds: how many rounds.
        users: how many users there are; two out of three of them take part in a round.
        removed: how many of them are removed, each in a world of its own.
        seed: which vectors.
        key: under what a user's state is kept.
        codec: the wire format.
        collector: decodes, guards and folds.
        support: the coordinates that may be sent, bool, shape (d,); None: all.
        honest: whether clients apply the chain; else they send their vectors as they are, and only the guard bounds them.

    Raises:
        ValueError: nothing bounds the chain.
    """
    whole = chain if isinstance(chain, Chain) else Chain((chain,))
    bound = whole.bound(UNBOUNDED, layout)
    if not math.isfinite(bound.total):
        raise ValueError(f"Expected a chain with a bound, got {whole.name}; end it with a clip.")
    rng, moved, outside = np.random.default_rng(seed), Moved(), 0.0
    worlds = [World(copy.deepcopy(whole), layout, bound, key, codec or DenseCodec(), collector, honest) for _ in range(removed + 1)]
    exponent = worlds[0].spec(1).grid.exponent
    for round in range(1, rounds + 1):
        kinds = rng.choice(KINDS, size=users)
        sent = [(u, hostile_vector(layout, bound.total, str(kinds[u]), rng)) for u in range(users) if (u + round) % 3]
        total = worlds[0].round(round, sent)
        for out, world in enumerate(worlds[1:]):
            without = world.round(round, [(u, v) for u, v in sent if u != out])
            moved.take(total, without, bound, layout, exponent, any(u == out for u, _ in sent))
            if support is not None:
                outside = max(outside, float(np.abs((total.total - without.total)[~support]).max()))
    sent_most = max(world.sent for world in worlds)
    detail = f"{removed} of {users} users taken out, {rounds} rounds"
    return (
        *moved.findings("chain", detail),
        Finding("chain: what is sent", 1.0, sent_most, sent_most <= 1 + CLOSE, "by honest clients before any guard, in units of the bound"),
        Finding("chain: support", 0.0, outside, not outside, "on coordinates that may not be sent"),
    )
