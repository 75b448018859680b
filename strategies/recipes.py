"""Recipes: a function for each published method, returning a plain `Method`. To add one, write a function and name it in `RECIPES`.

Arguments other than `sampler`, `local` and `mechanism` are what `[strategy]` may say beside `method`. PyTorch is imported when a
recipe is called, so that a wrong argument is refused at once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedclip.adaptive import AdaptiveClip
from fedclip.choices import Grouping, Memory, Mode, Precision, SmallTensors, Split, Weighting
from fedclip.config import Experiment, StrategyOptions, codec_stage
from fedclip.options import ConfigError, check_arguments, unknown, with_defaults
from fedclip.stages import (
    PAPER_WARMUP,
    Count,
    Density,
    Fraction,
    NotNegative,
    Positive,
    Rate,
    adagrad,
    adam,
    build_stage,
    clip_by_global_norm,
    clip_per_layer,
    dgc,
    gaussian,
    lamb,
    lars,
    local_sgd,
    sgd,
    yogi,
)
from strategies.privacy import build_sampler, noise_multiplier

if TYPE_CHECKING:
    from fedclip.method import Method
    from fedclip.release import Release

OTHER_SECTIONS = ("sampler", "local", "mechanism")
"""Arguments of every recipe that sections of their own describe."""

Betas = tuple[Fraction, Fraction]


def fedavg(
    *,
    sampler: Any,
    local: Any,
    mechanism: Any = None,
    server_lr: Rate = 1.0,
    server_momentum: Fraction = 0.0,
    max_norm: Positive | None = None,
    weighting: Weighting | None = None,
    max_examples: Count | None = None,
    double_momentum: bool = False,
    adaptive: AdaptiveClip | None = None,
) -> "Method":
    """Federated averaging (arXiv 1602.05629), with server momentum FedAvgM (1909.06335), with clip and noise DP-FedAvg (1710.06963).

    Weights are by examples without noise, uniform under noise, unless `weighting` says otherwise.
    """
    from fedclip.method import Method
    from fedclip.transform import chain

    return Method(
        sampler=sampler,
        local=local,
        client=chain(*([clip_by_global_norm(max_norm)] if max_norm else [])),
        release=_release(sampler, mechanism),
        server=chain(sgd(server_lr, server_momentum)),
        weighting=weighting or ("uniform" if mechanism else "examples"),
        max_examples=max_examples,
        double_momentum=double_momentum,
        adaptive=adaptive,
    )


def fedopt(
    *,
    sampler: Any,
    local: Any,
    mechanism: Any = None,
    optimizer: Literal["sgd", "adam", "lamb", "lars", "yogi", "adagrad"] = "adam",
    server_lr: Rate = 0.01,
    betas: Betas = (0.9, 0.99),
    eps: Positive = 1e-3,
    max_norm: Positive | None = None,
    double_momentum: bool = False,
    adaptive: AdaptiveClip | None = None,
) -> "Method":
    """Adaptive federated optimization (arXiv 2003.00295): the mean update is a gradient for a server optimizer.

    `eps` is the paper's tau; `sgd` and `lars` take the first of `betas` as momentum, `adagrad` has none. With `lars` a layer moves by
    `server_lr` times its norm.
    """
    from fedclip.method import Method
    from fedclip.transform import Transform, chain

    optimizers: Mapping[str, Callable[[], Transform]] = {
        "sgd": lambda: sgd(server_lr, betas[0]),
        "adam": lambda: adam(server_lr, betas, eps),
        "lamb": lambda: lamb(server_lr, betas, eps),
        "lars": lambda: lars(server_lr, betas[0], trust=1.0),
        "yogi": lambda: yogi(server_lr, betas, eps),
        "adagrad": lambda: adagrad(server_lr, eps),
    }
    return Method(
        sampler=sampler,
        local=local,
        client=chain(*([clip_by_global_norm(max_norm)] if max_norm else [])),
        release=_release(sampler, mechanism),
        server=chain(optimizers[optimizer]()),
        double_momentum=double_momentum,
        adaptive=adaptive,
    )


def pfl4asr(
    *,
    sampler: Any,
    local: Any,
    mechanism: Any = None,
    max_norm: Positive,
    split: Split = "dim",
    mode: Mode = "clip",
    layers: Grouping = "tensor",
    weights: tuple[Positive, ...] = (),
    server_lr: Rate = 4e-3,
    betas: Betas = (0.9, 0.999),
    eps: Positive = 1e-6,
    weight_decay: NotNegative = 0.0,
    trust_bounds: tuple[NotNegative, Annotated[float, Field(gt=0)]] = (0.0, float("inf")),
    double_momentum: bool = False,
    adaptive: AdaptiveClip | None = None,
) -> "Method":
    """User-level private federated ASR (arXiv 2310.00098, Algorithm 1): clip each layer, one noise on the sum, LAMB on the server."""
    from fedclip.method import Method
    from fedclip.transform import chain

    return Method(
        sampler=sampler,
        local=local,
        client=chain(clip_per_layer(max_norm, split, mode, layers, weights)),
        release=_release(sampler, mechanism),
        server=chain(lamb(server_lr, betas, eps, weight_decay, trust_bounds)),
        double_momentum=double_momentum,
        adaptive=adaptive,
    )


def deep_gradient_compression(
    *,
    sampler: Any,
    local: Any,
    mechanism: Any = None,
    density: Density = 0.001,
    momentum: Fraction = 0.9,
    nesterov: bool = False,
    clip_norm: Positive | None = None,
    warmup: tuple[tuple[Density, Count], ...] = PAPER_WARMUP,
    small: SmallTensors = "dense",
    grid: Precision = "float32",
    state: Memory = "user",
    server_lr: Rate = 1.0,
    max_norm: Positive | None = None,
    double_momentum: bool = False,
) -> "Method":
    """Deep Gradient Compression (arXiv 1712.01887): momentum correction, local clipping, factor masking, warm-up, a plain server step.

    The momentum of each tensor stands where the paper has it: at the users for what is sparse, on the server for small tensors that go
    whole; with `state = "none"` on the server for all. `max_norm` adds a per-layer clip of what is sent, which noise needs; rounding
    comes after it then, and what it takes off is lost.
    """
    from fedclip.dgc import ROUNDINGS
    from fedclip.method import Method
    from fedclip.transform import chain

    compress = dgc(density, momentum, nesterov, clip_norm, "model", max(1, round(sampler.expected_cohort)), warmup=warmup)
    compress = dataclasses.replace(compress, small=small, grid="float32" if max_norm else grid, state=state)
    rounding = ROUNDINGS[grid]
    clipped = [] if max_norm is None else [clip_per_layer(max_norm), *([] if rounding is None else [rounding])]
    whole = momentum if small == "dense" and state == "user" else None
    return Method(
        sampler=sampler,
        local=local,
        client=chain(compress, *clipped),
        release=_release(sampler, mechanism),
        server=chain(sgd(server_lr, momentum if state == "none" else 0.0, nesterov and bool(whole), whole)),
        double_momentum=double_momentum,
    )


def scaffold(
    *,
    sampler: Any,
    local: Any,
    mechanism: Any = None,
    server_lr: Rate = 1.0,
    max_norm: Positive | None = None,
    adaptive: AdaptiveClip | None = None,
) -> "Method":
    """SCAFFOLD (arXiv 1910.06378, option II): control variates take the drift out of many local steps; with clip and noise DP-SCAFFOLD.

    See `fedclip.control` for how the second vector of the paper need not be sent. Local training is plain SGD of `steps` steps.
    """
    from fedclip.method import Method
    from fedclip.transform import chain

    return Method(
        sampler=sampler,
        local=local,
        client=chain(*([clip_by_global_norm(max_norm)] if max_norm else [])),
        release=_release(sampler, mechanism),
        server=chain(sgd(server_lr)),
        adaptive=adaptive,
        control=True,
    )


def stages(
    *,
    sampler: Any,
    local: Any,
    mechanism: Any = None,
    client: list[dict[str, Any]] | None = None,
    server: list[dict[str, Any]],
    weighting: Weighting = "uniform",
    max_examples: Count | None = None,
    double_momentum: bool = False,
    adaptive: AdaptiveClip | None = None,
    control: bool = False,
) -> "Method":
    """Any method, its stages listed: what `[strategy]` means without `method`. `control` adds SCAFFOLD's control variates."""
    from fedclip.method import Method
    from fedclip.transform import chain

    return Method(
        sampler=sampler,
        local=local,
        client=chain(*(build_stage(s, "strategy.client") for s in client or [])),
        release=_release(sampler, mechanism),
        server=chain(*(build_stage(s, "strategy.server") for s in server)),
        weighting=weighting,
        max_examples=max_examples,
        double_momentum=double_momentum,
        adaptive=adaptive,
        control=control,
    )


RECIPES: Mapping[str, Callable[..., "Method"]] = {
    f.__name__: f for f in (fedavg, fedopt, pfl4asr, deep_gradient_compression, scaffold, stages)
}
"""The methods that `strategy.method` may name."""


def resolve(experiment: Experiment) -> Experiment:
    """Return the experiment with every argument of its recipe and of local training written out, without building anything.

    Raises:
        ConfigError: an unknown method or argument, or a value that is not allowed.
    """
    method = experiment.strategy.method
    if method not in RECIPES:
        raise unknown("strategy.method", method, RECIPES, "method")
    given = dict(experiment.strategy.model_extra or {})
    for own, section in (("sampler", "sampler"), ("local", "local"), ("mechanism", "privacy")):
        if own in given:
            raise ConfigError(f"strategy.{own}: unknown key; say it in the section [{section}].")
    arguments = with_defaults(RECIPES[method], given, "strategy", dict.fromkeys(OTHER_SECTIONS))
    local = with_defaults(local_sgd, experiment.local, "local")
    return experiment.model_copy(update={"strategy": StrategyOptions(method=method, **arguments), "local": local})


def build_method(experiment: Experiment, users: int) -> "Method":
    """Return the method of an experiment.

    Args:
        experiment: the experiment.
        users: how many users the cohort is drawn from.

    Raises:
        ConfigError: see `resolve`; or a cohort larger than the population.
        ValueError: the method as a whole is refused; see `Method`.
    """
    experiment = resolve(experiment)
    z, privacy = noise_multiplier(experiment), experiment.privacy
    method = RECIPES[experiment.strategy.method](
        sampler=build_sampler(experiment, users),
        local=local_sgd(**experiment.local),
        mechanism=gaussian(z, privacy.layer_noise, privacy.layer_noise_weights) if z is not None else None,
        **check_arguments(
            RECIPES[experiment.strategy.method], experiment.strategy.model_extra or {}, "strategy", dict.fromkeys(OTHER_SECTIONS)
        ),
    )
    from fedclip.codec import Codec
    from fedclip.downlink import Downlink
    from fedclip.transform import chain

    codec = build_stage(codec_stage(experiment), "codec")
    if not isinstance(codec, Codec):
        raise ConfigError(f"codec.name: '{experiment.codec.name}' makes a {type(codec).__name__}; expected a fedclip.codec.Codec.")
    stages = chain(*(build_stage(s, "downlink.stages") for s in experiment.downlink.stages))
    downlink, half = Downlink(stages, experiment.downlink.differences), experiment.states.precision == "float16"
    return dataclasses.replace(method, codec=codec, downlink=downlink, half_states=half)


def _release(sampler: Any, mechanism: Any) -> "Release":
    from fedclip.release import Release

    return Release(mechanism, sampler.expected_cohort if mechanism else "weights")
