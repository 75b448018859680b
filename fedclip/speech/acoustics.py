"""What happens to speech between mouth and microphone: rooms, noise, speed and gain, as pure functions of float32 arrays.

All audio has shape (time,). Everything random comes from a generator that the caller passes in. Imports NumPy only: its
transforms keep float32, run on one thread, and need no filter to be made anew for each speed.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

NoiseKind = Literal["white", "pink", "hum", "babble"]
"""white: hiss; pink: equal power an octave, like rain; hum: mains and fan tones; babble: speech-shaped, swelling as voices do."""

NOISE_KINDS: tuple[NoiseKind, ...] = get_args(NoiseKind)
ROOMS = 48
"""How many rooms there are."""

_RATIO_TOLERANCE = 2e-4
_AUDIBLE_HZ = 20.0
_DECAYS = 8  # reverberation times; the other factor of ROOMS is the distances


@dataclass(frozen=True)
class Room:
    """A room and the place in it where the speaker stands.

    Args:
        rt60: Seconds in which the reverberation falls by 60 dB.
        direct_db: Energy of the direct sound relative to the reverberation, in dB.
    """

    rt60: float
    direct_db: float


def room(index: int) -> Room:
    """Return room `index` of `ROOMS`: eight reverberation times from 0.1 to 0.4 s, six direct-to-reverberant ratios from 3 to 15 dB.

    Raises:
        IndexError: there is no such room.
    """
    if not 0 <= index < ROOMS:
        raise IndexError(f"Expected a room from 0 to {ROOMS - 1}, got {index}.")
    decay, distance = index % _DECAYS, index // _DECAYS
    return Room(rt60=0.1 + 0.3 * decay / (_DECAYS - 1), direct_db=3.0 + 12.0 * distance / (ROOMS // _DECAYS - 1))


def impulse_response(place: Room, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return a room's impulse response, shape (rt60 * sample_rate,): a direct impulse of 1, then exponentially decaying noise.

    The statistical model of reverberation (Polack 1988): h(t) = g n(t) 10^(-3 t / rt60), n white and Gaussian, begun 2 ms after the
    direct sound, with g such that sum h^2 = 10^(-direct_db / 10).
    """
    length = max(1, round(place.rt60 * sample_rate))
    start = min(length, round(0.002 * sample_rate))
    time = np.arange(length - start, dtype=np.float32) / np.float32(sample_rate)
    tail = rng.standard_normal(length - start, dtype=np.float32) * np.float32(10) ** (-3 * time / np.float32(place.rt60))
    energy = float(tail @ tail)
    response = np.zeros(length, np.float32)
    if energy > 0:
        response[start:] = tail * np.float32((10 ** (-place.direct_db / 10) / energy) ** 0.5)
    response[0] = 1.0
    return response


def reverberate(audio: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Return audio as heard through an impulse response: the convolution, cut to the length of `audio`."""
    if not len(audio) or not len(response):
        return audio.astype(np.float32)
    size = fast_length(len(audio) + len(response) - 1)
    spectrum = np.fft.rfft(audio.astype(np.float32, copy=False), size) * np.fft.rfft(response.astype(np.float32, copy=False), size)
    wet: np.ndarray = np.fft.irfft(spectrum, size)[: len(audio)]
    return wet.astype(np.float32, copy=False)


def resample(audio: np.ndarray, factor: float) -> np.ndarray:
    """Return audio with `factor` times as many samples, round(len * factor), by cutting or padding its spectrum.

    With factor = rate_out / (rate_in * speed) this changes the rate, and plays the audio `speed` times as fast.
    Ratios of common rates are met exactly; others to 2 parts in 10,000, a third of a cent, so that both transforms have quick sizes.

    Raises:
        ValueError: the factor is not positive and finite.
    """
    if not 0 < factor < float("inf"):
        raise ValueError(f"Expected a positive, finite resampling factor, got {factor}; check the two rates and the speed.")
    length = round(len(audio) * factor)
    if length == 0:
        return np.zeros(0, np.float32)
    size_in, size_out = _transform_sizes(len(audio), length, factor)
    spectrum = np.fft.rfft(audio.astype(np.float32, copy=False), size_in)
    resampled: np.ndarray = np.fft.irfft(spectrum[: size_out // 2 + 1], size_out)[:length]
    return (resampled * np.float32(size_out / size_in)).astype(np.float32, copy=False)


def draw_noise(kind: NoiseKind, length: int, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise of a kind, shape (length,), with mean square 1.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in NOISE_KINDS:
        raise ValueError(f"Expected a kind of noise among {', '.join(NOISE_KINDS)}, got {kind!r}.")
    if length <= 0:
        return np.zeros(0, np.float32)
    if kind == "white":
        noise = rng.standard_normal(length, dtype=np.float32)
    elif kind == "hum":
        noise = _hum(length, sample_rate, rng)
    else:
        noise = _coloured(kind, length, sample_rate, rng)
        if kind == "babble":
            noise = noise * _swell(length, sample_rate, rng)
    power = float(np.mean(np.square(noise)))
    return (noise / np.float32(power**0.5)).astype(np.float32, copy=False) if power > 0 else noise


def add_noise(audio: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Return audio + g * noise with g such that their mean squares are `snr_db` decibels apart.

    | audio or noise | result |
    |---|---|
    | either is silent or empty | the audio: no gain gives that ratio |
    | snr_db is +infinity | the audio |

    Raises:
        ValueError: the lengths differ.
    """
    if len(audio) != len(noise):
        raise ValueError(f"Expected noise as long as the audio, got {len(noise)} and {len(audio)} samples; draw noise of that length.")
    clean = audio.astype(np.float32, copy=False)
    signal_power, noise_power = (float(np.mean(np.square(x, dtype=np.float64))) if len(x) else 0.0 for x in (clean, noise))
    if signal_power == 0 or noise_power == 0:
        return clean.copy()
    gain = (signal_power / noise_power) ** 0.5 * 10 ** (-snr_db / 20)
    return clean + np.float32(gain) * noise.astype(np.float32, copy=False)


def set_peak(audio: np.ndarray, peak: float) -> np.ndarray:
    """Return audio scaled so that its largest magnitude is `peak`; silence stays silence."""
    largest = float(np.max(np.abs(audio))) if len(audio) else 0.0
    return audio.astype(np.float32) * np.float32(peak / largest if largest > 0 else 1.0)


def fast_length(length: int) -> int:
    """Return the least 2^k, 3 * 2^k, 5 * 2^k, 9 * 2^k or 15 * 2^k that is >= `length`: sizes of quick transforms."""
    candidates = (odd << max(0, (-(-length // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))
    return min(candidates)


def _transform_sizes(length_in: int, length_out: int, factor: float) -> tuple[int, int]:
    """Return sizes in the ratio `factor`, or about so, that hold the lengths and are quick to transform.

    Some silence is added, as a transform takes the end of the audio to be followed by its beginning.
    """
    first = length_out + 64
    ratio = Fraction(factor).limit_denominator(1000)
    if abs(ratio / Fraction(factor) - 1) < 1e-9 and _is_smooth(ratio.numerator) and _is_smooth(ratio.denominator):
        multiple = max(-(-first // ratio.numerator), -(-length_in // ratio.denominator))
        while not _is_smooth(multiple):
            multiple += 1
        return ratio.denominator * multiple, ratio.numerator * multiple
    for size_out in range(first, 2 * first):
        if not _is_smooth(size_out):
            continue
        exact = size_out / factor
        nearest, spread = round(exact), int(exact * _RATIO_TOLERANCE)
        for size_in in sorted(range(nearest - spread, nearest + spread + 1), key=lambda size: abs(size - nearest)):
            if size_in >= length_in and _is_smooth(size_in):
                return size_in, size_out
    return max(length_in, round(first / factor)), first


def _is_smooth(size: int) -> bool:
    for prime in (2, 3, 5, 7, 11, 13):
        while size % prime == 0:
            size //= prime
    return size == 1


def _coloured(kind: NoiseKind, length: int, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    size = fast_length(max(2, length))
    spectrum = rng.standard_normal(size + 2, dtype=np.float32).view(np.complex64)
    frequency = np.fft.rfftfreq(size, 1 / sample_rate).astype(np.float32)
    if kind == "pink":
        spectrum /= np.sqrt(np.maximum(frequency, _AUDIBLE_HZ))
    else:
        # Speech on average: flat to about 500 Hz and then 9 dB less an octave, little below 100 Hz.
        spectrum *= (1 + (frequency / 500) ** 2) ** np.float32(-0.75) * frequency / (frequency + 100)
    # Inaudible, but of so much power in pink noise that little would be left to be heard at a given ratio.
    spectrum[frequency < _AUDIBLE_HZ] = 0
    noise: np.ndarray = np.fft.irfft(spectrum, size)[:length]
    return noise.astype(np.float32, copy=False)


def _swell(length: int, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return a slow envelope in [0.1, 1.9], with a new level about four times a second: the rate of syllables."""
    knots = rng.uniform(0.1, 1.9, size=2 + 4 * length // sample_rate + 1)
    positions = np.arange(length) * (4.0 / sample_rate)
    levels: np.ndarray = np.interp(positions, np.arange(len(knots)), knots).astype(np.float32)
    return levels


def _hum(length: int, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Return harmonics of the mains and one fan tone over a floor of hiss."""
    time = np.arange(length, dtype=np.float32) * np.float32(2 * np.pi / sample_rate)
    base = 50.0 if rng.random() < 0.5 else 60.0
    tones = [(base * harmonic, rng.uniform(0.3, 1.0) / harmonic) for harmonic in (1, 2, 3, 5)]
    tones.append((rng.uniform(300, 1200), 0.3))
    noise: np.ndarray = np.float32(0.15) * rng.standard_normal(length, dtype=np.float32)
    for frequency, amplitude in tones:
        noise += np.float32(amplitude) * np.sin(np.float32(frequency) * time + np.float32(rng.uniform(0, 2 * np.pi)))
    return noise
