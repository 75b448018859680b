"""Corpora of recorded speech, read in place: any folder with a manifest, and folders of single spoken digits."""

import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedclip.speech.corpus import SAMPLE_RATE, Utterance
from fedclip.speech.errors import CorpusError
from fedclip.speech.grammar import DIGITS
from fedclip.speech.options import ManifestOptions, SpokenDigitsOptions
from fedclip.speech.recordings import Index, Recording, expect_folder, find_recording, read, seconds_a_byte, speaker_name

_DIGIT_NAME = re.compile(r"(\d)_(.+)_(\d+)\.wav")
_PUBLISHED_TEST = range(5)


@dataclass(frozen=True)
class ManifestCorpus:
    """Recordings listed in a manifest.

    Guarantees:
        Whether an utterance or a speaker is held out depends on its own name alone, not on the seed or on what else is listed.
        With `hold_out` "speakers", no held-out speaker is trained on.
    """

    options: ManifestOptions
    index: Index

    @classmethod
    def open(cls, options: ManifestOptions, folder: Path) -> "ManifestCorpus":
        """Read `manifest.csv` or `manifest.tsv` of a folder and see that every file it names is there.

        Its first line names the columns: `speaker`, `path` (relative to the folder), `text` and, optionally, `split` (train or
        test) and `language` (a code such as "fr", which says how the text is normalised). Other columns are ignored.

        Raises:
            CorpusError: no such folder, manifest, column or file, or a value that cannot be used; the message has the line.
        """
        rows = list(_manifest_rows(folder))
        splits = any("split" in row for _, row in rows)
        if options.hold_out == "split" and not splits:
            raise CorpusError(f"hold_out is 'split', but the manifest in {folder} lacks the column 'split'; add it or change hold_out.")
        by_split = splits and options.hold_out in ("auto", "split")
        train: dict[str, list[Recording]] = {}
        held_out: dict[str, list[Recording]] = {}
        seen: dict[str, str] = {}
        for where, row in rows:
            if row["path"] in seen:
                raise CorpusError(f"{where}: {row['path']} is already listed at {seen[row['path']]}; leave one of the two out.")
            seen[row["path"]] = where
            if by_split:
                if row["split"] not in ("train", "test"):
                    raise CorpusError(f"{where}: the split is {row['split']!r}; expected 'train' or 'test'.")
                reserved = row["split"] == "test"
            else:
                reserved = _fraction(row["speaker" if options.hold_out == "speakers" else "path"]) < options.held_out_fraction
            (held_out if reserved else train).setdefault(row["speaker"], []).append(_listed(where, folder, row))
        return cls(options, Index(folder, train, held_out))

    @cached_property
    def recipe(self) -> str:
        """A digest of the recordings and the options."""
        return self.index.digest("manifest", self.options.model_dump_json())

    @property
    def cacheable(self) -> bool:
        """Whether a speaker's utterances are the same each round: when their number is not limited."""
        return self.options.utterances is None

    @property
    def train_speakers(self) -> int:
        """How many speakers have training utterances."""
        return len(self.index.train_names)

    @property
    def held_out_speakers(self) -> int:
        """How many speakers have held-out utterances."""
        return len(self.index.held_out_names)

    def check(self) -> None:
        """Read the header of every recording.

        Raises:
            CorpusError: a recording is unreadable or empty; the message names the first such file.
        """
        self.index.check()

    def train(self, speaker: int, rng: np.random.Generator) -> list[Utterance]:
        """Return a speaker's training utterances, or as many of them as the options allow, drawn by `rng`."""
        recordings = self.index.train[speaker_name(self.index.train_names, speaker, "training")]
        limit = self.options.utterances
        if limit is not None and limit < len(recordings):
            recordings = tuple(recordings[i] for i in sorted(rng.choice(len(recordings), size=limit, replace=False)))
        return [Utterance(read(recording), recording.text, recording.language) for recording in recordings]

    def train_seconds(self, speaker: int) -> float:
        """Return about how long `train` is, from the files' sizes and one header."""
        recordings = self.index.train[speaker_name(self.index.train_names, speaker, "training")]
        share = min(self.options.utterances or len(recordings), len(recordings)) / len(recordings)
        return share * seconds_a_byte(recordings[0]) * sum(recording.size for recording in recordings)

    def held_out(self, speaker: int) -> list[Utterance]:
        """Return a speaker's held-out utterances."""
        recordings = self.index.held_out[speaker_name(self.index.held_out_names, speaker, "held-out")]
        return [Utterance(read(recording), recording.text, recording.language) for recording in recordings]


@dataclass(frozen=True)
class SpokenDigitsCorpus:
    """Connected digits, joined from recordings of single digits by the same speaker with pauses between them.

    Guarantees:
        Each held-out recording is heard exactly once, in utterances that the seed alone decides.
        A round uses no recording of a speaker twice, and no held-out recording is ever trained on.
        With `hold_out` a speaker's name, that speaker is not trained on.
    """

    options: SpokenDigitsOptions
    index: Index
    seed: int

    @classmethod
    def open(cls, options: SpokenDigitsOptions, folder: Path, seed: int) -> "SpokenDigitsCorpus":
        """List `recordings/<digit>_<speaker>_<number>.wav` of a folder: the layout of the Free Spoken Digit Dataset.

        Raises:
            CorpusError: no such folder, no such recordings, or no speaker of the name to be held out.
        """
        recordings = expect_folder(expect_folder(folder) / "recordings")
        train: dict[str, list[Recording]] = {}
        held_out: dict[str, list[Recording]] = {}
        speakers = set()
        for path in sorted(recordings.glob("*.wav")):
            match = _DIGIT_NAME.fullmatch(path.name)
            if match is None:
                raise CorpusError(f"{path} is not named <digit>_<speaker>_<number>.wav; rename it or move it out of the folder.")
            digit, speaker, number = match.groups()
            speakers.add(speaker)
            reserved = int(number) in _PUBLISHED_TEST if options.hold_out == "recordings" else speaker == options.hold_out
            (held_out if reserved else train).setdefault(speaker, []).append(find_recording(path, DIGITS[int(digit)]))
        if not speakers:
            raise CorpusError(f"{recordings} has no .wav files; is data_dir the folder that has the folder 'recordings' in it?")
        if options.hold_out not in ("recordings", *speakers):
            known = ", ".join(sorted(speakers))
            raise CorpusError(f"hold_out is {options.hold_out!r}, but {folder} has no such speaker; choose 'recordings' or one of {known}.")
        return cls(options, Index(folder, train, held_out), seed)

    @cached_property
    def recipe(self) -> str:
        """A digest of the recordings, the options and the seed."""
        return self.index.digest("spoken digits", self.options.model_dump_json(), self.seed)

    @property
    def cacheable(self) -> bool:
        """False: the digits are joined anew each round."""
        return False

    @property
    def train_speakers(self) -> int:
        """How many speakers are trained on."""
        return len(self.index.train_names)

    @property
    def held_out_speakers(self) -> int:
        """How many speakers have held-out recordings."""
        return len(self.index.held_out_names)

    def check(self) -> None:
        """Read the header of every recording.

        Raises:
            CorpusError: a recording is unreadable or empty; the message names the first such file.
        """
        self.index.check()

    def train(self, speaker: int, rng: np.random.Generator) -> list[Utterance]:
        """Return utterances of a speaker's training recordings, joined by `rng`."""
        recordings = self.index.train[speaker_name(self.index.train_names, speaker, "training")]
        return self._join(recordings, rng, self.options.utterances)

    def train_seconds(self, speaker: int) -> float:
        """Return about how long `train` is, from the files' sizes and one header."""
        recordings = self.index.train[speaker_name(self.index.train_names, speaker, "training")]
        mean = seconds_a_byte(recordings[0]) * sum(recording.size for recording in recordings) / len(recordings)
        length = sum(self.options.digits) / 2
        digits = min(self.options.utterances * length, len(recordings))
        return digits * mean + digits * (1 - 1 / length) * sum(self.options.pause) / 2

    def held_out(self, speaker: int) -> list[Utterance]:
        """Return utterances of all held-out recordings of a speaker, joined by the seed and the speaker's name."""
        name = speaker_name(self.index.held_out_names, speaker, "held-out")
        key = hashlib.blake2b(f"spoken digits/{self.seed}/{name}".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
        recordings = self.index.held_out[name]
        return self._join(recordings, rng, len(recordings))

    def _join(self, recordings: Sequence[Recording], rng: np.random.Generator, limit: int) -> list[Utterance]:
        """Join recordings in random order to at most `limit` utterances; the last one may be shorter than the options say."""
        order = [recordings[i] for i in rng.permutation(len(recordings))]
        utterances: list[Utterance] = []
        while order and len(utterances) < limit:
            count = int(rng.integers(*self.options.digits, endpoint=True))
            chosen, order = order[:count], order[count:]
            pieces = [read(chosen[0])]
            for recording in chosen[1:]:
                pieces += [np.zeros(round(float(rng.uniform(*self.options.pause)) * SAMPLE_RATE), np.float32), read(recording)]
            utterances.append(Utterance(np.concatenate(pieces), " ".join(recording.text for recording in chosen)))
        return utterances


def _manifest_rows(folder: Path) -> Iterable[tuple[str, dict[str, str]]]:
    """Yield each line of the manifest with where it stands, its speaker, path and text known not to be empty."""
    names = [name for name in ("manifest.csv", "manifest.tsv") if (expect_folder(folder) / name).is_file()]
    if len(names) != 1:
        raise CorpusError(f"Expected either manifest.csv or manifest.tsv in {folder}, found {' and '.join(names) or 'neither'}; keep one.")
    path = folder / names[0]
    tabs = names[0].endswith(".tsv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # Quotation marks mean nothing in a tab-separated file: texts have them as they are.
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
            missing = [name for name in ("speaker", "path", "text") if name not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise CorpusError(f"The first line of {path} lacks the columns {', '.join(missing)} (it has: {found}); name them there.")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or any(value is None for value in row.values()):
                    raise CorpusError(f"{where}: too many or too few values; quote a text that has the separator in it.")
                yield where, {name: value.strip() for name, value in row.items()}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error


def _listed(where: str, folder: Path, row: Mapping[str, str]) -> Recording:
    for name in ("speaker", "path", "text"):
        if not row[name]:
            raise CorpusError(f"{where}: the {name} is empty; fill it in or leave the line out.")
    try:
        return find_recording(folder / row["path"], row["text"], row.get("language", ""))
    except CorpusError as error:
        raise CorpusError(f"{where}: {error}") from error


def _fraction(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
