"""Which corpus lies in a folder, told by its layout, and where in it. Looks at names alone; imports neither PyTorch nor NumPy."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fedclip.asr.languages import LANGUAGES, code_of

_TAG: Final = re.compile(r"[A-Za-z]{2}([-_][A-Za-z]{2})?")


def librispeech(folder: Path) -> Path | None:
    """Return the folder of `train-clean-100` and its like: this one or its `LibriSpeech`."""
    return _first((folder, folder / "LibriSpeech"), lambda place: bool(librispeech_sets(place)))


def librispeech_sets(folder: Path) -> list[str]:
    """Return the sets that are in a folder, sorted: those of LibriSpeech, of Mini LibriSpeech, and others that are named like them."""
    return [place.name for place in folders(folder) if place.name.startswith(("train-", "dev-", "test-"))]


def common_voice(folder: Path) -> Path | None:
    """Return the folder of a language or of a release: this one or the one release in it."""
    return _first((folder, *folders(folder)), lambda place: bool(common_voice_languages(place)))


def common_voice_languages(folder: Path) -> list[Path]:
    """Return the folders of languages of a release, sorted; of a language's folder itself alone."""
    return [place for place in (folder, *folders(folder)) if (place / "clips").is_dir() and any(place.glob("*.tsv"))]


def speech_commands(folder: Path) -> Path | None:
    """Return the folder of the words: this one, or the one in it whose name begins with `speech_commands`."""
    inner = [place for place in folders(folder) if place.name.lower().startswith("speech")]
    return _first((folder, *inner), lambda place: any((place / name).is_file() for name in ("testing_list.txt", "validation_list.txt")))


def tedlium(folder: Path) -> Path | None:
    """Return the folder of `train`, `dev` and `test`: of release 3 `legacy`, or where that is not there the whole folder's `data`."""
    inner = [place for place in folders(folder) if place.name.startswith("TEDLIUM")]
    places = [place / part for place in (folder, *inner) for part in ("legacy", "", "data")]
    return _first(places, lambda place: bool(tedlium_sets(place)))


def tedlium_sets(folder: Path) -> list[str]:
    """Return the sets that a TED-LIUM folder has transcripts of; a folder of transcripts without sets is `train`."""
    sets = [name for name in ("train", "dev", "test") if (folder / name / "stm").is_dir()]
    return sets or (["train"] if (folder / "stm").is_dir() else [])


def voxpopuli(folder: Path) -> Path | None:
    """Return the folder of a language or of the languages: this one or its `transcribed_data`."""
    return _first((folder, folder / "transcribed_data"), lambda place: bool(voxpopuli_languages(place)))


def voxpopuli_languages(folder: Path) -> list[Path]:
    """Return the folders of languages, sorted; of a language's folder itself alone."""
    return [place for place in (folder, *folders(folder)) if any(place.glob("asr_*.tsv"))]


def manifest(folder: Path) -> Path | None:
    """Return the folder itself where it has a manifest."""
    return folder if any((folder / name).is_file() for name in ("manifest.csv", "manifest.tsv")) else None


def spoken_digits(folder: Path) -> Path | None:
    """Return the folder itself where it has recordings of digits."""
    return folder if (folder / "recordings").is_dir() else None


def tuxpaint_stamps(folder: Path) -> Path | None:
    """Return the folder of the stamps, which has a folder a topic: this one, or the one of the package unpacked into it."""
    return _first((folder / "usr/share/tuxpaint/stamps", folder), lambda place: any(place.glob("*/**/*_desc_??.ogg")))


FINDERS: Final[Mapping[str, Callable[[Path], Path | None]]] = {
    "manifest": manifest,
    "spoken_digits": spoken_digits,
    "librispeech": librispeech,
    "common_voice": common_voice,
    "speech_commands": speech_commands,
    "tedlium": tedlium,
    "voxpopuli": voxpopuli,
    "tuxpaint_stamps": tuxpaint_stamps,
}
"""For each kind of corpus, where in a folder it is, or None."""

EXPECTED: Final[Mapping[str, str]] = {
    "manifest": "a manifest.csv or manifest.tsv with the columns speaker, path and text",
    "spoken_digits": "recordings/<digit>_<speaker>_<number>.wav",
    "librispeech": "train-clean-100/<speaker>/<chapter>/",
    "common_voice": "train.tsv and clips/",
    "speech_commands": "testing_list.txt and <word>/<speaker>_nohash_<number>.wav",
    "tedlium": "train/stm/<talk>.stm and train/sph/<talk>.sph",
    "voxpopuli": "<language>/asr_train.tsv and <language>/<year>/<id>.ogg",
    "tuxpaint_stamps": "the stamps of `make stamps`",
}
"""For each kind of corpus, what a person should find in its folder."""


def language_of(place: Path, corpus: Path) -> str:
    """Return the language that the name of a folder of recordings tells, "" for none.

    A folder in that of the corpus is named after its language; the folder of the corpus may have any name, of which a known code is
    taken for one.
    """
    return place.name if place != corpus or (_TAG.fullmatch(place.name) and code_of(place.name) in LANGUAGES) else ""


def languages_told(kind: str, folder: Path) -> tuple[str, ...]:
    """Return the codes of the languages that the layout of a folder tells, as far as their letters are known; none for most kinds."""
    listing = {"common_voice": common_voice_languages, "voxpopuli": voxpopuli_languages}.get(kind)
    corpus = FINDERS[kind](folder.absolute())
    if listing is None or corpus is None:
        return ()
    codes = (code_of(language_of(place, corpus)) for place in listing(corpus))
    return tuple(dict.fromkeys(code for code in codes if code in LANGUAGES))


def folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden ones."""
    return sorted(place for place in folder.iterdir() if place.is_dir() and not place.name.startswith(".")) if folder.is_dir() else []


def _first(places: Iterable[Path], fits: Callable[[Path], bool]) -> Path | None:
    found: Iterator[Path] = (place for place in places if place.is_dir() and fits(place))
    return next(found, None)
