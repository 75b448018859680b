"""The embedded corpus: virtual speakers, each a function of (seed, number), whose speech is synthesised on demand."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from typing import Literal

import numpy as np

from fedclip.speech import acoustics
from fedclip.speech.corpus import SAMPLE_RATE, Utterance
from fedclip.speech.errors import CorpusError
from fedclip.speech.espeak import VARIANTS, SpeechRequest, Synthesizer, library_version
from fedclip.speech.grammar import draw_sentence
from fedclip.speech.options import EmbeddedOptions

MAX_POPULATION = 100_000_000
"""The most training speakers. Held-out speakers are numbered from here, so that they are the same at every population."""

Split = Literal["train", "held_out"]

_FORMAT = 3  # to be raised when the same options give other samples, which makes another recipe
_PITCH, _PITCH_RANGE, _RATE = (25, 75), (25, 75), (110, 190)
_PEAK, _SILENCE = (0.25, 0.95), (0.1, 0.3)
# Fitted by least squares to 400 sentences in random voices, standard error 14 %: seconds = (36 + 8.4 * characters) / rate.
_SECONDS_BASE, _SECONDS_A_CHARACTER = 36.0, 8.4


@dataclass(frozen=True)
class VirtualSpeaker:
    """All there is to know about a virtual speaker.

    Args:
        voice: Accent and variant of the synthesiser.
        room: Number of the room.
        pitch: Of the synthesiser, as are `pitch_range` and `rate`.
        pitch_range: Liveliness.
        rate: Words a minute before `speed`.
        speed: Factor by which the speech is played faster, which also raises its formants.
        noise: Kind of background noise.
        snr_db: How far the speech stands above the noise.
        peak: Largest magnitude of each utterance's samples.
        sentences: What the speaker says.
        silences: Seconds of background before and after each sentence.
    """

    voice: str
    room: int
    pitch: int
    pitch_range: int
    rate: int
    speed: float
    noise: acoustics.NoiseKind
    snr_db: float
    peak: float
    sentences: tuple[str, ...]
    silences: tuple[tuple[float, float], ...]

    @property
    def seconds(self) -> float:
        """About how long the speaker talks in all, predicted from the sentences."""
        spoken = sum(_SECONDS_BASE + _SECONDS_A_CHARACTER * len(sentence) for sentence in self.sentences) / self.rate
        return spoken / self.speed + sum(before + after for before, after in self.silences)


def is_reserved(voice: str, room: int) -> bool:
    """Whether a voice in a room is kept for held-out speakers: a fixed tenth of all combinations, whatever the seed."""
    digest = hashlib.blake2b(f"{voice}/{room}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def draw_speaker(options: EmbeddedOptions, seed: int, split: Split, number: int) -> VirtualSpeaker:
    """Return a virtual speaker: a function of the arguments, computed in constant time and memory."""
    rng = _stream(seed, split, number, "speaker")
    while True:
        voice = f"{options.accents[rng.integers(len(options.accents))]}+{VARIANTS[rng.integers(len(VARIANTS))]}"
        room = int(rng.integers(*options.rooms, endpoint=True))
        if is_reserved(voice, room) == (split == "held_out"):
            break
    count = int(rng.integers(*options.utterances, endpoint=True))
    return VirtualSpeaker(
        voice=voice,
        room=room,
        pitch=int(rng.integers(*_PITCH, endpoint=True)),
        pitch_range=int(rng.integers(*_PITCH_RANGE, endpoint=True)),
        rate=int(rng.integers(*_RATE, endpoint=True)),
        speed=float(rng.uniform(*options.speed)),
        noise=acoustics.NOISE_KINDS[rng.integers(len(acoustics.NOISE_KINDS))],
        snr_db=float(rng.uniform(*options.snr_db)),
        peak=float(rng.uniform(*_PEAK)),
        sentences=tuple(draw_sentence(rng) for _ in range(count)),
        silences=tuple((float(rng.uniform(*_SILENCE)), float(rng.uniform(*_SILENCE))) for _ in range(count)),
    )


@dataclass(frozen=True)
class EmbeddedCorpus:
    """A corpus of virtual speakers.

    Guarantees:
        A speaker's samples depend on (seed, split, number) and the options alone: not on the population, nor on the order
        in which speakers are read, nor on the process that reads them.
        No held-out speaker shares its number, or its combination of voice and room, with any training speaker.
        Memory does not grow with the population.
    """

    options: EmbeddedOptions
    population: int
    seed: int
    synthesizer: Synthesizer = field(default_factory=Synthesizer, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a population that would reach into the held-out speakers' numbers, and so few voices and rooms that nobody is held out."""
        if not 1 <= self.population <= MAX_POPULATION:
            raise CorpusError(f"Expected a population from 1 to {MAX_POPULATION:,}, got {self.population:,}.")
        first, last = self.options.rooms
        rooms = range(first, last + 1)
        reserved = {is_reserved(f"{a}+{v}", room) for a in self.options.accents for v in VARIANTS for room in rooms}
        if reserved != {True, False}:
            spoken, part = ", ".join(self.options.accents), "all" if True in reserved else "none"
            raise CorpusError(f"Of the voices of {spoken} in the rooms {first} to {last} {part} are held out; give more accents or rooms.")

    @cached_property
    def recipe(self) -> str:
        """A digest of all that the samples depend on. The population and the number of held-out speakers are not among it.

        Raises:
            SynthesizerError: the synthesiser is not installed.
        """
        parts = [
            self.options.model_dump(exclude={"held_out_speakers"}),
            {"seed": self.seed, "format": _FORMAT, "espeak": library_version(), "numpy": metadata.version("numpy")},
        ]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()

    @property
    def cacheable(self) -> bool:
        """True: a speaker says the same each round."""
        return True

    @property
    def train_speakers(self) -> int:
        """The population."""
        return self.population

    @property
    def held_out_speakers(self) -> int:
        """How many held-out speakers there are."""
        return self.options.held_out_speakers

    def train(self, speaker: int, rng: np.random.Generator) -> list[Utterance]:
        """Return the utterances of a training speaker; `rng` is not used."""
        return self._utterances("train", self._check(speaker, self.population, "training"))

    def train_seconds(self, speaker: int) -> float:
        """Return about how long a training speaker talks, without synthesising anything."""
        return draw_speaker(self.options, self.seed, "train", self._check(speaker, self.population, "training")).seconds

    def held_out(self, speaker: int) -> list[Utterance]:
        """Return the utterances of a held-out speaker."""
        return self._utterances("held_out", MAX_POPULATION + self._check(speaker, self.held_out_speakers, "held-out"))

    def close(self) -> None:
        """End the synthesiser process; the next read starts another."""
        self.synthesizer.close()

    def _check(self, speaker: int, count: int, kind: str) -> int:
        if not 0 <= speaker < count:
            raise IndexError(f"Expected a {kind} speaker from 0 to {count - 1}, got {speaker}.")
        return int(speaker)

    def _utterances(self, split: Split, number: int) -> list[Utterance]:
        speaker = draw_speaker(self.options, self.seed, split, number)
        rng = _stream(self.seed, split, number, "acoustics")
        requests = [SpeechRequest(text, speaker.voice, speaker.pitch, speaker.pitch_range, speaker.rate) for text in speaker.sentences]
        spoken = self.synthesizer.speak_all(requests)
        factor = SAMPLE_RATE / (self.synthesizer.sample_rate * speaker.speed)
        response = _response(speaker.room) if self.options.reverb else np.ones(1, np.float32)
        utterances = []
        for audio, text, silence in zip(spoken, speaker.sentences, speaker.silences, strict=True):
            before, after = (round(seconds * SAMPLE_RATE) for seconds in silence)
            heard = acoustics.reverberate(np.pad(acoustics.resample(audio, factor), (before, after)), response)
            noise = acoustics.draw_noise(speaker.noise, len(heard), SAMPLE_RATE, rng)
            heard = acoustics.set_peak(acoustics.add_noise(heard, noise, speaker.snr_db), speaker.peak)
            utterances.append(Utterance(heard, text))
        return utterances


def _response(room: int) -> np.ndarray:
    """Return a room's impulse response: one and the same for all who stand in it."""
    rng = np.random.Generator(np.random.Philox(key=room))
    return acoustics.impulse_response(acoustics.room(room), SAMPLE_RATE, rng)


def _stream(seed: int, split: Split, number: int, purpose: Literal["speaker", "acoustics"]) -> np.random.Generator:
    digest = hashlib.blake2b(f"speech/{seed}/{split}/{number}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
