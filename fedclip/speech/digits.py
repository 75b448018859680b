"""Connected digits from a folder of single spoken digits."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedclip.speech.corpus import SAMPLE_RATE, Utterance
from fedclip.speech.errors import CorpusError
from fedclip.speech.grammar import DIGITS
from fedclip.speech.index import Shelf, build_index, digest_of, expect_both
from fedclip.speech.index_file import stamp_of, walk
from fedclip.speech.listing import Entry
from fedclip.speech.options import SpokenDigitsOptions
from fedclip.speech.recordings import FORMAT, Recording, check, expect_folder, read, seconds_a_byte

_DIGIT_NAME = re.compile(r"(\d)_(.+)_(\d+)\.wav")
_PUBLISHED_TEST = range(5)


@dataclass(frozen=True)
class SpokenDigitsCorpus:
    """Connected digits, joined from recordings of single digits by the same speaker with pauses between them.

    Guarantees:
        Each held-out recording is heard exactly once, in utterances that the seed alone decides.
        A round uses no recording of a speaker twice, and no held-out recording is ever trained on.
        With `hold_out` a speaker's name, that speaker is not trained on.
    """

    options: SpokenDigitsOptions
    trained: Shelf
    reserved: Shelf
    seed: int

    @classmethod
    def open(cls, options: SpokenDigitsOptions, folder: Path, seed: int) -> "SpokenDigitsCorpus":
        """List `recordings/<digit>_<speaker>_<number>.wav` of a folder: the layout of the Free Spoken Digit Dataset.

        Raises:
            CorpusError: no such folder, no such recordings, or no speaker of the name to be held out.
        """
        files = list(walk(expect_folder(folder), [expect_folder(folder / "recordings")]))
        stamp, sizes = stamp_of(files), {path: size for path, size, _ in files}
        entries = list(_entries(folder, sizes, options))
        if not entries:
            raise CorpusError(f"{folder / 'recordings'} has no .wav files; is data_dir the folder that has the folder 'recordings' in it?")
        speakers = {entry.speaker for entry in entries}
        if options.hold_out not in ("recordings", *speakers):
            known = ", ".join(sorted(speakers))
            raise CorpusError(f"hold_out is {options.hold_out!r}, but {folder} has no such speaker; choose 'recordings' or one of {known}.")
        index = build_index(folder, entries, sizes, held_out=("test",), strict=True, stamp=stamp)
        trained, reserved = (Shelf(index, np.flatnonzero(index.of_sets([name]))) for name in ("train", "test"))
        expect_both(folder, trained, reserved, "recordings; add recordings or choose another hold_out.")
        return cls(options, trained, reserved, seed)

    @cached_property
    def recipe(self) -> str:
        """A digest of the recordings, the options and the seed."""
        index = self.trained.index
        return digest_of("spoken digits", FORMAT, index.stamp, index.content, self.options.model_dump_json(), self.seed)

    @property
    def cacheable(self) -> bool:
        """False: the digits are joined anew each round."""
        return False

    @property
    def train_speakers(self) -> int:
        """How many speakers are trained on."""
        return len(self.trained)

    @property
    def held_out_speakers(self) -> int:
        """How many speakers have held-out recordings."""
        return len(self.reserved)

    def check(self) -> None:
        """Read the header of every recording.

        Raises:
            CorpusError: a recording is unreadable or empty; the message names the first such file.
        """
        check(recording for shelf in (self.trained, self.reserved) for recording in shelf.recordings(shelf.chosen))

    def train(self, speaker: int, rng: np.random.Generator) -> list[Utterance]:
        """Return utterances of a speaker's training recordings, joined by `rng`."""
        recordings = self.trained.recordings(self.trained.numbers(speaker))
        return self._join(recordings, rng, self.options.utterances)

    def train_seconds(self, speaker: int) -> float:
        """Return about how long `train` is, from the files' sizes and one header."""
        recordings = self.trained.recordings(self.trained.numbers(speaker))
        mean = seconds_a_byte(recordings[0]) * sum(recording.size for recording in recordings) / len(recordings)
        length = sum(self.options.digits) / 2
        digits = min(self.options.utterances * length, len(recordings))
        return digits * mean + digits * (1 - 1 / length) * sum(self.options.pause) / 2

    def held_out(self, speaker: int) -> list[Utterance]:
        """Return utterances of all held-out recordings of a speaker, joined by the seed and the speaker's name."""
        recordings = self.reserved.recordings(self.reserved.numbers(speaker, "held-out"))
        name = self.reserved.name(speaker)
        key = hashlib.blake2b(f"spoken digits/{self.seed}/{name}".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
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


def _entries(folder: Path, sizes: Iterable[str], options: SpokenDigitsOptions) -> Iterator[Entry]:
    for path in sizes:
        if not path.endswith(".wav") or path.count("/") != 1:
            continue
        match = _DIGIT_NAME.fullmatch(path.partition("/")[2])
        if match is None:
            raise CorpusError(f"{folder / path} is not named <digit>_<speaker>_<number>.wav; rename it or move it out of the folder.")
        digit, speaker, number = match.groups()
        reserved = int(number) in _PUBLISHED_TEST if options.hold_out == "recordings" else speaker == options.hold_out
        yield Entry(path, speaker, DIGITS[int(digit)], "test" if reserved else "train", (folder / path, 0))
