"""`fedclip bench engine`: users a second beside a bare PyTorch loop and other simulators, which take turns."""

import json
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.contestants.process import Contestant, Setting, has
from fedclip.options import ConfigError

COHORTS = {"mlp": 1000, "cnn200k": 200, "cnn1m2": 100, "asr": 10}
"""Users of a round by default, by model: a few seconds of work."""

ROUNDS_A_TURN, RESAMPLES = 4, 10_000

STAGES = {
    "load": ("load_seconds", True),
    "train": ("train_seconds", True),
    "clip": ("chain_seconds", True),
    "fold": ("fold_seconds", True),
    "noise": ("release_seconds", False),
    "accounting": ("account_seconds", False),
    "server step": ("server_seconds", False),
}
"""What is stated of fedclip's rounds, and whether each worker does it at the same time as the others."""


@dataclass(frozen=True)
class Kind:
    """How a contestant is started.

    Attributes:
        module: of `experiments.contestants`.
        options: what it is told besides what all are told.
        package: what its interpreter has to have; empty: nothing but this project.
        models: what it is there for; empty: all.
    """

    module: str
    options: tuple[str, ...] = ()
    package: str = ""
    models: tuple[str, ...] = ()


IMAGES = ("mlp", "cnn200k", "cnn1m2")
KINDS = {
    "fedclip": Kind("ours"),
    "updates": Kind("ours", ("--reply", "updates")),
    "bare": Kind("bare", models=IMAGES),
    "bare asr": Kind("bare_asr", models=("asr",)),
    "pfl": Kind("pfl_sim", package="pfl", models=IMAGES),
    "flower": Kind("plain_flower", models=IMAGES),
}


@dataclass(frozen=True)
class Times:
    """A contestant's rounds: the users a second of each, in their order."""

    rates: tuple[float, ...]

    @classmethod
    def of(cls, answers: Sequence[Mapping[str, Any]]) -> "Times":
        """Return what its answers say."""
        return cls(tuple(a["users"] / a["seconds"] for a in answers))

    @property
    def median(self) -> float:
        """Users a second of the median round."""
        return statistics.median(self.rates)

    def ratio(self, other: "Times") -> tuple[float, float, float]:
        """Return the ratio of this median to the other's, and its 95% bootstrap interval over rounds, drawn for both alike."""
        mine, theirs = np.array(self.rates), np.array(other.rates)
        drawn = np.random.default_rng(0).integers(0, len(mine), (RESAMPLES, len(mine)))
        resampled = np.median(mine[drawn], axis=1) / np.median(theirs[drawn], axis=1)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return self.median / other.median, float(low), float(high)


def race(setting: Setting, rounds: int, peers: Sequence[str], pfl_python: str) -> tuple[dict[str, Contestant], list[str]]:
    """Time rounds of fedclip and its peers in turns of a few; return the contestants that there are, and which are not installed.

    Who begins goes round, so that nobody always follows the same other.

    Raises:
        ConfigError: one of them ended.
    """
    there: dict[str, Contestant] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name in ("fedclip", *peers):
            kind = KINDS[name]
            python = pfl_python if kind.package == "pfl" else sys.executable
            if kind.package and not has(python, kind.package):
                continue
            command = [python, "-m", f"experiments.contestants.{kind.module}", *setting.arguments(), *kind.options]
            there[name] = stack.enter_context(Contestant(name, command, setting, Path(folder)))
        order = list(there.values())
        for begun in range(0, rounds, ROUNDS_A_TURN):
            for contestant in order:
                contestant.turn(min(ROUNDS_A_TURN, rounds - begun))
            order = order[1:] + order[:1]
    return there, [name for name in peers if name not in there]


def peers_of(text: str | None, setting: Setting) -> list[str]:
    """Return the peers that are asked for, or those that are timed by default.

    Raises:
        ConfigError: one is not known, or is not there for the model.
    """
    fit = [name for name, kind in KINDS.items() if name != "fedclip" and setting.model in (kind.models or COHORTS)]
    if text is None:
        return [name for name in fit if name != "flower" and not (name == "updates" and setting.workers == 1)]
    asked = [name.strip() for name in text.split(",") if name.strip()]
    if wrong := [name for name in asked if name not in fit]:
        raise ConfigError(f"--peers: expected some of {', '.join(fit)} with the model {setting.model}, got '{wrong[0]}'.")
    return asked


def parts_of(answers: Sequence[Mapping[str, Any]], workers: int) -> dict[str, float]:
    """Return which part of the rounds' time each stage took; what workers do at a time counts once."""
    total = sum(a["seconds"] for a in answers)
    return {
        stage: sum(a["stages"][key] for a in answers) / total / (workers if at_a_time else 1) for stage, (key, at_a_time) in STAGES.items()
    }


def engine_command(setting: Setting, rounds: int, peers: str | None, pfl_python: str, as_json: bool) -> int:
    """Time the engine beside its peers, print users a second and ratios, and return the exit status. SIGTERM ends it in order.

    Raises:
        ConfigError: a number or a name out of range, or a contestant ended.
    """
    if not 1 <= setting.cohort <= setting.population:
        raise ConfigError(f"--cohort: expected 1 to {setting.population}, the population, got {setting.cohort}.")
    for number in (signal.SIGTERM, signal.SIGHUP):  # else contestants that wait would be left behind, stopped
        signal.signal(number, signal.default_int_handler)
    names, before = peers_of(peers, setting), os.getloadavg()[0]
    there, missing = race(setting, rounds, names, pfl_python)
    said = {name: len({c.described[name] for c in there.values()}) for name in ("parameters", "torch")}
    if said["parameters"] > 1:
        raise ConfigError("bench engine: the contestants trained models of different sizes; the figures would say nothing.")
    ours = Times.of(there["fedclip"].answers)
    result: dict[str, Any] = {
        "model": setting.model,
        "parameters": there["fedclip"].described["parameters"],
        "cohort": setting.cohort,
        "population": setting.population,
        "rounds": rounds,
        "workers": setting.workers,
        "device": setting.device,
        "cores": len(os.sched_getaffinity(0)),
        "load": [before, os.getloadavg()[0]],
        "contestants": {name: _figures(c, ours) for name, c in there.items()},
        "not_installed": missing,
        "parts": parts_of(there["fedclip"].answers, setting.workers),
    }
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    print(
        f"{setting.model} of {result['parameters']:,} parameters, {setting.cohort} of {setting.population:,} users a round, "
        f"{setting.workers} workers on {setting.device}, {rounds} rounds in turns, load {before:.1f} to {result['load'][1]:.1f}"
    )
    Console().print(_table(result))
    print("fedclip's rounds: " + ", ".join(f"{stage} {100 * part:.1f}%" for stage, part in result["parts"].items()))
    return 0


def _figures(contestant: Contestant, ours: Times) -> dict[str, Any]:
    times = Times.of(contestant.answers)
    low, high = np.quantile(times.rates, [0.25, 0.75])
    figures = {"users_per_second": times.median, "low": float(low), "high": float(high), "rates": list(times.rates)}
    users, cpu_seconds = (sum(a[key] for a in contestant.answers) for key in ("users", "cpu_seconds"))
    figures |= {"users": users, "users_per_cpu_second": users / cpu_seconds}
    if contestant.name != "fedclip":
        figures |= dict(zip(("ratio", "ratio_low", "ratio_high"), ours.ratio(times), strict=True))
    return figures | {"torch": contestant.described["torch"]}


def _table(result: Mapping[str, Any]) -> Table:
    table = Table("", box=None, pad_edge=False)
    for head in ("users/s", "quartiles", "fedclip is", "95%", "users/CPU s", "torch"):
        table.add_column(head, justify="right")
    for name, row in result["contestants"].items():
        beside = (f"{row['ratio']:.2f}x", f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}") if "ratio" in row else ("", "")
        table.add_row(
            name,
            f"{row['users_per_second']:.1f}",
            f"{row['low']:.1f}-{row['high']:.1f}",
            *beside,
            f"{row['users_per_cpu_second']:.1f}",
            row["torch"],
        )
    for name in result["not_installed"]:
        table.add_row(name, "not installed")
    return table
