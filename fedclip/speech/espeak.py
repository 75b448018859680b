"""Speech synthesis by eSpeak NG, which runs as a process of its own (see `espeak_process`): requests in, samples out."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Self, get_args

import numpy as np

from fedclip.speech.errors import SynthesizerError
from fedclip.speech.options import Accent

ACCENTS: tuple[str, ...] = get_args(Accent)
"""The accents of English, which decide how words are pronounced."""

# Not all that the library has: no whispers, robots, echoes and other effects that no listener would take for a person.
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "Alex", "Andy", "Lee", "f1", "f2", "f3", "f4", "f5", "Alicia", "Annie", "linda")
"""The variants, which decide the timbre. A voice is an accent and a variant: "en-us+f3"."""

_OK, _FAILED, _UNUSABLE = 0, 1, 2
_REMEDY = "Install it with: pip install 'fedclip[speech]'"


@dataclass(frozen=True)
class SpeechRequest:
    """One utterance to synthesise.

    Args:
        text: What to say.
        voice: An accent, optionally with a variant: "en-us", "en-gb-x-rp+f2".
        pitch: Height of the voice, 0 .. 99, about 50 for the voice as designed.
        pitch_range: Liveliness of the intonation, 0 (monotone) .. 99.
        rate: Words a minute, 80 .. 450.
    """

    text: str
    voice: str = "en-us"
    pitch: int = 50
    pitch_range: int = 50
    rate: int = 175

    def __post_init__(self) -> None:
        """Refuse what the library would silently clip or ignore."""
        if not self.text.strip():
            raise ValueError(f"Expected a text to speak, got {self.text!r}; give at least one word.")
        for name, value, low, high in (
            ("pitch", self.pitch, 0, 99),
            ("pitch_range", self.pitch_range, 0, 99),
            ("rate", self.rate, 80, 450),
        ):
            if not low <= value <= high:
                raise ValueError(f"Expected {name} from {low} to {high}, got {value}; eSpeak NG knows no other values.")


class Synthesizer:
    """A synthesiser process, started at the first request and ended by `close`, with this object or with this Python process.

    Guarantees:
        The samples are a function of the request alone, to the bit, whatever was spoken before and by which process.
        A pickled or forked copy starts a process of its own; threads may share one synthesiser and take turns.
        A process that dies is started again once for a call; a second death raises.
    """

    def __init__(self, command: Sequence[str] = ()) -> None:
        """Prepare a synthesiser without starting it.

        Args:
            command: The program that answers requests; empty for this Python on `espeak_process`.
        """
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[..., Synthesizer] | None = None
        self._owner = -1
        self._rate = 0

    def __reduce__(self) -> tuple[type["Synthesizer"], tuple[tuple[str, ...]]]:
        """Pickle what it is, not the running process."""
        return Synthesizer, (self._command,)

    def __enter__(self) -> Self:
        """Return itself; nothing is started yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    @property
    def pid(self) -> int | None:
        """The id of the running process, or None when there is none."""
        return self._process.pid if self._process is not None and self._owner == os.getpid() else None

    @property
    def sample_rate(self) -> int:
        """Samples a second of what `speak` returns; starts the process if need be."""
        with self._lock:
            self._start()
            return self._rate

    def speak(self, text: str, voice: str = "en-us", pitch: int = 50, pitch_range: int = 50, rate: int = 175) -> np.ndarray:
        """Return float32 samples, shape (time,), in [-1, 1] at `sample_rate`; the arguments are those of `SpeechRequest`."""
        return self.speak_all([SpeechRequest(text, voice, pitch, pitch_range, rate)])[0]

    def speak_all(self, requests: Sequence[SpeechRequest]) -> list[np.ndarray]:
        """Return the samples of each request, in one round trip.

        Raises:
            SynthesizerError: the library is not installed, a request was refused, or the process died twice.
        """
        if not requests:
            return []
        with self._lock:
            try:
                return self._exchange(requests)
            except (BrokenPipeError, EOFError):
                self._shut_down()
            try:
                return self._exchange(requests)
            except (BrokenPipeError, EOFError) as error:
                self._shut_down()
                raise SynthesizerError(
                    f"The speech synthesiser died twice on {len(requests)} requests, the first {requests[0]}. It may have been "
                    "killed for want of memory: look at its standard error above, or ask for fewer utterances at a time."
                ) from error

    def close(self) -> None:
        """End the process. The next request starts another; closing twice does nothing."""
        with self._lock:
            self._shut_down()

    def _exchange(self, requests: Sequence[SpeechRequest]) -> list[np.ndarray]:
        process = self._start()
        assert process.stdin is not None  # for the type checker: it was opened as a pipe
        body = json.dumps([astuple(request) for request in requests]).encode()
        process.stdin.write(struct.pack("<I", len(body)) + body)
        process.stdin.flush()
        # All answers are read before any is judged, or the next call would read what is left of these.
        answers = [_read_answer(process) for _ in requests]
        for request, (status, payload) in zip(requests, answers, strict=True):
            if status != _OK:
                raise SynthesizerError(f"{payload.decode()} (request: {request}). Choose a voice from ACCENTS and VARIANTS.")
        return [np.frombuffer(payload, np.int16).astype(np.float32) / np.float32(32768) for _, payload in answers]

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid():
            return self._process
        self._shut_down()
        # The file is run by its path, so that the process holds nothing of fedclip, and with -P, so that the names of this
        # folder's other files hide no modules from it.
        command = self._command or (sys.executable, "-P", str(Path(__file__).with_name("espeak_process.py")))
        process = subprocess.Popen([*command, str(os.getpid())], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process, self._owner = process, os.getpid()
        self._stop = weakref.finalize(self, _end_process, process, self._owner)
        status, payload = _read_answer(process)
        if status != _OK:
            self._shut_down()
            raise SynthesizerError(f"eSpeak NG is not usable: {payload.decode()}. {_REMEDY}")
        self._rate = int(payload)
        return process

    def _shut_down(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _read_answer(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    assert process.stdout is not None  # for the type checker: it was opened as a pipe
    header = process.stdout.read(5)
    if len(header) < 5:
        raise EOFError
    status, length = struct.unpack("<BI", header)
    payload = process.stdout.read(length)
    if len(payload) < length:
        raise EOFError
    return status, payload


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    for pipe in (process.stdin, process.stdout):
        # It may have died with a request unread.
        with contextlib.suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()
    if owner != os.getpid():
        process.returncode = 0  # a fork's copy of another process's child: not for this one to wait for
        return
    try:
        process.wait(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def library_version() -> str:
    """Return the version of the package that brings eSpeak NG.

    Raises:
        SynthesizerError: it is not installed.
    """
    try:
        return metadata.version("espeakng-loader")
    except metadata.PackageNotFoundError as error:
        raise SynthesizerError(f"The package espeakng-loader, which brings eSpeak NG, is not installed. {_REMEDY}") from error
