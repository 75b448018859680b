"""`SweepFolder`: the files that a sweep leaves behind, and how far each of its trials is. Imports no PyTorch."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tomli_w

from experiments.sweep_plan import Sweep, Trial
from fedclip.config import read_toml
from fedclip.options import ConfigError
from fedclip.storage import Storage, lock, replace

SWEEP_JSON, SWEEP_TOML, BASE_TOML = "sweep.json", "sweep.toml", "base.toml"
TRIALS, LOGS = "trials", "logs"

ENDED = ("done", "budget spent")
"""How a run says in its `summary.json` that nothing of it is left to do."""

Status = Literal["waiting", "running", "done", "failed", "interrupted"]


@dataclass
class Standing:
    """How far a trial is, and what went wrong with it."""

    status: Status = "waiting"
    error: str = ""


class SweepFolder:
    """One sweep's folder, held by one process at a time.

    Args:
        path: where.
        sweep: what is tried.
        resume: go on with the sweep that is there; otherwise a folder that holds one is refused.
        storage: the disk.

    Raises:
        ConfigError: there is a sweep already, or none to go on with, or one of other settings; another process has it; or it cannot
            be written.
    """

    def __init__(self, path: Path, sweep: Sweep, *, resume: bool = False, storage: Storage | None = None) -> None:
        self.path, self.sweep, self._storage = path, sweep, storage or Storage()
        check_sweep_folder(path, resume=resume)
        try:
            self._storage.make_folder(path / TRIALS)
            self._storage.make_folder(path / LOGS)
            self._lock = lock(path)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            if resume:
                self._check_same()
            for file, values in ((SWEEP_TOML, _plain(sweep)), (BASE_TOML, sweep.base)):
                replace(self._storage, path / file, [tomli_w.dumps(values).encode()])
            self.standings = {trial.name: self._found(trial) for trial in sweep.trials}
            self.save()
        except ConfigError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def run_folder(self, trial: Trial) -> Path:
        """Return where a trial's run is."""
        return self.path / TRIALS / trial.name

    def log(self, trial: Trial) -> Path:
        """Return where what a trial says goes."""
        return self.path / LOGS / f"{trial.name}.txt"

    def stand(self, trial: Trial, status: Status, error: str = "") -> None:
        """Write down how far a trial is."""
        self.standings[trial.name] = Standing(status, error)
        self.save()

    def settle(self, trial: Trial, error: str, interrupted: bool) -> Standing:
        """Write down how a trial ended, of which its run folder has the last word, and return it. With an error it failed."""
        if is_done(self.run_folder(trial)):
            self.stand(trial, "done")
        elif interrupted and not error:
            self.stand(trial, "interrupted")
        else:
            summary = read_json(self.run_folder(trial) / "summary.json")
            self.stand(trial, "failed", error or str(summary.get("error") or summary.get("status") or "it ended without a word"))
        return self.standings[trial.name]

    def save(self) -> None:
        """Write `sweep.json` in the place of the one before."""
        replace(self._storage, self.path / SWEEP_JSON, [(json.dumps(self.plain(), indent=2) + "\n").encode()])

    def plain(self) -> dict[str, Any]:
        """Return what `sweep.json` says."""
        options = self.sweep.options
        head = {"name": options.name, "base": str(options.base), "note": self.sweep.note, "keys": list(self.sweep.keys)}
        return head | {"trials": [_trial(trial) | vars(self.standings[trial.name]) for trial in self.sweep.trials]}

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"The sweep folder {self.path} cannot be written: {error}; make room, or choose another by --out.")

    def _found(self, trial: Trial) -> Standing:
        return Standing("done") if is_done(self.run_folder(trial)) else Standing()

    def _check_same(self) -> None:
        """Refuse to go on with other trials than there were; more of them are welcome."""
        if not (self.path / SWEEP_JSON).is_file():  # killed before it was written: nothing was tried
            return
        for file, now in ((BASE_TOML, dict(self.sweep.base)), (SWEEP_TOML, _plain(self.sweep))):
            for key in ("set", "name", "base") if file == SWEEP_TOML else (None,):
                before = read_toml(self.path / file)
                old, new = (before, now) if key is None else (before.get(key), now.get(key))
                if old != new:
                    what = "the base experiment" if key is None else f"{key} of the sweep"
                    raise ConfigError(f"--resume: {what} differs from {self.path / file}; put back what it said, or begin a new sweep.")
        trials = {trial.name: _trial(trial) for trial in self.sweep.trials}
        for before in self._recorded():
            name = before["name"]
            if trials.get(name) != {key: value for key, value in before.items() if key not in ("status", "error")}:
                how = "is not of the sweep any more" if name not in trials else "has other settings now"
                raise ConfigError(f"--resume: the trial {name} {how}; a sweep may be given more trials, nothing else. Begin a new one.")

    def _recorded(self) -> list[dict[str, Any]]:
        """Return the trials of `sweep.json`."""
        trials = read_json(self.path / SWEEP_JSON).get("trials")
        if not isinstance(trials, list) or not all(isinstance(trial, dict) and "name" in trial for trial in trials):
            raise ConfigError(f"--resume: {self.path / SWEEP_JSON} is damaged; delete it to go on: how far each trial is, {TRIALS} says.")
        return trials


def check_sweep_folder(path: Path, *, resume: bool) -> None:
    """Refuse a folder that holds a sweep or a run already, or none to go on with.

    Raises:
        ConfigError: it does.
    """
    # A sweep file of the user's own may be called sweep.toml, and lie beside its base: what would be replaced is refused.
    begun = (path / SWEEP_TOML).is_file() and ((path / TRIALS).is_dir() or (path / SWEEP_JSON).is_file())
    if resume and not begun:
        raise ConfigError(f"--resume: {path} holds no sweep (no {SWEEP_TOML} beside {TRIALS}); give its folder by --out.")
    there = next((name for name in (SWEEP_TOML, BASE_TOML, SWEEP_JSON, "config.toml") if (path / name).exists()), None)
    if not resume and (there or (path.exists() and not path.is_dir())):
        what = f"has a {there} already, of a sweep or a run or its file" if there else "is no folder"
        raise ConfigError(f"--out: {path} {what}; give another folder, or go on with a sweep by --resume.")


def is_done(run: Path) -> bool:
    """Return whether there is nothing left to do of the run in a folder."""
    return read_json(run / "summary.json").get("status") in ENDED


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file says; nothing where there is none, or it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _trial(trial: Trial) -> dict[str, Any]:
    plain = {"name": trial.name, "folder": f"{TRIALS}/{trial.name}", "settings": trial.settings, "case": trial.case, "seed": trial.seed}
    values: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return values


def _plain(sweep: Sweep) -> Mapping[str, Any]:
    """Return the sweep as a file says it, the tables' keys dotted."""
    values: dict[str, Any] = json.loads(json.dumps(sweep.options.model_dump(exclude_defaults=True), default=str))
    return values
