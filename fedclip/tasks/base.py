"""The seam between the round engine and what is trained: the `Task` protocol, and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

Counts = Mapping[str, float]
"""What one held-out unit adds to the metrics: sums and counts, never ratios, so that units can be pooled in any order."""


class Task(Protocol):
    """A model, the data of its users, its loss and its metrics.

    A task is built once a process from plain configuration values and is used for many users one after another.
    Methods are pure: the same arguments give the same result, and none touches a global random generator (random
    layers of the model draw from torch's global generator; the engine forks and seeds it around each user).

    A task whose batches are not tensors with the examples along the first dimension may have one more method, for `micro_batch`:
    `split(batch, most)` returns the batch in pieces of at most `most` examples, each with its number of examples.

    A task may have an attribute `channels_last`: True says that its model runs with the weights of its 2-D convolutions channels last; and
    an attribute `low_rank`: True says that nobody keeps the memory of the weights of its linear layers (see `fedclip.low_rank`).
    """

    @property
    def users(self) -> int:
        """How many training users there are; their ids are 0 .. users - 1. Nothing is ever enumerated over them."""

    @property
    def held_out_units(self) -> int:
        """How many held-out units (speakers, or shards of a test set) there are to evaluate on."""

    def make_model(self) -> nn.Module:
        """Return a new model with the initial weights of this task: bit-equal at each call."""

    def load_user(self, user: int, rng: np.random.Generator) -> Sequence[Any]:
        """Return the training examples of a user. `rng` is this user's stream of this round.

        It may be called on the training thread or on another one, while `batches` and `loss` train the user before, or between rounds;
        never for two users at once, nor while another method is asked for something else. What it returns may go unused, and must stay as
        it is while others are read: those of several users may lie there at once.

        An attribute `left_out` of what is returned, where there is one, counts what could not be used; `faults` says of what could
        not be read where it is and why, a line each.
        """

    def cost(self, user: int) -> float:
        """Return the predicted work of training this user for one round, in any fixed unit, without loading its data."""

    def batches(self, examples: Sequence[Any], batch_size: int, rng: np.random.Generator) -> Iterator[Any]:
        """Yield the batches of one epoch over the examples of a user, in an order drawn from `rng`."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the scalar training loss of a batch: the mean over its examples, differentiable."""

    def evaluate(self, model: nn.Module, unit: int) -> Counts:
        """Return what held-out unit `unit` (0 .. held_out_units - 1) adds to the metrics; the model is in eval mode."""

    def summarise(self, counts: Sequence[Counts], seed: int) -> dict[str, float]:
        """Return the metrics over all the units, with intervals: `eval_loss`, and `wer`, `cer` or `accuracy`."""
