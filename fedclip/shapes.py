"""What a thing would be without its values: sizes of models and states that nothing is allocated for."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from fedclip.layout import Layout

T = TypeVar("T")


def shapes_only(make: Callable[[], T]) -> T:
    """Return what `make` returns with its tensors on the meta device, where they take no room; as it is where that cannot be.

    A user's own model or stage may need its values when it is made.
    """
    try:
        with torch.device("meta"):
            return make()
    except Exception:  # noqa: BLE001  what is really wrong shows when it is made with its values
        return make()


def tensor_bytes(state: Any, half: bool = False) -> int:
    """Return how many bytes the tensors of a state take: a tensor, a tuple or a frozen dataclass of them; 2 a float32 with `half`."""
    if isinstance(state, torch.Tensor):
        return state.numel() * (2 if half and state.dtype == torch.float32 else state.element_size())
    if isinstance(state, tuple):
        return sum(tensor_bytes(part, half) for part in state)
    if dataclasses.is_dataclass(state):
        return sum(tensor_bytes(getattr(state, field.name), half) for field in dataclasses.fields(state))
    return 0


def fixed_bytes(model: nn.Module) -> int:
    """Return the bytes of what a model holds beside its trainable parameters: frozen ones and buffers, as float32."""
    fixed = [p for p in model.parameters() if not p.requires_grad] + list(model.buffers())
    return sum(4 * t.numel() if t.is_floating_point() else t.numel() * t.element_size() for t in fixed)


def shrunk(layout: Layout, most: int) -> Layout:
    """Return a layout of about `most` numbers at most, with the same tensors and layers, each smaller by the same factor."""
    share = min(1.0, most / max(1, layout.size))
    if share == 1.0:
        return layout
    sizes = [max(1, round(n * share)) if n else 0 for n in layout.sizes]
    return Layout(layout.names, tuple((n, 1) if len(s) > 1 else (n,) for n, s in zip(sizes, layout.shapes, strict=True)), layout.layers)
