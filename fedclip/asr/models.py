"""From `[task.model]` to a CTC model: its kind, its frozen weights, its adapters."""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from fedclip.adapters import adapt
from fedclip.asr.model import CtcTransformer
from fedclip.asr.model_options import CONFORMER_TARGETS, AdapterOptions, ConformerOptions, ModelDoorOptions, ModelOptions, PretrainedOptions
from fedclip.asr.options import AsrOptions
from fedclip.asr.weights import checked_digest
from fedclip.doors import load_door
from fedclip.layout import Layout
from fedclip.model_file import check_alphabet, flatten, load_model, model_path
from fedclip.options import ConfigError
from fedclip.shapes import shapes_only

_ANY_LENGTH: Final = 16_000
"""Frames, or samples, that every model should take."""


def make_model(options: AsrOptions, *, width: int, symbols: int, seed: int) -> nn.Module:
    """Return a model whose weights depend on the arguments and on the files they name alone; the global generator stays as it was.

    Args:
        options: the kind of model, and what it hears.
        width: features of a frame.
        symbols: outputs of a frame, the blank among them.
        seed: fixes what is drawn.

    Raises:
        ConfigError: weights that are named are not there, or fit neither their digest nor the model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        model = _bare(options, width, symbols, seed, weights=True)
    adapters = options.model.adapters
    if adapters is None:
        return model
    if adapters.base is not None:
        _load_base(model, adapters, options)
    targets = adapters.targets or (CONFORMER_TARGETS if isinstance(options.model, ConformerOptions) else ())
    try:
        return adapt(model, rank=adapters.rank, alpha=adapters.alpha, targets=targets, trained=adapters.trained, seed=seed)
    except ConfigError as error:
        raise ConfigError(f"task.model.{error}") from error


def make_skeleton(options: AsrOptions, *, width: int, symbols: int) -> nn.Module:
    """Return the same model without weights, which takes no room: what it makes of lengths is that of the model."""
    if isinstance(options.model, ModelDoorOptions):  # what a factory does is not known
        return skeleton_of(lambda: _bare(options, width, symbols, 0, weights=False))
    with torch.device("meta"):
        return _bare(options, width, symbols, 0, weights=False)


def skeleton_of(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a user's own model without weights; with them, where it can't say otherwise what it makes of lengths."""

    def made() -> nn.Module:
        model = make()
        lengths: Callable[[Tensor], Tensor] | None = getattr(model, "output_lengths", None)
        if lengths is not None:
            int(lengths(torch.tensor(_ANY_LENGTH, device="cpu")))  # raises if the answer depends on a value that is not there
        return model

    with torch.random.fork_rng(devices=[]):
        return shapes_only(made)


def _bare(options: AsrOptions, width: int, symbols: int, seed: int, *, weights: bool) -> nn.Module:
    match options.model:
        case ModelOptions():
            return CtcTransformer(options.model, n_mels=width, symbols=symbols, hop_seconds=options.features.hop_ms / 1000)
        case ConformerOptions():
            from fedclip.asr.conformer import CtcConformer

            return CtcConformer(options.model, n_mels=width, symbols=symbols)
        case PretrainedOptions(path=path, digest=digest):
            from fedclip.asr.pretrained import make_pretrained, read_config

            if weights:
                checked_digest(path, digest)
            return make_pretrained(read_config(path), symbols, path if weights else None)
        case ModelDoorOptions(name=name, arguments=arguments):
            try:
                model: nn.Module = load_door(name)(width=width, symbols=symbols, seed=seed, **arguments)
            except ConfigError:
                raise
            except Exception as error:
                raise ConfigError(f"task.model.name: '{name}' raised when it was built: {type(error).__name__}: {error}.") from error
            return model


def _load_base(model: nn.Module, adapters: AdapterOptions, options: AsrOptions) -> None:
    """Put the weights of a model file, which spells with the characters of the task, into a new model."""
    assert adapters.base is not None
    checked_digest(adapters.base, adapters.digest)
    try:
        layout, path = Layout.of(model), model_path(adapters.base)
        saved, tensors = load_model(path)
        check_alphabet(path, saved, options)
        params = flatten(tensors, layout)
    except ConfigError as error:
        raise ConfigError(f"task.model.adapters.base: {error}") from error
    trainable = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter, values in zip(trainable, layout.split(params), strict=True):
            parameter.copy_(values.view(parameter.shape))
