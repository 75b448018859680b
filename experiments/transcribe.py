"""`fedclip transcribe`: what a model of speech hears in files of audio, through the features and the decoder of its evaluation."""

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from experiments.prepare import check_device
from experiments.run import CHECK_FAILED, DONE
from fedclip.asr.decoding import open_decoder
from fedclip.asr.inputs import open_inputs
from fedclip.asr.models import make_model
from fedclip.asr.options import AsrOptions
from fedclip.asr.text import Alphabet
from fedclip.config import apply_overrides
from fedclip.model_file import check_alphabet, flatten, load_model, model_path
from fedclip.options import ConfigError
from fedclip.process import settle_process
from fedclip.replica import Replica
from fedclip.speech.errors import CorpusError
from fedclip.speech.recordings import Recording, read, seconds_a_byte
from strategies.recipes import resolve

AUDIO: Final = frozenset({".aif", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".sph", ".w64", ".wav"})
"""How names of files of audio end that are looked for in folders. A file that is named itself may have any name."""


class Transcriber:
    """A trained model of speech with its features and its decoder.

    Args:
        place: a run folder, or a `model.safetensors`.
        overrides: keys of its experiment to set anew, such as `task.decoder.beam=20`.

    Raises:
        ConfigError: there is no such model, it is none of speech, or its options are refused.
    """

    def __init__(self, place: Path, overrides: Sequence[str] = ()) -> None:
        path = model_path(place)
        saved, tensors = load_model(path)
        experiment = resolve(apply_overrides(saved, overrides))
        options = experiment.task
        if not isinstance(options, AsrOptions):
            raise ConfigError(f"{path} is a model of the task '{options.name}'; give one of the task 'asr', which hears speech.")
        check_alphabet(path, saved, options)
        check_device(experiment)
        self.max_seconds, alphabet = options.max_seconds, Alphabet(options.languages)
        self._inputs, self._decode = open_inputs(options), open_decoder(options.decoder, alphabet)
        model = make_model(options, width=self._inputs.width, symbols=alphabet.symbols, seed=experiment.run.seed)
        self._replica = Replica(model, experiment.run.device)
        self._replica.load(flatten(tensors, self._replica.layout))
        self._replica.model.eval()

    def __call__(self, audio: np.ndarray) -> str:
        """Return what is said in float32 samples of 16 kHz, shape (time,)."""
        device = self._replica.params.device
        features = self._inputs(audio).float()[None].to(device)
        with torch.inference_mode():
            logits, frames = self._replica.model(features, torch.tensor([features.shape[1]], device=device))
        return self._decode(logits, frames)[0]

    def file(self, path: Path) -> tuple[str, float]:
        """Return what is said in a file of any rate and number of channels, and how many seconds it lasts.

        Raises:
            CorpusError: it is unreadable, or longer than the model takes.
        """
        try:
            recording = Recording(path, "", path.stat().st_size)
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}; give a file of audio.") from error
        seconds = seconds_a_byte(recording) * recording.size
        if seconds > self.max_seconds * (1 + 1e-9):  # what is exactly as long as it may be is not
            raise CorpusError(
                f"{path} lasts {seconds:.1f} s, and task.max_seconds is {self.max_seconds:g}: cut it at pauses, or --set "
                f"task.max_seconds={np.ceil(seconds):.0f}, which takes memory (the square of the length) and is beyond what training heard."
            )
        return self(read(recording)), seconds


def transcribe_command(model: Path, places: Sequence[Path], overrides: Sequence[str], as_json: bool) -> int:
    """Print a line for each file of audio as it is done, and return the exit status: 1 where one could not be transcribed.

    Raises:
        ConfigError: as `Transcriber`, or a folder has no audio in it.
    """
    files = [file for place in places for file in _files(place)]
    settle_process()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a name that is not UTF-8 has its own bytes
    transcriber, status = Transcriber(model, overrides), DONE
    for file in files:
        try:
            text, seconds = transcriber.file(file)
        except CorpusError as error:
            status = CHECK_FAILED
            _say({"path": str(file), "error": str(error)}) if as_json else print(f"fedclip: {error}", file=sys.stderr, flush=True)
            continue
        _say({"path": str(file), "text": text, "seconds": seconds}) if as_json else print(f"{file}\t{text}", flush=True)
    return status


def _say(values: dict[str, str | float]) -> None:
    line = json.dumps(values, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # of a file's name: JSON is UTF-8, and escapes what is not
        line = json.dumps(values)
    print(line, flush=True)


def _files(place: Path) -> Iterator[Path]:
    """Yield a file itself, or the audio in a folder and those in it, sorted, without what is hidden.

    Raises:
        ConfigError: the folder has none.
    """
    if not place.is_dir():
        yield place
        return
    inside = sorted(file for file in place.rglob("*") if file.suffix.lower() in AUDIO and file.is_file())
    found = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(place).parts)]
    if not found:
        raise ConfigError(f"No audio in {place}: no file there ends in {', '.join(sorted(AUDIO))}; name the files themselves.")
    yield from found
