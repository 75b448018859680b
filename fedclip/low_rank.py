"""Weights of linear layers under plain SGD, kept as the weight of the round less a few outer products.

A batch of n rows changes the weight of a linear layer by a matrix of rank n: `W <- W - lr G^T X`, X its input of shape (n, in), G the
gradient of its output, shape (n, out). For a user of few rows it is enough to keep these. That saves most of what a small model's
training takes beside its passes: the copy of the weight for each user and, for each step, its gradient, written and then read by the step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WORTH = 1 << 18
"""Values of a weight from which on this takes less time than it saves where rows are few."""

CHUNK = 1 << 18
"""Values of a product that are made at once: a core's second cache has them until they are measured."""


class LowRank(nn.Parameter):
    """A parameter while its `Products` keep it; before and after that it is an ordinary one.

    Whatever is done with it but a linear layer, or asking for its form, first puts its values into their place. Who has kept the memory
    itself, by an earlier view or in compiled code, does not ask.
    """

    products: "Products | None" = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute a linear layer by products where that can be, and everything else as torch does."""
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs[name] for name in ("input", "weight", "bias")[len(args) :] if name in kwargs), None)[:3]
            if isinstance(weight, LowRank) and weight.products is not None and weight.products.take(x):
                rows = _Linear.apply(x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias, weight.products)
                return rows if x.ndim == 2 else rows.view(*x.shape[:-1], rows.shape[-1])
        for parameter in () if func in FORM else _found((args, kwargs)):
            if parameter.products is not None and (func not in GRADIENT or parameter.products.pending):
                parameter.products.settle()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


_GRAD: Any = torch.Tensor.grad
FORM = {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim")}
FORM |= {torch.Tensor.size, torch.Tensor.numel, torch.Tensor.dim, torch.Tensor.is_floating_point}
"""What asks for no values."""

GRADIENT = {_GRAD.__get__, _GRAD.__set__}
"""What asks for, or replaces, the gradient of the step, and for nothing where there is none yet."""


class Products:
    """The weight of one linear layer: `begin` makes it that of the round, steps change it by outer products.

    Attributes:
        parameter: the weight, shape (out, in).
        kept: whether it is kept so; otherwise the values are in the place that they have in any model.

    Args:
        parameter: shape (out, in).
        place: where its values lie, a view of the same memory.
    """

    def __init__(self, parameter: nn.Parameter, place: torch.Tensor) -> None:
        self.parameter, self._place = parameter, place
        leaving, entering = parameter.shape
        # So many rows take half the memory of the weight, and are still far fewer than what they add to a pass would cost.
        self._most = parameter.numel() // (2 * (leaving + entering))
        self._base = self._place
        self._inputs, self._gradients = (self._place.new_empty(0, width) for width in (entering, leaving))
        self._rank = self._filled = 0
        self._used, self.kept = False, False

    @property
    def pending(self) -> bool:
        """Whether there are rows of a gradient for which no step was taken."""
        return self.kept and self._filled > self._rank

    def begin(self, base: torch.Tensor) -> None:
        """Start from a weight, shape (out * in,), which must stay as it is; one whose gradients somebody hooks is an ordinary one."""
        self.end()
        if self.parameter._backward_hooks or self.parameter._post_accumulate_grad_hooks:
            self._place.copy_(base.view_as(self._place))
            return
        self._base, self._rank, self._filled, self._used, self.kept = base.view_as(self._place), 0, 0, False, True
        self.parameter.__class__ = LowRank
        self.parameter.products = self  # type: ignore[attr-defined]

    def end(self) -> None:
        """Let the parameter be an ordinary one, with whatever is in its place."""
        self.kept, self._base = False, self._place
        if isinstance(self.parameter, LowRank):
            del self.parameter.products
            self.parameter.__class__ = nn.Parameter  # type: ignore[assignment]

    def settle(self) -> None:
        """Put the values in their place, and what the step has of a gradient into the parameter's; it is an ordinary one from then on."""
        if not self.kept:
            return
        self.kept = False
        self._place.copy_(self._base)
        if self._rank:
            self._place.addmm_(self._gradients[: self._rank].t(), self._inputs[: self._rank], alpha=-1.0)
        if self._filled > self._rank:
            rows, before = slice(self._rank, self._filled), self.parameter.grad
            gradient = self._gradients[rows].t() @ self._inputs[rows]
            self.parameter.grad = gradient if before is None else before + gradient
        if not self._used:  # else at the step's end: what is computed again for its backward pass must be what it was
            self.end()

    def take(self, x: torch.Tensor) -> bool:
        """Return whether a layer of input `x` can be computed by products; otherwise what it is computed with is in its place."""
        plain = x.ndim > 0 and x.dtype == torch.float32 and x.device == self._place.device and x.layout == torch.strided
        plain = plain and not torch.is_autocast_enabled(x.device.type) and not torch._C._are_functorch_transforms_active()
        if plain and not self._used:
            self._used = self._filled + x.shape[:-1].numel() <= self._most
        if not (plain and self._used):
            self.settle()
            return False
        return True

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return what the layer makes of rows, shape (n, in): shape (n, out)."""
        weight = self._base if self.kept else self._place
        made = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
        if self.kept and self._rank:
            made.addmm_(x @ self._inputs[: self._rank].t(), self._gradients[: self._rank], alpha=-1.0)
        return made

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the layer's input, shape (n, in), from that of its output, shape (n, out)."""
        made = gradient @ self._base
        if self._rank:
            made.addmm_(gradient @ self._gradients[: self._rank].t(), self._inputs[: self._rank], alpha=-1.0)
        return made

    def add(self, x: torch.Tensor, gradient: torch.Tensor) -> bool:
        """Keep a batch's rows, shape (n, in), and the gradient of what the layer made of them, shape (n, out), for the step.

        Returns:
            False where there is no room for them.
        """
        first, last = self._filled, self._filled + len(x)
        if last > self._most:
            return False
        if not len(self._inputs):
            self._inputs, self._gradients = (kept.new_empty(self._most, kept.shape[1]) for kept in (self._inputs, self._gradients))
        self._inputs[first:last], self._gradients[first:last] = x, gradient
        self._filled = last
        return True

    def clear(self) -> None:
        """Begin a step: what was kept of the gradient for a step that was not taken is forgotten."""
        self._filled = self._rank

    def step(self, lr: float) -> None:
        """Take a step of plain SGD with what was kept for it."""
        with torch._C.DisableTorchFunctionSubclass():
            unseen = self.parameter.grad is not None
        if unseen:
            self.settle()
        if not self.kept:
            self.end()
            return
        self._gradients[self._rank : self._filled].mul_(lr)
        self._rank, self._used = self._filled, False

    def moved(self) -> Iterator[int]:
        """Put the weight of the round less the present one into its place; yield after each part how many of its values are there."""
        leaving, entering = self._place.shape
        rows, turned = max(1, CHUNK // entering), self._gradients[: self._rank].t().contiguous()
        for start in range(0, leaving, rows):
            torch.mm(turned[start : start + rows], self._inputs[: self._rank], out=self._place[start : start + rows])
            yield min(start + rows, leaving) * entering
        self.end()


class _Linear(torch.autograd.Function):
    """A linear layer whose weight is kept as products."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, products: Products) -> torch.Tensor:
        ctx.products = products
        ctx.save_for_backward(x)
        return products.forward(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        (x,), products = ctx.saved_tensors, ctx.products
        to_x, _, to_bias, _ = ctx.needs_input_grad
        node = ctx.next_functions[1][0]  # where the gradient of the weight would go
        if torch.is_grad_enabled():  # to be differentiated in its turn, the gradient has to know of the weight
            products.settle()
        wanted = node is not None and (not products.kept or torch._C._will_engine_execute_node(node))
        if products.kept and wanted and not products.add(x, gradient):
            products.settle()
        before = None
        if to_x:
            before = products.back(gradient) if products.kept else gradient @ products.parameter
        to_weight = gradient.t() @ x if wanted and not products.kept else None
        return before, to_weight, gradient.sum(0) if to_bias else None, None


def _found(values: Any) -> Iterator[LowRank]:
    """Yield the parameters of this kind that what a function is given holds."""
    if isinstance(values, LowRank):
        yield values
    elif isinstance(values, dict):
        yield from _found(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _found(value)
