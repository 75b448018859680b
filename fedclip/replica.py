"""`Replica`: a model whose trainable parameters, and their gradients, are views into two flat buffers."""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn
from torch.autograd.graph import Node

from fedclip.layout import Layout
from fedclip.low_rank import WORTH, Products
from fedclip.tasks.base import Task
from fedclip.update import Dense, measured, subtracted

POOLINGS = {"MaxPool2DWithIndicesBackward0", "AvgPool2DBackward0", "AdaptiveMaxPool2DBackward0"}
CONVOLUTION = "ConvolutionBackward0"
"""What autograd calls the backward passes of poolings that have the same bits either way, and of convolutions, whose own gradients lie
channels last again."""

WORTH_TURNING = 1 << 16
"""Values that a pooling pooled, from which on turning the gradient that comes to it takes less time than it saves."""


class Replica:
    """One resident model that trains many users one after another: a beginning is one copy, what has moved one subtraction.

    Args:
        model: the model; it is moved to the device and to float32, and belongs to the replica from here on.
        device: `"cpu"`, `"cuda"` or `"cuda:N"`.
        channels_last: whether the weights of 2-D convolutions lie channels last, which makes these a fifth faster on a CPU; what goes
            through the model lies that way too, so that its code must not take a `view` of it where `reshape` or `flatten` is right.
        low_rank: whether the weights of large linear layers may be kept as products in plain steps (`fedclip.low_rank`): nobody keeps
            their memory, or reads it in compiled code.

    Attributes:
        model: the module, whose parameters are views of `params`.
        layout: its layout, one layer a tensor.
        params: flat parameters, float32, shape (d,), but for what is kept as products, from `begin` to `moved`; where `channels_last`, the
            values within each such weight are in another order than the layout's.
        grads: flat gradients, in the order of `params`; every `backward` adds into it.
    """

    def __init__(self, model: nn.Module, device: str = "cpu", *, channels_last: bool = False, low_rank: bool = False) -> None:
        self.model, self._channels_last, self._low_rank = model.to(device=device, dtype=torch.float32), channels_last, low_rank
        self.layout = Layout.of(self.model)
        self.params = torch.empty(self.layout.size, device=device)
        self.grads = torch.zeros_like(self.params)
        turned = {id(m.weight) for m in self.model.modules() if channels_last and isinstance(m, nn.Conv2d)}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._turned = list[tuple[slice, torch.Size]]()
        compiled = any(isinstance(m, torch.jit.ScriptModule) for m in self.model.modules())
        linear = {id(m.weight) for m in self.model.modules() if low_rank and not compiled and type(m) is nn.Linear}
        self._products, self._others, start, after = list[tuple[slice, Products]](), list[tuple[slice, torch.Tensor]](), 0, 0
        for parameter, size in zip(trainable, self.layout.sizes, strict=True):
            place, shape, initial = slice(start, start + size), parameter.shape, parameter.detach()
            if id(parameter) in turned and shape[1] > 1 and shape[2:].numel() > 1:  # else the order is the same
                self._turned.append((place, shape))
            values, gradient = (_view(flat[place], shape, turned=id(parameter) in turned) for flat in (self.params, self.grads))
            values.copy_(initial)
            parameter.data, parameter.grad = values, gradient
            start += size
            if id(parameter) in linear and type(parameter) is nn.Parameter and size >= WORTH:
                self._products.append((place, Products(parameter, values)))
                self._others.append((slice(after, place.start), self.params[after : place.start]))
                after = start
        self._others.append((slice(after, start), self.params[after:start]))
        self._trainable, self._gradients, self._flat = trainable, [p.grad for p in trainable], True
        self._values, self._modules = [p.detach() for p in trainable], list(self.model.modules())
        self._buffers = [(b, b.clone()) for b in self.model.buffers()]
        self._scratch: dict[str, torch.Tensor] = {}
        self._pools = bool(turned)  # until a loss shows that they do not, or too little to look for: bits are the same

    @classmethod
    def of(cls, task: Task, device: str = "cpu", *, low_rank: bool = True) -> Self:
        """Return a replica of a task's model, its weights as the task says they may lie; `low_rank`: also those of linear layers."""
        channels_last, products = (bool(getattr(task, name, False)) for name in ("channels_last", "low_rank"))
        return cls(task.make_model(), device, channels_last=channels_last, low_rank=low_rank and products)

    def twin(self, task: Task) -> "Replica | None":
        """Return another replica of a task's model, on the same device and with its weights lying the same way.

        None where the task, against its contract, gives the same weights again: a second replica would take them from this one.
        """
        model, mine = task.make_model(), {id(parameter) for parameter in self.model.parameters()}
        if any(id(parameter) in mine for parameter in model.parameters()):
            return None
        return Replica(model, str(self.params.device), channels_last=self._channels_last, low_rank=self._low_rank)

    @property
    def bytes(self) -> int:
        """What the model takes, frozen weights and buffers with it."""
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))

    @property
    def flat_gradients(self) -> bool:
        """Whether `backward` adds into `grads`; otherwise each parameter takes the gradient that is made for it, which saves two passes."""
        return self._flat

    @flat_gradients.setter
    def flat_gradients(self, flat: bool) -> None:
        if flat:
            self._settle()
        if flat != self._flat:
            self._flat = flat
            for parameter, gradient in zip(self._trainable, self._gradients, strict=True):
                parameter.grad = gradient if flat else None

    def train(self) -> None:
        """Put the model, where any of it is not, into the mode for training."""
        if not all(module.training for module in self._modules):
            self.model.train()

    def clear_gradients(self) -> None:
        """Begin a step."""
        if self._flat:
            self.grads.zero_()
            return
        for _, products in self._products:
            products.clear()
        for parameter in self._trainable:
            parameter.grad = None

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss, shape (), to the gradients that the parameters hold."""
        if self._pools:
            self._pools = _keep_channels_last(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def descend(self, lr: float) -> None:
        """Take a step of plain SGD with the gradients that the parameters hold."""
        for _, products in self._products:
            products.step(lr)
        pairs = [(values, p.grad) for values, p in zip(self._values, self._trainable, strict=True) if p.grad is not None]
        torch._foreach_add_([values for values, _ in pairs], [g for _, g in pairs], alpha=-lr)

    def scratch(self, name: str) -> torch.Tensor:
        """Return a buffer of shape (d,), made at the first use of its name and the same from then on, with whatever was left in it."""
        if name not in self._scratch:
            self._scratch[name] = torch.empty_like(self.params)
        return self._scratch[name]

    def load(self, params: torch.Tensor) -> None:
        """Start from `params`, shape (d,), in the layout's order; buffers (batch statistics) go back to what they were at the start."""
        for _, products in self._products:
            products.end()
        self.params.copy_(self.arranged(params))
        self.restart()

    def begin(self, arranged: torch.Tensor) -> None:
        """Start as `load` does, for one training and `moved` after it, from parameters that are `arranged` and stay as they are until then.

        The weights of large linear layers are not copied, and kept as products where steps are plain (`low_rank`).
        """
        for place, products in self._products:
            products.begin(arranged[place])
        for place, values in self._others:
            values.copy_(arranged[place])
        self.restart()

    def moved(self, params: torch.Tensor) -> Dense:
        """Return `params`, shape (d,) and in the layout's order, from which it began, less those that it has now, in the place of these.

        Nobody has a use for the model from here to the next `load` or `begin`. On the CPU the update has its energies.
        """
        return measured(self._reordered(), self._parts(params))

    def _parts(self, params: torch.Tensor) -> Iterator[int]:
        """Fill `params` with what has moved; yield after each part how many values are there."""
        start = 0
        for place, products in (*((p, q) for p, q in self._products if q.kept), (slice(len(params), None), None)):
            between = slice(start, place.start)
            yield from (start + there for there in subtracted(params[between], self.params[between]))
            if products is not None:
                yield from (place.start + there for there in products.moved())
            start = place.stop

    def taken(self) -> torch.Tensor:
        """Return `params` itself put into the layout's order, for who has no use for the model until the next `load` or `begin`."""
        self._settle()
        return self._reordered()

    def _reordered(self) -> torch.Tensor:
        for place, shape in self._turned:
            part = self.params[place]
            _merged(part, shape, turned=False).copy_(_merged(part.clone(), shape, turned=True))
        return self.params

    def _settle(self) -> None:
        for _, products in self._products:
            products.settle()

    def restart(self) -> None:
        """Put the buffers of the model back to what they were when the replica was made, and leave the parameters."""
        for buffer, initial in self._buffers:
            buffer.copy_(initial)

    def arranged(self, vector: torch.Tensor) -> torch.Tensor:
        """Return a vector in the layout's order, shape (d,), in the order of `params`; the same object where that is the same."""
        if not self._turned:
            return vector
        arranged = vector.clone()
        for place, shape in self._turned:
            _merged(arranged[place], shape, turned=True).copy_(_merged(vector[place], shape, turned=False))
        return arranged

    def ordered(self, vector: torch.Tensor) -> torch.Tensor:
        """Return a copy of a vector in the order of `params`, shape (d,), in the layout's order."""
        ordered = vector.clone()
        for place, shape in self._turned:
            _merged(ordered[place], shape, turned=False).copy_(_merged(vector[place], shape, turned=True))
        return ordered

    def values(self) -> torch.Tensor:
        """Return a copy of the parameters in the layout's order, shape (d,)."""
        self._settle()
        return self.ordered(self.params)


def _keep_channels_last(loss: torch.Tensor) -> bool:
    """Have the gradients that come to the last poolings of a model lie channels last, as what was pooled does; return if there were any.

    Those of a layer over flattened maps do not, and a pooling then puts all of its own, which are several times larger, into their order
    and back: a twentieth of a small model's time.
    """
    seen, nodes, found = set[Node](), [loss.grad_fn], False
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in POOLINGS:
            saved: Any = getattr(node, "_raw_saved_self", None)
            if getattr(saved, "unpack_hook", saved) is not None:
                continue  # where activations are made again when they are needed, asking for one is asking for that
            pooled: torch.Tensor = node._saved_self  # type: ignore[attr-defined]  # of these nodes alone
            if pooled.numel() >= WORTH_TURNING and pooled.is_contiguous(memory_format=torch.channels_last):
                node.register_prehook(_channels_last)
                found = True
        elif node.name() != CONVOLUTION:
            nodes += [before for before, _ in node.next_functions]
    return found


def _channels_last(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    return tuple(g if g is None else g.contiguous(memory_format=torch.channels_last) for g in gradients)


def _view(part: torch.Tensor, shape: torch.Size, *, turned: bool) -> torch.Tensor:
    """Return a view of a flat tensor as a parameter; turned: of a convolution's weight (out, in, height, width), channels last."""
    if not turned:
        return part.view(shape)
    leaving, entering, height, width = shape
    return part.view(leaving, height, width, entering).permute(0, 3, 1, 2)


def _merged(part: torch.Tensor, shape: torch.Size, *, turned: bool) -> torch.Tensor:
    """Return what `_view` does with height and width as one dimension: copies from one order to the other take a fifth of the time."""
    leaving, entering, area = shape[0], shape[1], shape[2:].numel()
    return part.view(leaving, area, entering).transpose(1, 2) if turned else part.view(leaving, entering, area)
