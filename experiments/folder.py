"""`RunFolder`: the files that a run leaves behind. Other programs read them; docs/run-folder.md says what is in them."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomli_w
import torch

from experiments.prepare import check_free
from experiments.trackers import open_trackers
from fedclip.checkpoints import CheckpointError
from fedclip.config import Experiment
from fedclip.layout import Layout
from fedclip.model_file import save_model
from fedclip.options import ConfigError
from fedclip.storage import Storage, lock
from strategies.naming import run_digest

LEDGER, CHECKPOINTS, STATES = "ledger.jsonl", "checkpoints", "states"
"""The releases of a run under noise, a line each; the checkpoints; and what client chains keep of users."""

METRICS, SPEAKERS, ENVIRONMENT = "metrics.jsonl", "speakers.jsonl", "environment.json"

STAMP = "seeded simulation: epsilon is nominal; diagnostics of its cohorts are not private"
"""What every report of a simulation under noise says."""

PACKAGES = ("fedclip", "flwr", "ray", "torch", "torchaudio", "numpy", "dp-accounting", "jiwer", "soundfile")


def stamp_of(experiment: Experiment) -> str:
    """Return what every report of a run says of how far its privacy and its security can be relied on; empty: nothing."""
    noise, options = experiment.privacy.noise_multiplier is not None, experiment.deployment
    if options is None:
        return STAMP if noise else ""
    said = {
        "seeded: epsilon is nominal": noise and options.seeded,
        "diagnostics of its cohorts are not private": noise and options.diagnostics,
        "insecure: nodes were taken at their word, over connections that anybody can read": options.insecure,
    }
    return "; ".join(text for text, is_said in said.items() if is_said)


def withholds(experiment: Experiment) -> bool:
    """Return whether nothing of cohorts is shown, nor any time: of real devices under noise, where diagnostics were not asked for."""
    options = experiment.deployment
    return options is not None and not options.diagnostics and experiment.privacy.noise_multiplier is not None


class RunFolder:
    """One run's folder, held by one process at a time.

    Args:
        path: where.
        experiment: what is run, resolved.
        command: of `fedclip`, which makes the run and goes on with it.
        resume: go on with the run that is there, which is only locked until `start`; otherwise the folder is made anew, and one that
            holds a run is refused.
        storage: the disk.
        name: of the run in its random streams, where it does not follow from the experiment.

    Raises:
        ConfigError: the folder holds a run already, or none to go on with; another process has it; it cannot be written; or a tracker
            is not installed.
    """

    def __init__(
        self,
        path: Path,
        experiment: Experiment,
        command: str = "run",
        *,
        resume: bool = False,
        storage: Storage | None = None,
        name: str | None = None,
    ) -> None:
        self.path, self._experiment, self._storage = path, experiment, storage or Storage()
        self._withholds = withholds(experiment)
        self._trackers = open_trackers(experiment.run.trackers, path, experiment.run.name, timed=not self._withholds)
        self._noise = experiment.privacy.noise_multiplier is not None
        self._recorded = set[str]()
        if not resume:
            check_free(path)
        try:
            (path / CHECKPOINTS).mkdir(parents=True, exist_ok=resume)
            self._lock = lock(path)
            if not resume:
                said = environment(experiment) | {"command": command} | ({"deployment": name} if name else {})
                write_atomically(path / ENVIRONMENT, json.dumps(said, indent=2) + "\n")
                self._storage.write(path / METRICS, [])
                self.start()
        except OSError as error:
            raise ConfigError(f"The run folder {path} cannot be written: {error}; make room, or choose another by --out.") from error

    def start(self) -> None:
        """Write down what is run from here on; the end of an earlier part of the run is not the end any more."""
        write_atomically(self.path / "config.toml", tomli_w.dumps(self._experiment.plain()))
        (self.path / "summary.json").unlink(missing_ok=True)
        self._trackers.begin(self._experiment.plain(), stamp_of(self._experiment))

    def record(self, row: dict[str, Any]) -> int:
        """Append a round to `metrics.jsonl` and to the trackers; return the size of the file, which is durable by then."""
        metrics = self.path / METRICS
        self._storage.append(metrics, (to_json(row) + "\n").encode())
        self._storage.sync(metrics)
        numbers = {name: value for name, value in _numbers(row).items() if name not in ("round", "attempt")}
        self._recorded |= {*numbers}
        self._trackers.row(row["round"], numbers)
        return metrics.stat().st_size

    def cut_metrics(self, size: int) -> None:
        """Take away the rounds after a checkpoint.

        Raises:
            CheckpointError: the file is shorter than it was at the checkpoint.
        """
        metrics = self.path / METRICS
        there = len(self._storage.read(metrics)) if self._storage.exists(metrics) else 0
        if there < size:
            raise CheckpointError(f"{metrics} has {there} bytes, and had {size} at the checkpoint; rounds were taken away from it.")
        if there > size:
            self._storage.truncate(metrics, size)

    def save_speakers(self, rows: list[dict[str, Any]]) -> None:
        """Write the last evaluation's row of each held-out speaker, if there is any, in the place of the one before."""
        if rows:
            write_atomically(self.path / SPEAKERS, "".join(to_json(row) + "\n" for row in rows))

    def save_model(self, params: torch.Tensor, layout: Layout, round: int, name: str = "model") -> None:
        """Write the model of a round in the place of the one before."""
        save_model(self.path / CHECKPOINTS / f"{name}.safetensors", params, layout, self._experiment, round)

    def beat(self, round: int, status: str, seconds: float) -> None:
        """Tell watchers that the run goes on, and how far it is. A heart that cannot beat ends nothing."""
        now = {"pid": os.getpid(), "status": status, "round": round, "rounds": self._experiment.run.rounds}
        now |= {} if self._withholds else {"seconds": seconds, "time": time.time()}
        with suppress(OSError):
            write_atomically(self.path / "heartbeat.json", json.dumps(now) + "\n")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` last of all: a folder without it holds a run that did not end in order."""
        # Under noise trackers get what rows say of it, and no more.
        totals = {} if self._noise else {name: value for name, value in _numbers(summary).items() if name not in self._recorded}
        self._trackers.finish(totals, summary["status"])
        if self._trackers.failures:
            summary = summary | {"tracker_failures": self._trackers.failures}
        write_atomically(self.path / "summary.json", to_json(summary, indent=2) + "\n")

    def close(self) -> None:
        """Let another process have the folder. What trackers could not take is in `metrics.jsonl`."""
        self._trackers.finish({}, "failed")
        os.close(self._lock)


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def to_json(values: dict[str, Any], indent: int | None = None) -> str:
    """Return values as JSON that any program reads: what is not finite becomes null."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(v) for v in value]
        if isinstance(value, dict):
            return {name: finite(v) for name, v in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(values), indent=indent, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rounds of a run folder's `metrics.jsonl`."""
    return [json.loads(line) for line in (path / METRICS).read_text(encoding="utf-8").splitlines()]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Add a line of JSON to a file of a run, as soon as it has a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(values) + "\n")


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
        "init_from": str(experiment.run.init_from) if experiment.run.init_from else None,
        "commit": _commit(),
    }


def deployed_as(run: Path) -> str:
    """Return the name that was drawn for a run on real devices, empty for other folders and where there is none yet.

    Raises:
        ConfigError: the folder's file cannot be read.
    """
    try:
        return str(json.loads((run / ENVIRONMENT).read_text(encoding="utf-8")).get("deployment", ""))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run / ENVIRONMENT} cannot be read: {error}.") from error


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
