"""The index of a corpus on disk: made once, used by all processes, made anew when a listing or a recording changes."""

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors.numpy import save

from fedclip.speech.errors import CorpusError
from fedclip.speech.index import ARRAYS, STRINGS, Index, Strings, build_index
from fedclip.speech.listing import Entry, Skip, key_of
from fedclip.speech.options import ListedOptions
from fedclip.speech.published import LAYOUTS

Watch = Callable[[str, int], None]
"""Is told what is being done, and how many files or utterances of it are done."""

File = tuple[str, int, int]
"""Path relative to the corpus's folder, bytes, time of change in nanoseconds."""

_FORMAT: Final = "fedclip-index-1"
_SUFFIX: Final = ".index"
_KEPT: Final = 3
"""Indexes that are kept of one folder and section: others may be in use."""

_EVERY: Final = 2000
_LONGEST_HEADER: Final = 1 << 24
_TYPES: Final = {"U8": np.uint8, "I16": np.int16, "I32": np.int32, "I64": np.int64, "F64": np.float64}
_NOT_INDEXED: Final = {"speakers", "seed_fraction", "utterances"}
"""Options that choose among what is in the index."""


def open_index(
    options: ListedOptions, folder: Path, train: tuple[str, ...], held_out: tuple[str, ...], *, cache: Path, content: str = "", watch: Watch
) -> Index:
    """Return the index of some sets of a corpus: the one that is kept where no file has changed since, else a new one, which is kept.

    Args:
        options: the corpus section.
        folder: where the corpus is.
        train: the sets that are trained on.
        held_out: the sets that are held out.
        cache: where indexes are kept.
        content: the digest of the index that the run was prepared with: it is taken as it is kept, without a look at the files. Where it
            is not kept, as on another machine, it is made, and must be the same.
        watch: is told of the progress.

    Raises:
        CorpusError: a listing is damaged, or the index is not the one that the run was prepared with.
    """
    layout = LAYOUTS[options.kind]
    section = options.model_dump_json(exclude=_NOT_INDEXED)
    name = hashlib.blake2b(repr((_FORMAT, str(folder), section, train, held_out)).encode(), digest_size=12).hexdigest()
    if content and (kept := load_index(cache / f"{name}-{content}{_SUFFIX}", folder)) is not None:
        return kept
    with _locked(cache / f"{name}.lock"):
        sets = (*train, *held_out)
        kept_before = _kept(cache, name)
        found: Iterable[File] = watched(walk(folder, layout.depends(folder, options, sets)), watch, "looking at files")
        # Kept for a new index only, which is likely where there is none.
        files = found if kept_before else list(found)
        stamp = stamp_of(files)
        index = next((i for path in kept_before if (i := load_index(path, folder, stamp)) is not None), None)
        if index is None:
            again = walk(folder, layout.depends(folder, options, sets)) if kept_before else files
            sizes = {path: size for path, size, _ in again}
            listed: Iterable[Entry | Skip] = watched(layout.entries(folder, options, sets, sizes), watch, "indexing utterances")
            index = build_index(folder, listed, sizes, held_out=held_out, strict=layout.strict, stamp=stamp)
            index = replace(index, content=_digest(index))
            _keep(cache, name, index)
    if content and index.content != content:
        raise CorpusError(
            f"{folder} is not as it was when the run was prepared, or is another one on this machine; give all machines the same data, "
            "and start the run anew (or go on with it by --resume) after a change."
        )
    return index


def walk(folder: Path, places: Iterable[Path]) -> Iterator[File]:
    """Yield the files at some places and in the folders there, sorted in each folder, without hidden ones; what is not there is not.

    Raises:
        CorpusError: a folder may not be read.
    """
    for place in places:
        try:
            if place.is_dir():
                yield from _walk(place, "" if place == folder else os.path.relpath(place, folder) + "/")
            else:
                status = place.stat()
                yield key_of(folder, place), status.st_size, status.st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise CorpusError(f"{error.filename or place} cannot be read ({error.strerror}); correct its rights.") from error


def _walk(place: Path, prefix: str) -> Iterator[File]:
    """Yield the files in a folder: of a million in one folder only what is needed is kept to sort them."""
    inside: list[tuple[str, int, int]] = []
    with os.scandir(place) as found:
        for entry in found:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                inside.append((entry.name, -1, 0))
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # a link that leads nowhere is no file
                continue
            inside.append((entry.name, status.st_size, status.st_mtime_ns))
    inside.sort()
    for name, size, changed in inside:
        if size < 0:
            yield from _walk(place / name, f"{prefix}{name}/")
        else:
            yield prefix + name, size, changed


def stamp_of(files: Iterable[File]) -> str:
    """Return a digest of names, sizes and times of change."""
    state, some = hashlib.blake2b(digest_size=16), list[str]()
    for path, size, changed in files:
        some.append(f"{path}\0{size}\0{changed}\n")
        if len(some) == _EVERY:
            state.update("".join(some).encode("utf-8", "surrogateescape"))
            some.clear()
    state.update("".join(some).encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def watched(items: Iterable[Any], watch: Watch, what: str) -> Iterator[Any]:
    """Yield the items, and tell of them now and then."""
    count = 0
    for count, item in enumerate(items, start=1):
        if count % _EVERY == 0:
            watch(what, count)
        yield item
    watch(what, count)


def load_index(path: Path, folder: Path, stamp: str | None = None) -> Index | None:
    """Return the index in a file, mapped into memory, so that processes share it; None where there is none that can be trusted.

    Args:
        path: the file.
        folder: what its paths are relative to.
        stamp: what it must have been made from; None: anything.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length)) if length < _LONGEST_HEADER else {}
        said = json.loads(header.pop("__metadata__")["index"])
        if said["format"] != _FORMAT or (stamp is not None and said["stamp"] != stamp):
            return None
        mapped = np.memmap(path, np.uint8, "r", offset=8 + length)
        arrays = {key: _array(mapped, place) for key, place in header.items()}
        fields: dict[str, Any] = {key: Strings(arrays[f"{key}.data"], arrays[f"{key}.starts"]) for key in STRINGS}
        fields |= {key: arrays[key] for key in ARRAYS}
        fields["skipped"] = {cause: (count, first) for cause, (count, first) in said["skipped"].items()}
        index = Index(folder, **fields, stamp=said["stamp"], content=said["content"])
        if _digest(index) != index.content:
            return None
        with suppress(OSError):
            os.utime(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index


def _array(mapped: np.ndarray, place: dict[str, Any]) -> np.ndarray:
    begin, end = place["data_offsets"]
    return mapped[begin:end].view(_TYPES[place["dtype"]]).reshape(place["shape"])


def _arrays(index: Index) -> dict[str, np.ndarray]:
    """Return all arrays of an index by name."""
    arrays = {key: getattr(index, key) for key in ARRAYS}
    for key in STRINGS:
        arrays |= {f"{key}.data": getattr(index, key).data, f"{key}.starts": getattr(index, key).starts}
    return arrays


def _digest(index: Index) -> str:
    state = hashlib.blake2b(digest_size=16)
    for key, array in sorted(_arrays(index).items()):
        state.update(repr((key, array.dtype.str, array.shape)).encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def _kept(cache: Path, name: str) -> list[Path]:
    """Return the files of the indexes that are kept under a name, the last used first."""
    found = []
    for path in cache.glob(f"{name}-*{_SUFFIX}"):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found, reverse=True)]


def _keep(cache: Path, name: str, index: Index) -> None:
    """Write an index, which appears whole or not at all, and remove those longest unused."""
    said = {"format": _FORMAT, "stamp": index.stamp, "content": index.content, "skipped": index.skipped}
    path = cache / f"{name}-{index.content}{_SUFFIX}"
    temporary = path.with_suffix(f".{os.getpid()}.writing")
    try:
        temporary.write_bytes(save(_arrays(index), {"index": json.dumps(said)}))
        temporary.replace(path)
        for old in _kept(cache, name)[_KEPT:]:
            old.unlink(missing_ok=True)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        warnings.warn(
            f"The index of {index.folder} isn't kept in {cache}: {error}. Each process makes its own; set cache_dir.",
            RuntimeWarning,
            stacklevel=3,
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of this machine at a time make an index. Where there can be no lock, each makes its own."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):  # some shared disks have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
