"""What runs the trials of a sweep: warm processes of this machine, or tasks on a Ray cluster. Imports PyTorch in those only."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from experiments.prepare import read_run
from experiments.sweep_folder import is_done
from fedclip.config import Experiment
from fedclip.options import ConfigError
from fedclip.storage import lock

DONE, FAILED, INTERRUPTED = 0, 1, 130
ORPHAN_SECONDS = 60.0
"""So long may a trial whose sweep was killed go on to hold its folder."""

POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """What a worker does for a trial: with a folder its run is done or gone on with, without one it is only checked.

    Attributes:
        name: of the trial.
        experiment: resolved.
        folder: the run folder, absolute.
        log: where what it says goes, absolute.
    """

    name: str
    experiment: Experiment
    folder: Path | None = None
    log: Path | None = None


@dataclass(frozen=True)
class Reply:
    """How a job ended: the exit status of the command, and what went wrong."""

    name: str
    status: int
    error: str = ""


class Pool(Protocol):
    """Workers, each of which does one job at a time."""

    size: int

    def start(self, job: Job) -> None:
        """Begin a job; there are never more than `size`."""

    def replies(self, seconds: float) -> list[Reply]:
        """Return how jobs ended, after at most so many seconds."""

    def interrupt(self) -> None:
        """End the jobs in order: each replies."""

    def close(self) -> None:
        """End the workers at once."""


def do(job: Job) -> Reply:
    """Do a job in this process."""
    try:
        if job.folder is None or job.log is None:
            _check(job.experiment)
            return Reply(job.name, DONE)
        with job.log.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                return Reply(job.name, _run(job.experiment, job.folder))
            except Exception:
                traceback.print_exc()
                raise
    except KeyboardInterrupt:
        return Reply(job.name, INTERRUPTED)
    except ConfigError as error:
        return Reply(job.name, FAILED, str(error))
    except Exception as error:  # noqa: BLE001  a task of the user's own may raise anything; the other trials go on
        return Reply(job.name, FAILED, f"{type(error).__name__}: {error}")


def _check(experiment: Experiment) -> None:
    from experiments.engines import account_of
    from experiments.prepare import prepare

    account_of(prepare(experiment, weights=False))


def _run(experiment: Experiment, folder: Path) -> int:
    """Do a trial's run, or go on with it, by the code of `fedclip run`."""
    _await_free(folder)
    if is_done(folder):  # the process of a killed sweep came to its end
        return DONE
    from experiments.commands import run_command

    if _has_begun(folder):
        return run_command(read_run(folder, []), folder, quiet=False, resume=True)
    if folder.exists():  # made, and killed before its first checkpoint
        shutil.rmtree(folder)
    return run_command(experiment, folder, quiet=False)


def _has_begun(folder: Path) -> bool:
    """Return whether a run has anything to go on with; what was charged to a ledger is never thrown away."""
    ledger = folder / "ledger.jsonl"
    return any((folder / "checkpoints").glob("*.ckpt")) or (ledger.is_file() and ledger.stat().st_size > 0)


def _await_free(folder: Path) -> None:
    """Wait until no process has a run folder.

    Raises:
        ConfigError: one keeps it.
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    while folder.is_dir():
        try:
            os.close(lock(folder))
            return
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


class Processes:
    """Processes of this machine, kept warm from one trial to the next; one that dies is replaced, and none outlives this one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[tuple[Connection, Any]] = []
        self._busy: dict[Connection, tuple[Any, str]] = {}

    def start(self, job: Job) -> None:
        """Begin a job, in a new process where none is idle."""
        connection, process = self._idle.pop() if self._idle else self._spawn()
        try:
            connection.send(job)
        except OSError:  # it died while it was idle
            connection.close()
            connection, process = self._spawn()
            connection.send(job)
        self._busy[connection] = process, job.name

    def replies(self, seconds: float) -> list[Reply]:
        """Return how jobs ended."""
        found = []
        for connection in wait(list(self._busy), seconds):
            assert isinstance(connection, Connection)
            process, name = self._busy.pop(connection)
            try:
                found.append(connection.recv())
                self._idle.append((connection, process))
            except (EOFError, OSError):
                process.join()
                if process.exitcode == -signal.SIGTERM:  # told to end before it could listen
                    found.append(Reply(name, INTERRUPTED))
                    connection.close()
                    continue
                how = f"by signal {-process.exitcode}" if process.exitcode < 0 else f"with exit status {process.exitcode}"
                found.append(Reply(name, FAILED, f"its process ended {how}, perhaps for want of memory"))
                connection.close()
        return found

    def interrupt(self) -> None:
        """End the jobs in order."""
        for process, _ in self._busy.values():
            process.terminate()

    def close(self) -> None:
        """End the workers."""
        for connection, process in [*self._idle, *((c, p) for c, (p, _) in self._busy.items())]:
            process.kill()
            process.join()
            connection.close()
        self._idle, self._busy = [], {}

    def _spawn(self) -> tuple[Connection, Any]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), name="fedclip-trial")
        with _one_thread():
            process.start()
        theirs.close()
        return ours, process


def _work(connection: Connection) -> None:
    """Do the jobs that come, one after another."""
    # Ctrl-C reaches every process of the terminal; the sweep alone decides how its trials end, by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        while True:
            connection.send(do(connection.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)  # as its sweep was: run folders survive it


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let a process that is started now compute on one thread from its first import on."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class RayTasks:
    """Tasks of one core each on a Ray cluster, whose machines see the sweep folder at the same place.

    Raises:
        ConfigError: no such cluster, or no core of it is free.
    """

    def __init__(self, address: str, size: int = 0) -> None:
        import ray

        from clients.ray_worker import ONE_CORE, join_ray, own_paths

        self._ray, self._owns = ray, not ray.is_initialized()
        try:
            join_ray(address, None, 1, ONE_CORE, 2**28, log_to_driver=False)
        except (ValueError, ConnectionError) as error:
            raise ConfigError(f"ray: {error}") from error
        # Ray gives this no types.
        self.size = size or max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(own_paths())}
        self._task = ray.remote(_in).options(num_cpus=1, max_retries=0, runtime_env={"env_vars": environment})
        self._jobs: dict[Any, str] = {}

    def start(self, job: Job) -> None:
        """Hand a job to the cluster, which begins it as soon as it has a core free."""
        self._jobs[self._task.remote(os.getcwd(), job)] = job.name

    def replies(self, seconds: float) -> list[Reply]:
        """Return how jobs ended."""
        found = []
        if not self._jobs:
            return []
        for reference in self._ray.wait(list(self._jobs), num_returns=1, timeout=seconds)[0]:
            name = self._jobs.pop(reference)
            try:
                found.append(self._ray.get(reference))
            except self._ray.exceptions.TaskCancelledError:
                found.append(Reply(name, INTERRUPTED))
            except self._ray.exceptions.RayError as error:
                said = str(error).strip().splitlines() or [type(error).__name__]
                found.append(Reply(name, FAILED, f"Ray lost it: {said[-1]}"))
        return found

    def interrupt(self) -> None:
        """End the jobs in order."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=False)

    def close(self) -> None:
        """Leave the cluster, which ends what is left of the tasks."""
        for reference in self._jobs:
            self._ray.cancel(reference, force=True)
        if self._owns:
            self._ray.shutdown()


def _in(folder: str, job: Job) -> Reply:
    os.chdir(folder)  # paths in an experiment are relative to where the sweep was started
    return do(job)
