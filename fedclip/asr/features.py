"""From samples to what a model hears: log-mel features, and the masks of SpecAugment. Pure functions of their arguments."""

from typing import Final

import numpy as np
import torch
import torchaudio.functional as audio_functional
from torch import Tensor
from torch.nn import functional

from fedclip.asr.options import AugmentOptions, FeatureOptions
from fedclip.speech.corpus import SAMPLE_RATE

LOG_FLOOR: Final = 1e-10
"""The least mel energy: digital silence has a finite logarithm."""

VARIANCE_FLOOR: Final = 1e-5
"""Added to the variance of an utterance: features of silence are zeros, not noise blown up."""


class LogMel:
    """Log-mel features of one utterance, its mean and variance over time and mel taken out.

    Guarantees: the same samples give the same bits, whatever ran before; all values are finite; features of silence
    are 0; the result went through float16, so what a cache stores and what was just computed are the same bits.
    """

    def __init__(self, options: FeatureOptions) -> None:
        """Prepare the window and the filters, which all utterances share."""
        self._options = options
        self.width = options.n_mels
        self.recipe = ["log_mel", options.model_dump()]
        self._window_size = round(options.window_ms * SAMPLE_RATE / 1000)
        self._hop = round(options.hop_ms * SAMPLE_RATE / 1000)
        self._fft_size = _fft_size(options, self._window_size)
        self._window = torch.hamming_window(self._window_size, periodic=False)
        self._filters: Tensor = audio_functional.melscale_fbanks(
            self._fft_size // 2 + 1, options.low_hz, options.high_hz, options.n_mels, SAMPLE_RATE, mel_scale="htk"
        )

    def frames(self, samples: int) -> int:
        """Return how many feature frames so many samples give: at least one."""
        return 1 + max(0, samples - self._window_size) // self._hop

    def __call__(self, audio: np.ndarray) -> Tensor:
        """Return the float16 features, shape (time, mel), of float32 samples, shape (samples,).

        Raises:
            ValueError: the samples aren't mono, or aren't finite.
        """
        if audio.ndim != 1:
            raise ValueError(f"Expected mono samples of shape (samples,), got {audio.shape}: mix the channels down first.")
        wave = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
        if not bool(torch.isfinite(wave).all()):
            raise ValueError("Expected finite samples, got NaN or infinity: the recording is damaged, leave it out.")
        if len(wave) < self._window_size:
            wave = functional.pad(wave, (0, self._window_size - len(wave)))
        wave = audio_functional.preemphasis(wave, self._options.preemphasis)
        # Windows are cut by hand: torch.stft would pad each to the size of the transform and centre it, so that frames
        # depend on samples outside their window.
        windows = wave.unfold(0, self._window_size, self._hop) * self._window
        spectrum = torch.fft.rfft(windows, n=self._fft_size)
        power = spectrum.real.square() + spectrum.imag.square()
        mel = (power @ self._filters).clamp(min=LOG_FLOOR).log()
        variance, mean = torch.var_mean(mel, correction=0)
        normalised: Tensor = (mel - mean) / torch.sqrt(variance + VARIANCE_FLOOR)
        return normalised.half()


def _fft_size(options: FeatureOptions, window_size: int) -> int:
    """Return the transform's size: a power of two, so large that the narrowest mel filter covers a frequency of it."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (options.low_hz, options.high_hz))
    narrowest_hz = 700 * (10 ** ((low + 2 * (high - low) / (options.n_mels + 1)) / 2595) - 1) - options.low_hz
    size = 1 << (window_size - 1).bit_length()
    while SAMPLE_RATE / size >= narrowest_hz:
        size *= 2
    return size


def spec_augment(features: Tensor, lengths: Tensor, options: AugmentOptions) -> Tensor:
    """Return features with random bands of mel and of time set to 0, the mean of an utterance (arXiv 1904.08779).

    Draws from torch's global generator, like dropout: the engine forks and seeds it around each user. torchaudio's
    `mask_along_axis_iid` does so too but measures time by the padded batch; here each utterance is masked by its own
    length, and all masks are drawn at once.

    Args:
        features: Padded features, shape (batch, time, mel); unchanged.
        lengths: Frames of each utterance, shape (batch,).
        options: How many masks, and how wide: a time mask is no wider than `time_share` of its utterance.
    """
    if not options.enabled:
        return features
    batch, time, mel = features.shape
    bins = torch.full((batch,), mel, device=features.device)
    widest_band = bins.clamp(max=options.frequency_width)
    widest_span = (lengths * options.time_share).long().clamp(max=options.time_width)
    bands = _masked(bins, widest_band, options.frequency_masks, mel)
    spans = _masked(lengths, widest_span, options.time_masks, time)
    return features.masked_fill(bands[:, None, :] | spans[:, :, None], 0.0)


def _masked(sizes: Tensor, widest: Tensor, count: int, axis: int) -> Tensor:
    """Return which of `axis` positions lie in one of `count` random masks of up to `widest`, shape (batch, axis)."""
    draws = torch.rand(2, len(sizes), count, device=sizes.device)
    widths = (draws[0] * (widest[:, None] + 1)).long()
    starts = (draws[1] * (sizes[:, None] - widths + 1)).long()
    position = torch.arange(axis, device=sizes.device)
    inside = (position >= starts[..., None]) & (position < (starts + widths)[..., None])
    return inside.any(dim=1)
