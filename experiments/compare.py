"""`fedclip compare`: what runs paid in bytes, both ways, until they were as good as the first of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.folder import read_metrics, to_json
from experiments.live import size
from fedclip.options import ConfigError

METRICS = (("wer", "WER"), ("accuracy", "error"))
"""What runs are compared by, the first that there is, and what it is called; of accuracy the share of errors."""

Point = tuple[int, float, float]
"""A round, the bytes both ways up to it, and the error then."""


@dataclass(frozen=True)
class Course:
    """How a run's error fell while its bytes grew.

    Attributes:
        name: the run folder's.
        metric: what the error is called.
        points: an evaluation each, in order.
        low: lower end of the last error's 95% interval.
        high: upper end.
        up: bytes up of the whole run.
        down: bytes down.
    """

    name: str
    metric: str
    points: tuple[Point, ...]
    low: float
    high: float
    up: int
    down: int

    @property
    def error(self) -> float:
        """The last error."""
        return self.points[-1][2]

    def reaches(self, error: float) -> Point | None:
        """Return the first evaluation with at most this error; None where there is none."""
        return next((point for point in self.points if point[2] <= error), None)


def course_of(run: Path) -> Course:
    """Return the course of a run.

    Raises:
        ConfigError: it is no run folder, or the run was never evaluated.
    """
    try:
        rows = read_metrics(run)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run} holds no run that can be compared: {error}; give run folders.") from error
    key, name = next(((k, n) for k, n in METRICS if any(k in row for row in rows)), ("", ""))
    if not key:
        raise ConfigError(f"{run} was never evaluated by word error rate or accuracy; there is nothing to compare.")
    if not all("uplink_bytes" in row for row in rows):
        raise ConfigError(f"{run} does not say its bytes, which a run on real devices under noise withholds; compare simulations.")
    points, up, down = list[Point](), 0, 0
    last: dict[str, Any] = {}
    for row in rows:
        up, down = up + row["uplink_bytes"], down + row["downlink_bytes"]
        if key in row:
            points.append((row["round"], float(up + down), row[key] if key == "wer" else 1 - row[key]))
            last = row
    ends = last.get(f"{key}_low", last[key]), last.get(f"{key}_high", last[key])
    low, high = ends if key == "wer" else (1 - ends[1], 1 - ends[0])
    return Course(run.name, name, tuple(points), low, high, up, down)


def compare_command(runs: Sequence[Path], within: float, plot: Path | None, as_json: bool) -> int:
    """Print what each run paid to come within a margin of the first one's last error, and return the exit status.

    Raises:
        ConfigError: a folder holds no run that can be compared, runs are of different kinds, or the plot cannot be drawn.
    """
    courses = [course_of(run) for run in runs]
    kinds = sorted({course.metric for course in courses})
    if len(kinds) > 1:
        raise ConfigError(f"Runs of different kinds cannot be compared: {' and '.join(kinds)}.")
    target = courses[0].error + within
    if as_json:
        print(to_json({"target": target, "runs": [_plain(course, courses[0], target) for course in courses]}, indent=2))
    else:
        print(f"bytes both ways until {courses[0].metric} {100 * target:.1f}%, {100 * within:g} points over {courses[0].name}")
        Console(width=None if Console().is_terminal else 160).print(_table(courses, target))
    if plot is not None:
        draw(courses, target, plot)
    return 0


def draw(courses: Sequence[Course], target: float, file: Path) -> None:
    """Draw error against bytes both ways as PNG, SVG or PDF, by the file's ending.

    Raises:
        ConfigError: an ending that is not known, or a place that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    markers = "osD^vP*Xdph<>"
    for n, course in enumerate(courses):
        _, sent, errors = zip(*course.points, strict=True)
        axes.plot(sent, [100 * e for e in errors], marker=markers[n % len(markers)], markersize=4, linewidth=1.3, label=course.name)
    axes.axhline(100 * target, color="0.4", linewidth=0.9, linestyle="--", label=f"{100 * target:.1f}%")
    axes.set(xscale="log", xlabel="bytes sent both ways, whole run", ylabel=f"{courses[0].metric}, %")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    try:
        figure.savefig(file, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {file} cannot be drawn: {error}; end the name in .png, .svg or .pdf.") from error


def _plain(course: Course, first: Course, target: float) -> dict[str, Any]:
    there, base = course.reaches(target), first.reaches(target)
    return {
        "name": course.name,
        "error": course.error,
        "error_low": course.low,
        "error_high": course.high,
        "rounds": course.points[-1][0],
        "uplink_bytes_total": course.up,
        "downlink_bytes_total": course.down,
        "rounds_to_target": there[0] if there else None,
        "bytes_to_target": int(there[1]) if there else None,
        "times_less": base[1] / there[1] if there and base and there[1] else None,
        "best_error": min(point[2] for point in course.points),
    }


def _table(courses: Sequence[Course], target: float) -> Table:
    table = Table("run", box=None, pad_edge=False)
    for head in ("at the end", "rounds", "up", "down", "rounds to it", "bytes to it", "times less"):
        table.add_column(head, justify="right")
    for course in courses:
        row = _plain(course, courses[0], target)
        end = f"{100 * course.error:.1f}% ({100 * course.low:.1f} to {100 * course.high:.1f})"
        there = ["never", f"best {100 * row['best_error']:.1f}%", ""]
        if row["bytes_to_target"] is not None:
            there = [str(row["rounds_to_target"]), size(row["bytes_to_target"]), f"{row['times_less']:.3g}" if row["times_less"] else ""]
        table.add_row(course.name, end, str(row["rounds"]), size(course.up), size(course.down), *there)
    return table
