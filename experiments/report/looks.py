"""How points look: of few each has its own colour and sign; of many the colour says the first of their settings, the sign the others."""

from collections.abc import Sequence
from typing import Any

from experiments.report.read import Json
from experiments.report.words import plain, short_names

COLOURS, SIGNS = 7, 8
"""Colours and signs that can be told apart; the page and the exported figures have as many."""

LONG = {"privacy.noise_multiplier": "noise", "privacy.noise_cohort_size": "noise cohort"}
"""What is shorter in a label than the key is."""

MOST_KEYS = 4
"""Settings in a label."""


def telling(keys: Sequence[str], runs: Sequence[Json]) -> list[str]:
    """Return the keys that labels need: without those that follow from the case and the other keys, a noise's cohort from the noise."""
    told = list(keys[:MOST_KEYS])
    for key in reversed(keys[:MOST_KEYS]):
        others = [other for other in told if other != key]
        if others and follows(key, others, runs):
            told = others
    return told


def follows(key: str, others: Sequence[str], runs: Sequence[Json]) -> bool:
    """Return whether runs of one case that are alike in the other settings are alike in this one, so that the others say it."""
    values: dict[str, set[str]] = {}
    for run in runs:
        same = "; ".join([run["case"], *(repr(run["config"].get(other)) for other in others)])
        values.setdefault(same, set()).add(repr(run["config"].get(key)))
    return all(len(found) == 1 for found in values.values())


def parts_of(case: str, config: Json, told: Sequence[str], unset: str = "no {}") -> list[str]:
    """Return what tells a configuration from others: its case, and these settings by short names; one that is not set is `unset`."""
    names = short_names(told)

    def said(key: str, value: Any) -> str:
        name = LONG.get(key, names[key])
        return unset.format(name) if value is None else f"{name} {plain(value)}"

    return [case, *(said(key, config.get(key)) for key in told)]


def looks(parts: Sequence[Sequence[str]], ended: Sequence[bool]) -> tuple[list[list[int]], Json]:
    """Return for each point its colour, its sign and its dash, and what `colours` and `signs` say; nothing where each point has its own.

    Args:
        parts: what tells each point from the others, as many for each.
        ended: whether it is finished; those that are not may look like another of their configuration.
    """
    if len(parts) <= COLOURS:
        return [[n, n, 0] for n in range(len(parts))], {}
    varied = [i for i, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1]
    sides = [(of[varied[0]], ", ".join(of[i] for i in varied[1:])) for of in parts] if len(varied) > 1 else []
    for pairs in (sides, [(rest, first) for first, rest in sides]):
        colours, signs = (list(dict.fromkeys(pair[side] for pair in pairs)) for side in (0, 1))
        finished = [pair for pair, done in zip(pairs, ended, strict=False) if done]
        if pairs and len(colours) <= COLOURS and len(signs) <= SIGNS and len(set(finished)) == len(finished):
            found = [(colours.index(colour), signs.index(sign)) for colour, sign in pairs]
            return [[colour, sign, sign] for colour, sign in found], {"colours": colours, "signs": signs}
    return [[n, n, n // COLOURS] for n in range(len(parts))], {}
