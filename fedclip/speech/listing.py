"""What a corpus lists: entries and what is left out, and the reading of text files of lines and of tables."""

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fedclip.speech.errors import CorpusError


class Entry(NamedTuple):
    """An utterance as it is listed.

    `path` is relative to the corpus's folder, with slashes; `start` and `end` are seconds within the file, `end` None for all of it;
    `seconds` is how long it lasts where that is known; `where` is the listing file and the line.
    """

    path: str
    speaker: str
    text: str
    split: str
    where: tuple[Path, int]
    language: str = ""
    start: float = 0.0
    end: float | None = None
    seconds: float | None = None


class Skip(NamedTuple):
    """An utterance that is left out: why, and the first place to look at."""

    cause: str
    example: str


@dataclass(frozen=True)
class Table:
    """How a table is written: what parts its columns, and whether quotation marks mean something."""

    delimiter: str
    quoted: bool = False


TABS = Table("\t")


def at(where: tuple[Path, int]) -> str:
    """Return a place in a listing for people; line 0 is the file itself."""
    return f"{where[0]}, line {where[1]}" if where[1] else str(where[0])


def key_of(folder: Path, place: Path) -> str:
    """Return the path of a file as an index has it: relative to the corpus's folder where it is in there, else as it is."""
    return str(place.relative_to(folder) if place.is_relative_to(folder) else place)


def amount(value: str) -> float:
    """Return a number of a listing that cannot be negative or without end, such as seconds.

    Raises:
        ValueError: it is, or it is no number.
    """
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"expected a finite number from 0, got {value}")
    return number


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a UTF-8 text file with their numbers from 1, without their ends.

    Raises:
        CorpusError: the file cannot be read, or a line is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of it); save it as UTF-8.") from error
    except OSError as error:
        raise CorpusError(f"{path} cannot be read ({error.strerror}); put it there or correct its rights.") from error


def rows(path: Path, table: Table, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the rows of a table whose first line names its columns, with the number of the line, values without spaces around.

    Args:
        path: the file, UTF-8.
        table: how it is written; of several delimiters the one that the first line has.
        columns: those that it must have; others may be there.

    Raises:
        CorpusError: the file cannot be read, lacks a column, or has a row of another length; the message has file and line.
    """
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if table.quoted else csv.QUOTE_NONE
    reader = csv.reader((line + "\n" for _, line in lines(path)), delimiter=table.delimiter, quoting=quoting)
    try:
        names = next(reader, [])
        missing = [name for name in columns if name not in names]
        if missing:
            found = ", ".join(names) or "nothing"
            raise CorpusError(f"The first line of {path} lacks the columns {', '.join(missing)} (it has: {found}); name them there.")
        for row in reader:
            if len(row) != len(names):
                if not row:
                    continue
                raise CorpusError(
                    f"{path}, line {reader.line_num}: too many or too few values ({len(row)} for {len(names)} columns); "
                    "mend the line, or quote a text that has the separator in it."
                )
            yield reader.line_num, {name: value.strip() for name, value in zip(names, row, strict=True)}
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num}: {error}; mend the line.") from error


def delimiter_of(path: Path, known: Sequence[str]) -> str:
    """Return the one of the known delimiters that the first line of a table has; the first of them where it has none."""
    first = next(lines(path), (1, ""))[1]
    return max(known, key=lambda delimiter: (first.count(delimiter), -known.index(delimiter)))
