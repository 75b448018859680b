"""The loop of a run: rounds, evaluation, records, checkpoints, and an orderly end whatever happens."""

import dataclasses
import shlex
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from experiments.behind import Behind
from experiments.curves import draw_curves
from experiments.engines import Engine, OnGrid
from experiments.folder import CHECKPOINTS, STATES, RunFolder, read_metrics, stamp_of, withholds
from experiments.live import Reporter
from experiments.prepare import Prepared
from experiments.progress import Progress
from experiments.rows import row_of, times_of
from fedclip.account import BudgetSpent, LedgerError
from fedclip.asr.metrics import speaker_rows
from fedclip.checkpoints import Checkpoint, CheckpointError, Checkpoints
from fedclip.config import Experiment
from fedclip.method import noise_to_bound
from fedclip.options import ConfigError
from fedclip.process import peak_memory
from fedclip.round import Outcome, Released
from fedclip.storage import Storage
from fedclip.tasks.base import Counts
from fedclip.user_states import StatesInFolder
from strategies.naming import run_digest

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit status of every command."""


class Run:
    """A run in its folder: made anew, or gone on with from its last checkpoint.

    Args:
        prepared: the experiment.
        engine: computes the rounds.
        path: the run folder.
        resume: go on with the run that is there.
        storage: the disk.

    Raises:
        ConfigError: the folder is refused, or what lies in it cannot be trusted. Nothing was changed then.
    """

    def __init__(self, prepared: Prepared, engine: Engine, path: Path, *, resume: bool = False, storage: Storage | None = None) -> None:
        self.prepared, self.engine, self.path, self._storage = prepared, engine, path, storage or Storage()
        name = getattr(engine, "run", None)  # of a deployment it is drawn once
        self.folder = RunFolder(path, prepared.experiment, engine.command, resume=resume, storage=self._storage, name=name)
        self.progress = Progress()
        self._pending: Released | None = None
        self._withholds = withholds(prepared.experiment)
        self._checkpoints = Checkpoints(path / CHECKPOINTS, name or run_digest(prepared.experiment), self._storage)
        self._start = time.perf_counter()
        # A round's checkpoint is written while the next one trains, and is durable before anything of that one is. Not of central training,
        # which changes in place what is written, nor where users or their devices keep states that go by what is durable here.
        self._behind, self._beside = Behind(), engine.command == "run" and not prepared.method.stateful
        # On Ray a round's model is evaluated ahead of the next round's training: its row is open until all workers have.
        self._ahead = engine if self._beside and isinstance(engine, OnGrid) and engine.ordered else None
        self._open: dict[str, Any] | None = None
        engine.keep = self._keep
        if engine.account is not None:
            engine.account.before_line = self.wait
        try:
            self._resume() if resume else self._begin()
        except (CheckpointError, LedgerError, OSError) as error:
            self.folder.close()
            raise ConfigError(str(error)) from error

    @property
    def seconds(self) -> float:
        """The time that the run took so far."""
        return self.progress.seconds + time.perf_counter() - self._start

    def wait(self) -> None:
        """Wait until the last checkpoint is durable, and raise what kept it from that."""
        self._timed(self._behind.wait)

    def rounds(self, reporter: Reporter) -> str:
        """Do the rounds that are left and return how it ended; all that was done is durable then."""
        try:
            return self._rounds(reporter)
        finally:
            try:
                if self._open is not None:
                    self._end(self._open, reporter)
            finally:
                self.wait()

    def _rounds(self, reporter: Reporter) -> str:
        while self.engine.state.round < self.prepared.experiment.run.rounds:
            try:
                self._round(reporter)
            except BudgetSpent as spent:
                reporter.say(str(spent))
                return "budget spent"
            if self._gives_up:
                break
        return "too many users failed" if self._in_doubt else "done"

    @property
    def _in_doubt(self) -> bool:
        """Whether so many users failed. Real devices say so themselves, or send what cannot be read: that must not end the others' run."""
        return self.progress.too_many_failed and self.prepared.experiment.deployment is None

    @property
    def _gives_up(self) -> bool:
        return self._in_doubt and not self.prepared.method.private

    def _begin(self) -> None:
        if self.prepared.initial is not None:
            self.engine.restore(dataclasses.replace(self.engine.state, params=self.prepared.initial))
        self._save(0)

    def _resume(self) -> None:
        """Take the state of the last checkpoint, and see how far the round after it had come.

        Without a line in the ledger it is done again, with the same bits. With a line and its release, the release is replayed. With
        a line and no release it is drawn anew, as another attempt, and both count.
        """
        engine = self.engine
        point = self._checkpoints.last(engine.state.server)
        next_round, account, attempts = point.state.round + 1, engine.account, 0
        if account is not None:
            account.verify(point.charges, point.head, point.state.round)
            attempts = account.attempts(next_round)
            orphans = [f"round {r}, attempt {a}" for r, a in self._checkpoints.releases() if r >= next_round and a >= account.attempts(r)]
            if orphans:
                raise LedgerError(f"{account.path} lacks the line of a release that was made ({orphans[0]}); no epsilon can be trusted.")
        self._pending = self._checkpoints.released(next_round, attempts - 1) if attempts else None
        if account is not None:
            account.mend()
        self.folder.cut_metrics(point.notes["metrics_bytes"])
        self.progress = Progress(**point.notes["progress"])
        StatesInFolder(self.path / STATES, self._storage).roll_back(point.state.round if self._pending is None else next_round)
        self.folder.start()
        engine.restore(point.state)
        if "remembered" in point.notes:
            engine.remembered = point.notes["remembered"]  # type: ignore[attr-defined]

    def _round(self, reporter: Reporter) -> None:
        engine, experiment = self.engine, self.prepared.experiment
        replayed, (outcome, seconds) = self._pending is not None, self._outcome(reporter)
        row = row_of(outcome.tally, outcome.state.round, outcome.attempt, seconds, public=self._withholds)
        if not (replayed or self._withholds):  # the times of the users are of another round then
            row |= times_of(outcome.tally, seconds, engine.workers)
        if engine.account is not None:
            row |= {"epsilon": engine.account.spent().epsilon, "delta": engine.account.delta}
        if not self._withholds:  # nor may the end of the run, or what it says, follow from who failed
            self.progress.add(outcome)
        if not _is_due(row["round"], experiment):
            self._end(row, reporter)
        elif self._ahead is None or row["round"] == experiment.run.rounds or self._gives_up:
            self._end(row, reporter, self._evaluated)
        else:
            self._open = row

    def _outcome(self, reporter: Reporter) -> tuple[Outcome, float]:
        """Do one more round, and end the one before once its model is evaluated; return what it made, and its seconds since then."""
        start, engine, released = time.perf_counter(), self.engine, self._pending
        self._pending = None
        if engine.account is not None and released is None:
            engine.account.foresee()

        def evaluated(row: dict[str, Any], counts: list[Counts]) -> None:
            nonlocal start
            start, self._open = time.perf_counter(), None
            self._end(row, reporter, lambda: self._measured(counts))

        if released is not None:
            outcome = engine.replay(released)
        elif self._ahead is not None and self._open is not None:
            outcome = self._ahead.round(partial(evaluated, self._open))
        else:
            outcome = engine.round()
        return outcome, time.perf_counter() - start

    def _end(self, row: dict[str, Any], reporter: Reporter, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Evaluate the model of a round that is done, where it is due, and keep and show the round."""
        engine = self.engine
        try:
            if evaluate is not None:
                measured = evaluate()
                row |= measured | {"evaluated_round": row["round"]}
                self.folder.save_model(engine.state.params, engine.layout, engine.state.round)
                if self.progress.judge(measured, row["round"]):
                    self.folder.save_model(engine.state.params, engine.layout, engine.state.round, "best")
        finally:  # a round that is done is kept, whatever becomes of its evaluation
            self.progress.metrics |= {k: v for k, v in row.items() if isinstance(v, float | int)}
            self._save(self.folder.record(row), self._beside)
            self.folder.beat(row["round"], "running", self.seconds)
        reporter.round(row, self.seconds)

    def _evaluated(self) -> dict[str, float]:
        """Return the metrics of the model, which real devices may measure themselves."""
        measure: Callable[[], dict[str, float]] | None = getattr(self.engine, "measure", None)
        if measure is None:
            return self._measured(self.engine.evaluate_units())
        account = self.engine.account
        return measure() | ({"epsilon": account.spent().epsilon} if account is not None else {})  # which it may have charged

    def _measured(self, counts: list[Counts]) -> dict[str, float]:
        self.folder.save_speakers(speaker_rows(counts))
        return self.prepared.task.summarise(counts, 0)

    def _save(self, metrics_bytes: int, beside: bool = False) -> None:
        account = self.engine.account
        notes = {"metrics_bytes": metrics_bytes, "progress": self.progress.plain() | {"seconds": self.seconds}}
        if hasattr(self.engine, "remembered"):
            notes["remembered"] = self.engine.remembered
        point = Checkpoint(self.engine.state, len(account.charges) if account else 0, account.head if account else "", notes)
        keep = [self.progress.best["round"]] if self.progress.best else []
        if beside:
            self._timed(lambda: self._behind.start(lambda: self._checkpoints.save(point, keep)))
        else:
            self._timed(lambda: self._checkpoints.save(point, keep))

    def _keep(self, released: Released) -> None:
        self.wait()
        if self.engine.account is not None:
            self._timed(lambda: self._checkpoints.keep_released(released))

    def _timed(self, call: Callable[[], None]) -> None:
        """Do what the rounds have to wait for."""
        start = time.perf_counter()
        try:
            call()
        finally:
            self.progress.saving_seconds += time.perf_counter() - start


def run_rounds(prepared: Prepared, engine: Engine, path: Path, reporter: Reporter, resume: bool = False) -> int:
    """Run an experiment to its end and leave its folder behind.

    Args:
        prepared: the experiment.
        engine: computes the rounds.
        path: the run folder, made here.
        reporter: shows progress.
        resume: go on with the run that is in the folder.

    Returns:
        The exit status: 0 done or the budget spent, 1 too many users or a worker failed, 130 interrupted. What was done by then is
        kept in each case.

    Raises:
        ConfigError: the folder is refused.
    """
    run = Run(prepared, engine, path, resume=resume)
    progress = run.progress
    try:
        status = run.rounds(reporter)
    except KeyboardInterrupt:
        status = "interrupted"
    except Exception as error:  # noqa: BLE001  a task, a worker, the disk or Ray may raise anything; what was done by then is kept
        status = "failed"
        progress.errors.insert(0, f"{type(error).__name__}: {error}")
        with suppress(OSError):
            (path / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    if status == "done" and progress.nobody_had_data:
        status = "failed"
        progress.errors.insert(0, "no user had anything to train on; see examples_left_out in metrics.jsonl")
    if engine.state.round:
        try:
            run.folder.save_model(engine.state.params, engine.layout, engine.state.round)
        except Exception as error:  # noqa: BLE001  the disk, or the library that writes it; the summary says so
            status = "failed"
            progress.errors.insert(0, f"the model of the last round could not be written: {error}")
    summary = _summary(run, status)
    curves = _leave_curves(path, prepared.experiment) if engine.state.round else ""
    try:
        run.folder.beat(engine.state.round, status, run.seconds)
        run.folder.finish(summary)
    except OSError as error:
        status = "failed"
        progress.errors.insert(0, f"the end of the run could not be written: {error}")
        summary["status"] = status
    page = "\n".join(line for line in (curves, _leave_page(path) if engine.state.round else "") if line)
    run.folder.close()
    reporter.end(summary, path, progress.errors, engine.command if status in ("interrupted", "failed") else None, page)
    return {"done": DONE, "budget spent": DONE, "interrupted": INTERRUPTED}.get(status, CHECK_FAILED)


def _leave_curves(path: Path, experiment: Experiment) -> str:
    """Draw the run's `curves.png` and return what there is to say of it: a picture fails no run."""
    try:
        draw_curves(read_metrics(path), path / "curves.png", path.name, stamp=stamp_of(experiment))
    except Exception as error:  # noqa: BLE001  of fonts, of what matplotlib cannot draw, of the disk
        return f"curves.png was not made ({type(error).__name__}: {error}); the report has the same curves"
    return ""


def _leave_page(path: Path) -> str:
    """Make the run's `report.html` and return what there is to say of it; a page that cannot be made fails no run."""
    try:
        from experiments.report.command import write_page  # not in a Flower bundle, which takes no HTML

        return f"report: {write_page(path)}"
    except Exception as error:  # noqa: BLE001  the run is done, and its page can be made at any time
        return f"report.html was not made ({type(error).__name__}: {error}); fedclip report {shlex.quote(str(path))} makes it"


def _is_due(round: int, experiment: Experiment) -> bool:
    every = experiment.evaluation.every
    return round == experiment.run.rounds or bool(every and round % every == 0)


def _traffic(run: Run) -> dict[str, Any]:
    """Return what a user's taking part in a round costs over the whole run, and how much smaller that is than dense float32."""
    progress, dense = run.progress, 4 * run.engine.layout.size
    up, down = progress.uplink / progress.users, progress.downlink / progress.users
    traffic = {
        "participations_per_user": progress.users / (run.prepared.experiment.population.size or 1),
        "uplink_bytes_per_user": up,
        "downlink_bytes_per_user": down,
        "both_ways_ratio": 2 * dense / (up + down) if up + down else None,
        "uplink_ratio": dense / up if up else None,
        "uplink_ratio_steady": dense / progress.steady if progress.steady else None,
    }
    return {name: value for name, value in traffic.items() if value is not None}


def _summary(run: Run, status: str) -> dict[str, Any]:
    experiment, method, engine, progress = run.prepared.experiment, run.prepared.method, run.engine, run.progress
    summary: dict[str, Any] = {
        "name": experiment.run.name,
        "status": status,
        "rounds": engine.state.round,
        "parameters": engine.layout.size,
        "startup_memory_bytes": run.prepared.startup_memory,
        "population": experiment.population.size,
    }
    if not withholds(experiment):  # else no time either, nor the memory that updates took: both tell of who answered
        summary |= {
            "total_seconds": run.seconds,
            "saving_seconds_total": progress.saving_seconds,
            "peak_memory_bytes": peak_memory(),
            "users_total": int(progress.users),
            "failed_users_total": int(progress.failed),
            "uplink_bytes_total": int(progress.uplink),
            "downlink_bytes_total": int(progress.downlink),
        }
        summary |= {f"{name}_total": count for name, count in progress.faults.items()}
        if progress.users:
            summary |= _traffic(run)
    if note := getattr(run.prepared.task, "note", ""):
        summary["note"] = note
    if progress.best:
        summary["best"] = progress.best
    skipped = getattr(run.prepared.task, "skipped", {})
    if skipped:
        summary["skipped_utterances"] = {cause: count for cause, (count, _) in skipped.items()}
    if engine.account is not None:
        summary["noise_to_bound"] = noise_to_bound(method, engine.layout)
        summary["measured"] = engine.account.spent().plain()
        extrapolated = engine.account.extrapolated()
        if extrapolated is not None:
            summary["extrapolated"] = extrapolated.plain()
    if (stamp := stamp_of(experiment)) and (engine.account is not None or experiment.deployment is not None):
        summary["privacy"] = stamp
    if status in ("failed", "too many users failed") and progress.errors:
        summary["error"] = progress.errors[0]
    return summary | {k: v for k, v in progress.metrics.items() if k not in ("round", "attempt")}
