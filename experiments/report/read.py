"""Run folders and sweep folders as plain data. What a run that still goes on has not written yet is left out, never waited for."""

import fcntl
import json
import os
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from experiments.sweep_plan import DEFAULT
from fedclip.choices import block_of
from fedclip.options import ConfigError

Json = dict[str, Any]

RATES = ("wer", "accuracy")
"""What runs are judged by; a run by the first that it has."""

LAYER_LISTS = ("layer_clipped", "layer_norm", "layer_snr", "layer_sparsity", "trust_ratio")
"""Lists of `metrics.jsonl` with one number for each layer."""

CURVES = ("train_loss", "eval_loss", "epsilon", *RATES, *(f"{rate}_{end}" for rate in RATES for end in ("low", "high")))

SPREAD = ("wer_speakers_q25", "wer_speakers_median", "wer_speakers_q75", "wer_speakers_sd", "wer_worst_decile")


@dataclass(frozen=True)
class Trial:
    """Where one run lies, and what a sweep says of it.

    Attributes:
        name: the run folder's, or the trial's.
        folder: the run folder, which may not be there yet.
        sweep: the sweep's name; empty for a run by itself.
        seed: the sweep's.
        case: the sweep's case; empty where there are none.
        status: what the sweep says; empty for a run by itself.
        error: why it failed, as the sweep says.
        settings: what the sweep set, where it is not the default.
        note: what the sweep asks to be said.
        above: the sweep's folder; None for a run by itself.
    """

    name: str
    folder: Path
    sweep: str = ""
    seed: int | None = None
    case: str = ""
    status: str = ""
    error: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    note: str = ""
    above: Path | None = None


def find_trials(paths: Sequence[Path]) -> list[Trial]:
    """Return the runs of run folders and sweep folders, in order, each once.

    Raises:
        ConfigError: a path is neither.
    """
    found = dict[Path, Trial]()
    for path in paths:
        for trial in _trials_of(path):
            found.setdefault(trial.folder.resolve(), trial)
    trials = list(found.values())
    return [replace(trial, name=name) for trial, name in zip(trials, _told_apart(trials), strict=True)]


def _told_apart(trials: Sequence[Trial]) -> list[str]:
    """Return the trials' names, with as much of where they lie as tells them apart."""
    names, places = [trial.name for trial in trials], [trial.folder.resolve().parts for trial in trials]
    for depth in range(2, max(map(len, places), default=0) + 1):
        count = Counter(names)
        if len(count) == len(names):
            break
        for n, (trial, place) in enumerate(zip(trials, places, strict=True)):
            if count[names[n]] > 1:
                names[n] = f"{trial.sweep}/{trial.name}" if depth == 2 and trial.sweep else "/".join(place[-depth:])
    return names


def _trials_of(path: Path) -> Iterator[Trial]:
    if (path / "sweep.json").is_file():
        try:
            sweep = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
            for trial in sweep["trials"]:
                settings = tuple((key, value) for key, value in flat(trial.get("settings", {})) if value != DEFAULT)
                said = {key: str(trial.get(key) or "") for key in ("case", "status", "error")} | {"note": sweep.get("note") or ""}
                yield Trial(trial["name"], path / trial["folder"], sweep["name"], trial.get("seed"), settings=settings, above=path, **said)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}/sweep.json is damaged: {error!r}; give its run folders one by one.") from error
    elif (path / "metrics.jsonl").is_file():
        yield Trial(path.resolve().name, path)
    else:
        raise ConfigError(f"{path} is no run folder and no sweep folder: it has no metrics.jsonl and no sweep.json.")


def read_run(trial: Trial) -> Json:
    """Return what a run folder holds: `config` (flat), `summary`, `rows`, `speakers`, `tensors`, `command`; empty where not there yet.

    Raises:
        ConfigError: a file of it is damaged.
    """
    folder = trial.folder
    try:
        config = tomllib.loads(_text(folder / "config.toml"))
        summary = json.loads(_text(folder / "summary.json") or "{}", parse_constant=_no_number)
        environment = json.loads(_text(folder / "environment.json") or "{}")
        rows, speakers = _lines(folder / "metrics.jsonl"), _lines(folder / "speakers.jsonl")
    except ValueError as error:
        raise ConfigError(f"{folder} holds a damaged file: {error}.") from error
    tensors = _tensors(folder / "checkpoints" / "model.safetensors")
    return {
        "config": dict(flat(config)),
        "summary": summary,
        "rows": rows,
        "speakers": speakers,
        "tensors": tensors,
        "command": environment.get("command", "run"),
    }


def idle(trial: Trial) -> bool:
    """Return whether nobody works on a run: it or its sweep was held once, and now neither is; False where that can't be told."""
    held = [_held(folder / ".lock") for folder in (trial.folder, trial.above) if folder is not None]
    return False in held and True not in held


def _held(file: Path) -> bool | None:
    """Return whether a process holds a lock; None where there is none, or it can't be told."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go by the close
    except BlockingIOError:
        return True
    except OSError:
        return None
    else:
        return False
    finally:
        os.close(descriptor)


def _text(path: Path) -> str:
    """Return what a file says; nothing where there is none, or where it was put away just now."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def _no_number(_: str) -> None:
    """Return what stands for NaN and infinities, which JSON does not know."""


def _lines(path: Path) -> list[Json]:
    """Return the lines of a file; the last one may be on its way to the disk."""
    lines = _text(path).splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    return [json.loads(line, parse_constant=_no_number) for line in lines]


def _tensors(path: Path) -> list[str]:
    """Return the names of a model's tensors in the order of the vector; none where the file does not say."""
    try:
        with path.open("rb") as file:
            metadata = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__", {})
    except (OSError, ValueError):
        return []
    return list(json.loads(metadata.get("tensors", "[]")))


def flat(values: Json, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a configuration with its key as `--set` takes it; stages of a list by their names."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        elif isinstance(value, list) and value and all(isinstance(stage, dict) and len(stage) == 1 for stage in value):
            yield f"{above}{key}", [name for stage in value for name in stage]
            for stage in value:
                yield from flat(stage, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def rate_of(rows: Sequence[Json]) -> str:
    """Return what a run is judged by; empty where it was never evaluated so."""
    return next((rate for rate in RATES if any(row.get(rate) is not None for row in rows)), "")


def curves_of(rows: Sequence[Json], most: int) -> Json:
    """Return columns over rounds: sums up to each round (bytes, seconds, users) and what was measured in it, thinned to about `most`.

    A sum is None from the first round on that does not say its part.
    """
    sums: dict[str, list[float | None]] = {
        "up": list(accumulate((row.get("uplink_bytes") for row in rows), _add)),
        "down": list(accumulate((row.get("downlink_bytes") for row in rows), _add)),
        "seconds": list(accumulate((row.get("round_seconds") for row in rows), _add)),
        "users": list(accumulate((row.get("users") for row in rows), _add)),
    }
    rate = rate_of(rows)
    evaluated = [i for i, row in enumerate(rows) if row.get(rate) is not None]
    kept = sorted({*_evenly(list(range(len(rows))), most), *_evenly(evaluated, most)})
    columns: Json = {"round": [rows[i]["round"] for i in kept]} | {name: [values[i] for i in kept] for name, values in sums.items()}
    columns["both"] = [_add(sums["up"][i], sums["down"][i]) for i in kept]
    for name in CURVES:
        if any(name in row for row in rows):
            columns[name] = [rows[i].get(name) for i in kept]
    return columns


def _add(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def layers_of(rows: Sequence[Json], tensors: Sequence[str], most: int) -> Json:
    """Return the lists over layers: for each its `names`, and `rounds` by `values[layer][round]` to four digits, `most` rounds of them."""
    found: Json = {}
    for key in LAYER_LISTS:
        there = [row for row in rows if row.get(key)]
        if there:
            kept = [there[i] for i in _evenly(list(range(len(there))), most)]
            values = [[_short(value) for value in layer] for layer in zip(*(row[key] for row in kept), strict=True)]
            found[key] = {"names": _names(tensors, len(values)), "rounds": [row["round"] for row in kept], "values": values}
    return found


def _names(tensors: Sequence[str], count: int) -> list[str]:
    blocks = list(dict.fromkeys(map(block_of, tensors)))
    named = next((names for names in (list(tensors), blocks) if len(names) == count), None)
    return named or [f"layer {n}" for n in range(1, count + 1)]


def speakers_of(speakers: Sequence[Json], row: Json, most: int) -> Json:
    """Return the word error rates of held-out speakers, ascending and thinned to `most`, whose they are, how many, and their spread."""
    heard = sorted((line for line in speakers if line.get("wer") is not None), key=lambda line: line["wer"])
    if not heard:
        return {}
    spread = {name: row[name] for name in SPREAD if row.get(name) is not None}
    kept = [heard[i] for i in _evenly(list(range(len(heard))), most)]
    who = [" ".join(f"{key} {line[key]}" for key in ("unit", "group") if line.get(key) not in (None, "")) for line in kept]
    return {"count": len(heard), "wer": [line["wer"] for line in kept], "who": who} | spread


def _evenly(places: Sequence[int], most: int) -> list[int]:
    """Return at most so many places, evenly spread, the first and the last among them."""
    if len(places) <= most:
        return list(places)
    return [places[round(i * (len(places) - 1) / (most - 1))] for i in range(most)]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
