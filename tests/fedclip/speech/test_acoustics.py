"""Tests of rooms, noise, speed and gain."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchaudio import functional

from fedclip.speech import acoustics


def tone(frequency: float, seconds: float, rate: int) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return (np.sin(2 * np.pi * frequency * time) * np.hanning(len(time))).astype(np.float32)


def loudest_frequency(audio: np.ndarray, rate: int) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(audio))) * rate / len(audio))


def test_rooms_are_all_different_and_within_the_documented_ranges() -> None:
    rooms = [acoustics.room(i) for i in range(acoustics.ROOMS)]
    assert len(set(rooms)) == acoustics.ROOMS
    assert {round(r.rt60, 3) for r in rooms} >= {0.1, 0.4}
    assert all(0.1 <= r.rt60 <= 0.4 + 1e-9 and 3 <= r.direct_db <= 15 for r in rooms)
    with pytest.raises(IndexError, match="got 48"):
        acoustics.room(acoustics.ROOMS)


@pytest.mark.parametrize("index", [0, 7, 20, 47])
def test_an_impulse_response_has_its_rooms_ratio_and_decay(index: int) -> None:
    place = acoustics.room(index)
    response = acoustics.impulse_response(place, 16_000, np.random.default_rng(index))
    assert response.dtype == np.float32
    assert len(response) == round(place.rt60 * 16_000)
    tail = np.square(response[1:], dtype=np.float64)
    assert 10 * math.log10(response[0] ** 2 / tail.sum()) == pytest.approx(place.direct_db, abs=0.01)
    # Schroeder's backward integral falls by 60 dB in rt60; fitted between -5 and -25 dB as in ISO 3382.
    decay = 10 * np.log10(np.cumsum(tail[::-1])[::-1][:-1] / tail.sum())
    part = np.flatnonzero((decay < -5) & (decay > -25))
    slope = np.polyfit(part / 16_000, decay[part], 1)[0]
    assert -60 / slope == pytest.approx(place.rt60, rel=0.15)


@given(st.integers(0, 300), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_reverberation_is_the_convolution(length: int, taps: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    audio, response = rng.standard_normal(length).astype(np.float32), rng.standard_normal(taps).astype(np.float32)
    before = audio.copy()
    expected = np.convolve(audio.astype(np.float64), response)[:length] if length else audio
    np.testing.assert_allclose(acoustics.reverberate(audio, response), expected, atol=1e-3)
    np.testing.assert_array_equal(audio, before)


@pytest.mark.parametrize("kind", acoustics.NOISE_KINDS)
def test_noise_has_unit_power_and_no_constant_part(kind: acoustics.NoiseKind) -> None:
    noise = acoustics.draw_noise(kind, 32_000, 16_000, np.random.default_rng(5))
    assert noise.dtype == np.float32
    assert float(np.mean(np.square(noise))) == pytest.approx(1, rel=1e-3)
    assert abs(float(noise.mean())) < 0.1
    again = acoustics.draw_noise(kind, 32_000, 16_000, np.random.default_rng(5))
    np.testing.assert_array_equal(noise, again)
    assert len(acoustics.draw_noise(kind, 0, 16_000, np.random.default_rng(5))) == 0
    assert np.isfinite(acoustics.draw_noise(kind, 1, 16_000, np.random.default_rng(5))).all()


def test_pink_noise_has_equal_power_in_each_octave_and_white_noise_twice_as_much() -> None:
    def octaves(kind: acoustics.NoiseKind) -> np.ndarray:
        power = np.abs(np.fft.rfft(acoustics.draw_noise(kind, 1 << 17, 16_000, np.random.default_rng(1)))) ** 2
        hertz = np.fft.rfftfreq(1 << 17, 1 / 16_000)
        return np.array([power[(hertz >= low) & (hertz < 2 * low)].sum() for low in (250, 500, 1000, 2000)])

    np.testing.assert_allclose(octaves("pink") / octaves("pink").mean(), 1, atol=0.15)
    white = octaves("white")
    np.testing.assert_allclose(white[1:] / white[:-1], 2, atol=0.2)


def test_an_unknown_noise_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="white, pink, hum, babble, got 'green'"):
        acoustics.draw_noise("green", 10, 16_000, np.random.default_rng(0))  # type: ignore[arg-type]


@given(st.floats(-10, 40), st.integers(2, 2000), st.integers(0, 2**32 - 1))
def test_noise_is_added_at_the_given_ratio(snr_db: float, length: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    audio = (0.1 * rng.standard_normal(length)).astype(np.float32)
    noise = acoustics.draw_noise("white", length, 16_000, rng)
    added = acoustics.add_noise(audio, noise, snr_db).astype(np.float64) - audio
    measured = 10 * math.log10(np.mean(np.square(audio, dtype=np.float64)) / np.mean(np.square(added)))
    assert measured == pytest.approx(snr_db, abs=0.05)


def test_noise_at_the_edges() -> None:
    rng = np.random.default_rng(0)
    audio, noise, silence = tone(440, 0.1, 16_000), acoustics.draw_noise("pink", 1600, 16_000, rng), np.zeros(1600, np.float32)
    np.testing.assert_array_equal(acoustics.add_noise(silence, noise, 10), silence)
    np.testing.assert_array_equal(acoustics.add_noise(audio, silence, 10), audio)
    np.testing.assert_array_equal(acoustics.add_noise(audio, noise, math.inf), audio)
    assert len(acoustics.add_noise(silence[:0], noise[:0], 10)) == 0
    with pytest.raises(ValueError, match="got 5 and 1600 samples"):
        acoustics.add_noise(audio, noise[:5], 10)


@pytest.mark.parametrize(
    ("rate_in", "rate_out", "speed"), [(22_050, 16_000, 1.0), (22_050, 16_000, 1.083), (8000, 16_000, 1.0), (16_000, 8000, 0.9)]
)
def test_resampling_moves_a_tone_by_the_speed_and_keeps_its_level(rate_in: int, rate_out: int, speed: float) -> None:
    audio = tone(1000, 1.5, rate_in)
    factor = rate_out / (rate_in * speed)
    out = acoustics.resample(audio, factor)
    assert out.dtype == np.float32
    assert len(out) == round(len(audio) * factor)
    assert loudest_frequency(out, rate_out) == pytest.approx(1000 * speed, abs=2)
    assert np.abs(out).max() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_resampling_agrees_with_torchaudio_on_speech_frequencies(rate: int) -> None:
    audio = np.mean([tone(frequency, 0.7, rate) for frequency in (150, 900, 2900)], axis=0)
    expected = functional.resample(torch.from_numpy(audio), rate, 16_000, lowpass_filter_width=64).numpy()
    out = acoustics.resample(audio, 16_000 / rate)
    shorter = min(len(out), len(expected))
    np.testing.assert_allclose(out[:shorter], expected[:shorter], atol=2e-3)


def test_resampling_leaves_out_what_the_lower_rate_cannot_carry() -> None:
    assert np.abs(acoustics.resample(tone(10_000, 0.5, 22_050), 16_000 / 22_050)).max() < 1e-3


@given(st.integers(0, 500), st.floats(0.3, 3))
def test_resampling_has_the_documented_length(length: int, factor: float) -> None:
    out = acoustics.resample(np.ones(length, np.float32), factor)
    assert len(out) == round(length * factor)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_a_senseless_factor_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="positive, finite resampling factor"):
        acoustics.resample(np.ones(5, np.float32), factor)


def test_the_peak_is_set_and_silence_stays() -> None:
    assert np.abs(acoustics.set_peak(tone(300, 0.1, 8000), 0.5)).max() == pytest.approx(0.5)
    assert not acoustics.set_peak(np.zeros(5, np.float32), 0.5).any()
    assert len(acoustics.set_peak(np.zeros(0, np.float32), 0.5)) == 0


@given(st.integers(1, 10**6))
def test_a_fast_length_is_long_enough_and_not_wasteful(length: int) -> None:
    assert length <= acoustics.fast_length(length) <= max(length + 1, length * 4 / 3)
