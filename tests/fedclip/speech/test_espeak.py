"""Tests of the synthesiser and its process."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedclip.speech import espeak_process
from fedclip.speech.errors import SynthesizerError
from fedclip.speech.espeak import ACCENTS, VARIANTS, SpeechRequest, Synthesizer, library_version

PROGRAM = str(Path(espeak_process.__file__))
SENTENCE = "turn on the kitchen light"


@pytest.fixture(scope="module")
def synthesizer() -> Iterator[Synthesizer]:
    with Synthesizer() as shared:
        yield shared


def is_running(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def test_speech_is_audible_unclipped_and_of_sensible_length(synthesizer: Synthesizer) -> None:
    audio = synthesizer.speak(SENTENCE)
    assert synthesizer.sample_rate == 22_050
    assert audio.dtype == np.float32
    assert 0.8 < len(audio) / synthesizer.sample_rate < 2.5
    assert 0.1 < np.abs(audio).max() < 1
    # Speech below 4 kHz carries most of the energy, and a buzz of one frequency would carry all of it in a few bins.
    power = np.abs(np.fft.rfft(audio)) ** 2
    hertz = np.fft.rfftfreq(len(audio), 1 / synthesizer.sample_rate)
    assert power[hertz < 4000].sum() > 0.7 * power.sum()
    assert np.sort(power)[-10:].sum() < 0.5 * power.sum()


def test_the_samples_are_a_function_of_the_request_whatever_came_before(synthesizer: Synthesizer) -> None:
    requests = [
        SpeechRequest(text, voice, rate=rate)
        for text in (SENTENCE, "call home")
        for voice in ("en-us+f3", "en-029+m2")
        for rate in (120, 200)
    ]
    first = synthesizer.speak_all(requests)
    backwards = synthesizer.speak_all(requests[::-1])[::-1]
    with Synthesizer() as other:
        alone = [other.speak_all([request])[0] for request in requests]
    for one, two, three in zip(first, backwards, alone, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_no_voice_depends_on_the_time_of_day(synthesizer: Synthesizer) -> None:
    # The library seeds the breath of some voices, such as f2, with the second in which it was initialised.
    requests = [SpeechRequest("seven", f"en-us+{variant}") for variant in VARIANTS]
    first = synthesizer.speak_all(requests)
    time.sleep(1.1)
    with Synthesizer() as later:
        for one, two, request in zip(first, later.speak_all(requests), requests, strict=True):
            np.testing.assert_array_equal(one, two, err_msg=request.voice)


def test_every_voice_sounds_different_and_has_a_sentences_length(synthesizer: Synthesizer) -> None:
    requests = [SpeechRequest(SENTENCE, f"{accent}{variant}") for accent in ACCENTS for variant in ("", *(f"+{v}" for v in VARIANTS))]
    spoken = synthesizer.speak_all(requests)
    assert len({audio.tobytes() for audio in spoken}) == len(requests)
    for audio, request in zip(spoken, requests, strict=True):
        assert 0.8 < len(audio) / synthesizer.sample_rate < 2.5, request
        assert np.abs(audio).max() > 0.05, request
        assert np.count_nonzero(np.abs(audio) > 0.98) == 0, request


def test_pitch_range_and_rate_change_the_sound(synthesizer: Synthesizer) -> None:
    plain = synthesizer.speak(SENTENCE)
    for changed in (synthesizer.speak(SENTENCE, pitch=80), synthesizer.speak(SENTENCE, pitch_range=10)):
        assert plain.tobytes() != changed.tobytes()
    assert len(synthesizer.speak(SENTENCE, rate=250)) < 0.8 * len(plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "text to speak"),
        ({"pitch": 100}, "pitch from 0 to 99, got 100"),
        ({"pitch_range": -1}, "pitch_range from 0 to 99, got -1"),
        ({"rate": 20}, "rate from 80 to 450, got 20"),
    ],
)
def test_senseless_requests_are_refused(change: dict[str, str | int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeechRequest(**{"text": "call home", **change})  # type: ignore[arg-type]


def test_an_unknown_voice_is_named_and_the_next_request_is_answered(synthesizer: Synthesizer) -> None:
    with pytest.raises(SynthesizerError, match="no voice 'en-gb'"):
        synthesizer.speak_all([SpeechRequest("call home", "en-gb"), SpeechRequest("call home")])
    assert len(synthesizer.speak("call home"))


def test_an_utterance_that_crashes_the_library_is_an_error_and_the_next_is_spoken() -> None:
    program = (
        "import ctypes, sys; sys.argv[:] = ['x', sys.argv[1]]; import fedclip.speech.espeak_process as p; speak = p.Library.speak; "
        "p.Library.speak = lambda self, text, *rest: ctypes.string_at(0) if text == 'crash' else speak(self, text, *rest); p.main()"
    )
    with Synthesizer([sys.executable, "-c", program]) as synthesizer:
        with pytest.raises(SynthesizerError, match=r"crashed with signal \d+ on .*'crash'"):
            synthesizer.speak("crash")
        assert len(synthesizer.speak("call home"))


def test_a_process_that_died_is_started_again() -> None:
    with Synthesizer() as synthesizer:
        before, pid = synthesizer.speak("call home"), synthesizer.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        np.testing.assert_array_equal(synthesizer.speak("call home"), before)
        assert synthesizer.pid != pid


def test_a_process_that_dies_at_every_start_is_an_error_after_the_second() -> None:
    with Synthesizer([sys.executable, "-c", "pass"]) as synthesizer, pytest.raises(SynthesizerError, match="died twice on 1 requests"):
        synthesizer.speak("call home")


def test_without_the_package_the_error_says_what_to_install() -> None:
    # -I and -S leave out site-packages, where the package is.
    with Synthesizer([sys.executable, "-I", "-S", PROGRAM]) as synthesizer:
        with pytest.raises(SynthesizerError, match=r"espeakng_loader.*pip install 'fedclip\[speech\]'"):
            synthesizer.speak("call home")
        assert synthesizer.pid is None


def test_it_can_be_closed_twice_and_used_again() -> None:
    synthesizer = Synthesizer()
    assert synthesizer.speak_all([]) == []
    assert synthesizer.pid is None
    synthesizer.speak("call home")
    pid = synthesizer.pid
    assert pid is not None
    synthesizer.close()
    synthesizer.close()
    assert not is_running(pid)
    assert len(synthesizer.speak("call home"))
    synthesizer.close()


def test_an_abandoned_synthesizer_ends_its_process() -> None:
    synthesizer = Synthesizer()
    synthesizer.speak("call home")
    pid = synthesizer.pid
    assert pid is not None
    del synthesizer
    assert wait_until_gone(pid, 5)


def test_a_pickled_copy_starts_its_own_process() -> None:
    with Synthesizer() as synthesizer:
        audio = synthesizer.speak("call home")
        with pickle.loads(pickle.dumps(synthesizer)) as copy:
            assert copy.pid is None
            np.testing.assert_array_equal(copy.speak("call home"), audio)
            assert copy.pid != synthesizer.pid


def test_a_forked_copy_starts_its_own_process_and_leaves_the_first_alone() -> None:
    with Synthesizer() as synthesizer:
        audio, pid = synthesizer.speak("call home"), synthesizer.pid
        fork = os.fork()
        if fork == 0:
            try:
                same = np.array_equal(synthesizer.speak("call home"), audio) and synthesizer.pid not in (None, pid)
                synthesizer.close()
                os._exit(0 if same else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 0
        np.testing.assert_array_equal(synthesizer.speak("call home"), audio)
        assert synthesizer.pid == pid


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_the_process_dies_with_its_parent_even_when_that_is_killed() -> None:
    program = "from fedclip.speech.espeak import Synthesizer as S; s = S(); s.speak('a'); print(s.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        parent.wait()
        assert wait_until_gone(pid, 5)


def test_the_process_notices_an_orphaned_pipe() -> None:
    # The pipe stays open, but the process is told of a parent that it does not have.
    with subprocess.Popen(
        [sys.executable, PROGRAM, "1" if os.getppid() != 1 else "0"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as orphan:
        assert orphan.wait(timeout=30) == 0


def test_the_process_runs_as_a_module_too_and_loads_nothing_else_of_the_project() -> None:
    program = (
        "import sys, fedclip.speech.espeak_process as p; p.Library(); "
        "print(sorted(m for m in sys.modules if m.startswith(('fedclip', 'numpy', 'torch'))))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "['fedclip', 'fedclip.speech', 'fedclip.speech.espeak_process']"
    answer = subprocess.run([sys.executable, "-m", "fedclip.speech.espeak_process"], input=b"", capture_output=True, check=True).stdout
    assert answer == b"\x00\x05\x00\x00\x0022050"


def test_the_version_of_the_library_is_known() -> None:
    assert library_version()[0].isdigit()
