"""How the model goes down to clients, and what that costs. All clients of a round train from the same reconstruction of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedclip.codec import Codec
from fedclip.layout import Layout
from fedclip.transform import PROBE, Chain, Ctx, has_content
from fedclip.update import Dense, to_dense


@dataclass(frozen=True, eq=False)
class Sent:
    """What clients can have of the model when it goes down as differences.

    Attributes:
        params: the reconstruction after the last round, shape (d,); what the differences left out of the model is still to come.
        sizes: bytes of each round's difference, int64, shape (rounds,).
        users: users that ever took part, ascending, int64, shape (n,).
        last: the round in which each of them took part last, int64, shape (n,).
    """

    params: torch.Tensor
    sizes: torch.Tensor
    users: torch.Tensor
    last: torch.Tensor


@dataclass(frozen=True, eq=False)
class Download:
    """One round's download: the reconstruction as clients get it, how many bytes the cohort pays for it, and what the server keeps."""

    payload: bytes
    total_bytes: int
    sent: Sent | None


@dataclass(frozen=True)
class Downlink:
    """The model through some lossy stages, whole in each round, or as its difference to what clients have already.

    As differences, a client pays for those of the rounds since it last took part, or for the whole reconstruction in float32, whichever
    is less; who comes for the first time pays for the whole. What a difference lost stays in the next one.

    Attributes:
        stages: the lossy stages, without a state; none sends the model as it is.
        differences: send differences.

    Raises:
        ValueError: a stage with a state, or differences without a stage, which would lose nothing and cost the same.
    """

    stages: Chain = field(default_factory=Chain)
    differences: bool = False

    def __post_init__(self) -> None:
        if has_content(self.stages.init(PROBE)):
            raise ValueError(f"Expected stages without a state on the way down, got {self.stages.name}; the server keeps what they lose.")
        if self.differences and not self.stages.stages:
            raise ValueError("Expected stages with differences: a whole difference costs as much as the model.")

    def send(
        self,
        params: torch.Tensor,
        sent: Sent | None,
        cohort: Sequence[int],
        round: int,
        layout: Layout,
        rng: np.random.Generator,
        codec: Codec,
    ) -> Download:
        """Return the download of a round.

        Args:
            params: the model on the server, shape (d,).
            sent: what was sent before; None in the first round.
            cohort: who takes part, ascending.
            round: round number, from 1.
            layout: how the vector is made up.
            rng: the stream of stochastic rounding.
            codec: the wire format, the same as for updates.
        """
        ctx = Ctx(layout, rng, round, params)
        if not self.differences:
            payload = codec.encode(self.stages.apply(Dense(params), self.stages.init(layout), ctx).update, layout)
            return Download(payload, len(payload) * len(cohort), None)
        none = torch.zeros(0, dtype=torch.int64)
        known = Sent(params.clone(), none, none, none) if sent is None else sent
        step = self.stages.apply(Dense(params - known.params), self.stages.init(layout), ctx)
        size = len(codec.encode(step.update, layout))
        now = known.params + to_dense(step.update, layout)
        whole = codec.encode(Dense(now), layout)
        sizes = torch.cat([known.sizes, torch.tensor([size])])
        total, users, last = self._charge(known, sizes.numpy(), np.asarray(cohort, dtype=np.int64), round, len(whole))
        return Download(whole, total, Sent(now, sizes, torch.from_numpy(users), torch.from_numpy(last)))

    @staticmethod
    def _charge(known: Sent, sizes: np.ndarray, cohort: np.ndarray, round: int, whole: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Return what the cohort pays, and who took part when."""
        users, last = known.users.numpy(), known.last.numpy()
        at = np.searchsorted(users, cohort)
        there = np.zeros(len(cohort), dtype=bool)
        there[at < len(users)] = users[at[at < len(users)]] == cohort[at < len(users)]
        since = np.concatenate([[0], np.cumsum(sizes)])
        missed = since[round] - since[last[at[there]]]
        total = int(np.minimum(missed, whole).sum()) + whole * int((~there).sum())
        merged = np.union1d(users, cohort)
        rounds = np.zeros(len(merged), dtype=np.int64)
        rounds[np.searchsorted(merged, users)] = last
        rounds[np.searchsorted(merged, cohort)] = round
        return total, merged, rounds
