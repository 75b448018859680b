"""The other side of a contestant: `fedclip bench engine` starts it, has it take its turns, and ends it."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedclip.options import ConfigError

CLOSING_SECONDS = 30.0


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes:
        model: `mlp`, `cnn200k`, `cnn1m2` or `asr`.
        cohort: users a round.
        population: users there are.
        workers: processes that train.
        device: `cpu`, or a GPU that the workers share.
    """

    model: str
    cohort: int
    population: int
    workers: int
    device: str

    def arguments(self) -> list[str]:
        """Return what contestants are told."""
        values = {"model": self.model, "cohort": self.cohort, "population": self.population, "workers": self.workers, "device": self.device}
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]


class Contestant:
    """A process that does rounds when it is asked to, and is stopped while others have their turn, with all that it started.

    Args:
        name: what the table calls it.
        command: what is run.
        setting: what is timed.
        folder: for what it prints.

    Raises:
        ConfigError: it ended before it was ready.
    """

    def __init__(self, name: str, command: Sequence[str], setting: Setting, folder: Path) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        with self._log.open("w", encoding="utf-8") as log:
            # In a session of its own, so that Ctrl-C reaches this process alone, which then lets all of them end.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(setting.device),
                start_new_session=True,
            )  # fmt: skip
        self.described = self._answer()
        self.answers: list[dict[str, Any]] = []
        self._signal(signal.SIGSTOP)

    def turn(self, rounds: int) -> None:
        """Have it do a round that does not count, as what waited in its processes is done first, and then some that do.

        Raises:
            ConfigError: it has ended.
        """
        self._signal(signal.SIGCONT)
        self._round()
        self.answers += [self._round() for _ in range(rounds)]
        self._signal(signal.SIGSTOP)

    def _round(self) -> dict[str, Any]:
        pipe, before = self._process.stdin, session_seconds(self._process.pid)
        if pipe is not None:
            print(file=pipe, flush=True)
        answer = self._answer()
        return answer | {"cpu_seconds": session_seconds(self._process.pid) - before}

    def _signal(self, which: signal.Signals) -> None:
        """Stop all processes of the contestant, or let them go on: what some of them do while they wait would slow the others down."""
        for pid in session_processes(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, which)

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            said = [text for text in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if any(map(str.isalnum, text))]
            raise ConfigError(f"bench engine: {self.name} ended: {said[-1].strip() if said else 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        """Return the contestant, which the end of the `with` block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let the process end, which it does when nothing more can come; where it does not, end it and what it started."""
        self._signal(signal.SIGCONT)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def session_processes(session: int) -> dict[int, float]:
    """Return the processes of a session that are there now, each with its processor time in seconds."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it may end at any time
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()  # proc(5), from the third on
            if int(fields[3]) == session:
                found[int(path.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def session_seconds(session: int) -> float:
    """Return the processor time, in seconds, of the processes of a session that are there now."""
    return sum(session_processes(session).values())


def environment(device: str) -> dict[str, str]:
    """Return the environment of all contestants: one thread a process, no allocator of choice, no GPU where none is asked for.

    Ray would give way to every other process of the machine, which the others do not.
    """
    allocators = ("LD_PRELOAD", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name not in allocators}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    quiet = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    ray = {"RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return kept | quiet | ray | hidden | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def has(python: str, package: str) -> bool:
    """Return whether an interpreter finds a package.

    Raises:
        ConfigError: there is no such interpreter.
    """
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        return subprocess.run([python, "-c", look], check=False, capture_output=True).returncode == 0
    except OSError as error:
        raise ConfigError(f"--pfl-python: {python} cannot be run: {error}; give the path of a Python that has pfl.") from error
