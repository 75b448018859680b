"""The index of a corpus: who says what in which file, as a few arrays that a million utterances fit in and processes share."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from fedclip.speech.errors import CorpusError
from fedclip.speech.listing import Entry, Skip, at
from fedclip.speech.recordings import Recording

Skips = dict[str, tuple[int, str]]
"""For each cause, how many utterances were left out for it, and the first of them."""


@dataclass(frozen=True, eq=False)
class Strings:
    """Texts one after another: their UTF-8 bytes, and where each begins, int64, shape (texts + 1,)."""

    data: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Strings":
        """Pack texts; file names that are not UTF-8 keep their bytes."""
        parts = [text.encode("utf-8", "surrogateescape") for text in texts]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts], dtype=np.int64)])
        return cls(np.frombuffer(b"".join(parts), np.uint8), starts.astype(np.int64))

    def __len__(self) -> int:
        """Return how many texts there are."""
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> str:
        """Return one text."""
        return self.data[self.starts[number] : self.starts[number + 1]].tobytes().decode("utf-8", "surrogateescape")


STRINGS: Final = ("paths", "texts", "speakers", "sets", "languages")
ARRAYS: Final = ("sizes", "file", "speaker", "set", "language", "start", "end", "seconds")


@dataclass(frozen=True, eq=False)
class Index:
    """The utterances of a corpus, sorted by speaker, file and time.

    Args:
        folder: what paths are relative to.
        paths: of files, shape (files,); `sizes`: their bytes, int64.
        texts: as published, shape (utterances,); `file`, `speaker`, `set` and `language`: numbers of what is said in the arrays of
            strings; `start`, `end`: seconds within the file, NaN for its end; `seconds`: how long it lasts, NaN where that is not known.
        speakers: their names, sorted.
        sets: names of sets.
        languages: codes of languages.
        skipped: what is not in it, and why.
        stamp: a digest of size and time of change of all the files that it was made from.
        content: a digest of what is in it.
    """

    folder: Path
    paths: Strings
    texts: Strings
    speakers: Strings
    sets: Strings
    languages: Strings
    sizes: np.ndarray
    file: np.ndarray
    speaker: np.ndarray
    set: np.ndarray
    language: np.ndarray
    start: np.ndarray
    end: np.ndarray
    seconds: np.ndarray
    skipped: Skips = field(default_factory=dict)
    stamp: str = ""
    content: str = ""

    def recording(self, number: int) -> Recording:
        """Return an utterance."""
        file, end, seconds = int(self.file[number]), float(self.end[number]), float(self.seconds[number])
        return Recording(
            self.folder / self.paths[file],
            self.texts[number],
            int(self.sizes[file]),
            float(self.start[number]),
            None if np.isnan(end) else end,
            None if np.isnan(seconds) else seconds,
            self.languages[int(self.language[number])],
        )

    def of_sets(self, names: Iterable[str]) -> np.ndarray:
        """Return which utterances are in one of some sets, bool, shape (utterances,)."""
        wanted = {*names}
        return np.isin(self.set, [n for n in range(len(self.sets)) if self.sets[n] in wanted])


@dataclass(frozen=True, eq=False)
class Shelf:
    """The speakers who have some of the utterances of an index, numbered by name.

    Args:
        index: all utterances.
        chosen: numbers of those that are meant, ascending, shape (utterances,).
        count: only the first so many speakers; None for all.
    """

    index: Index
    chosen: np.ndarray
    count: int | None = None

    @cached_property
    def _speakers(self) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the speakers, and where the utterances of each begin in `chosen`, one more for the end."""
        numbers, starts = np.unique(self.index.speaker[self.chosen], return_index=True)
        return numbers.astype(np.int32), np.append(starts, len(self.chosen))

    def __len__(self) -> int:
        """Return how many speakers there are."""
        there = len(self._speakers[0])
        return there if self.count is None else min(there, self.count)

    def name(self, speaker: int) -> str:
        """Return the name of a speaker."""
        return self.index.speakers[int(self._speakers[0][speaker])]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all speakers, sorted."""
        return tuple(self.name(n) for n in range(len(self)))

    def numbers(self, speaker: int, kind: str = "training") -> np.ndarray:
        """Return the numbers of the utterances of a speaker in the index, sorted by file and time.

        Raises:
            IndexError: there is no such speaker.
        """
        if not 0 <= speaker < len(self):
            raise IndexError(f"Expected a {kind} speaker from 0 to {len(self) - 1}, got {speaker}.")
        starts = self._speakers[1]
        return self.chosen[starts[speaker] : starts[speaker + 1]]

    def recordings(self, numbers: Iterable[int]) -> tuple[Recording, ...]:
        """Return the recordings of some utterances of the index."""
        return tuple(self.index.recording(int(n)) for n in numbers)


def digest_of(*parts: object) -> str:
    """Return a digest of plain values."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def build_index(
    folder: Path, listed: Iterable[Entry | Skip], sizes: Mapping[str, int], *, held_out: Sequence[str], strict: bool, stamp: str = ""
) -> Index:
    """Return the index of what a corpus lists.

    Args:
        folder: what paths are relative to.
        listed: utterances in any order, and what the layout leaves out.
        sizes: bytes of the files that are there, by path.
        held_out: sets that are held out: an utterance may be listed once in these, and once in the others.
        strict: raise where a file is missing or empty, and do not count; an utterance may be listed only once.
        stamp: kept with the index.

    Raises:
        CorpusError: a recording is listed twice; with `strict` also one that is missing or has no bytes. The message has file and line.
    """
    skipped: Skips = {}
    entries: list[Entry] = []
    for item in listed:
        fault = _fault(item, sizes)
        if fault is None:
            entries.append(item)  # type: ignore[arg-type]  # a Skip is its own fault
        elif strict and isinstance(item, Entry):
            raise CorpusError(f"{at(item.where)}: {folder / item.path}: {fault.cause}; put a recording there, or leave the line out.")
        else:
            count, first = skipped.get(fault.cause, (0, fault.example))
            skipped[fault.cause] = (count + 1, first)
    # As paths compare: part by part.
    entries.sort(key=lambda e: (e.path.split("/"), e.start))
    _expect_single(entries, frozenset() if strict else frozenset(held_out))
    entries.sort(key=lambda e: e.speaker)
    return _packed(folder, entries, sizes, skipped, stamp)


def _fault(item: Entry | Skip, sizes: Mapping[str, int]) -> Skip | None:
    if isinstance(item, Skip):
        return item
    if item.path not in sizes:
        return Skip("there is no such file", item.path)
    if not sizes[item.path]:
        return Skip("the file is empty", item.path)
    if not item.speaker:
        return Skip("nobody is named as the speaker", at(item.where))
    if not item.text.strip():
        return Skip("there is no text", at(item.where))
    return None


def _expect_single(entries: Sequence[Entry], held_out: frozenset[str]) -> None:
    before: dict[bool, Entry] = {}
    for entry in entries:
        role = entry.split in held_out
        other = before.get(role)
        if other is not None and (other.path, other.start) == (entry.path, entry.start):
            first, second = sorted((other.where, entry.where))
            raise CorpusError(f"{at(second)}: {entry.path} is already listed at {at(first)}; leave one of the two out.")
        before[role] = entry


def _packed(folder: Path, entries: Sequence[Entry], sizes: Mapping[str, int], skipped: Skips, stamp: str) -> Index:
    paths = {path: n for n, path in enumerate(dict.fromkeys(e.path for e in entries))}
    names: dict[str, dict[str, int]] = {
        key: {name: n for n, name in enumerate(sorted({getattr(e, key) for e in entries}))} for key in ("speaker", "split", "language")
    }
    nan = float("nan")
    return Index(
        folder,
        paths=Strings.of(paths),
        texts=Strings.of(e.text for e in entries),
        speakers=Strings.of(names["speaker"]),
        sets=Strings.of(names["split"]),
        languages=Strings.of(names["language"]),
        sizes=np.array([sizes[path] for path in paths], np.int64),
        file=np.array([paths[e.path] for e in entries], np.int32),
        speaker=np.array([names["speaker"][e.speaker] for e in entries], np.int32),
        set=np.array([names["split"][e.split] for e in entries], np.int16),
        language=np.array([names["language"][e.language] for e in entries], np.int16),
        start=np.array([e.start for e in entries], np.float64),
        end=np.array([nan if e.end is None else e.end for e in entries], np.float64),
        seconds=np.array([nan if e.seconds is None else e.seconds for e in entries], np.float64),
        skipped=skipped,
        stamp=stamp,
    )
