"""`Method`: a federated method as plain data, checked as a whole when it is made."""

import dataclasses
import math
from dataclasses import dataclass, field

import torch

from fedclip.adaptive import AdaptiveClip
from fedclip.choices import Weighting
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.codec import Codec, DenseCodec
from fedclip.control import check_local, fresh_state
from fedclip.downlink import Downlink, Sent
from fedclip.fold import CAPACITY_BITS
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.optimizers import Optimizer
from fedclip.release import Release
from fedclip.sampling import Available, FixedSize, Poisson, Sampler
from fedclip.transform import PROBE, UNBOUNDED, Bound, Chain, State, has_content

AVERAGE_WEIGHT = 0.5
"""How much of a coordinate's average is its newest released value."""


def user_weight(examples: int, weighting: Weighting, max_examples: int | None) -> float:
    """Return the weight of a user with that many examples: 1, n, or `min(n, max_examples) / max_examples`."""
    if weighting == "uniform":
        return 1.0
    return float(examples) if max_examples is None else min(examples, max_examples) / max_examples


@dataclass(frozen=True)
class Method:
    """Who takes part, how a user trains, what happens to an update on its way, and what the server does with the mean.

    Attributes:
        sampler: draws the cohort.
        local: local training.
        client: the chain for each user's update (old parameters minus new ones).
        server: the chain for the released mean; its last stage is the optimizer.
        release: noise and division, between the two.
        codec: the wire format of an update.
        weighting: `"uniform"`, or `"examples"`: by the number of a user's examples. Without noise the weight multiplies what
            left the chain (FedAvg, arXiv 1602.05629); under noise it is `min(n, max_examples) / max_examples`, before the clip.
        max_examples: n_max under noise.
        double_momentum: allow momentum on both sides of one tensor.
        adaptive: how the bounds of the last clip move; None: they stay.
        downlink: how the model goes down to clients.
        half_states: keep what is remembered of users as float16.
        control: SCAFFOLD's control variates, one for each user and one on the server; see `fedclip.control`.

    Raises:
        ValueError: under noise, a chain without a clip or with a stage after its last clip that bounds nothing; a chain with
            state where a user's coming depends on others; weights without a limit under noise; adaptive bounds where the
            last stage that clips is no plain clip; control variates with weights by examples or without plain local steps of a fixed
            number; momentum on both sides of the same tensor; a server chain
            that does not end with an optimizer.
    """

    sampler: Sampler
    local: LocalSGD
    client: Chain
    server: Chain
    release: Release = field(default_factory=Release)
    codec: Codec = field(default_factory=DenseCodec)
    weighting: Weighting = "uniform"
    max_examples: int | None = None
    double_momentum: bool = False
    adaptive: AdaptiveClip | None = None
    downlink: Downlink = field(default_factory=Downlink)
    half_states: bool = False
    control: bool = False

    def __post_init__(self) -> None:
        if not self.server.stages or not isinstance(self.server.stages[-1], Optimizer):
            raise ValueError(
                f"Expected a server chain that ends with an optimizer, got {self.server.name}; "
                "end it with sgd, adam, lamb, lars, yogi or adagrad."
            )
        self._check_mask()
        if self.control:
            check_local(self.local)
            if self.weighting != "uniform":
                raise ValueError(f"Control variates need uniform weights, got '{self.weighting}'; set weighting = 'uniform'.")
        if self.private:
            self._check_private()
        if self.adaptive is not None and _plain_clip(self.client) is None:
            raise ValueError(
                f"Adaptive bounds need clip_by_global_norm, or clip_per_layer in mode clip, as the last clip; {self.client.name} has none."
            )
        both = [n for n in (1, 2) if self.server.has_momentum(n) and (self.local.has_momentum or self.client.has_momentum(n))]
        if both and not self.double_momentum:
            of_local = f"momentum {self.local.momentum}" if self.local.momentum else f"{self.local.optimizer}, betas {self.local.betas}"
            client = f"local_sgd ({of_local})" if self.local.has_momentum else self.client.name
            raise ValueError(
                f"Momentum on both sides of the same tensors: {client} on the client and {self.server.name} on the server; "
                "take one away, or set double_momentum = true if you mean it."
            )

    @property
    def private(self) -> bool:
        """Whether the release adds noise."""
        return self.release.mechanism is not None

    @property
    def stateful(self) -> bool:
        """Whether something is kept of each user between rounds."""
        return has_content(self.user_state(PROBE))

    @property
    def keeper(self) -> str:
        """What keeps it, for messages."""
        return f"{self.client.name} with control variates" if self.control else self.client.name

    def user_state(self, layout: Layout) -> State:
        """Return what is kept of a user that was never seen."""
        return fresh_state(self.client, layout, self.control)

    def bound(self, layout: Layout) -> Bound:
        """Return the bound on one user's update that the guard enforces."""
        return self.client.bound(UNBOUNDED, layout)

    def thresholds(self, layout: Layout) -> tuple[float, ...]:
        """Return the bounds that a run with adaptive clipping begins with; empty where the bounds stay."""
        clip = _plain_clip(self.client)
        return clip.thresholds(layout) if self.adaptive is not None and clip is not None else ()

    def for_round(self, thresholds: tuple[float, ...], layout: Layout) -> "Method":
        """Return the method as it is in a round: the last clip at its bounds of that round, the mechanism with the update's part of z.

        Raises:
            ValueError: the cohort is too small for the noise on the clip bits; see `AdaptiveClip.delta_multiplier`.
        """
        clip = _plain_clip(self.client)
        if self.adaptive is None or clip is None:
            return self
        moved = tuple(clip.with_thresholds(thresholds, layout) if s is clip else s for s in self.client.stages)
        release, mechanism = self.release, self.release.mechanism
        if mechanism is not None:
            z = self.adaptive.delta_multiplier(mechanism.noise_multiplier, self.sampler.expected_cohort, len(thresholds))
            release = dataclasses.replace(release, mechanism=dataclasses.replace(mechanism, noise_multiplier=z))
        return dataclasses.replace(self, client=Chain(moved), release=release, adaptive=None)

    def check(self, layout: Layout) -> None:
        """Refuse what only shows on a model.

        Raises:
            ValueError: numbers that are not those of the model's layers; noise that the bounds do not carry; a cohort too small
                for adaptive bounds.
        """
        now = self.for_round(self.thresholds(layout), layout)
        bound = now.bound(layout)
        if now.release.mechanism is not None:
            now.release.mechanism.deviations(bound, layout)

    def _largest_cohort(self) -> float:
        """Return how many users may come at once: where coins decide, ten standard deviations over what is expected, at most everybody."""
        sampler = self.sampler
        if isinstance(sampler, FixedSize):
            return sampler.cohort
        if isinstance(sampler, Poisson) and sampler.max_cohort is not None:
            return sampler.max_cohort
        asked = sampler.expected_cohort * (sampler.over_selection if isinstance(sampler, Available) else 1.0)
        return min(float(sampler.population), asked + 10 * math.sqrt(asked))

    def _check_mask(self) -> None:
        """Refuse what would remember, or mask again, what a common mask let through."""
        masks = [n for n, stage in enumerate(self.client.stages) if stage.support(1, PROBE) is not None]
        if len(masks) > 1:
            raise ValueError(f"Expected one stage that chooses the coordinates for all users, got {len(masks)} in {self.client.name}.")
        after = [s for s in self.client.stages[masks[0] + 1 :] if has_content(s.init(PROBE))] if masks else []
        if after:
            raise ValueError(
                f"{after[0].name} keeps a state after {self.client.stages[masks[0]].name}, and would add coordinates that are not sent; "
                "put the state around or before the mask."
            )

    def _check_private(self) -> None:
        if self.client.guard is None:
            raise ValueError(
                f"Under noise the client chain must clip, and {self.client.name} does not; "
                "end it with clip_per_layer or clip_by_global_norm."
            )
        stage = self.client.unbounded_stage()
        if stage is not None:
            raise ValueError(
                f"Under noise nothing after the last clip may enlarge an update, and {stage.name} can without limit; clip after it."
            )
        if self._largest_cohort() > 1 << CAPACITY_BITS:
            raise ValueError(
                f"Under noise nobody's update may keep another's out of the sum, which has room for {1 << CAPACITY_BITS:,} users; got a "
                f"cohort of {self.sampler.expected_cohort:,.10g}, which may come to {math.ceil(self._largest_cohort()):,}; lower it."
            )
        poisson = isinstance(self.sampler, Poisson) and self.sampler.max_cohort is None
        unclaimed = isinstance(self.sampler, Available) or (isinstance(self.sampler, FixedSize) and self.sampler.rate == 1)
        if self.stateful and not (poisson or unclaimed):
            raise ValueError(
                f"{self.keeper} keeps a state for each user, and under noise that needs each user to come by a coin of its own; "
                f"{self.sampler.name} sampling ties users to each other: use Poisson sampling without max_cohort."
            )
        if self.weighting == "examples" and self.max_examples is None:
            raise ValueError(
                "Under noise weights by examples need max_examples: w = min(n, max_examples) / max_examples bounds what one user adds."
            )


@dataclass(frozen=True, eq=False)
class ServerState:
    """All that a run carries from round to round.

    Attributes:
        params: the model, float32, shape (d,).
        server: state of the server chain.
        round: rounds done.
        attempt: releases that the next round already had.
        thresholds: the bounds of the next round's last clip, where they adapt.
        sent: what clients have of the model, where it goes down as differences.
        average: of what was released, by coordinate, shape (d,), where a common mask follows it.
        control: the server's control variate, shape (d,); None without, and before the first round, when it is zero.
    """

    params: torch.Tensor
    server: State
    round: int = 0
    attempt: int = 0
    thresholds: tuple[float, ...] = ()
    sent: Sent | None = None
    average: torch.Tensor | None = None
    control: torch.Tensor | None = None

    @classmethod
    def initial(cls, params: torch.Tensor, method: Method, layout: Layout) -> "ServerState":
        """Return the state before the first round."""
        return cls(params.clone(), method.server.init(layout), thresholds=method.thresholds(layout))


def _plain_clip(client: Chain) -> ClipByGlobalNorm | ClipPerLayer | None:
    """Return the last stage that clips, where it is a plain clip whose bounds can move by themselves."""
    last = next((s for s in reversed(client.stages) if s.guard is not None), None)
    if isinstance(last, ClipByGlobalNorm) or (isinstance(last, ClipPerLayer) and last.mode == "clip"):
        return last
    return None


def noise_to_bound(method: Method, layout: Layout) -> float:
    """Return the norm of the noise on the mean over the norm that the clip allows: `z sqrt(k) / S` where it is isotropic on k of them."""
    now = method.for_round(method.thresholds(layout), layout)
    # As many coordinates as in any round but the first, where nothing is released yet that a mask could follow.
    support = now.client.support(1, layout, torch.ones(layout.size))
    return math.hypot(*noise_norms(now, layout, support)) / now.bound(layout).total


def noise_norms(now: Method, layout: Layout, support: torch.Tensor | None = None) -> tuple[float, ...]:
    """Return the norm of the noise on each layer of the released mean, the root of its expected square: `sigma_h sqrt(k_h) / S`.

    Args:
        now: the method as it is in the round, see `Method.for_round`.
        layout: how the vector is made up.
        support: the coordinates that are sent, k_h of them in layer h; None: all.

    Returns:
        One number for each layer of the bound; none without noise.
    """
    mechanism, denominator, bound = now.release.mechanism, now.release.denominator, now.bound(layout)
    if mechanism is None or denominator == "weights":
        return ()
    there = layout if support is None else layout.restricted(support)
    sizes = there.grouped(bound.layers).layer_sizes
    return tuple(s * math.sqrt(d) / denominator for d, s in zip(sizes, mechanism.deviations(bound, there), strict=True))
