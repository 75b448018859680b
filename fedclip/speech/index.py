"""The index of a corpus: who says what in which file, as a few arrays that a million utterances fit in and processes share."""

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        return cls.packed([text.encode("utf-8", "surrogateescape") for text in texts])

    @classmethod
    def packed(cls, parts: Sequence[bytes | memoryview]) -> "Strings":
        """Pack texts that are encoded already."""
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


def expect_both(folder: Path, trained: Shelf, reserved: Shelf, what: str) -> None:
    """Refuse a corpus where nobody is trained on or nobody is held out; `what` there is nothing of, and the remedy, end the message.

    Raises:
        CorpusError: it is one.
    """
    for kind, shelf in (("training", trained), ("held-out", reserved)):
        if not len(shelf):
            raise CorpusError(f"{folder} is left without {kind} {what}")


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
    columns, skipped = _Columns(sizes), Skips()
    for item in listed:
        fault = _fault(item, sizes)
        if fault is None:
            columns.add(item)  # type: ignore[arg-type]  # a Skip is its own fault
        elif strict and isinstance(item, Entry):
            raise CorpusError(f"{at(item.where)}: {folder / item.path}: {fault.cause}; put a recording there, or leave the line out.")
        else:
            count, first = skipped.get(fault.cause, (0, fault.example))
            skipped[fault.cause] = (count + 1, first)
    columns.expect_single(frozenset() if strict else frozenset(held_out))
    return columns.index(folder, skipped, stamp)


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


class _Columns:
    """Entries as they come, in columns: a million of them as objects would take gigabytes."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._paths, self._speakers, self._sets, self._languages = (dict[str, int]() for _ in range(4))
        self._listings = dict[Path, int]()
        self._texts, self._text_ends = bytearray(), array("q", [0])
        self._file, self._speaker, self._set, self._language, self._listing, self._line = (array("i") for _ in range(6))
        self._start, self._end, self._seconds = (array("d") for _ in range(3))

    def add(self, entry: Entry) -> None:
        """Take an entry in."""
        self._file.append(self._paths.setdefault(entry.path, len(self._paths)))
        self._speaker.append(self._speakers.setdefault(entry.speaker, len(self._speakers)))
        self._set.append(self._sets.setdefault(entry.split, len(self._sets)))
        self._language.append(self._languages.setdefault(entry.language, len(self._languages)))
        self._listing.append(self._listings.setdefault(entry.where[0], len(self._listings)))
        self._line.append(entry.where[1])
        self._start.append(entry.start)
        self._end.append(math.nan if entry.end is None else entry.end)
        self._seconds.append(math.nan if entry.seconds is None else entry.seconds)
        self._texts += entry.text.encode("utf-8", "surrogateescape")
        self._text_ends.append(len(self._texts))

    def expect_single(self, held_out: frozenset[str]) -> None:
        """Refuse an utterance that is listed twice among those held out, or twice among the others."""
        role = np.array([name in held_out for name in self._sets], bool)[np.array(self._set, np.int32)]
        file, start = np.array(self._file, np.int32), np.array(self._start)
        order = np.lexsort((start, file, role))
        same = [column[order][1:] == column[order][:-1] for column in (start, file, role)]
        twice = np.flatnonzero(same[0] & same[1] & same[2])
        if len(twice):
            first, second = sorted(self._where(int(n)) for n in order[twice[0] : twice[0] + 2])
            path = list(self._paths)[file[order[twice[0]]]]
            raise CorpusError(f"{at(second)}: {path} is already listed at {at(first)}; leave one of the two out.")

    def index(self, folder: Path, skipped: Skips, stamp: str) -> Index:
        """Return the index of all entries."""
        speakers, speaker = _ranked(self._speakers, self._speaker, str)
        # As paths compare, part by part: no character is less than what stands for the slash.
        paths, file = _ranked(self._paths, self._file, lambda path: path.replace("/", "\0"))
        sets, in_set = _ranked(self._sets, self._set, str)
        languages, language = _ranked(self._languages, self._language, str)
        start = np.array(self._start, np.float64)
        order = np.lexsort((start, file, speaker))
        texts, ends = memoryview(self._texts), self._text_ends
        return Index(
            folder,
            paths=Strings.of(paths),
            texts=Strings.packed([texts[ends[n] : ends[n + 1]] for n in order]),
            speakers=Strings.of(speakers),
            sets=Strings.of(sets),
            languages=Strings.of(languages),
            sizes=np.array([self._sizes[path] for path in paths], np.int64),
            file=file[order],
            speaker=speaker[order],
            set=in_set[order].astype(np.int16),
            language=language[order].astype(np.int16),
            start=start[order],
            end=np.array(self._end, np.float64)[order],
            seconds=np.array(self._seconds, np.float64)[order],
            skipped=skipped,
            stamp=stamp,
        )

    def _where(self, number: int) -> tuple[Path, int]:
        return list(self._listings)[self._listing[number]], self._line[number]


def _ranked(names: Mapping[str, int], numbers: "array[int]", key: Callable[[str], str]) -> tuple[list[str], np.ndarray]:
    """Return names in the order of a key, and numbers of names as they came as numbers of names in that order, int32."""
    ordered = sorted(names, key=key)
    ranks = np.empty(len(names), np.int32)
    ranks[[names[name] for name in ordered]] = np.arange(len(names), dtype=np.int32)
    return ordered, ranks[np.array(numbers, np.int32)]
