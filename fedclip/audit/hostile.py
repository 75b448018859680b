"""Users who send what breaks bounds: huge, infinite and missing numbers, corners, zeros; and a task that makes them train to it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from fedclip.layout import Layout
from fedclip.tasks.base import Counts

KINDS = ("normal", "corner", "layer", "huge", "edge", "missing", "infinite", "tiny", "zeros", "largest")
"""What a vector may be. `corner`: every coordinate as large as the whole bound, the longest vector that a fixed-point sum can hold."""


def hostile_vector(layout: Layout, bound: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Return a vector of a kind, float32, shape (d,), in proportion to the bound on its norm."""
    d = layout.size
    vector = rng.standard_normal(d) * (3 * bound / math.sqrt(max(1, d)))
    if kind == "corner":
        vector = rng.choice((-1.0, 1.0), size=d) * bound * (1 - 1e-6)
    elif kind == "layer":
        start = np.concatenate([[0], np.cumsum(layout.sizes)])
        t = int(rng.integers(len(layout.sizes)))
        kept = np.zeros(d, dtype=bool)
        kept[start[t] : start[t + 1]] = True
        vector = _unit(np.where(kept, vector, 0.0)) * (bound * (1 - 1e-6))
    elif kind == "huge":
        vector = vector / bound * 1e30
    elif kind == "edge":
        vector = _unit(vector) * (bound * rng.choice((1 - 1e-7, 1.0, 1 + 1e-7, 1 + 1e-5)))
    elif kind in ("missing", "infinite"):
        vector[rng.integers(d, size=1 + d // 3)] = math.nan if kind == "missing" else rng.choice((math.inf, -math.inf))
    elif kind == "tiny":
        vector = np.where(vector > 0, 1e-45, -1e-40)
    elif kind == "zeros":
        vector = np.where(vector > 0, 0.0, -0.0)
    elif kind == "largest":
        vector = np.where(vector > 0, 3e38, -3e38)
    with np.errstate(over="ignore"):
        return vector.astype(np.float32)


def _unit(vector: np.ndarray) -> np.ndarray:
    """Return the vector at norm 1; a zero stays one."""
    return vector / (float(np.linalg.norm(vector)) or 1.0)


class _Vectors(nn.Module):
    """Parameters of zeros in the names, shapes and order of any layout, whatever modules those names would stand for."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self._names = layout.names
        self._tensors = nn.ParameterList(torch.zeros(shape) for shape in layout.shapes)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters under the layout's names."""
        yield from zip(self._names, self._tensors, strict=True)


class HostileTask:
    """A task over a layout whose users' updates are hostile vectors, another in each round: the loss is linear in the parameters.

    With local SGD of rate 1 and one step from zero parameters, a user's update is exactly its vector.

    Args:
        layout: of the vectors.
        bound: the bound on a user's update.
        users: how many users there are.
    """

    held_out_units = 1

    def __init__(self, layout: Layout, bound: float, users: int) -> None:
        self._layout, self._bound, self.users = layout, bound, users

    def make_model(self) -> nn.Module:
        """Return a module whose parameters are zeros and have the layout."""
        return _Vectors(self._layout)

    def load_user(self, user: int, rng: np.random.Generator) -> Sequence[Any]:
        """Return one to five examples, the first of which decides."""
        kind = KINDS[int(rng.integers(len(KINDS)))]
        return [torch.from_numpy(hostile_vector(self._layout, self._bound, kind, rng))] * int(rng.integers(1, 6))

    def cost(self, user: int) -> float:
        """Return 1."""
        return 1.0

    def batches(self, examples: Sequence[Any], batch_size: int, rng: np.random.Generator) -> Iterator[Any]:
        """Yield the first example."""
        yield examples[0]

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Return the sum over parameters of each times its number, whose gradient is the vector."""
        pieces = zip(model.parameters(), self._layout.split(batch), strict=True)
        return torch.stack([(p.flatten() * v).sum() for p, v in pieces]).sum()

    def evaluate(self, model: nn.Module, unit: int) -> Counts:
        """Return nothing."""
        return {}

    def summarise(self, counts: Sequence[Counts], seed: int) -> dict[str, float]:
        """Return nothing."""
        return {}
