"""The words that experiment files choose among where a number will not do. Imports nothing."""

from typing import Literal

Grouping = Literal["tensor", "block"]
"""What a layer is: each tensor, or all tensors of a numbered block."""

Split = Literal["uniform", "dim", "weights"]
"""How a bound is split over the layers."""

Mode = Literal["clip", "normalize"]
"""What per-layer clipping does with a layer under its bound: leave it, or scale it up too."""

Weighting = Literal["uniform", "examples"]
"""What a user weighs in the mean: the same as all others, or its number of examples."""

NoiseSplit = Literal["isotropic", "bounds", "weights"]
"""How noise is split over the layers: the same for all coordinates, in proportion to the layers' bounds, or by given numbers."""

Extent = Literal["tensor", "model"]
"""Over what a norm or a choice of coordinates goes: each tensor by itself, or all of them together."""

Normalization = Literal["mean", "sum"]
"""What the server makes of the nodes' gradients: their mean, or the sum of gradients that each node has divided by their number."""

SmallTensors = Literal["dense", "sparse"]
"""How a sparsifier treats tensors of one dimension or none: leave them whole, or as the others."""

Memory = Literal["user", "none"]
"""Whether a stage remembers each user from round to round."""

Precision = Literal["float32", "float16", "int8"]
"""What values are sent as."""

LocalOptimizer = Literal["sgd", "adamw", "lamb"]
"""How a local gradient becomes a step."""

Arithmetic = Literal["float32", "bfloat16", "float16"]
"""What forward and backward passes compute in; parameters and their steps stay float32."""


def block_of(name: str) -> str:
    """Return the path up to the first number in a tensor's name (`blocks.3.mlp.weight` -> `blocks.3`), else its module's path."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    if numbered:
        return ".".join(parts[: numbered[0] + 1])
    return ".".join(parts[:-1]) or name
