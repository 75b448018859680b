"""A deployment under observation: the model after each round, the most memory of its ServerApp by then, its rejections. And what its model
should be: the same rounds on a grid in memory."""

import json
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from experiments.engines import account_of, secret_of
from experiments.prepare import Prepared, prepare, read_experiment
from experiments.server_app import SECURITY_LOG
from fedclip.checkpoints import Checkpoints
from strategies.fleet import Fleet
from strategies.naming import run_digest
from tests.strategies.devices import EXPERIMENT, Device, Devices, enrolled, together

SECONDS_BETWEEN_LOOKS = 0.1


def settings(roster: Path, **more: object) -> list[str]:
    """Return settings of a deployment that can be repeated."""
    said = {"roster": f'"{roster}"', "seeded": "true", "diagnostics": "true"} | more
    return [f"deployment.{key}={value}" for key, value in said.items()]


def written(folder: Path, devices: list[Device], rounds: int) -> dict[str, str]:
    """Write an experiment on the recordings of devices, and return what to submit beside its settings."""
    text = EXPERIMENT.replace("rounds = 5", f"rounds = {rounds}") + "\n[evaluation]\nevery = 0\n"
    (folder / "experiment.toml").write_text(text, encoding="utf-8")
    return {"experiment": str(folder / "experiment.toml"), "data_dir": str(together(devices, folder / "together"))}


class InMemory:
    """The rounds of an experiment that was written, on a grid in memory.

    Attributes:
        name: of the run.
        roster: who is enrolled.
    """

    def __init__(self, folder: Path, devices: list[Device]) -> None:
        self.devices = [Device(d.name, shutil.copytree(d.folder, folder / "memory" / d.name), d.key) for d in devices]
        self.roster = enrolled(self.devices, folder / "memory" / "roster.toml")
        said = settings(self.roster, deadline_seconds=0.01)  # those that are silent are not waited for
        self.prepared: Prepared = prepare(read_experiment(folder / "experiment.toml", said, folder / "together"))
        self.name = run_digest(self.prepared.experiment)

    def fleet(self, *silent: str) -> Fleet:
        """Return a fleet before its first round, in which some never answer."""
        prepared, options = self.prepared, self.prepared.experiment.deployment
        assert options is not None
        grid = Devices(self.devices)
        grid.silent = {*silent}
        names = (secret_of(prepared), self.name, grid, options)
        return Fleet(prepared.method, prepared.task, prepared.recipe, *names, account=account_of(prepared))


@dataclass
class Watched:
    """Watches a run folder from a thread: checkpoints are linked before the run takes them away."""

    run: Path
    peaks: dict[int, int] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._over, self._kept = threading.Event(), self.run.with_name(f"{self.run.name}-kept")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def params(self, round: int, name: str, template: Any) -> torch.Tensor:
        """Return the model after a round, shape (d,)."""
        return Checkpoints(self._kept / str(round), name).last(template).state.params

    def security(self) -> list[dict[str, Any]]:
        """Return what was not taken of nodes."""
        path = self.run / SECURITY_LOG
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        for path in self.run.glob("checkpoints/*.ckpt"):
            folder = self._kept / str(int(path.stem))
            if not (folder / path.name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # taken away meanwhile
                    os.link(path, folder / path.name)
                with suppress(OSError, ValueError):
                    self.peaks[int(path.stem)] = peak_of(json.loads((self.run / "heartbeat.json").read_text(encoding="utf-8"))["pid"])


def peak_of(pid: int) -> int:
    """Return the most bytes of memory that a process ever had."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def causes(lines: Sequence[dict[str, Any]], node: str) -> dict[int, list[str]]:
    """Return why nothing was taken of a node, by round."""
    found: dict[int, list[str]] = {}
    for line in lines:
        if line["node"] == node:
            found.setdefault(line["round"], []).append(line["cause"])
    return found
