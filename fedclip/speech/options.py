"""Configuration of where speech comes from: one section a kind of corpus. Imports neither PyTorch nor NumPy."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from fedclip.options import Options


def _expect_ordered(name: str, low: float, high: float) -> None:
    if low > high:
        raise ValueError(f"Expected {name} as [smallest, largest], got [{low}, {high}]; swap the two.")


def _expect_once(name: str, values: Sequence[str]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"Expected each of {name} once, got {', '.join(values)}.")


Accent = Literal["en", "en-gb-scotland", "en-gb-x-rp", "en-us"]
"""The accents of English that virtual speakers have: British (the library knows no "en-gb"), Scottish, Received Pronunciation, American."""

RoomNumber = Annotated[int, Field(ge=0, le=47)]


class EmbeddedOptions(Options):
    """Virtual speakers that are synthesised on demand: nothing to download, any population.

    `snr_db`: each speaker's signal-to-noise ratio is uniform in this range; `speed`: so is the factor by which its speech
    is played faster. `utterances`: how many a speaker has. `reverb`: whether speakers stand in rooms. `accents` and `rooms`: those
    that speakers, held-out ones too, have and stand in; rooms from the first to the last, of which each next eight have a drier sound.
    """

    kind: Literal["embedded"] = "embedded"
    held_out_speakers: Annotated[int, Field(ge=1, le=1_000_000)] = 120
    utterances: tuple[Annotated[int, Field(ge=1, le=1000)], Annotated[int, Field(ge=1, le=1000)]] = (6, 10)
    snr_db: tuple[Annotated[float, Field(ge=-20, le=100)], Annotated[float, Field(ge=-20, le=100)]] = (5.0, 25.0)
    speed: tuple[Annotated[float, Field(ge=0.5, le=2)], Annotated[float, Field(ge=0.5, le=2)]] = (0.9, 1.1)
    reverb: bool = True
    accents: Annotated[tuple[Accent, ...], Field(min_length=1)] = get_args(Accent)
    rooms: tuple[RoomNumber, RoomNumber] = (0, 47)

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        _expect_once("accents", self.accents)
        _expect_ordered("rooms", *self.rooms)
        _expect_ordered("utterances", *self.utterances)
        _expect_ordered("snr_db", *self.snr_db)
        _expect_ordered("speed", *self.speed)
        return self


class RecordedOptions(Options):
    """What is common to recordings that are read as they are.

    `speakers`: "seed" trains on a fixed part of the training speakers, `seed_fraction` of them by a hash of their names, "federated" on
    all the others, "all" on both. `utterances`: at most so many a speaker a round, drawn anew each round; None for all of them.
    """

    speakers: Literal["all", "seed", "federated"] = "all"
    seed_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    utterances: Annotated[int, Field(ge=1)] | None = None


class ManifestOptions(RecordedOptions):
    """Recordings listed in `manifest.csv` or `manifest.tsv` of the data folder, columns speaker, path, text [, split] [, language].

    `hold_out`: "split" takes the manifest's split column, "utterances" holds out a fixed fraction of the utterances,
    "speakers" a fixed fraction of the speakers; "auto" means "split" where there is such a column, else "utterances".
    """

    kind: Literal["manifest"] = "manifest"
    hold_out: Literal["auto", "split", "utterances", "speakers"] = "auto"
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1


class PublishedOptions(RecordedOptions):
    """What is common to published corpora. No speaker who is held out is trained on.

    `subsets`: what is trained on, by the corpus's own names; empty: all its training sets that are there. `held_out`: what is held out;
    empty: its development sets, else its test sets, else `held_out_fraction` of the speakers by a hash of their names.
    """

    subsets: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _check_subsets(self) -> Self:
        _expect_once("subsets", self.subsets)
        _expect_once("held_out", self.held_out)
        twice = sorted({*self.subsets} & {*self.held_out})
        if twice:
            raise ValueError(f"Expected subsets and held_out to have none in common, got {', '.join(twice)} in both.")
        return self


class LibriSpeechOptions(PublishedOptions):
    """LibriSpeech: `train-clean-100/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac` with a `.trans.txt` a chapter."""

    kind: Literal["librispeech"] = "librispeech"


class CommonVoiceOptions(PublishedOptions):
    """Common Voice: `train.tsv`, `dev.tsv`, `test.tsv` and `clips/`, of one language or of a release with a folder a language.

    `languages`: the folders of a release that are read; empty: all of them.
    """

    kind: Literal["common_voice"] = "common_voice"
    languages: tuple[str, ...] = ()


class SpeechCommandsOptions(PublishedOptions):
    """Speech Commands: `<word>/<speaker>_nohash_<number>.wav`; its sets are `train`, `validation` and `test`."""

    kind: Literal["speech_commands"] = "speech_commands"


class TedLiumOptions(PublishedOptions):
    """TED-LIUM 1 to 3: `stm/<talk>.stm` and `sph/<talk>.sph` of `train`, `dev` and `test`; of release 3 those of `legacy`."""

    kind: Literal["tedlium"] = "tedlium"


class VoxPopuliOptions(PublishedOptions):
    """VoxPopuli, transcribed: `<language>/asr_train.tsv` and `<language>/<year>/<id>.ogg`.

    `languages`: the folders that are read; empty: all of them. `text`: the column of what is said; the raw one has capitals,
    punctuation and digits, and is empty in places.
    """

    kind: Literal["voxpopuli"] = "voxpopuli"
    languages: tuple[str, ...] = ()
    text: Literal["normalized_text", "raw_text"] = "normalized_text"


class SpokenDigitsOptions(Options):
    """Connected digits joined from a folder of single spoken digits: `recordings/<digit>_<speaker>_<number>.wav`.

    `digits`: how many digits an utterance has; `utterances`: how many utterances a speaker trains on a round; `pause`:
    seconds of silence between digits. `hold_out`: "recordings" holds out recordings 0 to 4 of every digit and speaker (the
    published test split); anything else is the name of the one speaker that is held out whole.
    """

    kind: Literal["spoken_digits"] = "spoken_digits"
    digits: tuple[Annotated[int, Field(ge=1, le=100)], Annotated[int, Field(ge=1, le=100)]] = (2, 5)
    utterances: Annotated[int, Field(ge=1)] = 10
    pause: tuple[Annotated[float, Field(ge=0, le=5)], Annotated[float, Field(ge=0, le=5)]] = (0.02, 0.15)
    hold_out: Annotated[str, Field(min_length=1)] = "recordings"

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        _expect_ordered("digits", *self.digits)
        _expect_ordered("pause", *self.pause)
        return self


StampLanguage = Literal["bg", "es", "fr", "ro", "ru"]
"""The languages whose recordings say what their texts say; those of the others were made for other texts."""


class StampsOptions(Options):
    """The spoken descriptions of Tux Paint's stamps, from Debian's package tuxpaint-stamps-default (`make stamps`, GPL-2).

    There is one voice a language. `users_per_language`: into how many pseudo-users its phrases are dealt, which are not different
    people; `deal`: "random" deals by a hash of the text, "topic" gives a user neighbouring stamps (animals, food, signs). Which
    phrases are held out depends on a hash of the text.
    """

    kind: Literal["tuxpaint_stamps"] = "tuxpaint_stamps"
    languages: Annotated[tuple[StampLanguage, ...], Field(min_length=1)] = ("bg", "es", "fr", "ro", "ru")
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    users_per_language: Annotated[int, Field(ge=1, le=1000)] = 10
    deal: Literal["random", "topic"] = "random"

    @model_validator(mode="after")
    def _check_languages(self) -> Self:
        _expect_once("languages", self.languages)
        return self


ListedOptions = ManifestOptions | LibriSpeechOptions | CommonVoiceOptions | SpeechCommandsOptions | TedLiumOptions | VoxPopuliOptions
"""The sections of corpora that are read through an index of their listings."""

CorpusOptions = Annotated[EmbeddedOptions | SpokenDigitsOptions | StampsOptions | ListedOptions, Field(discriminator="kind")]
"""Any corpus section; its `kind` says which."""
