"""Loading a user's own piece by `"module:factory"` or `"file.py:factory"`: only configuration names doors."""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fedclip.options import ConfigError


def load_door(reference: str) -> Any:
    """Return the object that `"module:name"` or `"path/to/file.py:name"` names.

    Raises:
        ConfigError: no such module, file or name, or the module raised when it was imported.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ConfigError(f"Expected 'module:name' or 'file.py:name', got '{reference}'.")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"'{reference}' could not be imported: {type(error).__name__}: {error}.") from error
    if not hasattr(module, name):
        public = ", ".join(sorted(n for n in vars(module) if not n.startswith("_")))
        raise ConfigError(f"'{place}' has no '{name}'; it has: {public}.")
    return getattr(module, name)


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"No such file: {path}; a door is written 'file.py:name', relative to the folder you run in.")
    # The name is a function of the path, so that classes of the file pickle and one file is loaded once a process.
    name = f"fedclip_door_{hashlib.blake2b(str(path).encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"Not a Python file: {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == name:
            value.__door__ = f"{path}:{value.__qualname__}"  # type: ignore[attr-defined]
    return module
