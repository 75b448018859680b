"""`Storage`: the few file operations that a run's survival depends on, and the two ways of writing that survive a crash.

Everything that must be there after a power cut goes through a `Storage`, so that tests can put a disk in its place that forgets, tears
or refuses what was not synced. Imports no PyTorch.
"""

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from fedclip.options import ConfigError

Chunk = bytes | memoryview


class Storage:
    """The files of this machine."""

    def exists(self, path: Path) -> bool:
        """Return whether there is a file."""
        return path.is_file()

    def read(self, path: Path) -> bytes:
        """Return a file's content."""
        return path.read_bytes()

    def read_end(self, path: Path, size: int) -> bytes:
        """Return the last bytes of a file; all of one that is shorter."""
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)

    def names(self, folder: Path) -> list[str]:
        """Return the names of the files in a folder, sorted; none where there is no folder."""
        return sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []

    def folders(self, folder: Path) -> list[str]:
        """Return the names of the folders in a folder, sorted; none where there is no folder."""
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it, where they are not there."""
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """Make a file anew, or in the place of an old one. Nothing is synced."""
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of a file, which is made where it is not there. Nothing is synced."""
        with path.open("ab") as file:
            file.write(data)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to its first bytes. Nothing is synced."""
        os.truncate(path, size)

    def sync(self, path: Path) -> None:
        """Wait until a file's content is on the disk."""
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, in the place of a file that has it."""
        os.replace(old, new)

    def sync_folder(self, folder: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        """Take a file away, where it is there: it may be done again."""
        path.unlink(missing_ok=True)


TEMPORARY = ".part"
"""The end of the name of a file that is not whole yet. One that a crash left behind is of no use to anybody."""


def replace(storage: Storage, path: Path, chunks: Iterable[Chunk]) -> None:
    """Write a file so that after any crash it is there whole, or as it was before."""
    temporary = path.with_name(path.name + TEMPORARY)
    storage.write(temporary, chunks)
    storage.sync(temporary)
    storage.rename(temporary, path)
    storage.sync_folder(path.parent)


def append(storage: Storage, path: Path, data: bytes) -> None:
    """Add to a file, and wait until it is on the disk. A crash within leaves the file as it was, with or without a torn end."""
    new = not storage.exists(path)
    storage.append(path, data)
    storage.sync(path)
    if new:
        storage.sync_folder(path.parent)


def lock(path: Path) -> int:
    """Take a folder for this process, for as long as the returned descriptor is open, and no longer than the process lives.

    Raises:
        ConfigError: another process has it.
    """
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 32).decode("ascii", "replace").strip()
        os.close(descriptor)
        raise ConfigError(f"{path} is in use by the process {holder or '?'}; wait for it, or end it.") from None
    os.truncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor
