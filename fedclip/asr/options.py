"""What an experiment file may say about speech recognition. Checked values only: imports no PyTorch."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from fedclip.asr.text import Alphabet
from fedclip.options import Options
from fedclip.speech.options import CorpusOptions, EmbeddedOptions, StampsOptions


class FeatureOptions(Options):
    """Log-mel features: Hamming windows, pre-emphasis, mean and variance of each utterance taken out."""

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
        return self


class AugmentOptions(Options):
    """SpecAugment (arXiv 1904.08779). Off by default: it hurts training from scratch with small cohorts."""

    enabled: bool = False
    frequency_masks: int = Field(default=2, ge=0, le=100)
    frequency_width: int = Field(default=30, ge=0)
    time_masks: int = Field(default=10, ge=0, le=100)
    time_width: int = Field(default=50, ge=0)
    time_share: float = Field(default=0.1, ge=0.0, le=1.0)
    """No time mask is wider than this share of its own utterance (the paper's bound is on each mask, not on their sum)."""


class ModelOptions(Options):
    """The CTC transformer: by default one that learns in minutes on a processor.

    The 255.8 M model of arXiv 2310.00098 is dim 768, 36 layers, 4 heads, mlp_dim 3072, kernel 7, stride 3, dropout and
    layer_drop 0.3, shift_seconds 30.
    """

    dim: int = Field(default=128, ge=4)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=2, ge=1)
    mlp_dim: int = Field(default=512, ge=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    layer_drop: float = Field(default=0.0, ge=0.0, lt=1.0)
    kernel: int = Field(default=15, ge=1)
    convolutions: int = Field(default=0, ge=0)
    """Further convolutions of the front end, each over 3 frames with a residual path: local context that attention need not learn."""
    stride: int = Field(default=4, ge=1, le=16)
    norm: Literal["pre", "post"] = "pre"
    shift_seconds: float = Field(default=0.0, ge=0.0)
    """Positions move by up to this much, either way, in training (CAPE), so that no absolute time is learnt.

    With it a model takes utterances longer than any it was trained on, and needs more steps to learn its first words."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"Expected an even dim divisible by heads, got dim {self.dim} and heads {self.heads}.")
        if self.kernel % 2 == 0:
            raise ValueError(f"Expected an odd kernel, so that a frame is centred on its input; got {self.kernel}.")
        if self.stride > self.kernel:
            raise ValueError(f"Expected stride <= kernel, or features between frames are lost; got {self.stride} > {self.kernel}.")
        return self


class AsrOptions(Options):
    """Speech recognition by characters and CTC: the corpus, the features, the model, and where features are kept."""

    name: Literal["asr"] = "asr"
    languages: tuple[str, ...] = ("en",)
    """What is spoken, by ISO 639-1 codes: their letters, in this order, are what the model spells with (see docs/languages.md)."""
    corpus: CorpusOptions = EmbeddedOptions()
    features: FeatureOptions = FeatureOptions()
    augment: AugmentOptions = AugmentOptions()
    model: ModelOptions = ModelOptions()
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
        if self.augment.enabled and self.augment.frequency_width > self.features.n_mels:
            raise ValueError(
                f"Expected augment.frequency_width <= features.n_mels, got {self.augment.frequency_width} > {self.features.n_mels}."
            )
        return self
