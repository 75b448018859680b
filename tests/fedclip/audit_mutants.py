"""Methods that are not what they say: one mutant for each rule of privacy, planted on the path that the audit drives."""

import dataclasses
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedclip.adaptive import AdaptiveClip
from fedclip.audit.bench import System
from fedclip.client import Client
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.collector import Collector, Contribution
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method
from fedclip.optimizers import SGD
from fedclip.release import Gaussian, Release
from fedclip.round import begin, finish
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.transform import Bound, Step, Transform, chain
from fedclip.update import Dense, Sparse, add, subtract, to_dense

LAYOUT = Layout(
    ("blocks.0.a", "blocks.0.bias", "none", "blocks.1.c", "scalar"),
    ((30, 40), (10,), (0,), (800,), ()),
    ("blocks.0.a", "blocks.0.bias", "none", "blocks.1.c", "scalar"),
)
LAYERS = Layout(("a", "bias", "none", "c", "scalar"), ((3, 4), (2,), (0,), (5,), ()), ("a", "bias", "none", "c", "scalar"))


def method(clip=None, mechanism=None, sampler=None, adaptive=None, release=Release, **more):
    """A method under noise: per-layer clip at 0.5, z = 1, S = 20 of 100."""
    sampler = sampler or Poisson(100, 20.0)
    return Method(
        sampler,
        LocalSGD(0.1, steps=1),
        chain(clip or ClipPerLayer(0.5)),
        chain(SGD(Schedule.of(0.1))),
        release(mechanism or Gaussian(1.0), sampler.expected_cohort),
        adaptive=adaptive,
        **more,
    )


# Noise


@dataclass(frozen=True)
class Quiet(Gaussian):
    """A twentieth too little."""

    def noise(self, bound, layout, rng):
        return super().noise(bound, layout, rng) * 0.95


@dataclass(frozen=True)
class Silent(Gaussian):
    """Next to none."""

    def noise(self, bound, layout, rng):
        return super().noise(bound, layout, rng) * 1e-3


@dataclass(frozen=True)
class Loud(Gaussian):
    """A twentieth too much: no leak, and not what is claimed."""

    def noise(self, bound, layout, rng):
        return super().noise(bound, layout, rng) * 1.05


@dataclass(frozen=True)
class LayerWithout(Gaussian):
    """The second tensor, of ten numbers, has none."""

    def noise(self, bound, layout, rng):
        noise = super().noise(bound, layout, rng)
        start = layout.sizes[0]
        noise[start : start + layout.sizes[1]] = 0.0
        return noise


@dataclass(frozen=True)
class LayerQuiet(Gaussian):
    """The fourth tensor has a twentieth too little."""

    def noise(self, bound, layout, rng):
        noise = super().noise(bound, layout, rng)
        start = sum(layout.sizes[:3])
        noise[start : start + layout.sizes[3]] *= 0.95
        return noise


@dataclass(frozen=True)
class ByLayerBound(Gaussian):
    """Noise of z C_h on each layer, as if each were a mechanism of its own."""

    def deviations(self, bound, layout):
        return tuple(self.noise_multiplier * c for c in bound.per_layer)


@dataclass(frozen=True)
class Flat(Gaussian):
    """Uniform noise of the right deviation."""

    def noise(self, bound, layout, rng):
        return self.noise_multiplier * bound.total * np.sqrt(3) * rng.uniform(-1, 1, layout.size)


@dataclass(frozen=True)
class Truncated(Gaussian):
    """No noise beyond three deviations."""

    def noise(self, bound, layout, rng):
        deviation = self.noise_multiplier * bound.total
        return np.clip(super().noise(bound, layout, rng), -3 * deviation, 3 * deviation)


@dataclass(frozen=True)
class Shifted(Gaussian):
    """Noise that is not about zero."""

    def noise(self, bound, layout, rng):
        return super().noise(bound, layout, rng) + 0.05 * self.noise_multiplier * bound.total


@dataclass(frozen=True)
class OneNoiseForAllLayers(Gaussian):
    """Each layer begins the same numbers again."""

    def noise(self, bound, layout, rng):
        numbers = rng.standard_normal(max(layout.sizes)) * (self.noise_multiplier * bound.total)
        return np.concatenate([numbers[:size] for size in layout.sizes])


@dataclass(frozen=True)
class Smooth(Gaussian):
    """Neighbours share half of their noise."""

    def noise(self, bound, layout, rng):
        numbers = rng.standard_normal(layout.size + 1) * (self.noise_multiplier * bound.total)
        return (numbers[1:] + numbers[:-1]) / np.sqrt(2)


@dataclass(frozen=True)
class Unrepeatable(Gaussian):
    """Noise from the operating system: an attempt that is released twice has two noises on one sum."""

    def noise(self, bound, layout, rng):
        return super().noise(bound, layout, np.random.default_rng())


@dataclass(frozen=True)
class OnlyWhereSent(Release):
    """Noise on the coordinates that the sum has."""

    def apply(self, total, weight, bound, layout, rng):
        noise = self.mechanism.noise(bound, layout, rng) * (total != 0)
        return (total + noise) / self.denominator


@dataclass(frozen=True)
class ByWhoCame(Release):
    """The sum over the number of users who came."""

    def apply(self, total, weight, bound, layout, rng):
        return (total + self.mechanism.noise(bound, layout, rng)) / (weight or self.denominator)


@dataclass(frozen=True)
class NothingForNobody(Release):
    """An empty cohort releases zeros."""

    def apply(self, total, weight, bound, layout, rng):
        return super().apply(total, weight, bound, layout, rng) if weight else np.zeros_like(total)


def finish_with(**key):
    """A finish whose streams have parts of their key replaced, noise and all."""

    def wrong(method, state, layout, plan, partials):
        streams = replace(plan.spec.streams, **key)
        return finish(method, state, layout, replace(plan, spec=replace(plan.spec, streams=streams)), partials)

    return wrong


# Sums


class OneInTenThousand(Collector):
    """Does not guard every ten thousandth update."""

    taken = 0

    def _open(self, contribution):
        type(self).taken += 1
        if type(self).taken % 10_000:
            return super()._open(contribution)
        return Dense(torch.nan_to_num(self.wire.decode(contribution.payload).vector, 0.0, 0.0, 0.0)), True


class NoGuard(Collector):
    """Trusts the clients."""

    def __init__(self, spec, layout, device="cpu"):
        super().__init__(spec, layout, device)
        self.guard = None


class NotFinite(Collector):
    """Guards by `not norm > bound`, folds by `not top > largest`, and has not made an update with a NaN zero first."""

    def take(self, block, contribution):
        vector = self.wire.decode(contribution.payload).vector if contribution.payload is not None else torch.zeros(1)
        if torch.isfinite(vector).all():
            super().take(block, contribution)
            return
        self.fold.total += (vector.double() * 2.0**self.fold.grid.exponent).to(torch.int64)
        self.fold.users += 1


class StatedWeights(Collector):
    """Multiplies by the weight that a client states, after the guard."""

    def take(self, block, contribution):
        whole = replace(self.spec, private=False)
        self.spec, spec = whole, self.spec
        super().take(block, contribution)
        self.spec = spec


def train_keyed_by_worker(site, spec, blocks, states=None):
    """What one user's clip cut off is added to the next user of the same worker."""
    client, collector = Client(site, spec), Collector(spec, site.replica.layout)
    layout = site.replica.layout
    for block, users in blocks:
        for user in users:
            left = getattr(site, "left", torch.zeros(layout.size))
            contribution = client.train_user(user)
            sent = to_dense(client.codec.decode(contribution.payload, layout), layout)
            site.left = 0.5 * (left + torch.nan_to_num(sent).flip(0))
            payload = client.codec.encode(Dense(sent + left), layout)
            collector.take(block, Contribution(user, payload, 1.0, contribution.tally, clip_bits=contribution.clip_bits))
    return collector.partial()


# Cohorts


@dataclass(frozen=True)
class FixedUnderPoisson(Poisson):
    """As many every round, under the event of Poisson sampling."""

    def draw(self, rng):
        return tuple(sorted(rng.choice(self.population, size=int(self.cohort), replace=False).tolist()))


@dataclass(frozen=True)
class Favouring(Poisson):
    """The first half of the ids comes a third more often than the other."""

    def draw(self, rng):
        coins = rng.random(self.population)
        odds = np.where(np.arange(self.population) < self.population // 2, 8 / 7, 6 / 7) * self.rate
        return tuple(np.flatnonzero(coins < odds).tolist())


@dataclass(frozen=True)
class TooMany(Poisson):
    """A rate a tenth above the claimed one."""

    def draw(self, rng):
        return Poisson(self.population, 1.1 * self.cohort).draw(rng)


def begin_with(**key):
    """A begin whose cohort is drawn with parts of the key replaced."""

    def wrong(method, state, layout, secret, run):
        other = replace(state, **{"round": key["round"] - 1} if "round" in key else key)
        plan = begin(method, state, layout, secret, run)
        return replace(plan, blocks=begin(method, other, layout, secret, run).blocks)

    return wrong


# Clip bits


class RawBits(AdaptiveClip):
    """Bounds move by the bits themselves."""

    def fractions(self, total, users, cohort, rng):
        return 0.5 + total / (2 * users) if users else np.full(total.shape, 0.5)


class QuietBits(AdaptiveClip):
    """A tenth too little noise on the bits."""

    def fractions(self, total, users, cohort, rng):
        return 0.5 + (total / 2 + 0.9 * rng.standard_normal(total.size) * (self.bits_noise * cohort)) / cohort


class WholeBits(AdaptiveClip):
    """Bits of 0 and 1: one more user moves their sum by 1."""

    def fractions(self, total, users, cohort, rng):
        return ((total + users) / 2 + rng.standard_normal(total.size) * (self.bits_noise * cohort)) / cohort


class NoiseOfTheUpdate(AdaptiveClip):
    """The bits' noise begins the update's numbers again."""

    def fractions(self, total, users, cohort, rng):
        state = rng.bit_generator.state
        state["state"]["counter"] = np.zeros(4, dtype=np.uint64)
        state["buffer_pos"] = 4
        again = np.random.Philox()
        again.state = state
        return super().fractions(total, users, cohort, np.random.Generator(again))


class BitsForFree(AdaptiveClip):
    """The update keeps all of z, as if the bits cost nothing."""

    def delta_multiplier(self, noise_multiplier, cohort, bounds):
        return noise_multiplier


# Stages


@dataclass(frozen=True)
class BoundsOfNormalize(ClipPerLayer):
    """Says that normalize mode keeps each layer within its part, which its gate does not."""

    stage_name = ""
    mode: str = "normalize"

    def bound(self, incoming, layout):
        return Bound(self.max_norm, self.bounds(layout.grouped(self.layers)), self.layers)

    @property
    def guard(self):
        return BoundsOfNormalizeGuard(self.max_norm)


@dataclass(frozen=True)
class BoundsOfNormalizeGuard(BoundsOfNormalize):
    """Projects the whole, and says that it projects the layers."""

    def apply(self, update, state, ctx):
        return ClipByGlobalNorm(self.max_norm).apply(update, None, ctx)

    @property
    def guard(self):
        return self


@dataclass(frozen=True)
class FeedbackAfterClip(Transform):
    """What the clip cut off is added to the next update after that one's clip."""

    max_norm: float = 0.5

    def init(self, layout):
        return torch.zeros(layout.size)

    def apply(self, update, state, ctx):
        clipped = ClipByGlobalNorm(self.max_norm).apply(update, None, ctx).update
        left = torch.clamp(torch.nan_to_num(subtract(update, clipped, ctx.layout).vector), -10, 10)
        return Step(add(clipped, Dense(state), ctx.layout), left)

    def bound(self, incoming, layout):
        return Bound(self.max_norm)

    @property
    def guard(self):
        return ClipByGlobalNorm(self.max_norm)


@dataclass(frozen=True)
class FeedbackAfterClipUnguarded(FeedbackAfterClip):
    """The same, with a guard that lets it through."""

    @property
    def guard(self):
        return WideGuard(self.max_norm)


@dataclass(frozen=True)
class WideGuard(Transform):
    """A guard of ten times the bound."""

    max_norm: float = 0.5

    def apply(self, update, state, ctx):
        return ClipByGlobalNorm(10 * self.max_norm).apply(update, None, ctx)

    def bound(self, incoming, layout):
        return Bound(self.max_norm)

    @property
    def guard(self):
        return self


@dataclass(frozen=True, eq=False)
class Remembering(Transform):
    """Keeps what it cut off in itself, for whoever comes next."""

    max_norm: float = 0.5
    memory: dict = dataclasses.field(default_factory=dict)

    def apply(self, update, state, ctx):
        whole = add(update, Dense(self.memory.get("left", torch.zeros(ctx.layout.size))), ctx.layout)
        clipped = ClipByGlobalNorm(self.max_norm).apply(whole, None, ctx).update
        self.memory["left"] = torch.clamp(torch.nan_to_num(subtract(whole, clipped, ctx.layout).vector), -1, 1)
        return Step(clipped)

    def bound(self, incoming, layout):
        return Bound(self.max_norm)

    @property
    def guard(self):
        return ClipByGlobalNorm(self.max_norm)


def support(layout, seed, share=0.5):
    """The coordinates of a public mask."""
    return np.random.default_rng(seed).random(layout.size) < share


@dataclass(frozen=True)
class MaskedClip(Transform):
    """Keeps the coordinates of a public mask, then clips: right, and so is its guard."""

    max_norm: float = 0.5
    seed: int = 0

    def apply(self, update, state, ctx):
        kept = torch.from_numpy(np.flatnonzero(support(ctx.layout, self.seed)))
        sparse = Sparse(kept, to_dense(update, ctx.layout)[kept])
        return ClipByGlobalNorm(self.max_norm).apply(Dense(to_dense(sparse, ctx.layout)), None, ctx)

    def bound(self, incoming, layout):
        return Bound(self.max_norm)

    @property
    def guard(self):
        return self


@dataclass(frozen=True)
class MaskWithOpenGuard(MaskedClip):
    """Its guard clips and does not mask, so that a client may send where there is no noise."""

    @property
    def guard(self):
        return ClipByGlobalNorm(self.max_norm)


@dataclass(frozen=True)
class MaskedGaussian(Gaussian):
    """Noise on the public mask alone."""

    seed: int = 0

    def noise(self, bound, layout, rng):
        return super().noise(bound, layout, rng) * support(layout, self.seed)


def systems():
    """Return the systems with a wrong function, by name."""
    return {
        "noise key without round": System(finish=finish_with(round=1)),
        "noise key without attempt": System(finish=finish_with(attempt=0)),
        "retry on the same cohort": System(begin=begin_with(attempt=0)),
        "the same cohort in every round": System(begin=begin_with(round=1)),
        "one in 10,000 unclipped": System(collector=OneInTenThousand),
        "no guard": System(collector=NoGuard),
        "not finite": System(collector=NotFinite),
        "stated weights": System(collector=StatedWeights),
        "state keyed by worker": System(train=train_keyed_by_worker),
    }
