"""`RunFolder`: the files that a run leaves behind. Other programs read them; docs/run-folder.md says what is in them."""

import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w
import torch

from experiments.prepare import check_free
from fedclip.config import Experiment
from fedclip.layout import Layout
from fedclip.model_file import save_model
from fedclip.options import ConfigError
from strategies.recipes import run_digest

LEDGER = "ledger.jsonl"
"""The releases of a run under noise, a line each, written before the release."""

PACKAGES = ("fedclip", "flwr", "ray", "torch", "torchaudio", "numpy", "dp-accounting", "jiwer", "soundfile")


class RunFolder:
    """One run's folder, made anew: a folder that already holds a run is refused.

    Args:
        path: where.
        experiment: what is run, resolved.

    Raises:
        ConfigError: the folder holds a run already, or cannot be written.
    """

    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self._experiment = path, experiment
        check_free(path)
        try:
            (path / "checkpoints").mkdir(parents=True)
            (path / "config.toml").write_text(tomli_w.dumps(experiment.plain()), encoding="utf-8")
            write_atomically(path / "environment.json", json.dumps(environment(experiment), indent=2) + "\n")
            self._metrics = (path / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"The run folder {path} cannot be written: {error}; choose another by --out.") from error
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(path / "tensorboard"))

    @property
    def model_path(self) -> Path:
        """The file of the model."""
        return self.path / "checkpoints" / "model.safetensors"

    def record(self, row: dict[str, Any]) -> None:
        """Append a round to `metrics.jsonl` and to TensorBoard."""
        self._metrics.write(to_json(row) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            if name not in ("round", "attempt") and isinstance(value, int | float):
                self._board.add_scalar(name, value, row["round"])

    def save_model(self, params: torch.Tensor, layout: Layout, round: int) -> None:
        """Write the model of a round in the place of the one before."""
        save_model(self.model_path, params, layout, self._experiment, round)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` last of all: a folder without it holds a run that did not end in order."""
        self._metrics.close()
        self._board.close()
        write_atomically(self.path / "summary.json", to_json(summary, indent=2) + "\n")


def to_json(values: dict[str, Any], indent: int | None = None) -> str:
    """Return values as JSON that any program reads: what is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: finite(value) for name, value in values.items()}, indent=indent, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rounds of a run folder's `metrics.jsonl`."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def environment(experiment: Experiment) -> dict[str, Any]:
    """Return what a run ran on: versions, seed, the digest that names it in the random streams, and the commit of the source."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "seed": experiment.run.seed,
        "run": run_digest(experiment),
        "commit": _commit(),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
