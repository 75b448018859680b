"""The eSpeak NG process: loads the library and answers requests over pipes. Imports nothing of fedclip.

eSpeak NG is free software under the GPL, version 3 or later. It is loaded in this process only, which speaks to the rest of
the project through standard input and output, as any command-line program would.

The library keeps state from one utterance to the next, so that the same call twice gives different samples. Here every
utterance is therefore spoken by a fork of a process that has initialised the library and never spoken: the audio is a
function of the request alone, whatever was asked before.

Protocol, integers little-endian:
    request   u32 length, then that many bytes of JSON: a list of [text, voice, pitch, pitch range, words a minute]
    answer    for each item, and once at the start: u8 status, u32 length, then that many bytes
    status 0  the samples, int16 in the machine's byte order (at the start: the sampling rate as decimal digits)
    status 1  a message in UTF-8: this item failed
    status 2  a message in UTF-8, at the start only: the library is not installed or not usable
The process ends when its standard input ends or when the process named by its first argument is no longer its parent.
"""

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import struct
import sys

OK, FAILED, UNUSABLE = 0, 1, 2
_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4
_QUIET = 40  # per cent: at the default of 100 some voices overflow 16 bits and clip
_ORPHAN_CHECK_SECONDS = 2.0


class Library:
    """The loaded and initialised eSpeak NG library."""

    def __init__(self) -> None:
        """Load the library that the package espeakng-loader brings.

        Raises:
            ImportError: the package is not installed.
            OSError: the library cannot be loaded or initialised.
        """
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = os.fsencode(espeakng_loader.get_data_path())
        self.rate = int(self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DO_NOT_EXIT))
        if self.rate <= 0:
            raise OSError(f"eSpeak NG did not initialise (code {self.rate}); its data was expected in {os.fsdecode(data)}")
        self._chunks: list[bytes] = []
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        # The library keeps a bare pointer to the callback, so that the Python object has to live as long as the library.
        self._callback = signature(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)
        # Reads the dictionary and phonemes of English once and for all, which halves the time of an utterance.
        self._library.espeak_SetVoiceByName(b"en")

    def _collect(self, samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def speak(self, text: str, voice: str, pitch: int, pitch_range: int, rate: int) -> bytes:
        """Return the int16 samples of a text. Only the first call of a process is a function of its arguments alone.

        Raises:
            ValueError: there is no such voice, or nothing was spoken.
        """
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        # Choosing a voice resets the parameters, so they come after it.
        for parameter, value in ((_RATE, rate), (_VOLUME, _QUIET), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        # The library would otherwise take the seed of a voice's breath from the time of day at its start.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        encoded = text.encode() + b"\0"
        self._chunks.clear()
        self._library.espeak_Synth(encoded, len(encoded), 0, 0, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        if not self._chunks:
            raise ValueError(f"eSpeak NG said nothing for {text!r} with voice {voice!r}")
        return b"".join(self._chunks)


def write_answer(descriptor: int, status: int, payload: bytes) -> None:
    """Write one answer in full."""
    data = memoryview(struct.pack("<BI", status, len(payload)) + payload)
    while data:
        data = data[os.write(descriptor, data) :]


def read_exactly(descriptor: int, count: int, parent: int) -> bytes | None:
    """Return `count` bytes, or None when the input has ended or the parent is gone."""
    data = bytearray()
    while len(data) < count:
        # The input does not end with the parent if another process inherited the pipe's other end: look for it now and then.
        if not select.select([descriptor], [], [], _ORPHAN_CHECK_SECONDS)[0]:
            if os.getppid() != parent:
                return None
            continue
        chunk = os.read(descriptor, count - len(data))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def answer_in_fork(library: Library, descriptor: int, item: list[object]) -> None:
    """Speak one item in a fork of this process, which writes the answer itself; a fork that crashes is answered for."""
    child = os.fork()
    if child == 0:
        try:
            try:
                answer = OK, library.speak(*item)  # type: ignore[arg-type]  # the shape of an item is part of the protocol
            except (ValueError, TypeError) as error:
                answer = FAILED, str(error).encode()
            write_answer(descriptor, *answer)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        how = f"crashed with signal {-code}" if code < 0 else f"ended with code {code}"
        write_answer(descriptor, FAILED, f"eSpeak NG {how} on {item!r}".encode())


def main() -> None:
    """Answer requests until the input ends."""
    parent = int(sys.argv[1]) if len(sys.argv) > 1 else os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is for the parent; its end ends this process
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # whatever the library prints must not get among the answers
    try:
        library = Library()
    except (ImportError, OSError) as error:
        write_answer(answers, UNUSABLE, str(error).encode())
        return
    write_answer(answers, OK, str(library.rate).encode())
    gc.disable()  # a collection would write to all pages, which a fork then has to copy
    while (header := read_exactly(requests, 4, parent)) is not None:
        body = read_exactly(requests, struct.unpack("<I", header)[0], parent)
        if body is None:
            return
        for item in json.loads(body):
            answer_in_fork(library, answers, item)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        main()
