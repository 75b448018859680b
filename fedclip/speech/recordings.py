"""Recordings on disk: reading one, or part of one, and all that a user has."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import soundfile

from fedclip.speech.acoustics import resample
from fedclip.speech.corpus import SAMPLE_RATE, Utterance
from fedclip.speech.errors import CorpusError

FORMAT: Final = 2
"""To be raised when the same files give other samples, which makes another recipe."""

_THREADS: Final = 4
"""Files that are read at a time: the library that decodes them lets other threads run."""

_RATES: Final = (4000, 384_000)
"""Samples a second that speech can have; a header that says something else is damaged."""

_WHOLE: Final = 0.9
"""The part of the samples of its header that a file must give: compressed files may miss a few at their end."""

_BYTES_A_SECOND: Final = {".flac": 16_000, ".mp3": 6_000, ".ogg": 6_000}

_LONGEST: Final = 4 * 3600.0
"""Seconds that are read at once at most; a header that says more is damaged, or nothing to train on."""

_SLACK: Final = 0.5
"""Seconds by which a segment may end after its file does."""


@dataclass(frozen=True)
class Recording:
    """A recording, or a part of one: its file with its size in bytes, what is said, and where in the file, in seconds.

    `end` None: at its end; `seconds` None: how long it lasts is not known without its header.
    """

    path: Path
    text: str
    size: int
    start: float = 0.0
    end: float | None = None
    seconds: float | None = None
    language: str = ""


def utterances(recordings: Sequence[Recording]) -> list[Utterance]:
    """Return what is heard in recordings, in their order, read on a few threads; an unreadable one has a fault and no samples."""
    if len(recordings) < 2:
        return [_utterance(recording) for recording in recordings]
    with ThreadPoolExecutor(min(_THREADS, len(recordings))) as threads:
        return list(threads.map(_utterance, recordings))


def _utterance(recording: Recording) -> Utterance:
    try:
        return Utterance(read(recording), recording.text, recording.language)
    except CorpusError as error:
        return Utterance(np.zeros(0, np.float32), recording.text, recording.language, str(error))


def read(recording: Recording) -> np.ndarray:
    """Return the samples of a recording, float32 in [-1, 1], its channels averaged, at `SAMPLE_RATE`, shape (time,).

    Raises:
        CorpusError: the file is unreadable, cut short or empty.
    """
    try:
        with soundfile.SoundFile(os.fsencode(recording.path)) as file:
            rate, frames = file.samplerate, file.frames
            if not _RATES[0] <= rate <= _RATES[1]:
                raise _unreadable(recording, f"its header says {rate} samples a second")
            first, last = round(recording.start * rate), frames if recording.end is None else round(recording.end * rate)
            if last > frames + _SLACK * rate:
                raise _unreadable(recording, f"it ends after {frames / rate:.1f} s, before the segment to {recording.end:.1f} s")
            if last - first > _LONGEST * rate:
                raise _unreadable(recording, f"its header says that it lasts {(last - first) / rate / 3600:.0f} hours")
            if first:
                file.seek(min(first, frames))
            channels = file.read(last - first, dtype="float32", always_2d=True)
        missing = _missing_bytes(recording)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise _unreadable(recording, error) from error
    if missing:
        raise _unreadable(recording, f"its last {missing:,} bytes are missing: a copy or download stopped early")
    if len(channels) < _WHOLE * (min(last, frames) - first):
        raise _unreadable(recording, f"only {len(channels):,} of {last - first:,} samples can be read: a copy or download stopped early")
    audio = np.ascontiguousarray(channels.mean(axis=1), np.float32)
    if not np.isfinite(audio).all():
        raise _unreadable(recording, "it has infinite samples or samples that are no numbers")
    if rate != SAMPLE_RATE:
        audio = resample(audio, SAMPLE_RATE / rate)
    if not len(audio):
        raise _unreadable(recording, "it has no samples")
    return np.clip(audio, -1.0, 1.0)


def seconds_a_byte(recording: Recording) -> float:
    """Return the duration of a recording divided by its size, from its header alone.

    Raises:
        CorpusError: the file is unreadable, empty or a WAV file that was cut short.
    """
    try:
        header = soundfile.info(os.fsencode(recording.path))
        missing = _missing_bytes(recording)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise _unreadable(recording, error) from error
    if header.frames <= 0 or header.samplerate <= 0:
        raise _unreadable(recording, "it has no samples")
    if missing:
        raise _unreadable(recording, f"its last {missing:,} bytes are missing: a copy or download stopped early")
    return float(header.frames / header.samplerate / recording.size)


def check(recordings: Iterable[Recording]) -> None:
    """Open every recording and read its header.

    Raises:
        CorpusError: a recording is unreadable or empty; the message names the first such file.
    """
    for recording in recordings:
        seconds_a_byte(recording)


def nominal_seconds_a_byte(path: Path) -> float:
    """Return about how long a byte of a kind of file lasts, by its name: for files that cannot be opened."""
    return 1 / _BYTES_A_SECOND.get(path.suffix.lower(), 32_000)


def expect_folder(path: Path) -> Path:
    """Return a folder if it is one.

    Raises:
        CorpusError: it is not.
    """
    if not path.is_dir():
        raise CorpusError(f"There is no folder {path}; correct data_dir or put the recordings there.")
    return path


def _unreadable(recording: Recording, cause: object) -> CorpusError:
    return CorpusError(f"{recording.path} is no readable recording ({cause}); replace it with an intact file or leave it out.")


def _missing_bytes(recording: Recording) -> int:
    """Return how many bytes a RIFF file lacks of what its header says; its audio would be read without a complaint, but too short."""
    with recording.path.open("rb") as file:
        start = file.read(8)
    declared = int.from_bytes(start[4:], "little") + 8
    # Programs that write to a pipe cannot know the length and declare the largest one.
    unknown = declared >= 2**31 - 1
    return 0 if start[:4] != b"RIFF" or unknown else max(0, declared - recording.size)
