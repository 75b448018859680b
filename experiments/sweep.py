"""`fedclip sweep`: the trials of a sweep, side by side, each an ordinary run. Imports no PyTorch: the workers do."""

import os
import shlex
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.sweep_folder import SWEEP_TOML, TRIALS, SweepFolder, check_sweep_folder, is_done
from experiments.sweep_live import SweepReporter, plainly
from experiments.sweep_plan import Sweep, Trial, read_sweep, refuse_trials
from experiments.sweep_pools import DONE, FAILED, INTERRUPTED, Job, Pool, Processes, RayTasks

SECONDS_BETWEEN_LOOKS = 0.5

TOLD_TO_END = "its process was told to end"
"""Of a trial that another than its sweep ended."""


@dataclass(frozen=True)
class SweepArguments:
    """What the command line says of a sweep.

    Attributes:
        file: the sweep file.
        out: the sweep folder; None: that of the file to go on with, or a new one.
        resume: go on with a sweep.
        overrides: keys of every trial, as for `fedclip run`.
        parallel: trials at a time; None: as the file says.
        ray_address: of a Ray cluster whose tasks the trials are; None: processes of this machine.
        dry_run: say what would be tried.
        quiet: print the end only.
    """

    file: Path
    out: Path | None = None
    resume: bool = False
    overrides: Sequence[str] = ()
    parallel: int | None = None
    ray_address: str | None = None
    dry_run: bool = False
    quiet: bool = False


def sweep_command(arguments: SweepArguments) -> int:
    """Run a sweep, or go on with one, and return the exit status: 0 where all trials are done. SIGTERM ends it in order, as Ctrl-C does.

    Raises:
        ConfigError: the file, any of its trials or the folder is refused; nothing was tried then.
    """
    sweep = read_sweep(arguments.file, arguments.overrides, on_ray=arguments.ray_address is not None)
    if arguments.dry_run:
        _print_plan(sweep)
        return DONE
    path = arguments.out or (arguments.file.parent if arguments.resume else _new_folder(sweep))
    check_sweep_folder(path, resume=arguments.resume)
    size = sweep.options.parallel if arguments.parallel is None else arguments.parallel
    left = [trial for trial in sweep.trials if not is_done(path / TRIALS / trial.name)]
    with closing(_pool(arguments.ray_address, size, left)) as pool:
        _check_all(pool, left)
        folder = SweepFolder(path, sweep, resume=arguments.resume)
        with closing(folder), SweepReporter(folder, arguments.quiet) as reporter, _told_to_stop() as stop:
            status = _try_all(pool, folder, reporter, stop)
            reporter.end("" if status == DONE else f"fedclip sweep {shlex.quote(str(path / SWEEP_TOML))} --resume")
    return status


def _try_all(pool: Pool, folder: SweepFolder, reporter: SweepReporter, stop: threading.Event) -> int:
    """Do what is left of the trials, and return the exit status."""
    trials = {trial.name: trial for trial in folder.sweep.trials}
    waiting = deque(name for name, standing in folder.standings.items() if standing.status == "waiting")
    running, told = dict[str, Trial](), False
    while running or (waiting and not stop.is_set()):
        while waiting and len(running) < pool.size and not stop.is_set():
            trial = trials[waiting.popleft()]
            running[trial.name] = trial
            folder.stand(trial, "running")
            pool.start(Job(trial.name, trial.experiment, folder.run_folder(trial).absolute(), folder.log(trial).absolute()))
        if stop.is_set() and not told:
            pool.interrupt()
            told = True
        for reply in pool.replies(SECONDS_BETWEEN_LOOKS):
            trial = running.pop(reply.name)
            alone = reply.status == INTERRUPTED and not stop.is_set()
            reporter.ended(trial, folder.settle(trial, TOLD_TO_END if alone else reply.error, reply.status == INTERRUPTED))
        reporter.look(running.values())
    if all(standing.status == "done" for standing in folder.standings.values()):
        return DONE
    return INTERRUPTED if stop.is_set() else FAILED


@contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set, the second time they end the sweep at once."""
    stop = threading.Event()

    def told(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, told) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_all(pool: Pool, trials: Sequence[Trial]) -> None:
    """Build the task and the method of every trial, as its run will, and refuse the sweep where one is refused."""
    waiting, running, refused = deque(trials), 0, dict[str, list[str]]()
    while waiting or running:
        while waiting and running < pool.size:
            trial = waiting.popleft()
            pool.start(Job(trial.name, trial.experiment))
            running += 1
        for reply in pool.replies(SECONDS_BETWEEN_LOOKS):
            running -= 1
            if reply.status == INTERRUPTED:
                raise KeyboardInterrupt
            if reply.status != DONE:
                refused.setdefault(reply.error, []).append(reply.name)
    refuse_trials(refused)


def _pool(address: str | None, size: int, trials: Sequence[Trial]) -> Pool:
    """Return the workers: by default one a core, or one trial at a time where each takes all cores itself."""
    if address is not None:
        return RayTasks(address, size)
    takes_all = any(trial.experiment.run.engine == "ray" for trial in trials)
    return Processes(min(size or (1 if takes_all else len(os.sched_getaffinity(0))), len(trials)))


def _new_folder(sweep: Sweep) -> Path:
    return Path("runs") / f"{sweep.options.name}-{datetime.now():%Y%m%d-%H%M%S}"


def _print_plan(sweep: Sweep) -> None:
    console = Console(width=None if Console().is_terminal else 200)
    table = Table("trial", *sweep.keys, "seed", box=None, pad_edge=False)
    for trial in sweep.trials:
        table.add_row(trial.name, *(plainly(trial.settings[key]) if key in trial.settings else "" for key in sweep.keys), str(trial.seed))
    console.print(table)
    rounds = sum(trial.experiment.run.rounds for trial in sweep.trials)
    console.print(f"{len(sweep.trials)} trials of {sweep.options.base}, {rounds:,} rounds in all", highlight=False, soft_wrap=True)
    if sweep.note:
        console.print(sweep.note, highlight=False, soft_wrap=True)
