"""The loop of a run: rounds, evaluation, records, and an orderly end whatever happens."""

import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.curves import draw_curves
from experiments.engines import Engine
from experiments.folder import RunFolder, read_metrics
from experiments.live import Reporter
from experiments.prepare import Prepared
from fedclip.account import BudgetSpent
from fedclip.config import Experiment
from fedclip.method import noise_to_bound
from fedclip.round import Outcome
from fedclip.tally import Tally, number

DONE, CHECK_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
"""Exit status of every command."""

STAMP = "seeded simulation: epsilon is nominal; diagnostics of its cohorts are not private"
"""What every report of a run under noise says."""

MOST_FAILED = 0.05
LEAST_FAILED = 10
"""A run without noise stops when over 5% of its users so far failed, and at least 10 of them."""


@dataclass
class Totals:
    """Sums over the rounds of a run."""

    users: float = 0.0
    failed: float = 0.0
    without_data: float = 0.0
    uplink: float = 0.0
    downlink: float = 0.0
    errors: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Take a round in."""
        self.users += number(outcome.tally, "users")
        self.failed += number(outcome.tally, "failed_users")
        self.without_data += number(outcome.tally, "users_without_data")
        self.uplink += number(outcome.tally, "uplink_bytes")
        self.downlink += number(outcome.tally, "downlink_bytes")
        self.errors += outcome.errors[: max(0, 5 - len(self.errors))]

    @property
    def nobody_had_data(self) -> bool:
        """Whether there were users, and none of them had anything to train on."""
        return self.without_data > 0 and not self.users and not self.failed

    @property
    def too_many_failed(self) -> bool:
        """Whether so many users failed that the result is in doubt."""
        return self.failed >= LEAST_FAILED and self.failed > MOST_FAILED * (self.users + self.failed)


def run_rounds(prepared: Prepared, engine: Engine, path: Path, reporter: Reporter) -> int:
    """Run an experiment to its end and leave its folder behind.

    Args:
        prepared: the experiment.
        engine: computes the rounds.
        path: the run folder, made here.
        reporter: shows progress.

    Returns:
        The exit status: 0 done or the budget spent, 1 too many users or a worker failed, 130 interrupted. What was done by then is
        kept in each case.

    Raises:
        ConfigError: the folder is refused.
    """
    experiment, totals, start = prepared.experiment, Totals(), time.perf_counter()
    folder = RunFolder(path, experiment)
    rounds, status, metrics = experiment.run.rounds, "done", dict[str, float]()
    try:
        while engine.state.round < rounds:
            try:
                row, outcome = _round(engine)
            except BudgetSpent as spent:
                status = "budget spent"
                reporter.say(str(spent))
                break
            totals.add(outcome)
            try:
                if _is_due(row["round"], experiment):
                    row |= engine.evaluate() | {"evaluated_round": row["round"]}
                    folder.save_model(engine.state.params, engine.layout, engine.state.round)
            finally:  # a round that is done is kept, whatever becomes of its evaluation
                metrics |= {k: v for k, v in row.items() if isinstance(v, float | int)}
                folder.record(row)
            reporter.round(row, time.perf_counter() - start)
            if totals.too_many_failed and not prepared.method.private:
                status = "too many users failed"
                break
    except KeyboardInterrupt:
        status = "interrupted"
    except Exception as error:  # noqa: BLE001  a task, a worker or Ray may raise anything; what was done by then is kept
        status = "failed"
        totals.errors.insert(0, f"{type(error).__name__}: {error}")
        (path / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
    if status == "done" and totals.too_many_failed:
        status = "too many users failed"
    if status == "done" and totals.nobody_had_data:
        status = "failed"
        totals.errors.insert(0, "no user had anything to train on; see examples_left_out in metrics.jsonl")
    if engine.state.round:
        folder.save_model(engine.state.params, engine.layout, engine.state.round)
        draw_curves(read_metrics(path), path / "curves.png", path.name, stamp=STAMP if prepared.method.private else "")
    summary = _summary(prepared, engine, totals, metrics, status, time.perf_counter() - start)
    folder.finish(summary)
    reporter.end(summary, path, totals.errors)
    return {"done": DONE, "budget spent": DONE, "interrupted": INTERRUPTED}.get(status, CHECK_FAILED)


def _round(engine: Engine) -> tuple[dict[str, Any], Outcome]:
    start, attempt = time.perf_counter(), engine.state.attempt
    outcome = engine.round()
    row = row_of(outcome.tally, outcome.state.round, attempt, time.perf_counter() - start)
    if engine.account is not None:
        row |= {"epsilon": engine.account.spent().epsilon, "delta": engine.account.delta}
    return row, outcome


def _is_due(round: int, experiment: Experiment) -> bool:
    every = experiment.evaluation.every
    return round == experiment.run.rounds or bool(every and round % every == 0)


def row_of(tally: Tally, round: int, attempt: int, seconds: float) -> dict[str, Any]:
    """Return the line of `metrics.jsonl` for a round: sums become means over the users who gave an update."""
    users, losses = number(tally, "users"), number(tally, "losses")
    row: dict[str, Any] = {
        "round": round,
        "attempt": attempt,
        "train_loss": number(tally, "train_loss") / losses if losses else None,
        "users": int(users),
        "failed_users": int(number(tally, "failed_users")),
        "uplink_bytes": int(number(tally, "uplink_bytes")),
        "downlink_bytes": int(number(tally, "downlink_bytes")),
        "users_per_second": users / seconds,
        "round_seconds": seconds,
    }
    for name, value in tally.items():
        stage, _, measured = name.partition(".")
        if stage == "chain" and users:
            row[measured] = [v / users for v in value] if isinstance(value, list) else value / users
        elif stage == "server":
            row[measured] = value
    for name in ("not_finite", "users_without_data", "examples_left_out"):
        if number(tally, name):
            row[name] = int(number(tally, name))
    return row


def _summary(prepared: Prepared, engine: Engine, totals: Totals, last: dict[str, float], status: str, seconds: float) -> dict[str, Any]:
    experiment, method = prepared.experiment, prepared.method
    summary: dict[str, Any] = {
        "name": experiment.run.name,
        "status": status,
        "rounds": engine.state.round,
        "total_seconds": seconds,
        "parameters": engine.layout.size,
        "population": experiment.population.size,
        "users_total": int(totals.users),
        "failed_users_total": int(totals.failed),
        "uplink_bytes_total": int(totals.uplink),
        "downlink_bytes_total": int(totals.downlink),
    }
    if engine.account is not None:
        summary["noise_to_bound"] = noise_to_bound(method, engine.layout)
        summary["measured"] = engine.account.spent().plain()
        extrapolated = engine.account.extrapolated()
        if extrapolated is not None:
            summary["extrapolated"] = extrapolated.plain()
        summary["privacy"] = STAMP
    return summary | {k: v for k, v in last.items() if k not in ("round", "attempt")}
