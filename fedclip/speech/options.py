"""Configuration of where speech comes from: one section a kind of corpus. Imports neither PyTorch nor NumPy."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedclip.options import Options


def _expect_ordered(name: str, low: float, high: float) -> None:
    if low > high:
        raise ValueError(f"Expected {name} as [smallest, largest], got [{low}, {high}]; swap the two.")


class EmbeddedOptions(Options):
    """Virtual speakers that are synthesised on demand: nothing to download, any population.

    `snr_db`: each speaker's signal-to-noise ratio is uniform in this range; `speed`: so is the factor by which its speech
    is played faster. `utterances`: how many a speaker has. `reverb`: whether speakers stand in rooms.
    """

    kind: Literal["embedded"] = "embedded"
    held_out_speakers: Annotated[int, Field(ge=1, le=1_000_000)] = 120
    utterances: tuple[Annotated[int, Field(ge=1, le=1000)], Annotated[int, Field(ge=1, le=1000)]] = (6, 10)
    snr_db: tuple[Annotated[float, Field(ge=-20, le=100)], Annotated[float, Field(ge=-20, le=100)]] = (5.0, 25.0)
    speed: tuple[Annotated[float, Field(ge=0.5, le=2)], Annotated[float, Field(ge=0.5, le=2)]] = (0.9, 1.1)
    reverb: bool = True

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        _expect_ordered("utterances", *self.utterances)
        _expect_ordered("snr_db", *self.snr_db)
        _expect_ordered("speed", *self.speed)
        return self


class ManifestOptions(Options):
    """Recordings listed in `manifest.csv` or `manifest.tsv` of the data folder, with columns speaker, path, text [, split].

    `hold_out`: "split" takes the manifest's split column, "utterances" holds out a fixed fraction of the utterances,
    "speakers" a fixed fraction of the speakers; "auto" means "split" where there is such a column, else "utterances".
    `utterances`: at most so many utterances a speaker a round, drawn anew each round; None for all of them.
    """

    kind: Literal["manifest"] = "manifest"
    hold_out: Literal["auto", "split", "utterances", "speakers"] = "auto"
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    utterances: Annotated[int, Field(ge=1)] | None = None


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


CorpusOptions = Annotated[EmbeddedOptions | ManifestOptions | SpokenDigitsOptions | StampsOptions, Field(discriminator="kind")]
"""Any corpus section; its `kind` says which."""
