"""Runs of models of every kind: doors, frozen weights by their digest, adapters from a run, decoders."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.prepare import prepare, read_experiment
from fedclip.asr.models import make_model
from fedclip.config import load_experiment
from fedclip.layout import Layout
from fedclip.model_file import flatten, load_model, model_path, save_model
from fedclip.options import ConfigError
from strategies.naming import run_digest
from strategies.recipes import resolve
from tests.pretrained_folder import write_pretrained
from tests.speech_folder import write_spoken_digits

ASR = """
[run]
name = "models"
rounds = 2
engine = "process"

[task]
name = "asr"
cache_mb = 0
max_seconds = 10
corpus = { kind = "spoken_digits", digits = [1, 1], utterances = 2 }

[sampler]
cohort = 2

[local]
lr = 0.1
steps = 1
batch_size = 2

[strategy]
method = "fedavg"

[evaluation]
every = 0
"""
SMALL = "task.model={dim=16, layers=1, heads=2, mlp_dim=32, kernel=5}"
MODEL = '''
import torch
from torch import nn


class Averages(nn.Module):
    """Means of four frames, and a linear layer."""

    def __init__(self, width, symbols, seed, scale):
        super().__init__()
        self.output = nn.Linear(width, symbols)
        with torch.no_grad():
            self.output.weight.normal_(generator=torch.Generator().manual_seed(seed)).mul_(scale)

    def output_lengths(self, lengths):
        return (lengths + 3) // 4

    def forward(self, features, lengths):
        pooled = nn.functional.avg_pool1d(features.transpose(1, 2), 4, ceil_mode=True).transpose(1, 2)
        return self.output(pooled), self.output_lengths(lengths)


def broken(width, symbols, seed):
    raise RuntimeError("no such layer")
'''


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    write_spoken_digits(folder, speakers=2, per_digit=6, seed=0)
    return folder


@pytest.fixture(scope="module")
def asr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("asr") / "asr.toml"
    path.write_text(ASR, encoding="utf-8")
    return path


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def start(experiment: Path, digits: Path, out: Path, *overrides: str) -> dict[str, float]:
    status, output = run("run", experiment, "--data-dir", digits, "--out", out, "--quiet", *(p for o in overrides for p in ("--set", o)))
    assert status == 0, output
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def seed(asr: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of the small transformer."""
    out = tmp_path_factory.mktemp("seed") / "run"
    start(asr, digits, out, SMALL)
    return out


def test_a_conformer_and_a_model_by_a_door_run_and_are_evaluated_again(asr: Path, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    kinds = {
        "conformer": "task.model={kind='conformer', dim=16, layers=1, heads=2, mlp_dim=16, depthwise_kernel=3}",
        "door": f"task.model={{name='{tmp_path}/mine.py:Averages', arguments={{scale=0.1}}}}",
    }
    for kind, override in kinds.items():
        summary = start(asr, digits, tmp_path / kind, override)
        status, output = run("evaluate", tmp_path / kind, "--data-dir", digits, "--json")
        assert status == 0, output
        assert json.loads(output)["eval_loss"] == summary["eval_loss"]
    assert summary["parameters"] == 80 * 30 + 30
    status, output = run("run", asr, "--data-dir", digits, "--set", f"task.model={{name='{tmp_path}/mine.py:broken'}}")
    assert status == 2
    assert "RuntimeError: no such layer" in output


def test_adapters_of_a_run_leave_its_weights_and_send_little(asr: Path, digits: Path, seed: Path, tmp_path: Path) -> None:
    whole = json.loads((seed / "summary.json").read_text())
    overrides = [SMALL, f"task.model.adapters.base='{seed}'", "task.model.adapters.rank=2"]
    adapted = start(asr, digits, tmp_path / "adapted", *overrides)
    assert adapted["parameters"] == 2 * (16 + 3 * 16) + 16 * 30 + 30
    assert adapted["uplink_bytes_per_user"] - 4 * adapted["parameters"] == whole["uplink_bytes_per_user"] - 4 * whole["parameters"]
    config = (tmp_path / "adapted" / "config.toml").read_text()
    assert 'digest = "' in config
    _, trained = load_model(model_path(seed))
    model = prepare(read_experiment(tmp_path / "adapted" / "config.toml", []), resume=True).task.make_model().state_dict()
    assert torch.equal(model["blocks.0.qkv.frozen.weight"], trained["blocks.0.qkv.weight"])
    assert all(torch.equal(model[name], tensor) for name, tensor in trained.items() if name != "blocks.0.qkv.weight")
    status, output = run("run", "--resume", tmp_path / "adapted", "--rounds", "3", "--quiet")
    assert status == 0, output

    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(model_path(seed).read_bytes())
    status, output = run(
        "run", "--resume", tmp_path / "adapted", "--rounds", "4", "--quiet", "--set", f"task.model.adapters.base='{moved}'"
    )
    assert status == 0, output
    moved.write_bytes((tmp_path / "adapted" / "checkpoints" / "model.safetensors").read_bytes())
    status, output = run("run", "--resume", tmp_path / "adapted", "--rounds", "5", "--quiet")
    assert (status, "other weights than the run began with" in output) == (2, True)


def test_a_base_that_does_not_fit_is_refused_before_a_folder_is_made(asr: Path, digits: Path, seed: Path, tmp_path: Path) -> None:
    wrong = {"no weights at": (tmp_path / "none", SMALL), "adapters.base: The model does": (seed, SMALL.replace("dim=16", "dim=20"))}
    for message, (base, model) in wrong.items():
        out = tmp_path / "out"
        status, output = run("run", asr, "--data-dir", digits, "--out", out, "--set", model, "--set", f"task.model.adapters.base='{base}'")
        assert (status, message in output, out.exists()) == (2, True, False), output
    with pytest.raises(ConfigError, match=r"adapters.base, a trained model"):
        load_experiment(asr, ["task.model.adapters.rank=4"])


def test_weights_of_other_letters_and_adapters_of_other_weights_are_refused(asr: Path, digits: Path, seed: Path, tmp_path: Path) -> None:
    def begin(*overrides: str) -> str:
        return run_digest(prepare(read_experiment(asr, [SMALL, "task.model.adapters.rank=2", *overrides], digits)).experiment)

    def write(name: str, languages: list[str], symbols: int, add: float = 0.0) -> Path:
        options = saved.task.model_copy(update={"languages": tuple(languages)})
        model = make_model(options, width=80, symbols=symbols, seed=0)
        layout, tensors = Layout.of(model), dict(model.named_parameters())
        path = tmp_path / f"{name}.safetensors"
        save_model(path, flatten(tensors, layout).detach() + add, layout, saved.model_copy(update={"task": options}), 2)
        return path

    saved, _ = load_model(model_path(seed))
    german = write("german", ["de"], 34)
    with pytest.raises(ConfigError, match=r"adapters\.base: task\.languages: .* spells de \(34 symbols\), the task sv \(34\)"):
        begin(f"task.model.adapters.base='{german}'", 'task.languages=["sv"]')

    on_seed = f"task.model.adapters.base='{seed}'"
    start(asr, digits, tmp_path / "adapted", SMALL, on_seed, "task.model.adapters.rank=2")
    init = f"run.init_from='{tmp_path / 'adapted'}'"
    assert begin(on_seed, init) != begin(on_seed)
    other = write("other", ["en"], 30, add=1.0)
    with pytest.raises(
        ConfigError, match=r"run\.init_from: the adapters in .* trained on other frozen weights \(\w{32}\) than task\.model"
    ):
        begin(f"task.model.adapters.base='{other}'", init)


def test_a_run_is_named_by_what_its_frozen_weights_are_and_not_by_their_place(asr: Path, digits: Path, tmp_path: Path) -> None:
    def name(folder: Path, *overrides: str) -> str:
        model = f"task.model={{kind='pretrained', path='{folder}'}}"
        return run_digest(prepare(read_experiment(asr, [model, *overrides], digits)).experiment)

    first = write_pretrained(tmp_path / "first", "wav2vec2")
    copied = write_pretrained(tmp_path / "copied", "wav2vec2")
    other = write_pretrained(tmp_path / "other", "hubert")
    assert name(first) == name(copied) != name(other)
    assert name(first) != name(first, "task.model.adapters.rank=4")
    assert name(first) == name(first, "task.model.adapters.rank=8", "task.decoder.beam=5")


def test_kinds_have_names_of_their_own_and_defaults_have_none(asr: Path) -> None:
    def name(*overrides: str) -> str:
        return run_digest(resolve(load_experiment(asr, overrides)))

    door = "task.model.name='{}/mine.py:make'"
    names = [
        name(),
        name("task.model.kind='conformer'"),
        name(door.format("/a")),
        name("task.model.kind='conformer'", "task.model.layers=5"),
    ]
    assert len(set(names)) == len(names)
    assert name() == name("task.model.kind='transformer'", "task.features.kind='log_mel'", "task.decoder.lm_weight=1.0")
    assert name(door.format("/a")) == name(door.format("/b"))
    with pytest.raises(ConfigError, match=r"task\.model\.depthwise: unknown key.*Did you mean 'depthwise_kernel'"):
        load_experiment(asr, ["task.model.kind='conformer'", "task.model.depthwise=3"])
    with pytest.raises(ConfigError, match=r"task\.model.*'conformr'"):
        load_experiment(asr, ["task.model.kind='conformr'"])


def test_a_run_is_evaluated_with_a_beam_and_an_n_gram_model(digits: Path, seed: Path, tmp_path: Path) -> None:
    lm = tmp_path / "digits.arpa"
    lm.write_text(
        "\\data\\\nngram 1=5\nngram 2=1\n\n\\1-grams:\n-2\t<unk>\n0\t<s>\t0\n-9\t</s>\n-0.1\tone\t0\n-0.1\ttwo\t0\n\n"
        "\\2-grams:\n-0.1\tone </s>\n\n\\end\\\n"
    )
    beam = ["--set", "task.decoder.beam=20", "--set", f"task.decoder.lm='{lm}'", "--set", "task.decoder.lm_weight=50"]
    status, output = run("evaluate", seed, "--data-dir", digits, "--json", *beam)
    assert status == 0, output
    measured = json.loads(output)
    # An untrained model says "one" to all, which is the one text that the n-gram model takes to be likely: right for one digit of ten.
    assert measured["wer"] == pytest.approx(0.9)
    status, output = run("evaluate", seed, "--data-dir", digits, *beam[:2], "--set", "task.decoder.lm=none.arpa")
    assert (status, "none.arpa cannot be read" in output) == (2, True)
