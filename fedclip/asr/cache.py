"""Features kept on disk between rounds: bounded in size, safe between processes; damage is a miss and never an error."""

import hashlib
import json
import os
import struct
import tempfile
import time
import warnings
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

_MAGIC: Final = b"fedclip-features-1\n"
_SUFFIX: Final = ".features"
_TEMPORARY: Final = ".writing"
_STALE_SECONDS: Final = 3600.0
"""Age at which a temporary file is taken for what a killed process left behind."""

_KEPT_SHARE: Final = 0.75
"""What is left of the limit after old entries went: the room made is used up before the next look at the folder."""

_ROOM_SHARE: Final = 0.125
"""Of the room, what one process writes before it looks again: others write at the same time."""

_HEADER: Final = struct.Struct("<II")
"""Checksum of all that follows it, and the length of the index."""


@dataclass(frozen=True, eq=False)
class Recording:
    """The features of an utterance, float16, shape (time, mel), what was said, and in which language, where that is told.

    No frames stand for over-long audio.
    """

    features: Tensor
    text: str
    language: str = ""


class Cache(Protocol):
    """Where the recordings of a speaker may be kept."""

    def get(self, key: str) -> tuple[Recording, ...] | None:
        """Return what was kept under a key, or None."""

    def put(self, key: str, recordings: Sequence[Recording]) -> None:
        """Keep recordings under a key, or don't: a cache promises nothing."""


class NoCache:
    """Keeps nothing."""

    def get(self, key: str) -> None:
        """Return None."""

    def put(self, key: str, recordings: Sequence[Recording]) -> None:
        """Do nothing."""


class DiskCache:
    """A file for each key; the files longest unused go when they pass the limit.

    Guarantees: `get` returns what was put, bit for bit, or None (absent, damaged, truncated, of another format); an entry
    appears whole or not at all (written aside, then renamed); one process keeps the files under the limit, and several
    do up to an eighth of the room that each of them last saw; a folder that can't be written makes runs slow and not fail.
    """

    def __init__(self, folder: Path, limit_mb: float) -> None:
        """Use `folder`, made at the first write, for up to `limit_mb` (1 MB = 10^6 bytes)."""
        if limit_mb <= 0:
            raise ValueError(f"Expected limit_mb > 0, got {limit_mb}: use NoCache to keep nothing.")
        self._folder = folder
        self._limit = round(limit_mb * 1e6)
        self._unchecked = 0
        """Bytes that this process may still write before it looks at the folder again."""

    def get(self, key: str) -> tuple[Recording, ...] | None:
        """Return the recordings kept under a key and mark them as used; None where there are none that can be read."""
        path = self._path(key)
        try:
            payload = path.read_bytes()
        except OSError:
            return None
        recordings = _unpack(payload)
        with suppress(OSError):
            if recordings is None:
                path.unlink()
            else:
                os.utime(path)
        return recordings

    def put(self, key: str, recordings: Sequence[Recording]) -> None:
        """Keep the recordings, if they fit at all; may remove the entries longest unused."""
        payload = _pack(recordings)
        if len(payload) > self._limit * _KEPT_SHARE:
            return
        path = self._path(key)
        try:
            if len(payload) > self._unchecked:
                self._make_room(len(payload))
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, payload)
        except OSError as error:
            warnings.warn(f"Features aren't kept in {self._folder}: {error}. Set cache_dir, or cache_mb = 0.", RuntimeWarning, stacklevel=2)
            return
        self._unchecked -= len(payload)

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / digest[:2] / (digest[2:] + _SUFFIX)

    def _make_room(self, incoming: int) -> None:
        """Look at the folder, remove the entries longest unused if `incoming` bytes would pass the limit, note the room."""
        entries = _entries(self._folder)
        total = sum(size for _, size, _ in entries)
        if total + incoming > self._limit:
            for _, size, path in sorted(entries):
                if total + incoming <= self._limit * _KEPT_SHARE:
                    break
                path.unlink(missing_ok=True)
                total -= size
        self._unchecked = max(incoming, int((self._limit - total) * _ROOM_SHARE))


def default_folder() -> Path:
    """Return `$XDG_CACHE_HOME/fedclip`, or `~/.cache/fedclip` where that isn't set."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedclip"


def open_cache(folder: Path | None, limit_mb: float) -> Cache:
    """Return a cache of up to `limit_mb` in `folder` (None: the default one); one that keeps nothing for a limit of 0."""
    return DiskCache(folder or default_folder(), limit_mb) if limit_mb > 0 else NoCache()


def _entries(folder: Path) -> list[tuple[float, int, Path]]:
    """Return when each entry was last used, its bytes and its path; remove what killed processes left behind."""
    found = []
    for path in folder.glob("??/*"):
        # Another process may remove it at any time.
        with suppress(FileNotFoundError):
            status = path.stat()
            if path.suffix == _SUFFIX:
                found.append((status.st_mtime, status.st_size, path))
            elif path.suffix == _TEMPORARY and time.time() - status.st_mtime > _STALE_SECONDS:
                path.unlink()
    return found


def _write(path: Path, payload: bytes) -> None:
    """Write a file that appears whole or not at all. Not synced: what a power cut damages is a miss."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise


def _pack(recordings: Sequence[Recording]) -> bytes:
    """Return the bytes of recordings: magic, checksum, length of the index, index (JSON), float16 values."""
    index = json.dumps([[*r.features.shape, r.text, *([r.language] if r.language else [])] for r in recordings]).encode()
    values = b"".join(r.features.numpy().tobytes() for r in recordings)
    lengths = struct.pack("<I", len(index))
    return _MAGIC + struct.pack("<I", zlib.crc32(lengths + index + values)) + lengths + index + values


def _unpack(payload: bytes) -> tuple[Recording, ...] | None:
    """Return the recordings in bytes that `_pack` made, None for any other bytes."""
    start = len(_MAGIC) + _HEADER.size
    if not payload.startswith(_MAGIC) or len(payload) < start:
        return None
    checksum, length = _HEADER.unpack_from(payload, len(_MAGIC))
    if zlib.crc32(memoryview(payload)[start - 4 :]) != checksum:
        return None
    # The checksum holds, so these are bytes that _pack wrote.
    index = json.loads(payload[start : start + length])
    values = torch.from_numpy(np.frombuffer(payload, dtype=np.float16, offset=start + length).copy())
    parts = torch.split(values, [frames * mels for frames, mels, *_ in index])
    return tuple(Recording(part.view(frames, mels), *told) for part, (frames, mels, *told) in zip(parts, index, strict=True))
