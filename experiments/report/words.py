"""What a report says in words, and the columns of its table."""

from collections.abc import Sequence
from typing import Any

from experiments.report.read import Json
from fedclip.accounting import rounded_up

VAGUE = ("name", "kind", "size", "value", "lr", "eps", "seed", "factor", "rounds")
"""Ends of keys that say too little by themselves."""

FEW = 4
"""Settings that stand before the results in the table; more stand behind them."""

RATE_NAMES = {"wer": "word error rate", "accuracy": "accuracy"}


def sentence_of(runs: Sequence[Json]) -> str:
    """Return what was run, in a sentence or two."""
    known = [run for run in runs if run["known"]] or runs
    first = known[0]["config"]
    ended = [run for run in runs if run["results"]["rate"] is not None]
    many = f"{len(runs)} runs" if len(runs) > 1 else "One run"
    parts = [f"{many} of {_each(runs, 'task.name') or 'a task'} by {_each(runs, 'strategy.method') or 'stages of its own'}"]
    if all(run["config"].get("population.size") == first.get("population.size") for run in known) and first.get("population.size"):
        parts.append(f"{first['population.size']:,} users")
    parts.append(f"{_range([run['results']['rounds'] for run in runs], '{:,.0f}')} rounds")
    parts.append(f"{_range([run['results']['users'] for run in runs if run['results']['users']], '{:,.0f}')} users' updates")
    text = ", ".join(parts) + "."
    for rate in dict.fromkeys(run["rate"] for run in ended):
        rates = [100 * run["results"]["rate"] for run in ended if run["rate"] == rate]
        text += f" {RATE_NAMES[rate].capitalize()} on held-out users {_range(rates, '{:.1f}')}%."
    private = [run["results"]["epsilon"] for run in runs if run["results"]["epsilon"] is not None]
    if private:
        deltas = [run["results"]["delta"] for run in runs if run["results"]["delta"] is not None]
        counted = "" if len(private) == len(runs) else f" in {len(private)} of them"
        text += f" Epsilon {_range([float(rounded_up(value)) for value in private], '{:,g}')} at delta {_range(deltas, '{:.0e}')}{counted}."
    return text


def _each(runs: Sequence[Json], key: str) -> str:
    values = list(dict.fromkeys(str(run["config"][key]) for run in runs if run["config"].get(key)))
    return ", ".join(values[:3]) + (" and others" if len(values) > 3 else "")


def plain(value: Any) -> str:
    """Return a setting as a person writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    return " + ".join(map(plain, value)) if isinstance(value, list) else str(value)


def _range(values: Sequence[float], form: str) -> str:
    """Return one number, or the least and the greatest of several."""
    if not values:
        return "no"
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest end of each key that tells it from the others, its words apart."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(2 if parts[-1] in VAGUE and len(parts) > 1 else 1, len(parts) + 1))
        end = next(e for e in ends if e == key or all(k == key or not f".{k}".endswith(f".{e}") for k in keys))
        found[key] = end.replace("_", " ").replace(".", " ")
    return found


def columns_of(runs: Sequence[Json], keys: Sequence[str]) -> list[Json]:
    """Return the table's columns: `title` with its unit, `kind` (how a value is written), and where the value lies in a run.

    `from` is `run`, `config` or `results`, and `key` the key there.
    """

    def of(place: str, key: str, title: str, kind: str) -> Json:
        return {"from": place, "key": key, "title": title, "kind": kind}

    names, settings = short_names(keys), list[Json]()
    found = [of("run", "name", "run", "text")]
    found += [of("run", "case", "case", "text")] if any(run["case"] for run in runs) else []
    for key in keys:
        number = all(isinstance(run["config"].get(key), int | float | None) for run in runs)
        settings.append(of("config", key, names[key], "number" if number else "text"))
    if len(settings) <= FEW:
        found, settings = [*found, *settings], []
    if len({run["seed"] for run in runs}) > 1:
        found.append(of("run", "seed", "seed", "number"))
    rates = list(dict.fromkeys(run["rate"] for run in runs if run["rate"]))
    title = {("wer",): "WER, %", ("accuracy",): "accuracy, %"}.get(tuple(rates), "WER or accuracy, %")
    results = [("rate", title, "percent"), ("low", "95% from, %", "percent"), ("high", "to, %", "percent"), ("cer", "CER, %", "percent")]
    results += [("up", "up, MB", "megabytes"), ("down", "down, MB", "megabytes"), ("both", "both, MB", "megabytes")]
    results += [
        ("ratio", "times less than dense", "number"),
        ("epsilon", "epsilon", "epsilon"),
        ("extrapolated", "epsilon, extrapolated", "epsilon"),
    ]
    results += [("rounds", "rounds", "count"), ("users", "users", "count"), ("seconds", "time, min", "minutes")]
    found += [of("results", *column) for column in results if any(run["results"][column[0]] is not None for run in runs)]
    return [*found, *settings, of("run", "stamps", "stamps", "text"), of("run", "status", "status", "text")]
