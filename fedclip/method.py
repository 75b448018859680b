"""`Method`: a federated method as plain data, checked as a whole when it is made."""

import math
from dataclasses import dataclass, field

import torch

from fedclip.choices import Weighting
from fedclip.codec import Codec, DenseCodec
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.optimizers import Optimizer
from fedclip.release import Release
from fedclip.sampling import Poisson
from fedclip.transform import UNBOUNDED, Bound, Chain, State


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

    Raises:
        ValueError: a client chain with state; under noise, a chain without a clip or with a stage after its last clip that bounds
            nothing; weights without a limit under noise; momentum on both sides of the same tensor; a server chain
            that does not end with an optimizer.
    """

    sampler: Poisson
    local: LocalSGD
    client: Chain
    server: Chain
    release: Release = field(default_factory=Release)
    codec: Codec = field(default_factory=DenseCodec)
    weighting: Weighting = "uniform"
    max_examples: int | None = None
    double_momentum: bool = False

    def __post_init__(self) -> None:
        if not self.server.stages or not isinstance(self.server.stages[-1], Optimizer):
            raise ValueError(f"Expected a server chain that ends with an optimizer, got {self.server.name}; end it with sgd, adam or lamb.")
        if self.private:
            self._check_private()
        if _has_content(self.client.init(Layout(("probe",), ((),), ("probe",)))):
            raise ValueError(
                f"{self.client.name} keeps a state for each user, which runs do not keep between rounds; use a stage without state."
            )
        both = [n for n in (1, 2) if self.server.has_momentum(n) and (self.local.momentum > 0 or self.client.has_momentum(n))]
        if both and not self.double_momentum:
            client = f"local_sgd (momentum {self.local.momentum})" if self.local.momentum > 0 else self.client.name
            raise ValueError(
                f"Momentum on both sides of the same tensors: {client} on the client and {self.server.name} on the server; "
                "take one away, or set double_momentum = true if you mean it."
            )

    @property
    def private(self) -> bool:
        """Whether the release adds noise."""
        return self.release.mechanism is not None

    def bound(self, layout: Layout) -> Bound:
        """Return the bound on one user's update that the guard enforces."""
        return self.client.bound(UNBOUNDED, layout)

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
    """

    params: torch.Tensor
    server: State
    round: int = 0
    attempt: int = 0

    @classmethod
    def initial(cls, params: torch.Tensor, method: Method, layout: Layout) -> "ServerState":
        """Return the state before the first round."""
        return cls(params.clone(), method.server.init(layout))


def _has_content(state: State) -> bool:
    return any(_has_content(s) for s in state) if isinstance(state, tuple) else state is not None


def noise_to_bound(method: Method, layout: Layout) -> float:
    """Return the expected norm of the noise on the mean over the norm that the clip allows: `z sqrt(d) / S`."""
    mechanism, denominator = method.release.mechanism, method.release.denominator
    if mechanism is None or denominator == "weights":
        return 0.0
    return mechanism.noise_multiplier * math.sqrt(layout.size) / denominator
