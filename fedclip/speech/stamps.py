"""The descriptions of Tux Paint's stamps: short phrases in several languages, one voice each, read in place."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fedclip.asr.text import Alphabet
from fedclip.speech.corpus import Utterance
from fedclip.speech.errors import CorpusError
from fedclip.speech.find import tuxpaint_stamps
from fedclip.speech.index import Shelf, build_index, digest_of, expect_both
from fedclip.speech.index_file import stamp_of, walk
from fedclip.speech.listing import Entry
from fedclip.speech.manifest import fraction
from fedclip.speech.options import StampsOptions
from fedclip.speech.recordings import FORMAT, Recording, expect_folder, seconds_a_byte, utterances

FASTEST = 25.0
"""Characters a second beyond which a recording says something else than its text: the voices speak 9 to 16, at the median."""


@dataclass(frozen=True)
class StampsCorpus:
    """Phrases by language, dealt to pseudo-users: all users of a language have the same voice, and are not different people.

    Guarantees:
        Each text and each recording of a language is heard once, in training or held out: which of the two depends on the text alone.
        A held-out unit is all the held-out phrases of a language, so of a voice.
    """

    options: StampsOptions
    trained: Shelf
    reserved: Shelf

    @classmethod
    def open(cls, options: StampsOptions, folder: Path) -> "StampsCorpus":
        """List `NAME_desc_XX.ogg` with the text after `XX.utf8=` in `NAME.txt`, below a folder or the package unpacked into it.

        Left out: phrases without a text, with characters that the language lacks (digits, foreign letters: nobody knows here how
        they were spoken), said twice, or too short for their text.

        Raises:
            CorpusError: no such folder, no such recordings, fewer phrases than users, or a text that is not UTF-8.
        """
        stamps = tuxpaint_stamps(expect_folder(folder)) or folder
        files = list(walk(stamps, [stamps]))
        entries: list[Entry] = []
        for language in options.languages:
            phrases = list(_phrases(stamps, language))
            if not phrases:
                raise CorpusError(
                    f"{stamps} has no recordings *_desc_{language}.ogg with texts; is data_dir the folder that `make stamps` filled?"
                )
            reserved = {p for p in phrases if _fraction("held out", p) < options.held_out_fraction}
            entries += [_entry(stamps, p, language, "test") for p in phrases if p in reserved]
            rest = [p for p in phrases if p not in reserved]
            if len(rest) < options.users_per_language:
                raise CorpusError(
                    f"users_per_language: expected at most {len(rest)}, the phrases of '{language}' in {stamps} that are trained on, got "
                    f"{options.users_per_language}; lower it or held_out_fraction."
                )
            if options.deal == "random":
                rest.sort(key=lambda p: _fraction("deal", p))
            for user, share in enumerate(np.array_split(np.arange(len(rest)), options.users_per_language)):
                entries += [_entry(stamps, rest[i], f"{language}-{user:04d}", "train") for i in share]
        sizes = {path: size for path, size, _ in files}
        index = build_index(stamps, entries, sizes, held_out=("test",), strict=True, stamp=stamp_of(files))
        trained, reserved_shelf = (Shelf(index, np.flatnonzero(index.of_sets([name]))) for name in ("train", "test"))
        expect_both(stamps, trained, reserved_shelf, "phrases; change held_out_fraction.")
        return cls(options, trained, reserved_shelf)

    @property
    def note(self) -> str:
        """What every report on this corpus says."""
        languages = self.options.languages
        return (
            f"tuxpaint_stamps: {len(languages)} voice{'s' * (len(languages) > 1)}, one a language ({', '.join(languages)}); "
            f"the {self.train_speakers} users are parts of what they read, not different people"
        )

    @cached_property
    def recipe(self) -> str:
        """A digest of the recordings and the options."""
        index = self.trained.index
        return digest_of("tuxpaint stamps", FORMAT, index.stamp, index.content, self.options.model_dump_json())

    @property
    def cacheable(self) -> bool:
        """True: a user's phrases are the same each round."""
        return True

    @property
    def train_speakers(self) -> int:
        """How many pseudo-users there are."""
        return len(self.trained)

    @property
    def held_out_speakers(self) -> int:
        """How many languages have held-out phrases."""
        return len(self.reserved)

    def check(self) -> None:
        """Do nothing: `open` read every header."""

    def train(self, speaker: int, rng: np.random.Generator) -> list[Utterance]:
        """Return the phrases of a pseudo-user."""
        return utterances(self.trained.recordings(self.trained.numbers(speaker)))

    def train_seconds(self, speaker: int) -> float:
        """Return about how long `train` is, from the files' sizes and one header."""
        recordings = self.trained.recordings(self.trained.numbers(speaker))
        return seconds_a_byte(recordings[0]) * sum(recording.size for recording in recordings)

    def held_out(self, speaker: int) -> list[Utterance]:
        """Return the held-out phrases of a language."""
        return utterances(self.reserved.recordings(self.reserved.numbers(speaker, "held-out")))


def _entry(stamps: Path, phrase: Recording, speaker: str, split: str) -> Entry:
    path = phrase.path.relative_to(stamps).as_posix()
    return Entry(path, speaker, phrase.text, split, (phrase.path, 0), phrase.language)


def _phrases(stamps: Path, language: str) -> Iterator[Recording]:
    """Yield the recordings of a language that can be used, in the order of their paths, normalised texts with them."""
    alphabet = Alphabet((language,))
    seen: set[str | bytes] = set()
    ending = f"_desc_{language}.ogg"
    for path in sorted(stamps.rglob(f"*{ending}")):
        text = alphabet.normalise(_text(path.with_name(path.name.removesuffix(ending) + ".txt"), language))
        try:
            symbols = alphabet.encode(text)
        except ValueError:
            continue
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
        again = text in seen or digest in seen
        seen |= {text, digest}
        if again or not symbols:
            continue
        recording = Recording(path, text, path.stat().st_size, language=language)
        if len(symbols) <= FASTEST * seconds_a_byte(recording) * recording.size:
            yield recording


def _text(path: Path, language: str) -> str:
    """Return the text of a stamp in a language, empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); unpack the package anew.") from error
    found = re.compile(rf"{language}\.utf8=(.*)")
    return next((match[1] for line in lines if (match := found.match(line))), "")


def _fraction(purpose: str, recording: Recording) -> float:
    """Return a number in [0, 1) that depends on the purpose, the language and the text alone."""
    return fraction(f"{purpose}/{recording.language}/{recording.text}")
