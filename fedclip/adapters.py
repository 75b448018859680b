"""Low-rank adapters (LoRA, arXiv 2106.09685) for the linear layers of any module: what is frozen never enters a `Layout`."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedclip.options import ConfigError

QUERIES_AND_VALUES = ("*.q_proj", "*.v_proj", "*.qkv")
"""Names of the layers that the paper adapts; where queries, keys and values are one layer, that one."""


class Adapted(nn.Module):
    """A frozen linear layer and, beside it, one of low rank: `W x + b + (alpha / rank) B A x`.

    Args:
        frozen: the layer; it is frozen here.
        rank: the rows of A, at least 1.
        alpha: scales what is added.
        generator: draws A, normal with variance 1 / inputs; B begins as zeros, so that the layer begins as it was.
    """

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self._scale = alpha / rank
        drawn = torch.randn(rank, frozen.in_features, generator=generator, device="cpu") * frozen.in_features**-0.5
        self.down = nn.Parameter(drawn.to(frozen.weight.device))
        self.up = nn.Parameter(torch.zeros(frozen.out_features, rank, device=frozen.weight.device))

    @property
    def weight(self) -> Tensor:
        """The whole matrix, for code that reads a layer's weight in the place of calling it (attention of torch and of WavLM)."""
        return self.frozen.weight + self._scale * (self.up @ self.down)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.frozen.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, shape (..., out_features), of inputs of shape (..., in_features)."""
        added = functional.linear(functional.linear(x, self.down), self.up)
        frozen: Tensor = self.frozen(x)
        return frozen + self._scale * added


def adapt(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str], trained: Sequence[str], seed: int) -> nn.Module:
    """Freeze a model, which is changed, but for adapters of some linear layers and for what is trained whole; return it.

    Args:
        model: any module.
        rank: rank of each adapter.
        alpha: what an adapter adds is scaled by alpha / rank.
        targets: patterns (as of files) of the names of linear layers; none: queries and values by the names that they usually have.
        trained: patterns of the names of modules and tensors that are trained whole; they get no adapters.
        seed: fixes the matrices A.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = targets or [p for p in QUERIES_AND_VALUES if any(fnmatchcase(n, p) for n in layers)] or QUERIES_AND_VALUES
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ConfigError(f"adapters.targets: no linear layer is named like '{pattern}'; there are {_kinds(layers)}.")
    names = [n for n, _ in model.named_parameters()]
    for pattern in trained:
        if not any(_within(name, pattern) for name in names):
            raise ConfigError(f"adapters.trained: no module or tensor is named like '{pattern}'; there are {_kinds(names)}.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(_within(name, pattern) for pattern in trained))
    generator = torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        whole = layer.weight.requires_grad or any(_within(name, pattern) for pattern in trained)
        if not whole and any(fnmatchcase(name, pattern) for pattern in targets):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapted(layer, rank, alpha, generator))
    return model


def _within(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _kinds(names: Iterable[str]) -> str:
    """Return the names with their numbers as `*`, each once."""
    return ", ".join(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names))
