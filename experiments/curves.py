"""`curves.png`: loss and error over rounds, for a first look."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"
"""Colours that stay apart for colour-blind readers (Okabe and Ito)."""


def draw_curves(rows: list[dict[str, Any]], path: Path, title: str, stamp: str = "") -> None:
    """Draw the rounds of a run: losses on the left, the error rate with its 95% interval on the right, a stamp under the title."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _line(left, rows, "train_loss", GREY, "training (users of the round)", marker="")
    _line(left, rows, "eval_loss", BLUE, "held-out users")
    left.set(xlabel="round", ylabel="loss", title="Loss")
    if left.lines:
        left.legend(frameon=False)
    if any("wer" in r for r in rows):
        _rate(right, rows, "wer", "word error rate, %", ORANGE)
        right.set_ylim(bottom=0)
    else:
        _rate(right, rows, "accuracy", "accuracy, %", BLUE)
    said = f"{title}: {len(rows)} rounds"
    if rows and "users" in rows[0]:  # of real devices under noise neither cohorts nor their bytes are shown
        gigabytes = sum(r["uplink_bytes"] + r["downlink_bytes"] for r in rows) / 1e9
        said += f", {sum(r['users'] for r in rows):,} users trained, {gigabytes:.2f} GB up and down"
    figure.suptitle(f"{said}\n{stamp}".rstrip())
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(axes: Axes, rows: list[dict[str, Any]], key: str, colour: str, label: str, marker: str = "o") -> None:
    points = [(r["round"], r[key]) for r in rows if r.get(key) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=marker, markersize=3, linewidth=1.5)


def _rate(axes: Axes, rows: list[dict[str, Any]], key: str, label: str, colour: str) -> None:
    ends = (key, f"{key}_low", f"{key}_high")
    points = [(r["round"], *(100 * r.get(end, r[key]) for end in ends)) for r in rows if key in r]
    if points:
        rounds, values, low, high = zip(*points, strict=True)
        axes.fill_between(rounds, low, high, color=colour, alpha=0.2, linewidth=0, label="95% interval")
        axes.plot(rounds, values, color=colour, marker="o", markersize=3, linewidth=1.5)
        axes.annotate(f"{values[-1]:.1f}%", (rounds[-1], values[-1]), textcoords="offset points", xytext=(-4, 8), ha="right", color=colour)
        axes.legend(frameon=False)
    axes.set(xlabel="round", ylabel=label, title="Held-out users")
