"""A corpus of recordings in place: any listed one, published or of one's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from fedclip.speech.corpus import Utterance
from fedclip.speech.errors import CorpusError
from fedclip.speech.find import EXPECTED, FINDERS
from fedclip.speech.index import Index, Shelf, Skips, digest_of, expect_both
from fedclip.speech.index_file import Watch, open_index
from fedclip.speech.manifest import fraction
from fedclip.speech.options import ListedOptions, ManifestOptions
from fedclip.speech.published import LAYOUTS
from fedclip.speech.recordings import FORMAT, check, expect_folder, nominal_seconds_a_byte, seconds_a_byte, utterances

CHECKED = 5000
"""Files whose headers are all read before a run: of more, those that cannot be read are left out when it comes to them."""


@dataclass(frozen=True, eq=False)
class RecordedCorpus:
    """Recordings that a corpus lists.

    Guarantees:
        Whether a speaker belongs to the seed or to the federation depends on its name alone, and on no other speaker.
        Of published corpora no held-out speaker is trained on; nor of a manifest with `hold_out` "speakers".
    """

    options: ListedOptions
    trained: Shelf
    reserved: Shelf
    skipped: Skips = field(default_factory=dict)
    """For each cause, how many utterances are left out for it, and the first of them."""

    @classmethod
    def open(cls, options: ListedOptions, folder: Path, *, cache: Path, content: str = "", watch: Watch = lambda *_: None) -> Self:
        """Return the corpus in a folder.

        Args:
            options: what is read of it, and who is trained on.
            folder: the data folder: the corpus, or the folder that it was unpacked in.
            cache: where indexes are kept.
            content: see `fedclip.speech.index_file.open_index`.
            watch: is told of the progress.

        Raises:
            CorpusError: no such folder, set or listing, a damaged listing, or nobody is left to train or evaluate on.
        """
        place = FINDERS[options.kind](expect_folder(folder))
        if place is None:
            raise CorpusError(f"{folder} is not as a corpus '{options.kind}': expected {EXPECTED[options.kind]} there; correct data_dir.")
        train, held_out = _chosen_sets(options, place)
        index = open_index(options, place, train, held_out, cache=cache, content=content, watch=watch)
        trained, reserved, shared = _dealt(options, index, train, held_out)
        keys = ", ".join(sorted({"hold_out", "subsets", "held_out", "speakers"} & {*type(options).model_fields}))
        remedy = f"add recordings, or choose another part of them ({keys})."
        expect_both(place, trained, reserved, f"recordings{_causes(index.skipped)}; {remedy}")
        return cls(options, trained, reserved, index.skipped | shared)

    @cached_property
    def recipe(self) -> str:
        """A digest of the recordings and the options."""
        index = self.trained.index
        return digest_of(FORMAT, index.stamp, index.content, self.options.model_dump_json())

    @property
    def content(self) -> str:
        """A digest of the index, by which a worker finds it."""
        return self.trained.index.content

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that utterances of its speakers are told to be in, as they are told, sorted."""
        index = self.trained.index
        heard = np.unique(np.concatenate([index.language[shelf.chosen] for shelf in (self.trained, self.reserved)]))
        return tuple(name for name in (index.languages[int(n)] for n in heard) if name)

    @property
    def cacheable(self) -> bool:
        """Whether a speaker's utterances are the same each round: when their number is not limited."""
        return self.options.utterances is None

    @property
    def train_speakers(self) -> int:
        """How many speakers have training utterances."""
        return len(self.trained)

    @property
    def held_out_speakers(self) -> int:
        """How many speakers have held-out utterances."""
        return len(self.reserved)

    def check(self) -> None:
        """Read the header of every recording of a manifest, if they are not too many.

        Raises:
            CorpusError: a recording is unreadable or empty; the message names the first such file.
        """
        if isinstance(self.options, ManifestOptions) and len(self.trained.index.paths) <= CHECKED:
            check(recording for shelf in (self.trained, self.reserved) for recording in shelf.recordings(shelf.chosen))

    def train(self, speaker: int, rng: np.random.Generator) -> list[Utterance]:
        """Return a speaker's training utterances, or as many of them as the options allow, drawn by `rng`."""
        numbers, limit = self.trained.numbers(speaker), self.options.utterances
        if limit is not None and limit < len(numbers):
            numbers = numbers[np.sort(rng.choice(len(numbers), size=limit, replace=False))]
        return utterances(self.trained.recordings(numbers))

    def train_seconds(self, speaker: int) -> float:
        """Return about how long `train` is, from what the listings say, else from the files' sizes and one header."""
        index, numbers = self.trained.index, self.trained.numbers(speaker)
        unknown = numbers[np.isnan(index.seconds[numbers])]
        seconds = float(np.nansum(index.seconds[numbers]))
        if len(unknown):
            first = index.recording(int(unknown[0]))
            try:
                rate = seconds_a_byte(first)
            except CorpusError:
                rate = nominal_seconds_a_byte(first.path)
            seconds += rate * int(index.sizes[index.file[unknown]].sum())
        return seconds * min(self.options.utterances or len(numbers), len(numbers)) / len(numbers)

    def held_out(self, speaker: int) -> list[Utterance]:
        """Return a speaker's held-out utterances."""
        return utterances(self.reserved.recordings(self.reserved.numbers(speaker, "held-out")))


def _chosen_sets(options: ListedOptions, place: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the sets that are trained on, and those that are held out: none where speakers are."""
    there = LAYOUTS[options.kind].sets(place, options)
    if isinstance(options, ManifestOptions):
        return ("train",), ("test",)
    for key, names in (("subsets", options.subsets), ("held_out", options.held_out)):
        unknown = [name for name in names if name not in there]
        if unknown:
            raise CorpusError(f"{key}: {', '.join(unknown)}: not in {place}; there are: {', '.join(there)}.")
    train = options.subsets or tuple(name for name in there if name.startswith("train") and name not in options.held_out)
    if not train:
        raise CorpusError(f"{place} has no training set; choose subsets from what is there: {', '.join(there)}.")
    rest = [name for name in there if name not in train]
    development, test = (tuple(name for name in rest if name.startswith(start)) for start in (("dev", "validation"), "test"))
    return train, options.held_out or development or test


def _dealt(
    options: ListedOptions, index: Index, train: tuple[str, ...], held_out: tuple[str, ...]
) -> tuple[Shelf, Shelf, dict[str, tuple[int, str]]]:
    """Return who is trained on and who is held out, and what is left out so that no speaker is both."""
    trained, skipped = index.of_sets(train), dict[str, tuple[int, str]]()
    if held_out:
        reserved = index.of_sets(held_out)
    else:
        reserved = trained & _speakers_below(index, "", options.held_out_fraction)
        trained &= ~reserved
    if not isinstance(options, ManifestOptions):
        held = np.zeros(len(index.speakers), bool)
        held[index.speaker[reserved]] = True
        shared = trained & held[index.speaker]
        if shared.any():
            skipped["the speaker is held out"] = (int(shared.sum()), index.speakers[int(index.speaker[shared][0])])
            trained &= ~shared
    if options.speakers != "all":
        trained &= _speakers_below(index, "seed/", options.seed_fraction) == (options.speakers == "seed")
    return Shelf(index, np.flatnonzero(trained).astype(np.int32)), Shelf(index, np.flatnonzero(reserved).astype(np.int32)), skipped


def _speakers_below(index: Index, salt: str, share: float) -> np.ndarray:
    """Return which utterances are of the share of the speakers that a hash of their names gives, bool, shape (utterances,)."""
    chosen = np.array([fraction(salt + index.speakers[n]) < share for n in range(len(index.speakers))], bool)
    below: np.ndarray = chosen[index.speaker]
    return below


def _causes(skipped: Mapping[str, tuple[int, str]]) -> str:
    causes = ", ".join(f"{cause}: {count:,}, such as {first}" for cause, (count, first) in skipped.items())
    return f" (left out: {causes})" if causes else ""
