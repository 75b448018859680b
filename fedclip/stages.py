"""The vocabulary of experiment files: a function for each named stage, rebuilt from plain data, and nothing that computes.

A stage is written `{ name = { argument = value } }`, or `"module:factory"` and `"file.py:factory"` in the place of the name.
This module imports no PyTorch, so that a wrong name or argument is refused before anything heavy is loaded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fedclip.choices import (
    Arithmetic,
    Extent,
    Grouping,
    LocalOptimizer,
    Memory,
    Mode,
    NoiseSplit,
    Normalization,
    Precision,
    SmallTensors,
    Split,
)
from fedclip.doors import load_door
from fedclip.options import check_arguments, unknown
from fedclip.schedules import Schedule

if TYPE_CHECKING:
    from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
    from fedclip.codec import DenseCodec
    from fedclip.dgc import DGC
    from fedclip.local import LocalSGD
    from fedclip.optimizers import LAMB, LARS, SGD, Adagrad, Adam, Yogi
    from fedclip.packed import PackedCodec
    from fedclip.quantize import Entropy, Fp16, Quantize, Sign
    from fedclip.release import Gaussian
    from fedclip.sampling import Available, FixedSize, Poisson
    from fedclip.sparsify import CommonMask, RandomK, TopK
    from fedclip.transform import ErrorFeedback

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
AtLeastOne = Annotated[float, Field(ge=1, allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0)]
Rate = Positive | Schedule

PAPER_WARMUP = ((0.25, 1), (0.0625, 1), (0.015625, 1), (0.004, 1))
"""The densities of Deep Gradient Compression (arXiv 1712.01887) before its last one: 75, 93.75, 98.4375 and 99.6 % are left out."""


def clip_by_global_norm(max_norm: Positive) -> "ClipByGlobalNorm":
    """Clip the whole update to an L2 norm of `max_norm`."""
    from fedclip.clipping import ClipByGlobalNorm

    return ClipByGlobalNorm(max_norm)


def clip_per_layer(
    max_norm: Positive, split: Split = "dim", mode: Mode = "clip", layers: Grouping = "tensor", weights: tuple[Positive, ...] = ()
) -> "ClipPerLayer":
    """Clip each layer to its part of `max_norm`."""
    from fedclip.clipping import ClipPerLayer

    return ClipPerLayer(max_norm, split, mode, layers, weights)


def with_error_feedback(inner: Any) -> "ErrorFeedback":
    """Add what the stage `inner` did not let through to the same user's next update."""
    from fedclip.transform import ErrorFeedback, Transform

    return ErrorFeedback(inner if isinstance(inner, Transform) else build_stage(inner))


def dgc(
    density: Density = 0.001,
    momentum: Fraction = 0.9,
    nesterov: bool = False,
    clip_norm: Positive | None = None,
    clip_by: Extent = "model",
    nodes: Count = 1,
    normalization: Normalization = "mean",
    mask: bool = True,
    warmup: tuple[tuple[Density, Count], ...] = PAPER_WARMUP,
    small: SmallTensors = "dense",
    grid: Precision = "float32",
    state: Memory = "user",
) -> "DGC":
    """Send the largest of what the user's updates, with momentum, have added up to (Deep Gradient Compression)."""
    from fedclip.dgc import DGC

    return DGC(density, momentum, nesterov, clip_norm, clip_by, nodes, normalization, mask, warmup, small, grid, state)


def top_k(density: Density, by: Extent = "tensor") -> "TopK":
    """Keep the coordinates of largest magnitude."""
    from fedclip.sparsify import TopK

    return TopK(density, by)


def random_k(density: Density, seed: Seed = 0, scale: bool = False) -> "RandomK":
    """Keep coordinates drawn by a public seed, the same for all users of a round."""
    from fedclip.sparsify import RandomK

    return RandomK(density, seed, scale)


def common_mask(density: Density, seed: Seed = 0, fresh: Density = 1.0) -> "CommonMask":
    """Keep coordinates that all users share: of a random partition, another part in each round, and of what was released before."""
    from fedclip.sparsify import CommonMask

    return CommonMask(density, seed, fresh)


def fp16() -> "Fp16":
    """Round to float16 numbers."""
    from fedclip.quantize import Fp16

    return Fp16()


def quantize(bits: Annotated[int, Field(ge=2, le=8)] = 8, block: Count = 32, stochastic: bool = True) -> "Quantize":
    """Round to a few bits, with a scale for each block of values."""
    from fedclip.quantize import Quantize

    return Quantize(bits, block, stochastic)


def sign() -> "Sign":
    """Send the sign of each value, and the mean magnitude of each tensor."""
    from fedclip.quantize import Sign

    return Sign()


def entropy(step: Positive = 2.0) -> "Entropy":
    """Round to multiples of `step` times the RMS, and send what is not 0 for the codec to squeeze."""
    from fedclip.quantize import Entropy

    return Entropy(step)


def sgd(lr: Rate, momentum: Fraction = 0.0, nesterov: bool = False, momentum_1d: Fraction | None = None) -> "SGD":
    """Take a step of server SGD, with momentum where asked."""
    from fedclip.optimizers import SGD

    return SGD(Schedule.of(lr), momentum, nesterov, momentum_1d)


def adam(lr: Rate, betas: tuple[Fraction, Fraction] = (0.9, 0.999), eps: Positive = 1e-8, weight_decay: NotNegative = 0.0) -> "Adam":
    """Take a step of server Adam; with `weight_decay`, AdamW."""
    from fedclip.optimizers import Adam

    return Adam(Schedule.of(lr), betas, eps, weight_decay)


def lamb(
    lr: Rate,
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: Positive = 1e-6,
    weight_decay: NotNegative = 0.0,
    trust_bounds: tuple[NotNegative, Annotated[float, Field(gt=0)]] = (0.0, float("inf")),
    layers: Grouping = "tensor",
) -> "LAMB":
    """Take a step of server LAMB: Adam, normalised layer by layer."""
    from fedclip.optimizers import LAMB

    return LAMB(Schedule.of(lr), betas, eps, weight_decay, trust_bounds, layers)


def lars(
    lr: Rate, momentum: Fraction = 0.9, trust: Positive = 1e-3, weight_decay: NotNegative = 0.0, layers: Grouping = "tensor"
) -> "LARS":
    """Take a step of server LARS: SGD with momentum, each layer's step in proportion to the norm of the layer."""
    from fedclip.optimizers import LARS

    return LARS(Schedule.of(lr), momentum, trust, weight_decay, layers)


def yogi(lr: Rate, betas: tuple[Fraction, Fraction] = (0.9, 0.99), eps: Positive = 1e-3, initial: NotNegative | None = None) -> "Yogi":
    """Take a step of server Yogi: Adam whose second moment moves by as much as it is, whatever the difference."""
    from fedclip.optimizers import Yogi

    return Yogi(Schedule.of(lr), betas, eps, initial)


def adagrad(lr: Rate, eps: Positive = 1e-3, initial: NotNegative | None = None) -> "Adagrad":
    """Take a step of server Adagrad: by the root of the sum of all squares so far."""
    from fedclip.optimizers import Adagrad

    return Adagrad(Schedule.of(lr), eps, initial)


def poisson(population: Count, cohort: Positive, max_cohort: Count | None = None, devices_per_user: Count = 1) -> "Poisson":
    """Take each of `population` users independently with probability `cohort / population`."""
    from fedclip.sampling import Poisson

    return Poisson(population, cohort, max_cohort, devices_per_user)


def fixed_size(population: Count, cohort: Count) -> "FixedSize":
    """Take `cohort` distinct users of `population`, all such cohorts equally likely."""
    from fedclip.sampling import FixedSize

    return FixedSize(population, cohort)


def available(population: Count, cohort: Positive, over_selection: AtLeastOne = 1.0) -> "Available":
    """Ask whoever is there of `population` users; the sum is divided by `cohort`."""
    from fedclip.sampling import Available

    return Available(population, cohort, over_selection)


def local_sgd(
    lr: Positive,
    steps: Count | None = None,
    epochs: Count | None = None,
    batch_size: Count = 8,
    clip_norm: Positive | None = None,
    momentum: Fraction = 0.0,
    optimizer: LocalOptimizer = "sgd",
    betas: tuple[Fraction, Fraction] = (0.9, 0.999),
    eps: Positive = 1e-8,
    weight_decay: NotNegative = 0.0,
    proximal: NotNegative = 0.0,
    accumulate: Count = 1,
    micro_batch: Count | None = None,
    precision: Arithmetic = "float32",
) -> "LocalSGD":
    """Train locally by SGD, AdamW or LAMB for a number of steps or epochs."""
    from fedclip.local import LocalSGD

    numbers = (momentum, optimizer, betas, eps, weight_decay, proximal, accumulate, micro_batch, precision)
    return LocalSGD(lr, steps, epochs, batch_size, clip_norm, *numbers)


def gaussian(noise_multiplier: Positive, split: NoiseSplit = "isotropic", weights: tuple[Positive, ...] = ()) -> "Gaussian":
    """Add Gaussian noise to the sum, with a standard deviation of `noise_multiplier` times the bound of the chain."""
    from fedclip.release import Gaussian

    return Gaussian(noise_multiplier, split, weights)


def dense() -> "DenseCodec":
    """Encode every float32 value as it is."""
    from fedclip.codec import DenseCodec

    return DenseCodec()


def packed(level: Annotated[int, Field(ge=1, le=19)] = 3) -> "PackedCodec":
    """Encode positions as gaps and values in the bits that their grid has, compressed by zstd."""
    from fedclip.packed import PackedCodec

    return PackedCodec(level)


STAGES: Mapping[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        *(clip_by_global_norm, clip_per_layer, with_error_feedback, dgc, top_k, random_k, common_mask, fp16, quantize, sign, entropy),
        *(sgd, adam, lamb, lars, yogi, adagrad, poisson, fixed_size, available, local_sgd, gaussian, dense, packed),
    )
}
"""Every stage that ships, by name."""


def check_stage(spec: Any, where: str) -> None:
    """Check the name and the arguments of a stage without building it.

    Raises:
        ConfigError: not a stage, an unknown name, an unknown argument or a value out of range; names the nearest known one.
    """
    name, arguments = _parts(spec, where)
    if ":" in name:
        return
    if name not in STAGES:
        raise unknown(f"{where}.{name}", name, STAGES, "stage")
    check_arguments(STAGES[name], arguments, f"{where}.{name}")
    if name == "with_error_feedback":
        check_stage(arguments["inner"], f"{where}.{name}.inner")


def build_stage(spec: Any, where: str = "stage") -> Any:
    """Return the stage that a piece of plain data describes: `"name"` or `{name: {argument: value}}`.

    Raises:
        ConfigError: as `check_stage`.
        ValueError: the stage itself refused its arguments.
    """
    check_stage(spec, where)
    name, arguments = _parts(spec, where)
    factory = load_door(name) if ":" in name else STAGES[name]
    if ":" not in name:
        arguments = check_arguments(factory, arguments, f"{where}.{name}")
    return factory(**arguments)


def describe_stage(stage: Any) -> dict[str, Any]:
    """Return a stage as plain data, from which `build_stage` makes an equal one: its name, or where its class is, and its fields.

    Raises:
        TypeError: the stage is no dataclass, so that its fields are not known.
    """
    if not dataclasses.is_dataclass(stage) or isinstance(stage, type):
        raise TypeError(f"Expected a stage that is a dataclass (its fields are what travels to clients), got {type(stage).__name__}.")
    cls = type(stage)
    name = str(getattr(stage, "stage_name", ""))
    if name not in STAGES or not cls.__module__.startswith("fedclip."):  # a stage of one's own may bear the name of another
        name = getattr(cls, "__door__", f"{cls.__module__}:{cls.__qualname__}")
    return {name: {f.name: _plain(getattr(stage, f.name)) for f in dataclasses.fields(stage)}}


def _plain(value: Any) -> Any:
    if hasattr(value, "apply") and dataclasses.is_dataclass(value):
        return describe_stage(value)
    if isinstance(value, Schedule):
        return value.model_dump()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _parts(spec: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        name, arguments = next(iter(spec.items()))
        if isinstance(arguments, Mapping):
            return str(name), dict(arguments)
    raise unknown(where, spec, STAGES, "stage, written { name = { argument = value } }")
