"""Log-mel features against a slow reference, and the masks of SpecAugment."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.asr.features import LogMel, spec_augment
from fedclip.asr.options import AugmentOptions, FeatureOptions


def noise(samples, seed=0):
    return np.random.default_rng(seed).normal(size=samples).astype(np.float32) * 0.1


def slow_log_mel(audio):
    """The definition, frame by frame and filter by filter, in float64."""
    emphasised = np.append(audio[0], audio[1:] - 0.97 * audio[:-1]).astype(np.float64)
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    frequency = np.arange(257) * 16_000 / 512
    rows = []
    for start in range(0, len(audio) - 399, 160):
        power = np.abs(np.fft.rfft(emphasised[start : start + 400] * np.hamming(400), n=512)) ** 2
        rise = (frequency[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
        fall = (edges[2:] - frequency[:, None]) / (edges[2:] - edges[1:-1])
        rows.append(np.log(np.maximum(power @ np.maximum(0, np.minimum(rise, fall)), 1e-10)))
    mel = np.array(rows)
    return (mel - mel.mean()) / mel.std()


def test_features_are_those_of_the_definition():
    audio = noise(8000)
    features = LogMel(FeatureOptions())(audio)
    assert features.shape == (48, 80)
    np.testing.assert_allclose(features.numpy(), slow_log_mel(audio), atol=4e-3)  # float16 near 3: steps of 2e-3


def test_mean_is_zero_and_variance_one_over_time_and_mel():
    features = LogMel(FeatureOptions())(noise(16_000)).float()
    assert abs(float(features.mean())) < 1e-3
    assert float(features.std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("audio", [np.zeros(4000, np.float32), np.zeros(0, np.float32), np.zeros(1, np.float32)])
def test_silence_and_nothing_give_zeros(audio):
    features = LogMel(FeatureOptions())(audio)
    assert len(features) >= 1
    assert float(features.float().abs().max()) < 1e-2


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3000), st.sampled_from([1e-8, 1e-3, 1.0, 100.0]), st.integers(0, 2**32 - 1))
def test_features_are_finite_and_the_same_at_each_call(samples, gain, seed):
    audio = noise(samples, seed) * np.float32(gain)
    before = audio.copy()
    log_mel = LogMel(FeatureOptions())
    features = log_mel(audio)
    assert torch.isfinite(features).all()
    assert len(features) == log_mel.frames(samples)
    assert torch.equal(features, LogMel(FeatureOptions())(audio))
    np.testing.assert_array_equal(audio, before)


@pytest.mark.parametrize("n_mels", [8, 40, 80, 128, 256])
def test_no_mel_filter_is_empty(n_mels):
    """torchaudio warns of empty filters, and warnings are errors."""
    assert LogMel(FeatureOptions(n_mels=n_mels))(noise(4000)).shape[1] == n_mels


def test_damaged_audio_is_refused():
    with pytest.raises(ValueError, match="damaged"):
        LogMel(FeatureOptions())(np.array([0.0, np.nan] * 400, np.float32))
    with pytest.raises(ValueError, match="mono"):
        LogMel(FeatureOptions())(np.zeros((2, 400), np.float32))


def augmented(options, lengths=(100, 37), seed=0):
    features = torch.ones(len(lengths), max(lengths), 80)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return features, spec_augment(features, torch.tensor(lengths), options)


def test_augmentation_switched_off_changes_nothing():
    features, result = augmented(AugmentOptions())
    assert result is features


def test_augmentation_follows_the_global_generator_and_keeps_its_input():
    features, first = augmented(AugmentOptions(enabled=True))
    assert torch.equal(first, augmented(AugmentOptions(enabled=True))[1])
    assert not torch.equal(first, augmented(AugmentOptions(enabled=True), seed=1)[1])
    assert (features == 1).all()


def test_a_time_mask_is_no_wider_than_its_share_of_its_own_utterance():
    options = AugmentOptions(enabled=True, frequency_masks=0, time_masks=1)
    widths = [(1 - augmented(options, seed=seed)[1][:, :, 0]).sum(dim=1) for seed in range(300)]
    assert torch.stack(widths).amax(dim=0).tolist() == [10, 3]


def test_a_frequency_mask_takes_a_band_of_up_to_its_width():
    options = AugmentOptions(enabled=True, time_masks=0, frequency_masks=1, frequency_width=5)
    for seed in range(50):
        masked = augmented(options, seed=seed)[1][0] == 0
        assert (masked == masked[0]).all()
        bins = masked[0].nonzero().flatten()
        assert len(bins) <= 5
        assert len(bins) < 2 or int(bins[-1] - bins[0]) == len(bins) - 1
