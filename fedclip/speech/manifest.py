"""The layout of recordings of one's own: a manifest, a line an utterance."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedclip.speech.errors import CorpusError
from fedclip.speech.listing import TABS, Entry, Table, at, key_of, rows
from fedclip.speech.options import ManifestOptions

_COMMAS: Final = Table(",", quoted=True)


def manifest_depends(folder: Path, options: ManifestOptions, sets: Sequence[str]) -> Iterator[Path]:
    """Yield the manifest and what it lists."""
    listing = _listing(folder)
    yield listing
    for _, row in _rows(listing):
        if row["path"]:
            yield folder / row["path"]


def manifest_entries(folder: Path, options: ManifestOptions, sets: Sequence[str], sizes: Mapping[str, int]) -> Iterator[Entry]:
    """Yield what a manifest lists.

    Its first line names the columns: `speaker`, `path` (relative to the folder), `text` and, optionally, `split` (train or test) and
    `language`. Other columns are ignored. Whether an utterance is held out depends on its own name, or its speaker's, alone: not on the
    seed or on what else is listed.

    Raises:
        CorpusError: no such manifest or column, or a value that cannot be used; the message has the line.
    """
    listing = _listing(folder)
    by_split = options.hold_out == "split"
    for number, row in _rows(listing):
        where = (listing, number)
        by_split = by_split or (options.hold_out == "auto" and "split" in row)
        if by_split and "split" not in row:
            raise CorpusError(f"hold_out is 'split', but {listing} lacks the column 'split'; add it or change hold_out.")
        for name in ("speaker", "path", "text"):
            if not row[name]:
                raise CorpusError(f"{at(where)}: the {name} is empty; fill it in or leave the line out.")
        if by_split:
            if row["split"] not in ("train", "test"):
                raise CorpusError(f"{at(where)}: the split is {row['split']!r}; expected 'train' or 'test'.")
            split = row["split"]
        else:
            reserved = fraction(row["speaker" if options.hold_out == "speakers" else "path"]) < options.held_out_fraction
            split = "test" if reserved else "train"
        yield Entry(key_of(folder, folder / row["path"]), row["speaker"], row["text"], split, where, row.get("language", ""))


def fraction(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") / 2**64


def _listing(folder: Path) -> Path:
    names = [name for name in ("manifest.csv", "manifest.tsv") if (folder / name).is_file()]
    if len(names) != 1:
        raise CorpusError(f"Expected either manifest.csv or manifest.tsv in {folder}, found {' and '.join(names) or 'neither'}; keep one.")
    return folder / names[0]


def _rows(listing: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # Quotation marks mean nothing in a tab-separated file: texts have them as they are.
    return rows(listing, TABS if listing.suffix == ".tsv" else _COMMAS, ("speaker", "path", "text"))
