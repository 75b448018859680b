"""`fedclip users`: who there is and what each has, before anything is trained."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.folder import to_json
from experiments.prepare import population_of
from fedclip.config import Experiment
from fedclip.options import ConfigError
from fedclip.population import Labels, Spread, each, sample
from fedclip.tasks.base import Task
from fedclip.tasks.build import TaskRecipe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLE = 5_000
"""Users that are looked at where nothing need be loaded."""

LOADED = 20
"""Users whose data is loaded, where there is no other way to count it."""

SHOWN = 40
"""Users whose labels are drawn."""


@dataclass(frozen=True, eq=False)
class Census:
    """What was found of users.

    Attributes:
        name: of the experiment.
        population: users there are.
        looked_at: ids of those whose seconds and labels are known, ascending.
        examples: examples of each user, of those whose examples could be counted: all of `looked_at`, or the first loaded ones.
        examples_there: training examples there are to deal; None where the task does not say.
        left_out: examples of the loaded users that cannot be used.
        seconds: predicted seconds of audio of each user; None where it is not speech.
        labels: None where there are none.
    """

    name: str
    population: int
    looked_at: np.ndarray
    examples: Spread
    examples_there: int | None
    left_out: int
    seconds: Spread | None
    labels: Labels | None

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        everybody = len(self.looked_at) == self.population
        plain: dict[str, Any] = {"name": self.name, "users": self.population, "looked_at": len(self.looked_at), "everybody": everybody}
        plain["examples_per_user"] = dataclasses.asdict(self.examples)
        if self.examples_there is not None:
            plain["examples_total"] = self.examples_there
        if self.left_out:
            plain["examples_left_out"] = self.left_out
        if self.seconds is not None:
            plain["seconds_per_user"] = dataclasses.asdict(self.seconds)
        if self.labels is not None:
            plain |= {
                "labels": self.labels.names.tolist(),
                "label_shares": self.labels.overall.tolist(),
                "labels_per_user": dataclasses.asdict(Spread.of(self.labels.distinct())),
                "label_entropy_bits_mean": float(self.labels.entropy().mean()),
                "label_total_variation_mean": float(self.labels.total_variation().mean()),
            }
        return plain


def take_census(experiment: Experiment, task: Task, size: int | None = None) -> Census:
    """Return what the users of an experiment have.

    Of all users where there are no more than `SAMPLE`, else of so many drawn by the seed. Examples are counted by `labels_of`
    where the task has that, which loads nothing; else the data of `LOADED` of them is loaded.

    Args:
        experiment: resolved.
        task: its task.
        size: users to look at, and to load where need be.

    Raises:
        ConfigError: the data of a user cannot be read, or nobody has any.
    """
    population, seed = population_of(experiment, task), experiment.run.seed
    rng = np.random.default_rng(seed)
    chosen = sample(population, size or SAMPLE, rng)
    labels_of, counted, left_out = getattr(task, "labels_of", None), chosen, 0
    labels = None
    try:
        if labels_of is not None:
            own = [np.asarray(labels_of(int(user))) for user in chosen]
            examples, labels = Spread.of([len(of) for of in own]), Labels.of(own)
        else:
            counted = chosen if size else chosen[sample(len(chosen), LOADED, rng)]
            loaded = [task.load_user(int(user), np.random.default_rng((seed, int(user)))) for user in counted]
            examples = Spread.of([len(of) for of in loaded])
            left_out = sum(int(getattr(of, "left_out", 0)) for of in loaded)
        seconds = Spread.of(each(chosen, task.cost)) if experiment.task.name == "asr" else None
    except Exception as error:
        raise ConfigError(f"task.name: '{experiment.task.name}' cannot give the data of users: {type(error).__name__}: {error}.") from error
    if not examples.total:
        raise ConfigError(f"None of {examples.users} users that were looked at has anything to train on.")
    there = getattr(task, "examples", None)
    return Census(experiment.run.name, population, chosen, examples, there if isinstance(there, int) else None, left_out, seconds, labels)


def users_command(experiment: Experiment, size: int | None, out: Path | None, as_json: bool) -> int:
    """Print what users have, draw it where asked for, and return the exit status.

    Raises:
        ConfigError: the task or its data are refused, or the plot cannot be drawn.
    """
    census = take_census(experiment, TaskRecipe.of(experiment).build(), size)
    if as_json:
        print(to_json(census.plain(), indent=2))
    else:
        _print(census)
    if out is not None:
        draw(census, out)
    return 0


def draw(census: Census, file: Path) -> None:
    """Draw the labels of the first users that were looked at, or seconds, beside the histogram of sizes: a .png, .svg or .pdf.

    Raises:
        ConfigError: an ending that is not known, or a place that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = 1 + (census.labels is not None) + (census.seconds is not None)
    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if census.labels is not None:
        _draw_labels(axes.pop(0), census.labels, census.looked_at)
    _draw_histogram(axes.pop(0), census.examples, "examples")
    if census.seconds is not None:
        _draw_histogram(axes.pop(0), census.seconds, "seconds of audio (predicted)")
    figure.suptitle(f"{census.name}: {census.population:,} users, {len(census.looked_at):,} looked at")
    try:
        figure.savefig(file, dpi=150)
    except ValueError as error:
        raise ConfigError(f"--out: {file} cannot be drawn: {error}; end the name in .png, .svg or .pdf.") from error
    except OSError as error:
        raise ConfigError(f"--out: {file} cannot be written: {error}; give a folder that exists.") from error


def _draw_labels(axes: "Axes", labels: Labels, users: np.ndarray) -> None:
    import matplotlib

    shown = labels.counts[:SHOWN]
    at, below = np.arange(len(shown)), np.zeros(len(shown))
    colours = matplotlib.colormaps["tab20" if len(labels.names) <= 20 else "viridis"]
    for n, name in enumerate(labels.names):
        shade = n if len(labels.names) <= 20 else n / (len(labels.names) - 1)
        axes.bar(at, shown[:, n], bottom=below, width=0.9, color=colours(shade), label=str(name))
        below += shown[:, n]
    axes.set(xlabel=f"user (the first {len(shown)} of {len(labels.counts):,})", ylabel="examples", title="Labels")
    places = at[:: max(1, len(at) // 10)]
    axes.set_xticks(places, [str(users[n]) for n in places])
    if len(labels.names) <= 20:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)


def _draw_histogram(axes: "Axes", spread: Spread, name: str) -> None:
    axes.stairs(spread.counts, spread.edges, fill=True, color="#0072B2")
    axes.axvline(spread.median, color="#D55E00", linewidth=1)
    axes.set(xlabel=name, ylabel="users", title=f"{spread.users:,} users, median {spread.median:.4g}")


def _print(census: Census) -> None:
    everybody = len(census.looked_at) == census.population
    which = "all of them" if everybody else f"{len(census.looked_at):,} of them, drawn by the seed"
    print(f"{census.name}: {census.population:,} users; what follows is of {which}")
    if census.examples.users < len(census.looked_at):
        print(f"examples are counted in the data of {census.examples.users} of these")
    table = Table("", box=None, pad_edge=False)
    for head in ("users", "least", "quartile", "median", "quartile", "most", "mean", "in all"):
        table.add_column(head, justify="right")
    rows: list[tuple[str, Spread | None]] = [("examples", census.examples), ("seconds (predicted)", census.seconds)]
    if census.labels is not None:
        rows.append(("labels", Spread.of(census.labels.distinct())))
    for name, spread in rows:
        if spread is not None:
            in_all = "" if name == "labels" else f"{spread.total:,.0f}"
            table.add_row(name, f"{spread.users:,}", *_numbers(spread), in_all)
    Console(width=None if Console().is_terminal else 120).print(table)
    _print_histogram(census.examples)
    if census.examples_there is not None and everybody:
        print(f"{census.examples.total:,.0f} of {census.examples_there:,} training examples are dealt")
    if census.left_out:
        print(f"{census.left_out} examples cannot be used")
    if census.labels is not None:
        labels = census.labels
        print(
            f"labels: {len(labels.names)}; of a user: entropy {labels.entropy().mean():.3f} bits (of {_entropy(labels.overall):.3f}), "
            f"total variation to all {labels.total_variation().mean():.3f}, on average"
        )


def _print_histogram(spread: Spread) -> None:
    """Print a bar a line."""
    most = max(spread.counts)
    for (low, high), count in zip(itertools.pairwise(spread.edges), spread.counts, strict=True):
        ends = f"{low + 0.5:,.0f} to {high - 0.5:,.0f}" if high - low > 1 else f"{low + 0.5:,.0f}"
        print(f"{ends:>16} | {'#' * round(40 * count / most)} {count:,}")


def _numbers(spread: Spread) -> Sequence[str]:
    values = (spread.minimum, spread.lower_quartile, spread.median, spread.upper_quartile, spread.maximum, spread.mean)
    return [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values]


def _entropy(shares: np.ndarray) -> float:
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
