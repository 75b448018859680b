"""What every speech corpus is: utterances by speaker, training speakers apart from held-out ones."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

SAMPLE_RATE = 16_000
"""Samples a second of all audio that a corpus hands out; recordings at other rates are resampled on reading."""


@dataclass(frozen=True, eq=False)
class Utterance:
    """One spoken utterance: float32 mono samples in [-1, 1] at `SAMPLE_RATE`, shape (time,), and what was said, as published."""

    audio: np.ndarray
    text: str
    language: str = ""
    """The code of its language and perhaps a region ("fr", "sv-SE"), by which the text is normalised; empty where it isn't told."""
    fault: str = ""
    """Why its recording cannot be read; there is no audio then."""


class Corpus(Protocol):
    """Utterances by speaker. Reading a speaker is a pure function of the arguments; memory does not grow with speakers."""

    @property
    def recipe(self) -> str:
        """A digest of all that the audio depends on: two corpora with one recipe give the same samples (a cache key)."""

    @property
    def cacheable(self) -> bool:
        """Whether `train` ignores its `rng`, so that what is derived from a speaker may be kept."""

    @property
    def train_speakers(self) -> int:
        """How many training speakers there are, numbered from 0."""

    @property
    def held_out_speakers(self) -> int:
        """How many held-out units there are, numbered from 0."""

    def train(self, speaker: int, rng: np.random.Generator) -> list[Utterance]:
        """Return the training utterances of a speaker; `rng` drives what may differ from round to round."""

    def train_seconds(self, speaker: int) -> float:
        """Return about how many seconds of audio `train` gives for a speaker, without making or reading them."""

    def held_out(self, speaker: int) -> list[Utterance]:
        """Return the utterances of a held-out unit: the same at every call."""
