"""The layouts of published corpora: which sets are in a folder, which files they depend on, and what they list."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedclip.speech.errors import CorpusError
from fedclip.speech.find import common_voice_languages, folders, language_of, librispeech_sets, tedlium_sets, voxpopuli_languages
from fedclip.speech.listing import TABS, Entry, Skip, Table, amount, at, delimiter_of, lines, rows
from fedclip.speech.manifest import manifest_depends, manifest_entries
from fedclip.speech.options import CommonVoiceOptions, LibriSpeechOptions, SpeechCommandsOptions, TedLiumOptions, VoxPopuliOptions

Sizes = Mapping[str, int]
"""The bytes of each file that an index depends on, by its path relative to the corpus's folder."""

Listed = Iterator[Entry | Skip]


@dataclass(frozen=True)
class Layout:
    """How a kind of corpus is read.

    Args:
        sets: the names of the sets that are in a folder.
        depends: the files and folders that an index of some sets depends on.
        entries: what these sets list, in any order, given the files that are there.
        strict: whether what is wrong with one recording is an error: a person's own list can be mended.
    """

    sets: Callable[[Path, Any], Sequence[str]]
    depends: Callable[[Path, Any, Sequence[str]], Iterator[Path]]
    entries: Callable[[Path, Any, Sequence[str], Sizes], Listed]
    strict: bool = False


# LibriSpeech (Panayotov et al., 2015)

_UTTERANCE: Final = re.compile(r"(\d+)-(\d+)-\d+")


def _librispeech_depends(folder: Path, options: LibriSpeechOptions, sets: Sequence[str]) -> Iterator[Path]:
    yield from (folder / name for name in ("SPEAKERS.TXT", *sets))


def _librispeech_entries(folder: Path, options: LibriSpeechOptions, sets: Sequence[str], sizes: Sizes) -> Listed:
    subsets = _librispeech_speakers(folder / "SPEAKERS.TXT") if "SPEAKERS.TXT" in sizes else None
    for name in sets:
        unlisted = {path for path in sizes if path.startswith(f"{name}/") and path.endswith(".flac")}
        for listing in sorted(path for path in sizes if path.startswith(f"{name}/") and path.endswith(".trans.txt")):
            chapter, speaker = listing.rpartition("/")[0], listing.split("/")[1]
            if subsets is not None and subsets.get(speaker) != name:
                known = subsets.get(speaker, "none at all")
                raise CorpusError(f"{folder / 'SPEAKERS.TXT'}: it has speaker {speaker} of {name} in {known}; mend one of them.")
            for number, line in lines(folder / listing):
                utterance, _, text = line.strip().partition(" ")
                match = _UTTERANCE.fullmatch(utterance)
                if match is None or match[1] != speaker:
                    raise CorpusError(f"{folder / listing}, line {number}: expected {speaker}-<chapter>-<number> TEXT, got {line[:60]!r}.")
                path = f"{chapter}/{utterance}.flac"
                unlisted.discard(path)
                yield Entry(path, speaker, text, name, (folder / listing, number), "en")
        yield from (Skip("recording that no listing has", path) for path in sorted(unlisted))


def _librispeech_speakers(path: Path) -> dict[str, str]:
    """Return the set of each speaker: `14 | F | train-clean-360 | 25.03 | name`."""
    found = {}
    for number, line in lines(path):
        if line.strip() and not line.startswith(";"):
            parts = [part.strip() for part in line.split("|", maxsplit=4)]
            if len(parts) < 3 or not parts[0].isdigit():
                raise CorpusError(f"{path}, line {number}: expected ID | SEX | SUBSET | MINUTES | NAME, got {line[:60]!r}.")
            found[parts[0]] = parts[2]
    return found


# Common Voice (Ardila et al., 2020)


def _languages(folder: Path, options: CommonVoiceOptions | VoxPopuliOptions) -> list[Path]:
    there = common_voice_languages(folder) if isinstance(options, CommonVoiceOptions) else voxpopuli_languages(folder)
    names = [place.name for place in there]
    unknown = sorted({*options.languages} - {*names})
    if unknown:
        raise CorpusError(f"languages: {', '.join(unknown)}: no such folder in {folder}; there are: {', '.join(names)}.")
    return [place for place in there if place.name in options.languages or not options.languages]


def _common_voice_sets(folder: Path, options: CommonVoiceOptions) -> list[str]:
    there = [{path.stem for path in place.glob("*.tsv")} for place in _languages(folder, options)]
    return [name for name in ("train", "dev", "test", "validated", "other", "invalidated") if any(name in names for names in there)]


def _common_voice_depends(folder: Path, options: CommonVoiceOptions, sets: Sequence[str]) -> Iterator[Path]:
    for place in _languages(folder, options):
        yield from (place / f"{name}.tsv" for name in (*sets, "clip_durations"))
        yield place / "clips"


def _common_voice_entries(folder: Path, options: CommonVoiceOptions, sets: Sequence[str], sizes: Sizes) -> Listed:
    for place in _languages(folder, options):
        prefix, told = "" if place == folder else f"{place.name}/", language_of(place, folder)
        seconds = _clip_durations(place / "clip_durations.tsv") if f"{prefix}clip_durations.tsv" in sizes else {}
        for name in sets:
            if f"{prefix}{name}.tsv" not in sizes:
                continue
            listing = place / f"{name}.tsv"
            for number, row in rows(listing, TABS, ("client_id", "path", "sentence")):
                # Old releases name clips without their ending.
                clip = row["path"] if row["path"].endswith((".mp3", ".wav", ".ogg", ".flac")) else f"{row['path']}.mp3"
                if not row["path"]:
                    raise CorpusError(f"{listing}, line {number}: the path is empty; fill it in or leave the line out.")
                language = row.get("locale") or told
                path = f"{prefix}clips/{clip}"
                yield Entry(path, row["client_id"], row["sentence"], name, (listing, number), language, seconds=seconds.get(clip))


def _clip_durations(path: Path) -> dict[str, float]:
    """Return the seconds of each clip: newer releases list milliseconds."""
    found = {}
    for number, row in rows(path, TABS, ("clip",)):
        value = next((value for key, value in row.items() if key.startswith("duration")), "")
        try:
            found[row["clip"]] = amount(value) / 1000
        except ValueError:
            raise CorpusError(f"{path}, line {number}: expected milliseconds from 0, got {value!r}.") from None
    return found


# Speech Commands (Warden, 2018)

_COMMAND: Final = re.compile(r"(.+)_nohash_\d+\.wav")
_LISTS: Final = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def _speech_commands_sets(folder: Path, options: SpeechCommandsOptions) -> list[str]:
    return ["train", *(name for name, listing in _LISTS.items() if (folder / listing).is_file())]


def _speech_commands_depends(folder: Path, options: SpeechCommandsOptions, sets: Sequence[str]) -> Iterator[Path]:
    yield from (folder / listing for listing in _LISTS.values())
    yield from (place for place in folders(folder) if not place.name.startswith("_"))


def _speech_commands_entries(folder: Path, options: SpeechCommandsOptions, sets: Sequence[str], sizes: Sizes) -> Listed:
    listed: dict[str, tuple[str, tuple[Path, int]]] = {}
    for name, listing in _LISTS.items():
        for number, line in lines(folder / listing) if listing in sizes else ():
            path = line.strip()
            if path in listed:
                raise CorpusError(f"{folder / listing}, line {number}: {path} is already listed at {at(listed[path][1])}; keep one.")
            if path:
                listed[path] = (name, (folder / listing, number))
    for path in [*sizes, *(path for path in listed if path not in sizes)]:
        if not path.endswith(".wav"):
            continue
        word, _, file = path.rpartition("/")
        match = _COMMAND.fullmatch(file)
        name, where = listed.get(path, ("train", (folder / path, 0)))
        if match is None:
            yield Skip("not named as published", path)
        elif name in sets:
            yield Entry(path, match[1], word, name, where, "en")


# TED-LIUM (Hernandez et al., 2018)

_YEAR: Final = re.compile(r"_\d{4}[A-Za-z]?$")
_MARKUP: Final = re.compile(r"<[^>]*>|\{[^}]*\}|\(\d+\)")
_UNSCORED: Final = "ignore_time_segment_in_scoring"


def _tedlium_place(folder: Path, name: str) -> Path:
    return folder / name if (folder / name / "stm").is_dir() else folder


def _tedlium_depends(folder: Path, options: TedLiumOptions, sets: Sequence[str]) -> Iterator[Path]:
    for name in sets:
        yield from (_tedlium_place(folder, name) / part for part in ("stm", "sph"))


def _tedlium_entries(folder: Path, options: TedLiumOptions, sets: Sequence[str], sizes: Sizes) -> Listed:
    for name in sets:
        inside = "" if _tedlium_place(folder, name) == folder else f"{name}/"
        for listing in sorted(path for path in sizes if path.startswith(f"{inside}stm/") and path.endswith(".stm")):
            for number, line in lines(folder / listing):
                if line.strip() and not line.startswith(";;"):
                    yield _segment(line, name, f"{inside}sph/", (folder / listing, number))


def _segment(line: str, name: str, audio: str, where: tuple[Path, int]) -> Entry | Skip:
    """Return what a line `talk channel speaker start end <labels> text` says.

    The speaker of a talk is named after it, with the year: one person's talks become one user's. Marks such as <unk> and {SMACK} stand
    for noises and are no text.
    """
    parts = line.split(maxsplit=5)
    try:
        start, end = amount(parts[3]), amount(parts[4])
    except (IndexError, ValueError):
        raise CorpusError(
            f"{at(where)}: expected TALK CHANNEL SPEAKER START END <LABELS> TEXT with seconds from 0, got {line[:60]!r}."
        ) from None
    if _UNSCORED in line or parts[2] == "inter_segment_gap":
        return Skip("segment that is not scored", at(where))
    if not start < end:
        return Skip("segment that ends before it begins", at(where))
    # The transcripts set endings apart: "it 's".
    text = " ".join(_MARKUP.sub(" ", parts[5]).split()).replace(" '", "'") if len(parts) > 5 else ""
    return Entry(f"{audio}{parts[0]}.sph", _YEAR.sub("", parts[2]), text, name, where, "en", start, end, end - start)


# VoxPopuli (Wang et al., 2021): what voxpopuli.get_asr_data writes


def _voxpopuli_sets(folder: Path, options: VoxPopuliOptions) -> list[str]:
    there = [{path.stem for path in place.glob("asr_*.tsv")} for place in _languages(folder, options)]
    return [name for name in ("train", "dev", "test") if any(f"asr_{name}" in names for names in there)]


def _voxpopuli_depends(folder: Path, options: VoxPopuliOptions, sets: Sequence[str]) -> Iterator[Path]:
    for place in _languages(folder, options):
        yield from (place / f"asr_{name}.tsv" for name in sets)
        yield from (year for year in folders(place) if re.fullmatch(r"\d{4}", year.name))


def _voxpopuli_entries(folder: Path, options: VoxPopuliOptions, sets: Sequence[str], sizes: Sizes) -> Listed:
    for place in _languages(folder, options):
        prefix, told = "" if place == folder else f"{place.name}/", language_of(place, folder)
        for name in sets:
            listing = place / f"asr_{name}.tsv"
            if f"{prefix}asr_{name}.tsv" not in sizes:
                continue
            table = Table(delimiter_of(listing, ("\t", ";", "|")))
            for number, row in rows(listing, table, ("id", "speaker_id", options.text)):
                if not re.match(r"\d{4}", row["id"]):
                    raise CorpusError(f"{listing}, line {number}: expected an id that begins with a year, got {row['id']!r}.")
                path = f"{prefix}{row['id'][:4]}/{row['id']}.ogg"
                speaker = "" if row["speaker_id"] == "None" else row["speaker_id"]
                yield Entry(path, speaker, row[options.text], name, (listing, number), told)


LAYOUTS: Final[Mapping[str, Layout]] = {
    "librispeech": Layout(lambda folder, _: librispeech_sets(folder), _librispeech_depends, _librispeech_entries),
    "common_voice": Layout(_common_voice_sets, _common_voice_depends, _common_voice_entries),
    "speech_commands": Layout(_speech_commands_sets, _speech_commands_depends, _speech_commands_entries),
    "tedlium": Layout(lambda folder, _: tedlium_sets(folder), _tedlium_depends, _tedlium_entries),
    "voxpopuli": Layout(_voxpopuli_sets, _voxpopuli_depends, _voxpopuli_entries),
    "manifest": Layout(lambda *_: ("train", "test"), manifest_depends, manifest_entries, strict=True),
}
"""The layout of each kind of corpus that is read through an index."""
