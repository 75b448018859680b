"""What a report shows: runs, points over seeds with their fronts, the table's columns, all as data that page, exports and tests share."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.report.looks import follows, looks, parts_of, telling
from experiments.report.read import Json, Trial, curves_of, find_trials, idle, layers_of, rate_of, read_run, speakers_of
from experiments.report.words import columns_of, sentence_of, short_names
from fedclip.accounting import Guarantee

AXES = ("both", "up", "down", "epsilon", "extrapolated", "users", "seconds")
"""What an error rate is shown against: bytes of the whole run, epsilon, users trained, seconds."""

NO_DIFFERENCE = (
    "run.seed",
    "run.name",
    "run.workers",
    "run.engine",
    "run.reply",
    "run.out",
    "run.trackers",
    "task.cache_dir",
    "task.cache_mb",
    "evaluation.every",
    "ray.",
)
"""Keys, or with a dot at the end whole sections, that change no result: runs of one point may differ in them."""

FINISHED = ("done", "budget spent")
"""How a run ended that went as far as it was to go."""

MOST_COLUMNS = 8
"""Settings that the table shows; all are in the rows' details."""

COSTS = ("both", "up", "down", "users", "seconds")
"""What runs cost, summed up over rounds."""

THINNING = ((256, 100), (256, 50), (256, 25), (128, 12), (64, 8), (32, 4), (16, 2), (8, 2))
"""Points of a curve and columns of a heat map, tried in this order until the data fit."""

LARGEST = 1_000_000
"""Bytes of data in a page: with Plotly it stays under 6 MB."""


def collect(paths: Sequence[Path]) -> Json:
    """Return what a report of these run and sweep folders shows; long runs are thinned until the data fit a page.

    Raises:
        ConfigError: a path is no run or sweep folder, or a file of it is damaged.
    """
    trials = find_trials(paths)
    read = [read_run(trial) for trial in trials]
    report: Json = {}
    for points, columns in THINNING:
        runs = [_run(n, trial, found, points, columns) for n, (trial, found) in enumerate(zip(trials, read, strict=True))]
        report = _report(runs, trials)
        if len(json.dumps(report, default=str)) <= LARGEST:
            break
    return report


def _run(n: int, trial: Trial, found: Json, points: int, columns: int) -> Json:
    rows, summary, config = found["rows"], found["summary"], found["config"]
    rate = rate_of(rows)
    last: Json = next((row for row in reversed(rows) if row.get(rate) is not None), {})
    curves, status, nobody = curves_of(rows, points), _status(trial, found), idle(trial)
    # An epsilon that is infinite is written as null: one of an earlier round does not stand for it.
    epsilon = next((row["epsilon"] for row in reversed(rows) if "epsilon" in row), None)
    extrapolated = (summary.get("extrapolated") or {}).get("epsilon")
    results = {
        "rate": last.get(rate),
        "low": last.get(f"{rate}_low", last.get(rate)),
        "high": last.get(f"{rate}_high", last.get(rate)),
        "cer": last.get("cer"),
        **{name: curves[name][-1] if rows else None for name in COSTS},
        "rounds": rows[-1]["round"] if rows else 0,
        "epsilon": epsilon,
        "delta": next((row["delta"] for row in reversed(rows) if row.get("delta") is not None), None),
        "extrapolated": extrapolated,
        "ratio": summary.get("both_ways_ratio"),
    }
    at: Json = {"round": 0}
    if last:  # what it had cost when it was as good as it says
        place = curves["round"].index(last["round"])
        at = {"round": last["round"], "epsilon": last.get("epsilon")} | {name: curves[name][place] for name in COSTS}
        at["extrapolated"] = extrapolated if last is rows[-1] else None
    return {
        "id": n,
        "name": trial.name,
        "folder": str(trial.folder),
        "sweep": trial.sweep,
        "case": trial.case,
        "known": bool(config),
        "seed": config.get("run.seed", trial.seed),
        "status": "stopped" if nobody and status == "running" else status,
        "idle": nobody,
        "error": trial.error or str(summary.get("error") or ""),
        "rate": rate,
        "stamps": _stamps(found, epsilon),
        "privacy": _privacy(summary),
        "note": summary.get("note", ""),
        "config": {key: _writable(value) for key, value in (dict(trial.settings) | config).items()},
        "command": found["command"],
        "results": results,
        "at": at,
        "noisy": _noisy(found),
        "curves": curves,
        "layers": layers_of(rows, found["tensors"], columns),
        "speakers": speakers_of(found["speakers"], last, points),
    }


def _status(trial: Trial, found: Json) -> str:
    """Return how far a run is: its folder has the last word on what is finished, its sweep on what failed or goes on anew."""
    own = str(found["summary"].get("status") or "")
    if own not in FINISHED and trial.status in ("failed", "running"):
        return trial.status
    return own or trial.status or ("running" if found["rows"] or found["config"] else "waiting")


def _writable(value: Any) -> Any:
    """Return a setting as JSON can say it: dates and numbers that are not finite as text."""
    if isinstance(value, list):
        return [_writable(part) for part in value]
    if isinstance(value, dict):
        return {key: _writable(part) for key, part in value.items()}
    plainly = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if plainly else str(value)


def _noisy(found: Json) -> bool:
    """Return whether there was noise, whatever its epsilon."""
    return "measured" in found["summary"] or any("epsilon" in row for row in found["rows"])


def _stamps(found: Json, epsilon: float | None) -> list[str]:
    """Return the words that go with every figure of a run; of one that is not done, those that its rows can tell."""
    summary = found["summary"]
    if not summary and not found["rows"]:
        return []
    if epsilon is None:
        return ["not private", *(["noise without a finite epsilon"] if _noisy(found) else [])]
    said = summary.get("privacy", "nominal")  # until it says otherwise a run is a seeded simulation
    stamps = ["private", *(word for word in ("nominal", "insecure") if word in said)]
    return [*stamps, *(["extrapolated"] if summary.get("extrapolated") else [])]


def _privacy(summary: Json) -> str:
    """Return what a run says of its privacy, and what its epsilons mean."""
    stated = [summary[key] for key in ("measured", "extrapolated") if summary.get(key)]
    return "; ".join(filter(None, [summary.get("privacy", ""), *(Guarantee.of(one).describe_kind() for one in stated)]))


def _report(runs: list[Json], trials: Sequence[Trial]) -> Json:
    known = [run for run in runs if run["known"]]
    keys = _varied(known or runs, trials)
    points = _points(runs, telling(keys, known or runs))
    styles, legend = looks([point.pop("parts") for point in points], [point["ended"] for point in points])
    # A trial that waits has no configuration yet, but for what its sweep sets: it has no part in what is common.
    first: Json = known[0]["config"] if known else {}
    common = {key: value for key, value in first.items() if all(run["config"].get(key) == value for run in known)}
    rates = list(dict.fromkeys(run["rate"] for run in runs if run["rate"]))
    report = {
        "title": ", ".join(dict.fromkeys(trial.sweep or trial.name for trial in trials)) if len(runs) < 4 or trials[0].sweep else "Runs",
        "sentence": sentence_of(runs),
        "privacy": sorted({run["privacy"] for run in runs if run["privacy"]}),
        "notes": sorted({note for note in (*(run["note"] for run in runs), *(trial.note for trial in trials)) if note}),
        "stamps": list(dict.fromkeys(stamp for run in runs for stamp in run["stamps"])),
        "keys": keys,
        "names": short_names(keys),
        "rates": rates,
        "columns": columns_of(runs, keys[:MOST_COLUMNS]),
        "common": common,
        "points": [point | {"style": style} for point, style in zip(points, styles, strict=True)],
        "legend": legend,
        "fronts": {r: {axis: front([p for p in points if p["rate"] == r and p["ended"]], axis, r) for axis in AXES} for r in rates},
        "runs": [run | {"config": {k: v for k, v in run["config"].items() if not (run["known"] and k in common)}} for run in runs],
    }
    return report


def _varied(runs: Sequence[Json], trials: Sequence[Trial]) -> list[str]:
    """Return the keys that runs differ in: what a sweep varies, else all but those that change no result, seeds and cases apart."""
    swept = list(dict.fromkeys(key for trial in trials for key, _ in trial.settings))
    alone = all(trial.sweep for trial in trials) and len({trial.sweep for trial in trials}) == 1
    every = swept if alone else list(dict.fromkeys(key for run in runs for key in run["config"]))
    cases = {key for trial in trials if trial.case for key, _ in trial.settings} if alone and any(t.case for t in trials) else set()
    texts = {key: {json.dumps(run["config"].get(key)) for run in runs} for key in every}
    varied = [key for key in every if len(texts[key]) > 1 and not _changes_nothing(key) and key != "run.init_digest"]
    free = [key for key in varied if key not in cases or not follows(key, [], runs)]
    return sorted(free, key=lambda key: sum(key not in run["config"] for run in runs))


def _changes_nothing(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in NO_DIFFERENCE)


def _points(runs: Sequence[Json], told: Sequence[str]) -> list[Json]:
    """Return a point for each configuration: means over its seeds and their range; of one run the 95% interval of its error rate.

    What it cost is of the round whose error rate it is. Runs that are not finished are of one point only where they stand alike.
    """
    groups: dict[str, list[Json]] = {}
    for run in runs:
        if run["results"]["rate"] is not None:
            said = {key: value for key, value in run["config"].items() if not _changes_nothing(key)}
            stands = "" if run["status"] in FINISHED else _stands(run)
            same = json.dumps([run["command"], run["case"], run["rate"], stands, said], sort_keys=True)
            groups.setdefault(same, []).append(run)
    points = []
    for n, members in enumerate(groups.values()):
        results, first = [run["results"] for run in members], members[0]
        point: Json = {"id": n, "runs": [run["id"] for run in members], "rate": first["rate"], "case": first["case"]}
        point["ended"], point["noisy"] = first["status"] in FINISHED, any(run["noisy"] for run in members)
        point["seeds"] = len({run["seed"] for run in members})
        point["label"] = _label(members, told) + ("" if point["ended"] else f" ({_stands(first)})")
        point["y"] = _spread([r["rate"] for r in results])
        if len(members) == 1:
            point["y"] |= {"low": results[0]["low"], "high": results[0]["high"]}
        point["x"] = {axis: _spread(values) for axis in AXES if all(values := [run["at"][axis] for run in members])}
        point["parts"] = parts_of(first["case"], first["config"], told)
        points.append(point)
    return points


def _stands(run: Json) -> str:
    """Return how far a run is that is not finished."""
    return f"{'so far' if run['status'] in ('running', 'waiting') else run['status']}, round {run['at']['round']}"


def _spread(values: Sequence[float]) -> Json:
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}


def _label(members: Sequence[Json], told: Sequence[str]) -> str:
    """Return what tells a point from the others: a run's name where it is alone, else its case and settings."""
    if len(members) == 1:
        return str(members[0]["name"])
    alike: str = os.path.commonprefix([run["name"] for run in members]).rstrip("0123456789-_. /=")  # noqa: RUF071  names, not paths
    if alike and not members[0]["sweep"]:
        return alike
    said = parts_of(members[0]["case"], members[0]["config"], told, unset="")
    return ", ".join(filter(None, said)) or alike or str(members[0]["name"])


def front(points: Iterable[Json], axis: str, rate: str) -> list[int]:
    """Return the points that none beats in both, from the least of `axis` on: word error rates fall, accuracies rise."""
    sign = 1 if rate == "wer" else -1
    there = sorted((p["x"][axis]["mean"], sign * p["y"]["mean"], p["id"]) for p in points if axis in p["x"])
    kept, best = list[int](), float("inf")
    for _, error, point in there:
        if error < best:
            kept.append(point)
            best = error
    return kept
