"""What a person sees while a run goes on: a live table on a terminal, plain lines elsewhere."""

import json
import math
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedclip.accounting import Guarantee

COLUMNS = ("round", "loss", "error", "up", "down", "users/s", "time left")
SHOWN_ROUNDS = 12
SHOWN_WORKERS = 16
SECONDS_BETWEEN_LINES = 5.0
SECONDS_BEFORE_BAR = 2.0

DEPLOYMENT = "deployment"
"""The `command` of runs on real devices, which `flwr run` starts and goes on with."""


@contextmanager
def indexing(console: Console | None = None) -> Iterator[Callable[[str, int], None]]:
    """Give a function that is told how far the making of an index is, and shows it on stderr where that takes long."""
    shown = console or Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed:,.0f}"), BarColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=shown, transient=True, auto_refresh=False)
    start, tasks = time.monotonic(), dict[str, TaskID]()

    def watch(what: str, done: int) -> None:
        if time.monotonic() - start < SECONDS_BEFORE_BAR:
            return
        if what not in tasks:
            if not shown.is_terminal:
                shown.print(f"{what} ...", highlight=False)
            elif not tasks:
                progress.start()
            tasks[what] = progress.add_task(what, total=None)
        if shown.is_terminal:
            progress.update(tasks[what], completed=done, refresh=True)

    try:
        yield watch
    finally:
        if tasks and shown.is_terminal:
            progress.stop()


class Reporter:
    """Shows the rounds of a run as they end.

    Args:
        rounds: rounds to come.
        quiet: show the end only.
        console: where to.
    """

    def __init__(self, rounds: int, quiet: bool, console: Console | None = None) -> None:
        self._console = console or Console()
        self._rounds, self._quiet = rounds, quiet
        self._rows: deque[tuple[str, ...]] = deque(maxlen=SHOWN_ROUNDS)
        self._workers: dict[str, tuple[int, float]] = {}
        self._error = ""
        self._last_line = -SECONDS_BETWEEN_LINES
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal and not quiet else None

    def __enter__(self) -> Self:
        """Start showing."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Say something beside the table."""
        if not self._quiet:
            self._console.print(text, highlight=False)

    def round(self, row: dict[str, Any], seconds: float) -> None:
        """Show a round; `seconds` is the time since the start of the run."""
        cells = self._cells(row, seconds)
        self._rows.append(cells)
        if self._live is not None:
            self._live.update(self._shown())
        elif not self._quiet:
            self._line(row, cells, "eval_loss" in row)

    def worker(self, name: str, users: int, seconds: float) -> None:
        """Show that a worker is done with its part of a round: users, and the seconds that it spent on them."""
        so_far, _ = self._workers.pop(name, (0, 0.0))
        self._workers[name] = so_far + users, seconds
        if self._live is not None:
            self._live.update(self._shown())

    def end(self, summary: dict[str, Any], path: Path, errors: list[str], resume_by: str | None = None, page: str = "") -> None:
        """Say how the run ended, where its folder is, what became of its page, and how to go on with it where something is left to do."""
        if self._live is not None:
            self._live.stop()
        failed = summary.get("failed_users_total")
        if failed:
            self._console.print(f"{failed} of {failed + summary['users_total']} users failed, each counted as zero:", highlight=False)
        for error in errors:
            self._console.print(f"  {error}", highlight=False, markup=False)
        result = describe_result(summary)
        seconds = f" in {summary['total_seconds']:.0f} s" if "total_seconds" in summary else ""  # of devices it may be withheld
        self._console.print(f"{summary['status']}: {summary['rounds']} rounds{seconds}{result}", highlight=False)
        for line in describe_speakers(summary):
            self._console.print(line, highlight=False, soft_wrap=True)
        if "note" in summary:
            self._console.print(summary["note"], highlight=False, soft_wrap=True)
        if "uplink_ratio" in summary:
            self._console.print(describe_traffic(summary), highlight=False, soft_wrap=True)
        if "peak_memory_bytes" in summary:
            self._console.print(describe_memory(summary), highlight=False, soft_wrap=True)
        for key in ("measured", "extrapolated"):
            if key in summary:
                self._console.print(Guarantee.of(summary[key]).describe(), highlight=False, soft_wrap=True)
        if "privacy" in summary:
            self._console.print(summary["privacy"], highlight=False, soft_wrap=True)
        for line in (f"run folder: {path}", page):
            if line:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        if resume_by is not None:
            by = f"fedclip {resume_by} --resume {shlex.quote(str(path))}"
            if resume_by == DEPLOYMENT:
                by = f"flwr run . --run-config {shlex.quote(f'resume={json.dumps(str(path))}')}, with the federation and `set` as before"
            self._console.print(f"to go on: {by}", highlight=False, markup=False, soft_wrap=True)

    def _cells(self, row: dict[str, Any], seconds: float) -> tuple[str, ...]:
        for key, name in (("wer", "WER"), ("accuracy", "accuracy")):
            if key in row:
                self._error = f"{name} {100 * row[key]:.1f}%"
        left = seconds / row["round"] * (self._rounds - row["round"])
        loss = "-" if row.get("train_loss") is None else f"{row['train_loss']:.3f}"
        up, down = (size(row[name]) if name in row else "-" for name in ("uplink_bytes", "downlink_bytes"))  # of devices some is withheld
        rate = f"{row['users_per_second']:.1f}" if "users_per_second" in row else "-"
        return f"{row['round']}/{self._rounds}", loss, self._error or "-", up, down, rate, clock(left)

    def _shown(self) -> Group:
        """Return the table of the rounds, and under it that of the workers that were heard of last."""
        if len(self._workers) < 2:
            return Group(self._table())
        heard = sorted(list(self._workers)[-SHOWN_WORKERS:])
        workers = Table("worker", "users", "seconds of the last", box=None, pad_edge=False)
        for name in heard:
            users, seconds = self._workers[name]
            workers.add_row(name, f"{users:,}", f"{seconds:.1f}")
        if len(self._workers) > len(heard):
            workers.caption = f"and {len(self._workers) - len(heard)} more"
        return Group(self._table(), "", workers)

    def _table(self) -> Table:
        table = Table(*COLUMNS, box=None, pad_edge=False)
        for cells in self._rows:
            table.add_row(*cells)
        return table

    def _line(self, row: dict[str, Any], cells: tuple[str, ...], evaluated: bool) -> None:
        now = time.monotonic()
        if evaluated or row["round"] == 1 or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            place, loss, error, up, down, rate, left = cells
            line = f"{place}  loss {loss}  {error}  up {up}  down {down}  {rate} users/s  {left} left"
            self._console.print(line, highlight=False, soft_wrap=True)


def describe_result(metrics: dict[str, Any]) -> str:
    """Return the headline of a set of metrics, with its interval, empty where it was not evaluated."""
    for key, name in (("wer", "WER"), ("accuracy", "accuracy")):
        if key in metrics:
            value, low, high = (100 * metrics.get(k, math.nan) for k in (key, f"{key}_low", f"{key}_high"))
            interval = "" if math.isnan(low + high) else f" (95% interval {low:.1f} to {high:.1f})"
            return f", {name} {value:.1f}%{interval}"
    return ""


def describe_speakers(metrics: dict[str, Any]) -> list[str]:
    """Return how word error rates differ over languages, where there are several, and over held-out speakers: a line each."""
    groups = {key.removeprefix("wer."): 100 * metrics[key] for key in metrics if key.startswith("wer.")}
    lines = [f"WER by language: {', '.join(f'{group} {value:.1f}%' for group, value in groups.items())}"] if groups else []
    if "wer_worst_decile" in metrics:
        low, median, high, deviation, worst = (
            100 * metrics[key] for key in (*(f"wer_speakers_{name}" for name in ("q25", "median", "q75", "sd")), "wer_worst_decile")
        )
        lines.append(
            f"WER by speaker: median {median:.1f}%, quartiles {low:.1f}% and {high:.1f}%, standard deviation {deviation:.1f}; "
            f"the worst tenth of the speakers {worst:.1f}%"
        )
    return lines


def describe_traffic(summary: dict[str, Any]) -> str:
    """Return what went over the wire in a run, both ways and warm-up included, and the steady-state uplink ratio that papers print."""
    up, down, up_each, down_each = (size(summary[f"{way}link_bytes_{per}"]) for per in ("total", "per_user") for way in ("up", "down"))
    return (
        f"bytes: {up} up, {down} down, {up_each} and {down_each} for a user in a round; over the whole run "
        f"{summary['both_ways_ratio']:.3g} times less than dense float32 both ways, up alone {summary['uplink_ratio']:.4g} "
        f"(steady state {summary['uplink_ratio_steady']:.4g}); "
        f"each user took part {summary['participations_per_user']:.3g} times"
    )


def describe_memory(summary: dict[str, Any]) -> str:
    """Return the peak memory of the process that led the run: what it had at its start, and the rest in copies of the model."""
    peak, startup, model = summary["peak_memory_bytes"], summary["startup_memory_bytes"], 4 * summary["parameters"]
    rest = (peak - startup) / model
    return f"peak memory: {size(peak)}, of which {size(startup)} at the start; the rest is {rest:.1f} models of {size(model)}"


def size(count: float) -> str:
    """Return a number of bytes for people: `size(12_300_000)` is `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float) -> str:
    """Return a duration for people: `clock(65)` is `1:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
