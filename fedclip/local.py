"""Local training: gradient steps on one user's data, from the parameters of the round."""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch

from fedclip.choices import Arithmetic, LocalOptimizer
from fedclip.inplace import InPlace, clip_factor
from fedclip.replica import Replica
from fedclip.tasks.base import Task

FIRST_SCALE, SCALE_STEPS = 2.0**16, 2000
"""What a float16 loss is multiplied by at first, and how many steps in a row double it (both as in `torch.amp.GradScaler`)."""

NO_BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class LocalSGD:
    """Gradient steps with a constant rate, each gradient clipped by its global norm (arXiv 2310.00098, section 3).

    The state of the optimizer begins anew for each user and round. `clip_norm` bounds the gradient of the loss; weight decay of `sgd`,
    the proximal term and a control variate are added after it.

    Attributes:
        lr: local learning rate.
        steps: optimizer steps; epochs are repeated until there are enough. None: `epochs` counts.
        epochs: passes over the user's data. One of the two is given.
        batch_size: examples in a batch.
        clip_norm: bound on the norm of each step's gradient; None for no clip.
        momentum: local momentum of `sgd` in [0, 1).
        optimizer: `sgd`, `adamw` (arXiv 1711.05101) or `lamb` (1904.00962).
        betas: decay of the moments of `adamw` and `lamb`.
        eps: of `adamw` and `lamb`, outside the root.
        weight_decay: added to the gradient (`sgd`), decoupled (`adamw`), inside the normalised direction (`lamb`).
        proximal: mu of FedProx (arXiv 1812.06127): `mu (w - w_round)` is added to each gradient.
        accumulate: batches in a step, whose gradients are averaged; the last step of `epochs` may have fewer.
        micro_batch: a batch goes through the model in pieces of at most so many examples, whose gradients add up to that of the
            batch; None: whole.
        precision: what forward and backward passes compute in (`torch.autocast`). With float16 the loss is scaled, and
            batches whose gradient overflows are taken again with half the scale; a step that overflows unscaled is left out.

    Raises:
        ValueError: both or neither of steps and epochs; numbers of another optimizer.
    """

    stage_name: ClassVar[str] = "local_sgd"
    lr: float
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 8
    clip_norm: float | None = None
    momentum: float = 0.0
    optimizer: LocalOptimizer = "sgd"
    betas: tuple[float, float] = NO_BETAS
    eps: float = 1e-8
    weight_decay: float = 0.0
    proximal: float = 0.0
    accumulate: int = 1
    micro_batch: int | None = None
    precision: Arithmetic = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"Expected either steps or epochs, got steps = {self.steps} and epochs = {self.epochs}.")
        if self.optimizer != "sgd" and self.momentum:
            raise ValueError(f"Expected momentum with the local optimizer sgd only, got {self.momentum} with {self.optimizer}; set betas.")
        if self.optimizer == "sgd" and (self.betas, self.eps) != (NO_BETAS, 1e-8):
            raise ValueError(
                f"Expected betas and eps with the local optimizers adamw and lamb only, got {self.betas}, {self.eps} with sgd; "
                "set optimizer, or momentum."
            )

    @property
    def has_momentum(self) -> bool:
        """Whether steps average over earlier gradients of the same user and round."""
        return self.momentum > 0 or (self.optimizer != "sgd" and self.betas[0] > 0)

    @property
    def _is_plain(self) -> bool:
        """Whether a step is the parameters less the rate times the gradient of one batch, and nothing else."""
        more = (self.momentum, self.clip_norm, self.weight_decay, self.proximal)
        return self.optimizer == "sgd" and not any(more) and self.accumulate == 1 and self.precision == "float32"

    def train(
        self, replica: Replica, task: Task, examples: Sequence[Any], rng: np.random.Generator, correction: torch.Tensor | None = None
    ) -> float:
        """Train the replica in place on a user's examples.

        Args:
            replica: loaded with the parameters of the round.
            task: gives batches and loss.
            examples: at least one.
            rng: the user's stream for the order of batches.
            correction: added to each gradient, shape (d,): the control variate of SCAFFOLD.

        Returns:
            The mean training loss over the batches; NaN where the data gives no batch.
        """
        replica.train()
        replica.flat_gradients = not (self._is_plain and correction is None)
        optimizer = None
        if replica.flat_gradients:
            optimizer = InPlace(replica, self.optimizer, self.momentum, self.betas, self.eps, self.weight_decay)
        if self.proximal:
            replica.scratch("start").copy_(replica.params)
        losses = list[torch.Tensor]()
        for of_step, finite in self.gradients(replica, task, examples, rng):
            losses += of_step
            if not finite:
                continue
            if optimizer is None:
                replica.descend(self.lr)
            else:
                self._step(replica, optimizer, correction)
        if not replica.flat_gradients:
            replica.clear_gradients()  # a core's caches have their memory, and the next user, who may train in another replica, needs some
        if not losses:
            return math.nan
        # Of another device one number is waited for, not one a batch.
        return sum(map(torch.Tensor.item, losses) if replica.params.device.type == "cpu" else torch.stack(losses).tolist()) / len(losses)

    def gradients(
        self, replica: Replica, task: Task, examples: Sequence[Any], rng: np.random.Generator
    ) -> Iterator[tuple[list[torch.Tensor], bool]]:
        """Put the gradient of one step after another into the replica.

        Yields:
            The loss of each of the step's batches, shape (), and False where a float16 gradient overflows at any scale.
        """
        scale = _Scale() if self.precision == "float16" else None
        batches = self.batches(task, examples, rng)
        while group := list(islice(batches, self.accumulate)):
            yield self._gradient(replica, task, group, scale)

    def _gradient(self, replica: Replica, task: Task, group: Sequence[Any], scale: "_Scale | None") -> tuple[list[torch.Tensor], bool]:
        begun = 1.0 if scale is None else scale.factor
        while True:
            replica.clear_gradients()
            factor = 1.0 if scale is None else scale.factor
            losses = [self._backward(replica, task, batch, factor) for batch in group]
            if len(group) > 1 or factor != 1.0:
                replica.grads.mul_(1.0 / (len(group) * factor))
            if scale is None or scale.took(bool(torch.isfinite(torch.linalg.vector_norm(replica.grads)))):
                return losses, True
            if scale.factor < 1.0:  # no scale helps this one; those that come after it have the one from before
                scale.factor = begun
                return losses, False

    def _backward(self, replica: Replica, task: Task, batch: Any, factor: float) -> torch.Tensor:
        """Add the gradient of a batch times a factor to the gradients, and return its loss, shape ()."""
        device = replica.params.device.type
        total = None
        for piece, part in pieces(task, batch, self.micro_batch):
            cast = nullcontext() if self.precision == "float32" else torch.autocast(device, getattr(torch, self.precision))
            with cast:
                loss = task.loss(replica.model, piece)
            loss = loss if part == 1.0 else loss * part
            replica.backward(loss if factor == 1.0 else loss * factor)
            total = loss.detach() if total is None else total + loss.detach()
        return torch.zeros((), device=device) if total is None else total

    def _step(self, replica: Replica, optimizer: InPlace, correction: torch.Tensor | None) -> None:
        grads, params = replica.grads, replica.params
        factor = None if self.clip_norm is None else clip_factor(grads, self.clip_norm)
        decay = self.weight_decay if self.optimizer == "sgd" else 0.0
        pulled = bool(decay or self.proximal or correction is not None)
        if pulled and factor is not None:
            grads.mul_(factor)
        if decay:
            grads.add_(params, alpha=decay)
        if self.proximal:
            moved = torch.sub(params, replica.scratch("start"), out=replica.scratch("moved"))
            grads.add_(moved, alpha=self.proximal)
        if correction is not None:
            grads.add_(correction)
        optimizer.step(self.lr, None if pulled else factor)

    def batches(self, task: Task, examples: Sequence[Any], rng: np.random.Generator) -> Iterator[Any]:
        """Yield the batches of a user for one round, as many as `steps` or `epochs` say; none where the data gives none."""
        if self.epochs is not None:
            for _ in range(self.epochs):
                yield from task.batches(examples, self.batch_size, rng)
            return
        left = (self.steps or 0) * self.accumulate
        while left:
            taken = 0
            for batch in islice(task.batches(examples, self.batch_size, rng), left):
                taken += 1
                yield batch
            if not taken:
                return
            left -= taken


class _Scale:
    """The scale of a float16 loss: a power of two, halved at an overflow. It begins anew for each user, so that none depends on others."""

    def __init__(self) -> None:
        self.factor, self._steps = FIRST_SCALE, 0

    def took(self, finite: bool) -> bool:
        """Take note of whether a gradient was finite, and return it."""
        self._steps = self._steps + 1 if finite else 0
        if not finite or self._steps == SCALE_STEPS:
            self.factor, self._steps = self.factor * (2.0 if finite else 0.5), 0
        return finite


def pieces(task: Task, batch: Any, most: int | None) -> list[tuple[Any, float]]:
    """Return a batch in pieces of at most `most` examples, each with its part of the examples; None: the batch as it is.

    A tensor, or a tuple or list of tensors of one length, is cut along its first dimension; for anything else the task says how, by a
    method `split(batch, most)` that returns each piece with its number of examples.

    Raises:
        TypeError: it is anything else, and the task does not say.
    """
    if most is None:
        return [(batch, 1.0)]
    own = getattr(task, "split", None)
    if own is not None:
        cut = list(own(batch, most))
    else:
        parts = (batch,) if isinstance(batch, torch.Tensor) else batch
        whole = isinstance(parts, tuple | list) and all(isinstance(t, torch.Tensor) and t.ndim for t in parts)
        if not whole or len({len(t) for t in parts}) != 1:
            raise TypeError(
                f"Expected batches that are tensors of one length to cut them for micro_batch, got {type(batch).__name__}; give the task "
                "a method split(batch, most) that returns pairs of a piece and its number of examples, or leave micro_batch out."
            )
        columns = [t.split(most) for t in parts]
        cut = [(row[0] if isinstance(batch, torch.Tensor) else type(batch)(row), len(row[0])) for row in zip(*columns, strict=True)]
    total = math.fsum(n for _, n in cut)
    return [(piece, n / total) for piece, n in cut]
