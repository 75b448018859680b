"""Optimizers that step in place on the flat buffers of a replica: local training and the central baseline. A step allocates no vector."""

import torch

from fedclip.choices import LocalOptimizer
from fedclip.optimizers import Moments
from fedclip.replica import Replica
from fedclip.transform import State


class InPlace:
    """One optimizer over a replica's parameters, from a fresh state.

    `sgd`: `b <- momentum b + g; theta <- theta - lr b`. `adamw`: arXiv 1711.05101, with the operations of `torch.optim.AdamW` in their
    order, so that it has the same bits. `lamb`: arXiv 1904.00962, each tensor a layer; its ratio is 1 where either norm is 0.

    Args:
        replica: its parameters are stepped by its gradients; its scratch buffers hold the state.
        name: which optimizer.
        momentum: of `sgd`, in [0, 1).
        betas: decay of the moments of the other two.
        eps: added outside the root.
        weight_decay: decoupled (`adamw`), or inside the normalised direction (`lamb`); that of `sgd` belongs in the gradient.
    """

    def __init__(
        self,
        replica: Replica,
        name: LocalOptimizer,
        momentum: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._replica, self._name, self._momentum, self._betas, self._eps, self._decay = replica, name, momentum, betas, eps, weight_decay
        self._steps = 0
        self._first = replica.scratch("first").zero_() if momentum or name != "sgd" else None
        self._second = replica.scratch("second").zero_() if name != "sgd" else None

    @property
    def state(self) -> State:
        """A copy of the state on the CPU, in the layout's order: None, a momentum of shape (d,), or `Moments`."""
        first, second = (None if t is None else self._replica.ordered(t.detach()).cpu() for t in (self._first, self._second))
        return first if first is None or second is None else Moments(self._steps, first, second)

    @state.setter
    def state(self, state: State) -> None:
        if isinstance(state, Moments) and self._second is not None:
            self._steps = state.steps
            self._second.copy_(self._replica.arranged(state.second))
            state = state.first
        if self._first is not None:
            self._first.copy_(self._replica.arranged(state))

    def step(self, lr: float, factor: torch.Tensor | None = None) -> None:
        """Take one step with the gradients, or with them times a factor, shape (); the gradients may be changed by it."""
        params, grads = self._replica.params, self._replica.grads
        if self._second is not None:
            self._adaptive(lr, grads if factor is None else grads.mul_(factor), self._second)
        elif self._first is not None:
            velocity = self._first.mul_(self._momentum)
            velocity.add_(grads) if factor is None else velocity.addcmul_(grads, factor)
            params.add_(velocity, alpha=-lr)
        elif factor is None:
            params.add_(grads, alpha=-lr)
        else:
            params.addcmul_(grads, factor, value=-lr)

    def _adaptive(self, lr: float, grads: torch.Tensor, second: torch.Tensor) -> None:
        (b1, b2), params, first = self._betas, self._replica.params, self._replica.scratch("first")
        self._steps += 1
        first.lerp_(grads, 1 - b1)
        second.mul_(b2).addcmul_(grads, grads, value=1 - b2)
        root = torch.sqrt(second, out=self._replica.scratch("root"))
        root.div_((1 - b2**self._steps) ** 0.5).add_(self._eps)
        if self._name == "adamw":
            params.mul_(1 - lr * self._decay)
            params.addcdiv_(first, root, value=-lr / (1 - b1**self._steps))
            return
        direction = torch.div(first, root, out=root).div_(1 - b1**self._steps).add_(params, alpha=self._decay)
        for theta, u in zip(self._replica.layout.split(params), self._replica.layout.split(direction), strict=True):
            size, length = torch.linalg.vector_norm(theta), torch.linalg.vector_norm(u)
            ratio = torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))
            theta.addcmul_(u, ratio, value=-lr)


def clip_factor(grads: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Return what a gradient of shape (d,) is multiplied by so that its norm is at most `max_norm`, shape (); 1 where that is None."""
    if max_norm is None:
        return torch.ones((), device=grads.device)
    # The same small constant as torch.nn.utils.clip_grad_norm_.
    return torch.clamp(max_norm / (torch.linalg.vector_norm(grads) + 1e-6), max=1.0)
