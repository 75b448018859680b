"""The table as CSV and LaTeX, and the figures as PNG and SVG, without a browser."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from experiments.report.read import Json
from experiments.report.words import RATE_NAMES, plain
from fedclip.accounting import rounded_up
from fedclip.options import ConfigError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that stay apart for colour-blind readers (Okabe and Ito)."""

MARKERS, LINES = "osD^PXv*", ("-", "--", ":", "-.")
SCALES = {"percent": 100.0, "megabytes": 1e-6, "minutes": 1 / 60}
AXIS_NAMES = {
    "both": "bytes up and down, whole run",
    "up": "bytes up, whole run",
    "down": "bytes down, whole run",
    "epsilon": "epsilon, measured",
    "extrapolated": "epsilon, extrapolated to a larger cohort",
    "round": "round",
    "seconds": "seconds of rounds",
    "users": "users trained",
}
LAYER_NAMES = {
    "layer_clipped": "share of users clipped",
    "layer_norm": "mean norm before the clip",
    "layer_snr": "signal to noise of the release",
    "layer_sparsity": "share of zeros in what was sent",
    "trust_ratio": "trust ratio",
}
MOST_LINES = 12
"""Runs in a figure of curves: more can't be told apart."""


def export(report: Json, folder: Path) -> list[str]:
    """Write the table and every figure into a folder, and return the names of the files.

    Raises:
        ConfigError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = ["runs.csv", "runs.tex"]
        for name, text in zip(written, (as_csv(report), as_latex(report)), strict=True):
            (folder / name).write_text(text, encoding="utf-8")
        for name, figure in figures(report):
            for ending in ("png", "svg"):
                figure.savefig(folder / f"{name}.{ending}", dpi=150)
                figure.set_layout_engine("none")  # laid out by the first, which takes longest
                written.append(f"{name}.{ending}")
    except OSError as error:
        raise ConfigError(f"--export: {folder} cannot be written: {error}; choose another folder.") from error
    return written


def value_of(report: Json, run: Json, column: Json) -> Any:
    """Return what stands in a column of the table for a run, in the column's unit; None where there is nothing."""
    place = {"run": run, "results": run["results"], "config": (report["common"] if run["known"] else {}) | run["config"]}[column["from"]]
    value = place.get(column["key"])
    return value * SCALES[column["kind"]] if column["kind"] in SCALES and value is not None else value


def as_csv(report: Json) -> str:
    """Return the table with all digits."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(column["title"] for column in report["columns"])
    for run in report["runs"]:
        values = [value_of(report, run, column) for column in report["columns"]]
        writer.writerow("" if v is None else repr(v) if isinstance(v, float) else plain(v) for v in values)
    return file.getvalue()


def as_latex(report: Json) -> str:
    """Return the table as a `tabular` with the rules of booktabs."""
    columns = report["columns"]
    lines = [" & ".join(_tex(column["title"]) for column in columns)]
    lines += [" & ".join(_tex(_written(value_of(report, run, column), column["kind"])) for column in columns) for run in report["runs"]]
    head, *rows = [f"  {line} \\\\" for line in lines]
    form = "".join("l" if column["kind"] == "text" else "r" for column in columns)
    return "\n".join([f"\\begin{{tabular}}{{{form}}}", "  \\toprule", head, "  \\midrule", *rows, "  \\bottomrule", "\\end{tabular}", ""])


def _written(value: Any, kind: str) -> str:
    if value is None:
        return ""
    if kind == "percent":
        return f"{value:.1f}"
    if kind == "epsilon":
        return rounded_up(value)
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def figures(report: Json) -> Iterator[tuple[str, Figure]]:
    """Yield the figures by name; those with nothing in them are left out."""
    for rate in report["rates"]:
        for axis in ("both", "up", "down", "epsilon", "extrapolated"):
            if any(axis in point["x"] for point in report["points"] if point["rate"] == rate):
                yield f"{rate}-{axis}", _tradeoff(report, rate, axis)
        for axis in ("round", "seconds", "users", "both", "epsilon"):
            runs = [run for run in report["runs"] if run["curves"].get(rate) and any(run["curves"].get(axis) or [])]
            if runs:
                yield f"{rate}-over-{axis}", _curves(runs[:MOST_LINES], rate, axis)
    for run, name in zip(report["runs"], _file_names([run["name"] for run in report["runs"]]), strict=True):
        for key, found in run["layers"].items():
            yield f"{name}-{key}", _heat(run, key, found)
    heard = [run for run in report["runs"] if run["speakers"]]
    if heard:
        yield "speakers", _speakers(heard[:MOST_LINES])


def _file_names(names: Sequence[str]) -> list[str]:
    """Return a file's name for each name, numbered where two come to the same on a disk that knows no capitals."""
    found = list[str]()
    for name in names:
        plainly = numbered = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in name)
        n = 1
        while numbered.casefold() in map(str.casefold, found):
            n += 1
            numbered = f"{plainly}-{n}"
        found.append(numbered)
    return found


def claims_of(runs: Sequence[Json]) -> list[str]:
    """Return the lines that go with a figure of these runs: all their stamps, and what they say of privacy."""
    stamps = dict.fromkeys(stamp for run in runs for stamp in run["stamps"])
    return [*filter(None, [", ".join(stamps)]), *dict.fromkeys(run["privacy"] for run in runs if run["privacy"])]


def _axes(runs: Sequence[Json], x: str, y: str, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(claims_of(runs)), fontsize=7, color="0.35", wrap=True)
    return figure, axes


def _tradeoff(report: Json, rate: str, axis: str) -> Figure:
    there = [point for point in report["points"] if point["rate"] == rate and axis in point["x"]]
    runs = [report["runs"][n] for point in there for n in point["runs"]]
    figure, axes = _axes(runs, AXIS_NAMES[axis], f"{RATE_NAMES[rate]}, %")
    for point in there:
        x, y = point["x"][axis], {end: 100 * value for end, value in point["y"].items()}
        bars = [[[s["mean"] - s["low"]], [s["high"] - s["mean"]]] for s in (x, y)]
        colour, sign, _ = point["style"]
        style = {"color": COLOURS[colour % len(COLOURS)], "marker": MARKERS[sign % len(MARKERS)], "label": point["label"]}
        style |= {} if point["ended"] else {"markerfacecolor": "none"}
        axes.errorbar(x["mean"], y["mean"], xerr=bars[0], yerr=bars[1], capsize=2, linestyle="", **style)
    front = [report["points"][n] for n in report["fronts"][rate][axis]]
    axes.plot([p["x"][axis]["mean"] for p in front], [100 * p["y"]["mean"] for p in front], ":", color="0.4", linewidth=1, zorder=0)
    axes.set_xscale("log")
    if axis in ("both", "up", "down"):
        axes.xaxis.set_major_formatter(EngFormatter("B"))
    signs = report["legend"] and _signs(report["legend"])
    _legend(axes, len(signs or there), signs)
    return figure


def _signs(legend: Json) -> list[Line2D]:
    """Return what stands in a legend where colours say one thing and signs another."""
    colours = [Line2D([], [], color=COLOURS[n], linewidth=5, label=text) for n, text in enumerate(legend["colours"])]
    return colours + [Line2D([], [], color="0.4", marker=MARKERS[n], linestyle="", label=text) for n, text in enumerate(legend["signs"])]


def _curves(runs: Sequence[Json], rate: str, axis: str) -> Figure:
    figure, axes = _axes(runs, AXIS_NAMES[axis], f"{RATE_NAMES[rate]}, %")
    for n, run in enumerate(runs):
        both = zip(run["curves"][axis], run["curves"][rate], strict=True)
        points = [(x, 100 * y) for x, y in both if x is not None and y is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], label=run["name"], linewidth=1.4, **_line_of(n))
    _legend(axes, len(runs))
    return figure


def _line_of(n: int) -> dict[str, Any]:
    return {"color": COLOURS[n % len(COLOURS)], "linestyle": LINES[n // len(COLOURS) % len(LINES)]}


def _legend(axes: Axes, entries: int, handles: list[Line2D] | None = None) -> None:
    columns = max(1, math.ceil(entries / 24))
    axes.legend(handles=handles or None, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns)


def _heat(run: Json, key: str, found: Json) -> Figure:
    names, shares = found["names"], key in ("layer_clipped", "layer_sparsity")
    figure, axes = _axes([run], "round", "", height=max(2.2, 1 + 0.22 * len(names)))
    values = [[math.nan if v is None or (not shares and v <= 0) else v for v in layer] for layer in found["values"]]
    positive = [v for layer in values for v in layer if v > 0]
    norm = Normalize(0, 1) if shares or not positive else LogNorm(min(positive), max(positive))
    # A column a round that was kept: of long runs some are left out.
    image = axes.imshow(values, aspect="auto", cmap="cividis", norm=norm, interpolation="nearest")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    every = max(1, len(found["rounds"]) // 10)
    axes.set_xticks(range(0, len(found["rounds"]), every), [str(r) for r in found["rounds"][::every]])
    axes.grid(visible=False)
    axes.set_title(f"{run['name']}: {LAYER_NAMES[key]}", fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure


def _speakers(runs: Sequence[Json]) -> Figure:
    figure, axes = _axes(runs, "share of held-out speakers, best first, %", "word error rate, %")
    for n, run in enumerate(runs):
        rates = [100 * rate for rate in run["speakers"]["wer"]]
        places = [100 * i / max(1, len(rates) - 1) for i in range(len(rates))]
        axes.plot(places, rates, label=run["name"], **_line_of(n))
    axes.axvspan(90, 100, color="0.5", alpha=0.15)
    axes.set_ylim(bottom=0)
    _legend(axes, len(runs))
    return figure
