"""`Replica`: a model whose trainable parameters, and their gradients, are views into two flat buffers."""

import torch
from torch import nn

from fedclip.layout import Layout


class Replica:
    """One resident model that trains many users one after another: a reset is one copy, a delta one subtraction.

    Args:
        model: the model; it is moved to the device and to float32, and belongs to the replica from here on.
        device: `"cpu"`, `"cuda"` or `"cuda:N"`.

    Attributes:
        model: the module, whose parameters are views of `params`.
        layout: its layout, one layer a tensor.
        params: flat parameters, float32, shape (d,).
        grads: flat gradients; every `backward` adds into it.
    """

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        self.model = model.to(device=device, dtype=torch.float32)
        self.layout = Layout.of(self.model)
        self.params = torch.empty(self.layout.size, device=device)
        self.grads = torch.zeros_like(self.params)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        views = zip(trainable, self.layout.split(self.params), self.layout.split(self.grads), strict=True)
        for parameter, values, gradient in views:
            values.copy_(parameter.detach().flatten())
            parameter.data = values.view(parameter.shape)
            parameter.grad = gradient.view(parameter.shape)
        self._buffers = [(b, b.clone()) for b in self.model.buffers()]
        self._scratch: dict[str, torch.Tensor] = {}

    def scratch(self, name: str) -> torch.Tensor:
        """Return a buffer of shape (d,), made at the first use of its name and the same from then on, with whatever was left in it."""
        if name not in self._scratch:
            self._scratch[name] = torch.empty_like(self.params)
        return self._scratch[name]

    def load(self, params: torch.Tensor) -> None:
        """Start from `params`, shape (d,); buffers (batch statistics) go back to what they were when the replica was made."""
        self.params.copy_(params)
        for buffer, initial in self._buffers:
            buffer.copy_(initial)
