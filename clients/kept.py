"""What a device keeps between rounds: in the folder of its data a folder for each run, of which those used last stay.

Whoever works for a run holds a lock in its folder, which the system lets go when the process ends. A folder that is not as these are
made, or that cannot be read or taken away, is left alone: none of it may cost a round.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

KEPT_RUNS = 5
"""Runs of which a device keeps what their chains remember; a run that is older begins afresh if it goes on."""

LOCK, GONE = ".lock", ".gone."


@contextmanager
def in_use(folder: Path, run: str) -> Iterator[None]:
    """Keep the folder of a run from being taken away; at the end of its first use, take away those of runs that were used long ago.

    Args:
        folder: of all that the device keeps.
        run: the name of the run, and of its folder there.
    """
    own, first = folder / run, not (folder / run).exists()
    held = _hold(own)
    try:
        yield
        if first:
            forget(folder, run)
    finally:
        if held is not None:
            os.close(held)


def forget(folder: Path, run: str) -> None:
    """Take away the folders of all runs but this one, those that were used last, and those that another process works for."""
    with suppress(OSError):
        others = [path for path in folder.iterdir() if path.name != run and _is_of_a_run(path)]
        others.sort(key=_last_use, reverse=True)
        for path in others[KEPT_RUNS - 1 :]:
            with suppress(OSError):
                _remove(path)


def _hold(own: Path) -> int | None:
    """Return a descriptor whose shared lock keeps a folder; None where there can be none."""
    with suppress(OSError):
        for _ in range(3):  # it may be taken away just before
            own.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(own / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(descriptor), os.stat(own / LOCK)):
                    os.utime(descriptor)
                    return descriptor
            os.close(descriptor)
    return None


def _is_of_a_run(path: Path) -> bool:
    """Return whether a folder is one of a run's states, whole or on its way out, and nothing else."""
    with suppress(OSError):
        return not path.is_symlink() and all(name == LOCK or name.isdecimal() for name in os.listdir(path))
    return False


def _last_use(path: Path) -> float:
    """Return when a run was used last; what is on its way out counts as oldest."""
    with suppress(OSError):
        return -1.0 if path.name.startswith(GONE) else (path / LOCK).stat().st_mtime
    with suppress(OSError):  # as left by a release that had no locks
        return max(p.stat().st_mtime for p in (path, *path.rglob("*")))
    return 0.0


def _remove(path: Path) -> None:
    """Take a folder away, which first gets another name: whoever comes for the run then finds none, not half of one."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = path if path.name.startswith(GONE) else path.rename(path.with_name(f"{GONE}{path.name}"))
    finally:
        os.close(descriptor)
    shutil.rmtree(gone)
