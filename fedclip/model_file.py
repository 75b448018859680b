"""A model as one `safetensors` file: named float32 tensors that any program can load, and the experiment in the metadata."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedclip.asr.options import AsrOptions
from fedclip.asr.text import Alphabet
from fedclip.config import Experiment, TaskOptions, make_experiment
from fedclip.layout import Layout
from fedclip.options import ConfigError

FORMAT = "fedclip-model-1"


def save_model(path: Path, params: torch.Tensor, layout: Layout, experiment: Experiment, round: int) -> None:
    """Write a model so that the file is there whole or not at all; `params` has shape (d,).

    The file holds tensors by name; their order in the vector, which lists of layers follow, is in the metadata.

    Raises:
        OSError: it cannot be written.
    """
    views = zip(layout.names, layout.shapes, layout.split(params.cpu()), strict=True)
    tensors = {name: values.view(shape).clone() for name, shape, values in views}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"format": FORMAT, "experiment": json.dumps(experiment.plain()), "round": str(round), "tensors": json.dumps(layout.names)}
    try:
        save_file(tensors, temporary, metadata)
    except SafetensorError as error:  # the library says so of a full disk too
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error
    temporary.replace(path)


def model_path(place: Path) -> Path:
    """Return the file of a model: of a run folder the last model, else the file itself."""
    return place / "checkpoints" / "model.safetensors" if place.is_dir() else place


def load_model(path: Path) -> tuple[Experiment, dict[str, torch.Tensor]]:
    """Return the experiment that a model came from, and its tensors by name.

    Raises:
        ConfigError: no such file, or none that `save_model` wrote.
    """
    if not path.is_file():
        raise ConfigError(f"No such model: {path}; give a run folder or a model.safetensors.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    except SafetensorError as error:
        raise ConfigError(f"{path} is no safetensors file, or damaged: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise ConfigError(f"{path} holds no model of this project (format {metadata.get('format')}, expected {FORMAT}).")
    return make_experiment(json.loads(metadata["experiment"])), tensors


def check_alphabet(path: Path, saved: Experiment, task: TaskOptions) -> None:
    """Refuse a model whose outputs stand for other characters than a task's: it might fit, and would spell nonsense.

    Raises:
        ConfigError: it is such a model.
    """
    if isinstance(saved.task, AsrOptions) and isinstance(task, AsrOptions):
        theirs, ours = Alphabet(saved.task.languages), Alphabet(task.languages)
        if theirs.characters != ours.characters:
            raise ConfigError(
                f"task.languages: {path} spells {', '.join(theirs.languages)} ({theirs.symbols} symbols), the task "
                f"{', '.join(ours.languages)} ({ours.symbols}); give task.languages = {list(theirs.languages)}, or another model."
            )


def flatten(tensors: dict[str, torch.Tensor], layout: Layout) -> torch.Tensor:
    """Return named tensors as one vector, shape (d,).

    Raises:
        ConfigError: other names or shapes than the layout's.
    """
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    expected = dict(zip(layout.names, layout.shapes, strict=True))
    if shapes != expected:
        differing = sorted(n for n in {*shapes, *expected} if shapes.get(n) != expected.get(n))
        raise ConfigError(f"The model does not fit this task: {len(differing)} tensors differ, among them {', '.join(differing[:3])}.")
    return torch.cat([tensors[name].float().flatten() for name in layout.names])
