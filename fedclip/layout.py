"""`Layout`: how a model's trainable tensors lie in one flat float32 vector, and which of them form a layer."""

import hashlib
import itertools
import json
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from fedclip.choices import Grouping, block_of

ROW = 256
"""Coordinates in a row of `Rows`."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The coordinates of a layout in rows of `ROW`.

    Attributes:
        loose: the coordinates of rows that are of several tensors, and what is left after the last whole row, int64, ascending.
        owners: the layer of each whole row, H for one that is of several tensors, and then of each loose coordinate, int64.
    """

    loose: np.ndarray
    owners: np.ndarray


@dataclass(frozen=True)
class Layout:
    """Names, shapes and layers of the trainable floating-point tensors of a model, in the order of `named_parameters`.

    Buffers and integer tensors are no part of it. Offsets follow from the shapes; the vector has no gaps.

    Attributes:
        names: one name a tensor, unique.
        shapes: one shape a tensor; `()` is a scalar, a zero in a shape makes an empty tensor.
        layers: for each tensor the name of the layer it belongs to. With one layer a tensor this equals `names`, which is
            what pfl4asr (arXiv 2310.00098) calls a layer.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.shapes) == len(self.layers):
            counts = (len(self.names), len(self.shapes), len(self.layers))
            raise ValueError(f"Expected one name, shape and layer for each tensor, got {counts[0]}, {counts[1]} and {counts[2]}.")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"Expected unique tensor names, got {self.names}.")

    @classmethod
    def of(cls, model: nn.Module, grouping: Grouping = "tensor") -> "Layout":
        """Return the layout of a model's trainable parameters.

        Args:
            model: any module. Parameters with `requires_grad` off are frozen and left out; a shared one counts once.
            grouping: `"tensor"`: every tensor is a layer; `"block"`: all tensors of a numbered block (`blocks.3.…`) are one
                layer, and a tensor outside any block belongs to its module's layer.

        Raises:
            ValueError: the model has no trainable parameter, or one that is not floating point.
        """
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"Expected a model with trainable parameters, got {type(model).__name__} with none; check requires_grad.")
        for name, parameter in named:
            if not parameter.is_floating_point():
                raise ValueError(f"Expected floating-point parameters, got {parameter.dtype} in '{name}'; freeze it or make it a buffer.")
        names = tuple(n for n, _ in named)
        return cls(names, tuple(tuple(p.shape) for _, p in named), names).grouped(grouping)

    def grouped(self, grouping: Grouping) -> "Layout":
        """Return the same tensors with layers by tensor or by block."""
        layers = self.names if grouping == "tensor" else self._blocks
        if layers == self.layers:
            return self
        return self._by_block if grouping == "block" else Layout(self.names, self.shapes, layers)

    def __getstate__(self) -> dict[str, object]:
        """Leave out what can be made anew: of a large model it is megabytes."""
        return {"names": self.names, "shapes": self.shapes, "layers": self.layers}

    @cached_property
    def _blocks(self) -> tuple[str, ...]:
        return tuple(block_of(n) for n in self.names)

    @cached_property
    def _by_block(self) -> "Layout":
        return Layout(self.names, self.shapes, self._blocks)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each tensor."""
        return tuple(math.prod(s) for s in self.shapes)

    @cached_property
    def size(self) -> int:
        """Elements of the whole vector, d."""
        return sum(self.sizes)

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """The distinct layers in order of first appearance; there are H of them."""
        return tuple(dict.fromkeys(self.layers))

    @cached_property
    def layer_of(self) -> tuple[int, ...]:
        """For each tensor the index of its layer in `layer_names`."""
        index = {name: i for i, name in enumerate(self.layer_names)}
        return tuple(index[layer] for layer in self.layers)

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Elements of each layer, d_h."""
        sizes = [0] * len(self.layer_names)
        for layer, size in zip(self.layer_of, self.sizes, strict=True):
            sizes[layer] += size
        return tuple(sizes)

    @cached_property
    def rows(self) -> Rows:
        """The whole vector in rows of `ROW` coordinates, and which layer each is of: what takes a few operations, not some a tensor."""
        layers, loose, owners, start = np.full(self.size // ROW, len(self.layer_names)), list[np.ndarray](), list[int](), 0
        for layer, size in zip(self.layer_of, self.sizes, strict=True):
            end = start + size
            first, last = -(-start // ROW), end // ROW
            layers[first:last] = layer
            loose += [np.arange(start, end)] if first >= last else [np.arange(start, first * ROW), np.arange(last * ROW, end)]
            owners += [layer] * (1 if first >= last else 2)
            start = end
        return Rows(np.concatenate(loose), np.concatenate([layers, np.repeat(owners, [len(part) for part in loose])]))

    def restricted(self, support: torch.Tensor) -> "Layout":
        """Return the layout of the values at some coordinates alone: one dimension a tensor, empty where none of it is there.

        Args:
            support: coordinates, int64, ascending and distinct, shape (k,).
        """
        return Layout(self.names, tuple((n,) for n in self.counts(support)), self.layers)

    def counts(self, indices: torch.Tensor) -> list[int]:
        """Return how many of some coordinates (int64, ascending) each tensor has."""
        ends = torch.tensor(self.sizes, dtype=torch.int64).cumsum(0)
        cuts = torch.searchsorted(indices.cpu(), ends).tolist()
        return [b - a for a, b in itertools.pairwise([0, *cuts])]

    @cached_property
    def digest(self) -> str:
        """A short stable hash of names, shapes and layers."""
        text = json.dumps([self.names, self.shapes, self.layers])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def split(self, vector: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return one flat view of `vector` (shape (size,)) for each tensor, in order.

        Raises:
            ValueError: the vector has another shape.
        """
        if vector.shape != (self.size,):
            raise ValueError(
                f"Expected a vector of shape ({self.size},) for this layout, got {tuple(vector.shape)}; is it another model's?"
            )
        return torch.split(vector, list(self.sizes))
