"""Any Flower app on `RayGrid`: what `fedclip flower` does with the folder of an app. Imports Flower, and Ray where the app runs."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from flwr.app import UserConfig
from flwr.cli.config_utils import load_and_validate
from flwr.clientapp import ClientApp
from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app

from fedclip.options import ConfigError

if TYPE_CHECKING:
    from clients.ray_grid import RayGrid

T = TypeVar("T")

OWN_PACKAGES = ("clients", "experiments", "fedclip", "strategies")


@dataclass(frozen=True)
class FlowerApp:
    """A Flower app as its `pyproject.toml` tells it.

    Args:
        folder: The folder of the app, which its modules are imported from.
        server: Its ServerApp, `"module:attribute"`.
        client: Its ClientApp, `"module:attribute"`.
        run_config: What both find as `context.run_config`.
    """

    folder: Path
    server: str
    client: str
    run_config: UserConfig


def read_app(folder: Path, run_config: Sequence[str] = ()) -> FlowerApp:
    """Read the folder of a Flower app, without importing the app.

    Args:
        folder: Where its `pyproject.toml` is.
        run_config: Keys of `[tool.flwr.app.config]` set anew, `"key=value ..."` each, as `flwr run --run-config` takes them.

    Raises:
        ConfigError: There is no such app, it isn't whole, or it has no such keys.
    """
    file = folder.absolute() / "pyproject.toml"
    if not file.is_file():
        raise ConfigError(f"{folder}: there is no pyproject.toml. Give the folder of a Flower app, as `flwr new` makes it.")
    for name in OWN_PACKAGES:
        there, own = folder.absolute() / name, Path(__file__).parents[1] / name
        if there.with_suffix(".py").is_file() or (there.is_dir() and not there.samefile(own)):
            raise ConfigError(
                f"{folder}: its package or module '{name}' has the name of one of fedclip's, and Python imports one of a name. Rename it."
            )
    try:
        values, _ = load_and_validate(file)
        app = values["tool"]["flwr"]["app"]
        overrides = parse_config_args(list(run_config))
        if any(run_config) and not overrides:  # Flower passes over what it can't read
            raise ValueError(f"--run-config: expected 'key=value ...', got '{' '.join(run_config)}'.")
        merged = fuse_dicts(flatten_dict(app.get("config")), overrides)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{folder}: {error}") from error
    except click.ClickException as error:
        raise ConfigError(f"--run-config: {error.message}") from error
    missing = [name for name in ("serverapp", "clientapp") if name not in app["components"]]
    if missing:
        raise ConfigError(
            f"{folder}: {' and '.join(missing)} missing in [tool.flwr.app.components]. Name both, each as 'module:attribute'."
        )
    return FlowerApp(folder.absolute(), app["components"]["serverapp"], app["components"]["clientapp"], merged)


def import_app(app: FlowerApp) -> tuple[ServerApp, ClientApp]:
    """Import both apps; their folder goes on `sys.path`, and with it to the workers.

    Raises:
        ConfigError: A module can't be imported, or isn't what it is named as.
    """
    return _load(app, app.server, ServerApp), _load(app, app.client, ClientApp)


def _load(app: FlowerApp, reference: str, kind: type[T]) -> T:
    try:
        loaded = load_app(reference, ValueError, app.folder)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{reference}: {error}. Install what the app depends on: pip install -e {app.folder}") from error
    if not isinstance(loaded, kind):
        raise ConfigError(f"{reference}: expected a flwr {kind.__name__}, got {type(loaded).__name__}. See [tool.flwr.app.components].")
    return loaded


def open_grid(app: FlowerApp, nodes: int, workers: int | None = None, address: str | None = None) -> "RayGrid":
    """Start workers for an app that was imported.

    Args:
        app: The app.
        nodes: Registered nodes, at least 1.
        workers: Worker processes, at least 1; None: one a core.
        address: A Ray cluster to run them on; None: this machine.

    Raises:
        ConfigError: Ray has too little for the workers, cannot start them, or isn't there.
    """
    from clients.ray_grid import RayGrid

    try:
        workers = workers or len(os.sched_getaffinity(0))
        return RayGrid(app.client, nodes=nodes, workers=workers, run_config=app.run_config, address=address)
    except (ValueError, RuntimeError, ConnectionError) as error:
        raise ConfigError(f"ray: {error}") from error


def flower_command(folder: Path, nodes: int, workers: int | None, run_config: Sequence[str], address: str | None) -> int:
    """Run a Flower app, and return the exit status; what the ServerApp raises is the user's to read, and passes."""
    app = read_app(folder, run_config)
    server, _ = import_app(app)
    with open_grid(app, nodes, workers, address) as grid:
        server(grid, grid.context())
    return 0
