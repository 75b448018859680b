"""Sums of what was measured of users: named numbers or lists of numbers that add up in cohort order."""

from collections.abc import Iterable, Mapping

Value = float | list[float]
Tally = dict[str, Value]
"""Sums by name; a list holds one sum for each layer."""

MOST_SAID, MOST_CHARACTERS = 100, 1000
"""Lines kept of what failed users say, by a worker and of a round, and characters of a line: a hundred thousand may fail at once."""


def add_up(tallies: Iterable[Mapping[str, Value]]) -> Tally:
    """Return the sums over tallies, taken in the order given; a name that one of them lacks counts zero there.

    Raises:
        ValueError: a name is a number in one and a list, or a list of another length, in another.
    """
    total: Tally = {}
    for tally in tallies:
        for name, value in tally.items():
            total[name] = _add(total[name], value, name) if name in total else (list(value) if isinstance(value, list) else value)
    return total


def number(tally: Mapping[str, Value], name: str) -> float:
    """Return a sum that is a single number; 0 where nothing was added."""
    value = tally.get(name, 0.0)
    if isinstance(value, list):
        raise ValueError(f"Expected one number for '{name}', got {len(value)}.")
    return value


def _add(a: Value, b: Value, name: str) -> Value:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [x + y for x, y in zip(a, b, strict=True)]
    if isinstance(a, list) or isinstance(b, list):
        raise ValueError(f"Expected sums of one kind for '{name}', got {a} and {b}.")
    return a + b


def shortened(line: str) -> str:
    """Return a line of what a user said, cut where it is too long to be kept."""
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "…"
