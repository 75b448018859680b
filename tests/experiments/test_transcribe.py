"""`fedclip transcribe`: the texts that evaluation makes of the same recordings, whatever form these have on disk."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.prepare import prepare
from fedclip.config import make_experiment
from fedclip.layout import Layout
from fedclip.model_file import flatten, load_model, save_model
from fedclip.replica import Replica
from fedclip.site import Site, evaluate_units
from fedclip.speech.acoustics import resample
from fedclip.speech.corpus import SAMPLE_RATE, Utterance
from fedclip.tasks.asr import AsrTask

MODELS = {
    "transformer": {"dim": 16, "layers": 1, "heads": 2, "mlp_dim": 32, "kernel": 5},
    "conformer": {"kind": "conformer", "dim": 16, "layers": 1, "heads": 2, "mlp_dim": 16, "depthwise_kernel": 3},
}


def values(model: str) -> dict[str, object]:
    return {
        "run": {"name": "spoken", "rounds": 1, "engine": "process"},
        "task": {"name": "asr", "cache_mb": 0, "model": MODELS[model]},
        "population": {"size": 2},
        "sampler": {"cohort": 1},
        "local": {"lr": 0.1, "steps": 1},
        "strategy": {"method": "fedavg"},
    }


def write_model(path: Path, model: str) -> AsrTask:
    """Write a model that nobody trained, and whose weights are large enough to tell utterances apart; return its task."""
    prepared = prepare(make_experiment(values(model)))
    task = prepared.task
    assert isinstance(task, AsrTask)
    network = task.make_model()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    layout = Layout.of(network)
    flat = torch.cat([dict(network.named_parameters())[name].detach().flatten() for name in layout.names])
    save_model(path, flat, layout, prepared.experiment, 1)
    return task


def hypotheses(task: AsrTask, path: Path) -> list[str]:
    """Return what evaluation makes of the first held-out unit, the shortest utterance first."""
    heard, decode = list[str](), task._decode

    def noting(logits: torch.Tensor, frames: torch.Tensor) -> list[str]:
        texts = decode(logits, frames)
        heard.extend(texts)
        return texts

    task._decode = noting
    site = Site(task, Replica(task.make_model()))
    evaluate_units(site, flatten(load_model(path)[1], site.replica.layout), [0])
    return heard


def transcribe(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["transcribe", *(str(a) for a in arguments)])
    return result.exit_code, result.stdout, result.stderr


def by_length(utterances: list[Utterance]) -> list[Utterance]:
    return sorted(utterances, key=lambda u: len(u.audio))


@pytest.mark.parametrize("kind", [*MODELS])
def test_held_out_speech_on_disk_gives_the_hypotheses_of_evaluation(kind: str, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    task = write_model(model, kind)
    spoken = by_length(task._corpus.held_out(0))
    files = [tmp_path / f"{n:02}.wav" for n in range(len(spoken))]
    for file, utterance in zip(files, spoken, strict=True):
        soundfile.write(file, utterance.audio, SAMPLE_RATE, subtype="FLOAT")
    expected = hypotheses(task, model)
    assert len(set(expected)) > len(expected) / 2
    status, output, _ = transcribe(model, *files)
    assert status == 0
    assert output == "".join(f"{file}\t{text}\n" for file, text in zip(files, expected, strict=True))


def test_any_rate_and_channels_are_heard_as_a_corpus_of_recordings_hears_them(tmp_path: Path) -> None:
    model, folder = tmp_path / "model.safetensors", tmp_path / "recordings"
    task = write_model(model, "transformer")
    (folder / "deeper" / ".hidden").mkdir(parents=True)
    rows = [("speaker", "path", "text", "split")]
    for n, utterance in enumerate(by_length(task._corpus.held_out(0))[:4]):
        louder = resample(utterance.audio, (44_100, 8_000)[n % 2] / SAMPLE_RATE)
        name = f"deeper/{n}.{('wav', 'flac')[n // 2]}"
        soundfile.write(folder / name, np.stack([0.9 * louder, 0.3 * louder], axis=1), (44_100, 8_000)[n % 2])
        rows.append(("a", name, utterance.text, "test"))
    soundfile.write(folder / "deeper" / ".hidden" / "5.wav", utterance.audio, SAMPLE_RATE)
    rows.append(("b", "deeper/.hidden/5.wav", utterance.text, "train"))
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    told = values("transformer")
    told["task"] |= {"corpus": {"kind": "manifest", "hold_out": "split"}, "cache_dir": str(tmp_path / "cache")}
    recorded = prepare(make_experiment(told | {"population": {}, "run": told["run"] | {"data_dir": str(folder)}})).task
    status, output, _ = transcribe(model, folder, "--json")
    assert status == 0
    heard = [json.loads(line) for line in output.splitlines()]
    assert [Path(row["path"]).name for row in heard] == ["0.wav", "1.wav", "2.flac", "3.flac"]
    assert sorted(row["text"] for row in heard) == sorted(hypotheses(recorded, model))
    assert [row["seconds"] for row in heard] == [pytest.approx(soundfile.info(row["path"]).duration) for row in heard]


def test_what_cannot_be_heard_has_a_line_and_the_rest_is_done(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    write_model(model, "transformer")
    good, bad, long, none = (tmp_path / name for name in ("good.wav", "bad.wav", "long.wav", "none.wav"))
    noise = 0.1 * np.random.default_rng(0).standard_normal(21 * SAMPLE_RATE)
    soundfile.write(good, noise[: 20 * SAMPLE_RATE], SAMPLE_RATE)  # as long as it may be
    soundfile.write(long, noise, SAMPLE_RATE)
    bad.write_bytes(b"RIFF this is no sound")
    status, output, errors = transcribe(model, bad, long, none, good)
    assert status == 1
    assert [line.split("\t")[0] for line in output.splitlines()] == [str(good)]
    assert [line.split(" ")[1] for line in errors.splitlines()] == [str(bad), str(long), str(none)]
    assert "lasts 21.0 s, and task.max_seconds is 20: cut it at pauses, or --set task.max_seconds=21" in errors
    status, output, _ = transcribe(model, long, bad, "--json", "--set", "task.max_seconds=21")
    assert (status, [sorted(json.loads(line)) for line in output.splitlines()]) == (1, [["path", "seconds", "text"], ["error", "path"]])


def test_a_name_that_is_not_utf_8_is_heard_and_keeps_its_bytes(tmp_path: Path) -> None:
    model, folder = tmp_path / "model.safetensors", tmp_path / "recordings"
    write_model(model, "transformer")
    folder.mkdir()
    name = os.fsencode(folder) + b"/caf\xe9.wav"
    soundfile.write(folder / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE), SAMPLE_RATE)
    Path(os.fsdecode(name)).write_bytes((folder / "a.wav").read_bytes())
    (folder / os.fsdecode(b"bad\xe9.wav")).write_bytes(b"no sound")
    result = CliRunner().invoke(app, ["transcribe", str(model), str(folder)])
    assert result.exit_code == 1
    lines = [line.split(b"\t") for line in result.stdout_bytes.splitlines()]
    assert [line[0] for line in lines] == [os.fsencode(folder / "a.wav"), name]
    assert lines[0][1] == lines[1][1]
    rows = [json.loads(line) for line in transcribe(model, folder, "--json")[1].splitlines()]
    assert [os.fsencode(row["path"]) for row in rows if "text" in row] == [os.fsencode(folder / "a.wav"), name]
    assert [row["path"] for row in rows if "error" in row] == [str(folder / os.fsdecode(b"bad\xe9.wav"))]


def test_bad_input_is_refused(tmp_path: Path, vision: Path) -> None:
    model, empty = tmp_path / "model.safetensors", tmp_path / "empty"
    empty.mkdir()
    write_model(model, "transformer")
    assert "No audio in" in transcribe(model, empty)[2]
    for status, _, errors in (transcribe(model, empty), transcribe(tmp_path / "none", empty), transcribe(model, "a.wav", "--set", "x.y=1")):
        assert status == 2, errors
    prepared = prepare(make_experiment(values("transformer") | {"task": {"name": "vision"}}))
    network = prepared.task.make_model()
    layout = Layout.of(network)
    save_model(model, torch.zeros(layout.size), layout, prepared.experiment, 1)
    status, _, errors = transcribe(model, "a.wav")
    assert (status, "model of the task 'vision'" in errors) == (2, True), errors
