"""A folder of single spoken digits for tests: recorded ones where there are some, else synthesised."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from fedclip.speech import acoustics
from fedclip.speech.espeak import SpeechRequest, Synthesizer
from fedclip.speech.grammar import DIGITS

RATE = 8000


@dataclass(frozen=True)
class Voice:
    """A speaker of the generated folder."""

    name: str
    voice: str
    pitch: int
    rate: int


VOICES = (
    Voice("anna", "en-us+f2", 55, 150),
    Voice("bruno", "en-us+m3", 40, 160),
    Voice("clara", "en-gb-x-rp+f4", 60, 145),
    Voice("duncan", "en-gb-scotland+m7", 45, 155),
    Voice("emil", "en-us-nyc+Mike", 30, 165),
    Voice("fay", "en-029+linda", 50, 150),
)


def spoken_digits(folder: Path) -> Path:
    """Return the folder that FEDCLIP_SPEECH_DIR names, or else `folder`, filled with generated recordings."""
    recorded = os.environ.get("FEDCLIP_SPEECH_DIR")
    return Path(recorded) if recorded else write_spoken_digits(folder)


def write_spoken_digits(folder: Path, speakers: int = 6, per_digit: int = 8, seed: int = 0) -> Path:
    """Write `recordings/<digit>_<speaker>_<number>.wav`, 16-bit at 8 kHz and free of silence, and return `folder`.

    Recordings of one digit by one speaker differ in pitch, rate, loudness and noise.

    Args:
        folder: Where to write; made if missing.
        speakers: How many of the six voices.
        per_digit: How many recordings of each digit by each speaker; the first five are the published test split.
        seed: The same seed writes the same files.
    """
    recordings = folder / "recordings"
    recordings.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with Synthesizer() as synthesizer:
        for voice in VOICES[:speakers]:
            plan = [(digit, number) for digit in range(10) for number in range(per_digit)]
            requests = [
                SpeechRequest(
                    DIGITS[digit],
                    voice.voice,
                    pitch=voice.pitch + int(rng.integers(-6, 7)),
                    pitch_range=int(rng.integers(30, 70)),
                    rate=voice.rate + int(rng.integers(-20, 21)),
                )
                for digit, _ in plan
            ]
            for (digit, number), audio in zip(plan, synthesizer.speak_all(requests), strict=True):
                small = acoustics.resample(_trim(audio), RATE / synthesizer.sample_rate)
                noisy = acoustics.add_noise(small, acoustics.draw_noise("pink", len(small), RATE, rng), rng.uniform(20, 40))
                loud = acoustics.set_peak(noisy, float(rng.uniform(0.3, 0.9)))
                soundfile.write(recordings / f"{digit}_{voice.name}_{number}.wav", loud, RATE, subtype="PCM_16")
    return folder


def _trim(audio: np.ndarray) -> np.ndarray:
    """Return audio without what is softer than 1 % of its peak at either end."""
    loud = np.flatnonzero(np.abs(audio) > 0.01 * np.abs(audio).max())
    return audio[loud[0] : loud[-1] + 1]
