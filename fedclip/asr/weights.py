"""Which frozen weights a model begins with: their place and their digest, since they change a result as much as any number does."""

import hashlib
from pathlib import Path

from fedclip.asr.model_options import AnyModelOptions, PretrainedOptions
from fedclip.model_file import model_path
from fedclip.options import ConfigError

PRETRAINED_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


def pinned(model: AnyModelOptions) -> AnyModelOptions:
    """Return a model section that names its frozen weights by an absolute path and by what is there, where it has any.

    Raises:
        ConfigError: nothing is there, or other weights than the section says.
    """
    if isinstance(model, PretrainedOptions):
        path = model.path.expanduser().absolute()
        return model.model_copy(update={"path": path, "digest": checked_digest(path, model.digest)})
    if model.adapters is None or model.adapters.base is None:
        return model
    base = model.adapters.base.expanduser().absolute()
    found = checked_digest(base, model.adapters.digest)
    return model.model_copy(update={"adapters": model.adapters.model_copy(update={"base": base, "digest": found})})


def frozen_digest(model: AnyModelOptions) -> str | None:
    """Return the digest of the frozen weights that a pinned model section names; None where it names none."""
    if isinstance(model, PretrainedOptions):
        return model.digest
    return model.adapters.digest if model.adapters is not None else None


def checked_digest(place: Path, expected: str | None) -> str:
    """Return the digest of a model file, of a run folder's last model, or of a folder with a pretrained model.

    Raises:
        ConfigError: nothing is there, or something else than was expected.
    """
    file = model_path(place)
    files = [file] if file.is_file() else sorted({p for pattern in PRETRAINED_FILES for p in place.glob(pattern)})
    if not files:
        raise ConfigError(f"task.model: no weights at {place}; give a run folder, a model file or the folder of a pretrained model.")
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as opened:
            content = hashlib.file_digest(opened, "blake2b").digest()
        digest.update((path.name if len(files) > 1 else "").encode() + b"\0" + content)
    if expected not in (None, digest.hexdigest()):
        raise ConfigError(f"task.model: {place} holds other weights than the run began with ({digest.hexdigest()}, {expected}).")
    return digest.hexdigest()
