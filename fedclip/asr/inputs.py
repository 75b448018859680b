"""What a model hears of an utterance: log-mel features, raw samples, or the features of Whisper."""

import json
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedclip.asr.features import LogMel
from fedclip.asr.model_options import PretrainedOptions
from fedclip.asr.options import AsrOptions
from fedclip.options import ConfigError
from fedclip.speech.corpus import SAMPLE_RATE

SHORTEST: Final = 400
"""Samples that a shorter recording is padded to: the 25 ms window of the encoders."""

WHISPER_HOP: Final = 160
"""Samples between two frames of Whisper's features."""

WHISPER_REACH: Final = 200
"""Samples that a frame sees to either side of its centre."""


class Inputs(Protocol):
    """Features of one utterance: the same samples give the same bits, whatever ran before."""

    @property
    def width(self) -> int:
        """Features of a frame."""

    @property
    def recipe(self) -> list[Any]:
        """All that the features depend on besides the samples, as plain data: part of the key of a cache."""

    def __call__(self, audio: np.ndarray) -> Tensor:
        """Return the float16 features, shape (time, width), at least one frame, of float32 samples, shape (samples,)."""


class Waveform:
    """The samples themselves, shape (samples, 1), as float16, which rounds each by up to 0.05 % of itself.

    Args:
        normalise: take the mean out, and divide by the deviation, as wav2vec 2.0 does.
    """

    width = 1

    def __init__(self, normalise: bool) -> None:
        self._normalise = normalise
        self.recipe = ["waveform", normalise]

    def __call__(self, audio: np.ndarray) -> Tensor:
        """Return the samples as features.

        Raises:
            ValueError: the samples aren't mono, or aren't finite.
        """
        wave = torch.from_numpy(_checked(audio))
        if self._normalise and len(wave):
            variance, mean = torch.var_mean(wave, correction=0)
            wave = (wave - mean) / torch.sqrt(variance + 1e-7)
        return functional.pad(wave, (0, max(0, SHORTEST - len(wave))))[:, None].half()


class WhisperInputs:
    """Whisper's log-mel features (arXiv 2212.04356) by the library transformers, without the frames that only see silence past the end.

    `fedclip.asr.pretrained.whisper_padding` puts these back.

    Args:
        extractor: the library's `WhisperFeatureExtractor`.
        max_seconds: the longest audio there will be.

    Raises:
        ConfigError: that is longer than the model takes.
    """

    def __init__(self, extractor: Any, max_seconds: float) -> None:
        if max_seconds > extractor.chunk_length:
            raise ConfigError(f"task.max_seconds: expected at most {extractor.chunk_length}, all that it hears, got {max_seconds}.")
        self._extractor = extractor
        self.width = int(extractor.feature_size)
        self.recipe = ["whisper", self.width, extractor.chunk_length]

    def __call__(self, audio: np.ndarray) -> Tensor:
        """Return the features.

        Raises:
            ValueError: the samples aren't mono, or aren't finite.
        """
        features = self._extractor(_checked(audio), sampling_rate=SAMPLE_RATE, return_tensors="np")["input_features"][0]
        frames = max(1, -(-(len(audio) + WHISPER_REACH) // WHISPER_HOP))
        return torch.from_numpy(features.T[:frames].copy()).half()


def open_inputs(options: AsrOptions) -> Inputs:
    """Return what the model of the options hears.

    Raises:
        ConfigError: features are asked for that a pretrained model does not take, or masks of something that is no spectrum.
    """
    inputs: Inputs
    if isinstance(options.model, PretrainedOptions):
        if options.features.model_dump(exclude_defaults=True):
            raise ConfigError("task.features: a pretrained model has features of its own; leave the section out.")
        inputs = _inputs_of(options.model.path, options.max_seconds)
    elif options.features.kind == "waveform":
        inputs = Waveform(normalise=True)
    elif options.features.kind == "whisper":
        from fedclip.asr.pretrained import library

        inputs = WhisperInputs(library().WhisperFeatureExtractor(feature_size=options.features.n_mels), options.max_seconds)
    else:
        return LogMel(options.features)
    if options.augment.enabled and inputs.width == 1:
        raise ConfigError("task.augment.enabled: SpecAugment masks spectra, and this model hears samples; turn it off.")
    return inputs


def _inputs_of(folder: Path, max_seconds: float) -> Inputs:
    """Return what the pretrained model in a folder hears."""
    from fedclip.asr.pretrained import library, read_config

    config = read_config(folder)
    file = folder / "preprocessor_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if said.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise ConfigError(f"{file}: expected a sampling_rate of {SAMPLE_RATE}, which speech has here, got {said['sampling_rate']}.")
    if config.model_type != "whisper":
        return Waveform(bool(said.get("do_normalize", True)))
    chunk = config.max_source_positions * 2 * WHISPER_HOP // SAMPLE_RATE
    return WhisperInputs(library().WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=chunk), max_seconds)


def _checked(audio: np.ndarray) -> np.ndarray:
    if audio.ndim != 1:
        raise ValueError(f"Expected mono samples of shape (samples,), got {audio.shape}: mix the channels down first.")
    wave = np.ascontiguousarray(audio, dtype=np.float32)
    if not np.isfinite(wave).all():
        raise ValueError("Expected finite samples, got NaN or infinity: the recording is damaged, leave it out.")
    return wave
