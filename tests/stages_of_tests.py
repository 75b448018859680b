"""Transforms that only tests use: some that break a bound, one with a momentum."""

from dataclasses import dataclass, replace

import torch

from fedclip.transform import UNBOUNDED, Bound, Step, Transform
from fedclip.update import Dense, Sparse, scale, to_dense


@dataclass(frozen=True)
class TopK(Transform):
    """The k greatest coordinates. It can only shrink an update, so it keeps the bound that comes in."""

    stage_name = "top_k"
    k: int

    def apply(self, update, state, ctx):
        vector = to_dense(update, ctx.layout)
        kept = vector.abs().topk(min(self.k, vector.numel())).indices.sort().values
        return Step(Sparse(kept, vector[kept]))

    def bound(self, incoming, layout):
        return incoming


@dataclass(frozen=True)
class Amplify(Transform):
    """Times a number that the data could choose: nothing bounds it."""

    stage_name = "amplify"
    factor: float = 2.0
    said: Bound = UNBOUNDED

    def apply(self, update, state, ctx):
        return Step(scale(update, self.factor))

    def bound(self, incoming, layout):
        return self.said


@dataclass(frozen=True)
class Round(Transform):
    """To whole multiples of a step. It may enlarge an update a little, and leaves that to the guard."""

    stage_name = "round"
    step: float

    def apply(self, update, state, ctx):
        return Step(Dense(torch.round(to_dense(update, ctx.layout) / self.step) * self.step))

    def bound(self, incoming, layout):
        return replace(incoming)


@dataclass(frozen=True)
class Momentum(Transform):
    """Says that it keeps a momentum, and keeps none."""

    stage_name = "client_momentum"

    def apply(self, update, state, ctx):
        return Step(update)

    def bound(self, incoming, layout):
        return incoming

    def has_momentum(self, ndim):
        return True


@dataclass(frozen=True)
class Draws(Transform):
    """Says what it draws, one number after another, and alters nothing."""

    stage_name = "draws"

    def apply(self, update, state, ctx):
        return Step(update, measurements={"drawn": (ctx.rng.random(), ctx.rng.random())})

    def bound(self, incoming, layout):
        return incoming
