"""Local training: plain SGD on one user's data, from the parameters of the round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch

from fedclip.replica import Replica
from fedclip.tasks.base import Task


@dataclass(frozen=True)
class LocalSGD:
    """SGD with a constant rate for a number of steps or epochs, each gradient clipped by its global norm (arXiv 2310.00098, section 3).

    Attributes:
        lr: local learning rate.
        steps: optimizer steps; epochs are repeated until there are enough. None: `epochs` counts.
        epochs: passes over the user's data. One of the two is given.
        batch_size: examples in a batch.
        clip_norm: bound on the norm of each step's gradient; None for no clip.
        momentum: local momentum in [0, 1), starting from zero in each round.
    """

    stage_name: ClassVar[str] = "local_sgd"
    lr: float
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    clip_norm: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"Expected either steps or epochs, got steps = {self.steps} and epochs = {self.epochs}.")

    def train(self, replica: Replica, task: Task, examples: Sequence[Any], rng: np.random.Generator) -> float:
        """Train the replica in place on a user's examples.

        Args:
            replica: loaded with the parameters of the round.
            task: gives batches and loss.
            examples: at least one.
            rng: the user's stream for the order of batches.

        Returns:
            The mean training loss over the steps; NaN where the data gives no batch.
        """
        replica.model.train()
        velocity = torch.zeros_like(replica.params) if self.momentum else None
        losses = []
        for batch in self.batches(task, examples, rng):
            replica.grads.zero_()
            loss = task.loss(replica.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            self._step(replica, velocity)
            losses.append(loss.detach())
        return float(torch.stack(losses).mean()) if losses else float("nan")

    def _step(self, replica: Replica, velocity: torch.Tensor | None) -> None:
        grads = replica.grads
        factor = torch.ones((), device=grads.device)
        if self.clip_norm is not None:
            # The same small constant as torch.nn.utils.clip_grad_norm_.
            factor = torch.clamp(self.clip_norm / (torch.linalg.vector_norm(grads) + 1e-6), max=1.0)
        if velocity is None:
            replica.params.addcmul_(grads, factor, value=-self.lr)
        else:
            velocity.mul_(self.momentum).addcmul_(grads, factor)
            replica.params.add_(velocity, alpha=-self.lr)

    def batches(self, task: Task, examples: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
        """Yield the batches of a user for one round, as many as `steps` or `epochs` say; none where the data gives none."""
        if self.epochs is not None:
            for _ in range(self.epochs):
                yield from task.batches(examples, self.batch_size, rng)
            return
        left = self.steps or 0
        while left:
            taken = 0
            for batch in islice(task.batches(examples, self.batch_size, rng), left):
                taken += 1
                yield batch
            if not taken:
                return
            left -= taken
