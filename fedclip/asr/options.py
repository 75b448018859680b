"""What an experiment file may say about speech recognition. Checked values only: imports no PyTorch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fedclip.asr.model_options import AnyModelOptions, ConformerOptions, ModelOptions
from fedclip.asr.text import Alphabet
from fedclip.options import Options
from fedclip.speech.options import CorpusOptions, EmbeddedOptions, StampsOptions


class FeatureOptions(Options):
    """Log-mel features: Hamming windows, pre-emphasis, mean and variance of each utterance taken out.

    `kind` is for models by a door: `waveform` gives them samples of mean 0 and variance 1, and `whisper` the features of Whisper
    with `n_mels`; the other options are those of `log_mel`. A pretrained model has features of its own.
    """

    kind: Literal["log_mel", "waveform", "whisper"] = "log_mel"
    n_mels: int = Field(default=80, ge=8, le=256)
    window_ms: float = Field(default=25.0, ge=5.0, le=200.0)
    hop_ms: float = Field(default=10.0, ge=2.0, le=100.0)
    preemphasis: float = Field(default=0.97, ge=0.0, lt=1.0)
    low_hz: float = Field(default=0.0, ge=0.0)
    high_hz: float = Field(default=8000.0, le=8000.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hop_ms > self.window_ms:
            raise ValueError(f"Expected hop_ms <= window_ms, or samples between windows are lost; got {self.hop_ms} > {self.window_ms}.")
        if self.low_hz >= self.high_hz:
            raise ValueError(f"Expected low_hz < high_hz, got {self.low_hz} and {self.high_hz}.")
        idle = sorted({*self.model_dump(exclude_defaults=True)} - {"kind"} - _TAKEN[self.kind])
        if idle:
            raise ValueError(f"Expected no {', '.join(idle)} beside kind '{self.kind}', which makes nothing of it; leave it out.")
        return self


_TAKEN = {"log_mel": {*FeatureOptions.model_fields}, "waveform": set[str](), "whisper": {"n_mels"}}
"""What each kind of features takes."""


class AugmentOptions(Options):
    """SpecAugment (arXiv 1904.08779). Off by default: it hurts training from scratch with small cohorts."""

    enabled: bool = False
    frequency_masks: int = Field(default=2, ge=0, le=100)
    frequency_width: int = Field(default=30, ge=0)
    time_masks: int = Field(default=10, ge=0, le=100)
    time_width: int = Field(default=50, ge=0)
    time_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """No time mask is wider than this share of its own utterance (the paper's bound is on each mask, not on their sum)."""


class DecoderOptions(Options):
    """How the symbols of frames become a text in evaluation: greedy, or the best of a beam, with an n-gram model if there is one.

    A text scores the log of the sum of its paths' probabilities, `lm_weight` times the n-gram model's log10 probability, and
    `word_score` for each word.
    """

    beam: int = Field(default=0, ge=0, le=100_000)
    """How many texts are kept from frame to frame; 0: greedy, the best symbol of each frame."""
    lm: Path | None = None
    """An n-gram model as ARPA text."""
    unit: Literal["word", "character"] = "word"
    """What the n-gram model is over. `word`: no other words than its own are found. `character`: any; a space is written `|` in it."""
    lm_weight: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    word_score: float = Field(default=0.0, allow_inf_nan=False)
    """What each word adds, where the n-gram model is over words: it counters that more words are less probable."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.beam == 0 and self.model_dump(exclude_defaults=True):
            raise ValueError("Expected beam >= 1 with the other options of the decoder: greedy decoding has none.")
        if self.word_score and (self.lm is None or self.unit != "word"):
            raise ValueError("Expected lm with unit 'word' beside word_score: without these nothing counts words.")
        if self.lm is None and (self.lm_weight != 1.0 or self.unit != "word"):
            raise ValueError(f"Expected lm beside lm_weight {self.lm_weight:g} and unit '{self.unit}': they are those of an n-gram model.")
        return self


class AsrOptions(Options):
    """Speech recognition by characters and CTC: the corpus, the features, the model, and where features are kept."""

    name: Literal["asr"] = "asr"
    languages: tuple[str, ...] = ("en",)
    """What is spoken, by ISO 639-1 codes: their letters, in this order, are what the model spells with (see docs/languages.md)."""
    corpus: CorpusOptions = EmbeddedOptions()
    features: FeatureOptions = FeatureOptions()
    augment: AugmentOptions = AugmentOptions()
    model: AnyModelOptions = ModelOptions()
    decoder: DecoderOptions = DecoderOptions()
    max_seconds: float = Field(default=20.0, gt=0.0)
    """Longer recordings are left out, and counted: attention costs the square of the length."""
    cache_dir: Path | None = None
    """Where features are kept; by default `$XDG_CACHE_HOME/fedclip` or `~/.cache/fedclip`."""
    cache_mb: float = Field(default=1024.0, ge=0.0)
    """How much the cache may hold before the longest unused entries go; 0 keeps nothing."""

    @field_validator("languages")
    @classmethod
    def _known(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        return Alphabet(languages).languages

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.corpus, StampsOptions) and not {*self.corpus.languages} <= {*self.languages}:
            raise ValueError(
                f"expected task.languages to have all of task.corpus.languages, got {list(self.languages)} "
                f"and {list(self.corpus.languages)}"
            )
        if self.features.kind == "waveform" and isinstance(self.model, ModelOptions | ConformerOptions):
            raise ValueError(
                f"Expected features.kind 'log_mel' with model.kind '{self.model.kind}', got 'waveform': it would attend over thousands of "
                "frames a second; samples are for models by a door."
            )
        if self.augment.enabled and self.augment.frequency_width > self.features.n_mels:
            raise ValueError(
                f"Expected augment.frequency_width <= features.n_mels, got {self.augment.frequency_width} > {self.features.n_mels}."
            )
        return self
