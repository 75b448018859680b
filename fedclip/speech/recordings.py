"""Recordings on disk: an index of who says what in which file, and reading one. Which are held out is decided elsewhere."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import numpy as np
import soundfile

from fedclip.speech.acoustics import resample
from fedclip.speech.corpus import SAMPLE_RATE
from fedclip.speech.errors import CorpusError

_FORMAT = 1  # to be raised when the same files give other samples, which makes another recipe


@dataclass(frozen=True)
class Recording:
    """A recording of the index: its file, what is said, the file's size and time of change, which tell its version, and the language."""

    path: Path
    text: str
    size: int
    changed: int
    language: str = ""


@dataclass(frozen=True)
class Index:
    """The recordings of a folder: those of training speakers, and those of held-out units, each sorted by name."""

    folder: Path
    train: Mapping[str, Sequence[Recording]]
    held_out: Mapping[str, Sequence[Recording]]
    train_names: tuple[str, ...] = field(init=False)
    held_out_names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Number the speakers and refuse an index that nothing can be trained or evaluated on."""
        object.__setattr__(self, "train", _sorted(self.train))
        object.__setattr__(self, "held_out", _sorted(self.held_out))
        object.__setattr__(self, "train_names", tuple(sorted(self.train)))
        object.__setattr__(self, "held_out_names", tuple(sorted(self.held_out)))
        for kind, names in (("training", self.train_names), ("held-out", self.held_out_names)):
            if not names:
                raise CorpusError(f"{self.folder} is left without {kind} recordings; add recordings or choose another hold_out.")

    def first(self, count: int) -> Self:
        """Return the index with only the first `count` training speakers; who is held out stays."""
        return replace(self, train={name: self.train[name] for name in self.train_names[:count]})

    def digest(self, *parts: object) -> str:
        """Return a digest of all recordings as they are now, of how they are split, and of `parts`."""
        state = hashlib.blake2b(repr((_FORMAT, *parts)).encode(), digest_size=16)
        for split, speakers in (("train", self.train), ("held out", self.held_out)):
            for name in sorted(speakers):
                for recording in speakers[name]:
                    path = os.path.relpath(recording.path, self.folder)
                    told = (recording.text, recording.size, recording.changed, recording.language)
                    state.update(repr((split, name, path, *told)).encode())
        return state.hexdigest()

    def check(self) -> None:
        """Open every recording and read its header.

        Raises:
            CorpusError: a recording is unreadable or empty; the message names the first such file.
        """
        for speakers in (self.train, self.held_out):
            for name in sorted(speakers):
                for recording in speakers[name]:
                    seconds_a_byte(recording)


def read(recording: Recording) -> np.ndarray:
    """Return the samples of a recording, float32 in [-1, 1], its channels averaged, at `SAMPLE_RATE`, shape (time,).

    Raises:
        CorpusError: the file is unreadable or empty.
    """
    try:
        channels, rate = soundfile.read(recording.path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(recording, error) from error
    audio = np.ascontiguousarray(channels.mean(axis=1), np.float32)
    if not len(audio):
        raise _unreadable(recording, "it has no samples")
    if not np.isfinite(audio).all():
        raise _unreadable(recording, "it has infinite samples or samples that are no numbers")
    if rate != SAMPLE_RATE:
        audio = resample(audio, SAMPLE_RATE / rate)
    return np.clip(audio, -1.0, 1.0)


def seconds_a_byte(recording: Recording) -> float:
    """Return the duration of a recording divided by its size, from its header alone.

    Raises:
        CorpusError: the file is unreadable, empty or a WAV file that was cut short.
    """
    try:
        header = soundfile.info(recording.path)
        missing = _missing_bytes(recording)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(recording, error) from error
    if header.frames <= 0 or header.samplerate <= 0:
        raise _unreadable(recording, "it has no samples")
    if missing:
        raise _unreadable(recording, f"its last {missing:,} bytes are missing: a copy or download stopped early")
    return float(header.frames / header.samplerate / recording.size)


def find_recording(path: Path, text: str, language: str = "") -> Recording:
    """Return the entry of a file for an index, without opening it.

    Raises:
        CorpusError: there is no such file, or it has no bytes.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CorpusError(f"{path} cannot be found or read ({error.strerror}); put it there or correct its name.") from error
    if not path.is_file() or not status.st_size:
        raise CorpusError(f"{path} is {'an empty file' if path.is_file() else 'no file'}; replace it with a recording or leave it out.")
    return Recording(path, text, status.st_size, status.st_mtime_ns, language)


def expect_folder(path: Path) -> Path:
    """Return a folder if it is one.

    Raises:
        CorpusError: it is not.
    """
    if not path.is_dir():
        raise CorpusError(f"There is no folder {path}; correct data_dir or put the recordings there.")
    return path


def speaker_name(names: Sequence[str], speaker: int, kind: str) -> str:
    """Return the name of speaker number `speaker`.

    Raises:
        IndexError: there is no such number.
    """
    if not 0 <= speaker < len(names):
        raise IndexError(f"Expected a {kind} speaker from 0 to {len(names) - 1}, got {speaker}.")
    return names[speaker]


def _unreadable(recording: Recording, cause: object) -> CorpusError:
    return CorpusError(f"{recording.path} is no readable recording ({cause}); replace it with an intact WAV or FLAC file or leave it out.")


def _missing_bytes(recording: Recording) -> int:
    """Return how many bytes a RIFF file lacks of what its header says; its audio would be read without a complaint, but too short."""
    with recording.path.open("rb") as file:
        start = file.read(8)
    declared = int.from_bytes(start[4:], "little") + 8
    # Programs that write to a pipe cannot know the length and declare the largest one.
    unknown = declared >= 2**31 - 1
    return 0 if start[:4] != b"RIFF" or unknown else max(0, declared - recording.size)


def _sorted(speakers: Mapping[str, Sequence[Recording]]) -> dict[str, tuple[Recording, ...]]:
    return {name: tuple(sorted(speakers[name], key=lambda recording: recording.path)) for name in sorted(speakers)}
