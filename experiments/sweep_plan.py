"""A sweep file: what is varied, and the checked experiment of each trial. Imports no PyTorch."""

import copy
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from fedclip.config import Experiment, drop_key, make_experiment, read_override, read_toml, set_key
from fedclip.options import ConfigError, Options, unknown, validate
from strategies.recipes import resolve

DEFAULT = "default"
"""The value that takes a key out of the base experiment, so that its default stands: no noise, say."""

LONGEST_NAME, LONGEST_VALUE = 120, 32

NOTE = (
    "Tuning on private data costs privacy: each private trial states the epsilon of its own releases only. Whoever sees several trials, or "
    "the choice of the best, learns from all of them, and their costs add up; tune on public data, or account for every trial."
)
"""What is said once of a sweep that has a private trial."""


class SweepOptions(Options):
    """A whole sweep file. A trial is a case with a value of each key of the grid and a seed; later ones set keys over earlier ones."""

    base: Path
    """The experiment file, relative to the sweep file."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] = "sweep"
    """By default that of the file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of every trial."""
    cases: tuple[dict[str, Any], ...] = ()
    """Keys that go together, with a `name`."""
    grid: dict[str, Any] = Field(default_factory=dict)
    """A list of values for each key: every combination is tried. Under a name that is no section, keys that go together, as in `cases`."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = ()
    """By default the seed of the experiment."""
    parallel: Annotated[int, Field(ge=0)] = 0
    """Trials at a time; 0: one a core."""


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep.

    Attributes:
        name: short, unique, fit for a folder.
        settings: what it sets that others set otherwise or not at all, by dotted key, without the seed.
        case: the name of its case; None where the sweep has no cases.
        seed: of all its randomness.
        experiment: all of it, resolved.
    """

    name: str
    settings: Mapping[str, Any]
    case: str | None
    seed: int
    experiment: Experiment = field(repr=False)

    @property
    def private(self) -> bool:
        """Whether there is noise."""
        privacy = self.experiment.privacy
        return privacy.noise_multiplier is not None or privacy.target_epsilon is not None


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read: its options with the base's absolute path, what the base says, the varied keys and the trials."""

    options: SweepOptions
    base: Mapping[str, Any]
    keys: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def note(self) -> str:
        """What is to be said with every result."""
        return NOTE if any(trial.private for trial in self.trials) else ""


def read_sweep(path: Path, overrides: Iterable[str] = (), *, on_ray: bool = False) -> Sweep:
    """Return the sweep of a file, every trial resolved and checked.

    A trial's engine is this process, unless the base or the sweep says otherwise: the trials run side by side, with the same bits.

    Args:
        path: the file.
        overrides: `"section.key=value"` for every trial.
        on_ray: the trials are tasks on a Ray cluster.

    Raises:
        ConfigError: the file, a key or a value is refused, or any trial is.
    """
    said = read_toml(path)
    options = validate(SweepOptions, {"name": re.sub(r"[^A-Za-z0-9._-]", "-", path.stem)} | said)
    base = options.base if options.base.is_absolute() else path.parent.absolute() / options.base
    common = _flat(options.set) | _flat(dict(map(read_override, overrides)))
    options = options.model_copy(update={"base": base, "set": common})
    values = read_toml(base)
    axes = _axes(options)
    _check(common, axes)
    keys = tuple(dict.fromkeys(key for axis in axes for choice in axis for key in choice.settings))
    names, trials, refused = set[str](), list[Trial](), dict[str, list[str]]()
    seeds: tuple[int | None, ...] = options.seeds or (None,)
    for choices, seed in itertools.product(itertools.product(*axes), seeds):
        parts = [*(choice.text for choice in choices), *([] if seed is None else [f"seed={seed}"])]
        name = _unique("-".join(parts) or options.name, names)
        varied = {key: value for choice in choices for key, value in choice.settings.items()}
        case = choices[0].text if options.cases else None
        try:
            experiment = _experiment(values, common | varied | ({} if seed is None else {"run.seed": seed}), on_ray)
        except ConfigError as error:
            refused.setdefault(str(error), []).append(name)
        else:
            trials.append(Trial(name, varied, case, experiment.run.seed, experiment))
    refuse_trials(refused)
    _refuse_same(trials)
    return Sweep(options, values, keys, tuple(trials))


def refuse_trials(refused: Mapping[str, list[str]]) -> None:
    """Refuse a sweep some of whose trials are refused: by message, their names."""
    if refused:
        several = {message: f", and {len(names) - 1} more" if len(names) > 1 else "" for message, names in refused.items()}
        raise ConfigError("\n".join(f"trial {names[0]}{several[message]}: {message}" for message, names in refused.items()))


def _refuse_same(trials: Iterable[Trial]) -> None:
    """Refuse trials that would be the same experiment twice: a seed or a value that is there again."""
    same = dict[str, list[str]]()
    for trial in trials:
        same.setdefault(json.dumps(trial.experiment.plain(), sort_keys=True, default=str), []).append(trial.name)
    twice = [" and ".join(names) for names in same.values() if len(names) > 1]
    if twice:
        more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
        raise ConfigError(f"The trials {twice[0]}{more} are the same experiment; leave out what is there twice of seeds, grid or cases.")


def _refuse_lost(keys: Iterable[str]) -> None:
    """Refuse a key whose whole section a later one sets."""
    before = list[str]()
    for key in keys:
        lost = next((other for other in before if other.startswith(f"{key}.")), None)
        if lost is not None:
            raise ConfigError(f"{lost}: lost, as {key} is set after it, whole; say it in the value of {key}, or leave one of them out.")
        before.append(key)


def _experiment(base: Mapping[str, Any], settings: Mapping[str, Any], on_ray: bool) -> Experiment:
    _refuse_lost(settings)
    values = copy.deepcopy(dict(base))
    for key, value in settings.items():
        if value == DEFAULT:
            drop_key(values, key)
        else:
            set_key(values, key, copy.deepcopy(value))
    run = values.get("run")
    if isinstance(run, dict) and run.setdefault("engine", "process") != "process" and on_ray:
        raise ConfigError("run.engine: a trial on a Ray cluster is one task, and computes its rounds there; leave run.engine out.")
    return resolve(make_experiment(values))


@dataclass(frozen=True)
class _Choice:
    """One value of an axis: how a trial's name says it, and what it sets."""

    text: str
    settings: Mapping[str, Any]


def _axes(options: SweepOptions) -> list[list[_Choice]]:
    """Return what is combined: the cases, and for each key of the grid its values, or settings that go together under a name."""
    axes = [_choices("cases", options.cases)] if options.cases else []
    grid = _flat(options.grid)
    short = _short(grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid.{key}: expected a list of values, got {values!r}.")
        if key.split(".")[0] in Experiment.model_fields:
            axes.append([_Choice(f"{short[key]}={_text(value)}", {key: value}) for value in values])
        elif all(isinstance(value, dict) for value in values):
            axes.append(_choices(f"grid.{key}", values, f"{key}="))
        else:
            raise unknown(f"grid.{key}", key.split(".")[0], Experiment.model_fields, "section")
    return axes


def _choices(where: str, tables: Sequence[Mapping[str, Any]], before: str = "") -> list[_Choice]:
    """Return settings that go together, each under its name."""
    choices = list[_Choice]()
    for number, table in enumerate(tables):
        name = table.get("name", f"case{number + 1}" if where == "cases" else None)
        if not isinstance(name, str) or not _safe(name).strip(".-_"):
            raise ConfigError(f"{where}.{number}.name: expected a name with letters or digits in it, got {name!r}.")
        if any(before + name == other.text for other in choices):
            raise ConfigError(f"{where}: two of them have the name '{name}'; names tell trials apart.")
        choices.append(_Choice(before + name, _flat({key: value for key, value in table.items() if key != "name"})))
    return choices


def _check(common: Mapping[str, Any], axes: list[list[_Choice]]) -> None:
    """Refuse keys that a sweep sets itself or that are set twice."""
    varied = [list(dict.fromkeys(key for choice in axis for key in choice.settings)) for axis in axes]
    for key in (*common, *itertools.chain(*varied)):
        if key in ("run.out", "run.seed"):
            remedy = "each trial has its folder in the sweep's, see --out" if key == "run.out" else "give seeds = [..]"
            raise ConfigError(f"{key}: a sweep sets it itself; {remedy}.")
        if sum(key in keys for keys in varied) > 1:
            raise ConfigError(f"{key}: both cases and grid, or two lists of the grid, vary it; leave it out of one of them.")
    for key in common:
        if any(key in keys for keys in varied):
            raise ConfigError(f"set.{key}: the sweep varies it; leave it out of set, or of the grid and the cases.")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by dotted key: `local.lr = 1` is `"local.lr" = 1`, and `"local.lr" = { .. }`, quoted, is a table as a value."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        deeper = isinstance(value, dict) and value and "." not in key
        flat |= _flat(value, f"{prefix}{key}.") if deeper else {f"{prefix}{key}": value}
    return flat


def _short(keys: Iterable[str]) -> dict[str, str]:
    """Return the shortest endings of dotted keys that tell them apart."""
    short = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        short[key] = next((e for e in endings if not any(k != key and f".{k}".endswith(f".{e}") for k in keys)), key)
    return short


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=str)
    return _safe(text)[:LONGEST_VALUE]


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("_")


def _unique(name: str, taken: set[str]) -> str:
    """Return a name fit for a folder that is not taken, and take it."""
    short = _safe(name)[:LONGEST_NAME].lstrip(".-_") or "trial"
    candidate = next(c for n in itertools.count(1) if (c := short if n == 1 else f"{short}-{n}") not in taken)
    taken.add(candidate)
    return candidate
