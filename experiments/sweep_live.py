"""What a person sees while a sweep goes on: a live table on a terminal, plain lines elsewhere. Imports no PyTorch."""

import json
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from experiments.live import clock
from experiments.sweep_folder import Standing, SweepFolder, read_json
from experiments.sweep_plan import Trial
from fedclip.accounting import Guarantee

SHOWN_ENDED = 8
METRICS = (("wer", "WER"), ("accuracy", "accuracy"))


class SweepReporter:
    """Shows how far the trials of a sweep are.

    Args:
        folder: the sweep.
        quiet: show the end only.
        console: where to.
    """

    def __init__(self, folder: SweepFolder, quiet: bool, console: Console | None = None) -> None:
        self._folder, self._quiet, self._console = folder, quiet, console or Console()
        self._ended: deque[tuple[str, ...]] = deque(maxlen=SHOWN_ENDED)
        self._results = dict[str, tuple[int, str]]()
        self._rounds = {trial.name: _round(folder.run_folder(trial)) for trial in folder.sweep.trials}
        self._start, self._before = time.monotonic(), self._done_rounds()
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal and not quiet else None

    def __enter__(self) -> Self:
        """Start showing, with what is to be said once."""
        there = sum(standing.status == "done" for standing in self._folder.standings.values())
        self._say(f"{len(self._folder.standings)} trials{f', {there} of them done' if there else ''}; in {self._folder.path}")
        if self._folder.sweep.note:
            self._say(self._folder.sweep.note)
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()

    def look(self, running: Iterable[Trial]) -> None:
        """Show how far the running trials are."""
        if self._live is None:
            return
        table = Table("trial", "status", "round", "result", box=None, pad_edge=False)
        for cells in self._ended:
            table.add_row(*cells)
        for trial in running:
            table.add_row(*self._cells(trial, "running"))
        table.caption, table.caption_justify = self._counts(), "left"
        self._live.update(table)

    def ended(self, trial: Trial, standing: Standing) -> None:
        """Show how a trial ended."""
        cells = self._cells(trial, standing.status)
        self._ended.append(cells)
        if standing.error:
            self._say(f"{trial.name} failed: {standing.error}; see {self._folder.log(trial)}")
        if self._live is None:
            name, status, place, result = cells
            self._say(f"{name}  {status}  {place}  {result}  ({self._counts()})")

    def end(self, resume_by: str) -> None:
        """Say how the sweep ended, and the command to go on with it where there is something left to do."""
        if self._live is not None:
            self._live.stop()
        counts = Counter(standing.status for standing in self._folder.standings.values())
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        for line in (f"{said} in {clock(time.monotonic() - self._start)}", f"sweep folder: {self._folder.path}"):
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        if self._quiet:
            for name, standing in self._folder.standings.items():
                if standing.error:
                    self._console.print(f"{name} failed: {standing.error}", highlight=False, markup=False, soft_wrap=True)
        if resume_by:
            self._console.print(f"to go on: {resume_by}", highlight=False, markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _cells(self, trial: Trial, status: str) -> tuple[str, ...]:
        run = self._folder.run_folder(trial)
        self._rounds[trial.name] = _round(run)
        return trial.name, status, f"{self._rounds[trial.name]}/{trial.experiment.run.rounds}", self._result(trial)

    def _result(self, trial: Trial) -> str:
        """Return the last evaluation of a trial; its rows are read anew only where there are others than at the last look."""
        run = self._folder.run_folder(trial)
        size, known = _size(run / "metrics.jsonl") + _size(run / "summary.json"), self._results.get(trial.name)
        if known is None or known[0] != size:
            known = self._results[trial.name] = size, _result(run)
        return known[1]

    def _counts(self) -> str:
        counts = Counter(standing.status for standing in self._folder.standings.values())
        said = [f"{counts[status]} {status}" for status in ("done", "running", "failed", "waiting") if counts[status]]
        done = self._done_rounds() - self._before
        if done:
            left = sum(self._left(trial) for trial in self._folder.sweep.trials)
            said.append(f"{clock((time.monotonic() - self._start) / done * left)} left")
        return ", ".join(said)

    def _left(self, trial: Trial) -> int:
        open_ = self._folder.standings[trial.name].status in ("waiting", "running")
        return max(0, trial.experiment.run.rounds - self._rounds[trial.name]) if open_ else 0

    def _done_rounds(self) -> int:
        return sum(self._rounds.values())


def plainly(value: Any) -> str:
    """Return a value as an experiment file says it, nearly."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _round(run: Path) -> int:
    return int(read_json(run / "heartbeat.json").get("round", 0))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _result(run: Path) -> str:
    """Return the last evaluation of a run, and what it cost in privacy once it has ended."""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # not there yet, or a line that is being written
        return ""
    found = next(((row, key, name) for row in reversed(rows) for key, name in METRICS if key in row), None)
    if found is None:
        return ""
    row, key, name = found
    measured = read_json(run / "summary.json").get("measured")  # of a run that goes on there is nothing to state yet
    spent = f", {Guarantee.of(measured).describe()}" if measured else ""
    return f"{name} {100 * row[key]:.1f}%{spent}"
