"""`fedclip plan`: prints what a run costs before it is run."""

import dataclasses
import os
import time

from rich.console import Console
from rich.table import Table

from experiments.cost import Cost, cost_of
from experiments.folder import to_json
from experiments.live import clock, size
from fedclip.config import Experiment
from fedclip.forecast import Process


def plan_command(experiment: Experiment, workers: int | None, measured: bool, as_json: bool) -> int:
    """Print what a run costs, and return the exit status.

    Raises:
        ConfigError: as `cost_of`.
    """
    begin = time.perf_counter()
    ray = workers is not None or experiment.run.engine == "ray"
    count = (workers or experiment.run.workers or len(os.sched_getaffinity(0))) if ray else 0
    cost = cost_of(experiment, count, measured)
    if as_json:
        print(to_json(cost.plain(), indent=2))
        return 0
    _print(cost)
    print(f"planned in {time.perf_counter() - begin:.0f} s; nothing was written")
    return 0


def _print(cost: Cost) -> None:
    experiment, rounds = cost.prepared.experiment, cost.prepared.experiment.run.rounds
    where = f"{cost.workers} Ray worker{'s' if cost.workers > 1 else ''}" if cost.workers else "one process"
    print(
        f"{experiment.run.name}: {cost.layout.size:,} parameters in {len(cost.layout.names)} tensors, {rounds:,} rounds of about "
        f"{cost.cohort:,.6g} of {experiment.population.size:,} users, {where}"
    )
    for process in cost.processes:
        _print_memory(process, cost.start_up)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"\nmemory in all: {size(cost.memory)}; this machine has {size(machine)}")
    for line in _figures(cost, rounds):
        print(line)
    for line in cost.assumptions():
        print(f"  {line}")


def _print_memory(process: Process, start_up: int) -> None:
    count = f"{process.count} x " if process.count > 1 else ""
    print(f"\nmemory of {count}{process.name}: {size(process.peak + start_up)} at most, when {process.largest}")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_row(size(start_up), "interpreter and libraries")
    for name, taken in {**process.kept, **process.phases[process.largest]}.items():
        if taken:
            table.add_row(size(taken), name)
    Console().print(table)


def _figures(cost: Cost, rounds: int) -> list[str]:
    """Return operations, bytes, time and disk, a line each."""
    trial, traffic, lines = cost.trial, cost.traffic, list[str]()
    if trial is not None:
        flops = trial.user_flops
        lines.append(f"operations: {flops:.3g} a user, {flops * cost.cohort:.3g} a round, {flops * cost.cohort * rounds:.3g} in all")
    kind = "exact" if traffic.exact else "estimated"
    for name, bytes_ in (("up", traffic.up), ("down", traffic.down)):
        both = f"{size(bytes_ * cost.cohort)} a round, {size(bytes_ * cost.cohort * rounds)} in all"
        lines.append(f"bytes {name} ({kind}): {size(bytes_)} a user, {both}")
    if trial is not None and cost.round_seconds is not None:
        lines.append(
            f"time: {trial.user_seconds:.3g} s a user ({trial.steps} steps of {trial.step_seconds:.3g} s), {cost.round_seconds:.3g} s "
            f"a round with {cost.workers or 1} at work, {clock(cost.round_seconds * rounds)} in all"
        )
    parts = (f"{size(count)} {name}" for name, count in dataclasses.asdict(cost.disk).items() if count)
    return [*lines, f"disk: {size(cost.disk.total)} ({', '.join(parts)})"]
