"""Runs on speech: the recordings of FEDCLIP_SPEECH_DIR, else a generated folder of the same layout; and the embedded corpus."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.cli import app
from experiments.engines import open_engine
from experiments.prepare import corpus_kind, prepare, read_experiment
from fedclip.asr.options import AsrOptions
from fedclip.config import Experiment
from fedclip.options import ConfigError
from fedclip.speech.options import ManifestOptions
from tests.corpora_folders import HELD_OUT, TRAIN, common_voice, librispeech, write_text
from tests.speech_folder import write_spoken_digits
from tests.stamps_folder import write_stamps

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SMALL = (
    "task.model.dim=16",
    "task.model.convolutions=1",
    "task.model.mlp_dim=32",
    "task.features.n_mels=20",
    "task.cache_mb=0",
    "local.steps=2",
)
IN_PROCESS = ("--set", "run.engine=process", "--set", "task.cache_mb=0")


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of spoken digits."""
    given = os.environ.get("FEDCLIP_SPEECH_DIR")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("digits")
    write_spoken_digits(folder, speakers=6, per_digit=20, seed=0)
    return folder


@pytest.fixture
def manifest(digits: Path, tmp_path: Path) -> Path:
    """Return a small folder with a manifest, made of some of the digits."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    chosen = [p for p in sorted((digits / "recordings").glob("[0-3]_*.wav")) if int(p.stem.split("_")[2]) < 8]
    rows = [("speaker", "path", "text")]
    for path in chosen:
        digit, speaker, _ = path.stem.split("_")
        shutil.copy(path, folder / path.name)
        rows.append((speaker, path.name, ("zero", "one", "two", "three")[int(digit)]))
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def test_quickstart_runs_on_a_folder_of_ones_own_without_the_synthesiser(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    overrides = [part for key in (*SMALL, f'task.cache_dir="{tmp_path / "cache"}"') for part in ("--set", key)]
    status, output = run(
        "run", EXPERIMENTS / "quickstart.toml", "--data-dir", manifest, "--out", out, "--rounds", "2", *IN_PROCESS, *overrides
    )
    assert status == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["population"] == len({p.stem.split("_")[1] for p in manifest.glob("*.wav")})
    assert summary["eval_words"] > 0
    config = (out / "config.toml").read_text()
    assert 'kind = "manifest"' in config
    status, output = run("evaluate", out, "--data-dir", manifest, "--json")
    assert status == 0, output
    assert json.loads(output)["wer"] == summary["wer"]


def test_an_unreadable_recording_is_one_clear_message_and_no_folder(manifest: Path, tmp_path: Path) -> None:
    broken = next(manifest.glob("*.wav"))
    broken.write_bytes(b"RIFF this is no sound")
    out = tmp_path / "run"
    status, output = run("run", EXPERIMENTS / "quickstart.toml", "--data-dir", manifest, "--out", out, *IN_PROCESS)
    assert status == 2, output
    assert broken.name in output
    assert "Traceback" not in output
    assert not out.exists()


def test_a_folder_of_no_known_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No known layout .*manifest\.csv"):
        corpus_kind(tmp_path)


def test_what_an_experiment_says_of_its_corpus_is_not_lost_on_a_folder_of_another_layout(manifest: Path) -> None:
    def read(*overrides: str) -> Experiment:
        return read_experiment(EXPERIMENTS / "digits.toml", ["population.size=2", "sampler.cohort=2", *overrides], manifest)

    said = 'task.corpus={kind="common_voice", speakers="federated", seed_fraction=0.4}'
    with pytest.raises(ConfigError, match=r"layout of 'manifest'.*'common_voice'.*\(seed_fraction, speakers\).*--set 'task\.corpus="):
        read(said)
    bare = read('task.corpus={kind="common_voice"}')
    assert isinstance(bare.task, AsrOptions)
    assert (bare.task.corpus, bare.population.size) == (ManifestOptions(), 2)
    virtual = read_experiment(EXPERIMENTS / "seeded.toml", [], manifest)
    assert isinstance(virtual.task, AsrOptions)
    assert (virtual.task.corpus, virtual.population.size) == (ManifestOptions(), None)


def test_the_published_experiment_reads_common_voice_as_released_and_librispeech_where_it_is_told_so(tmp_path: Path) -> None:
    cache, kind = f'task.cache_dir="{tmp_path / "cache"}"', 'task.corpus={kind="librispeech"}'
    voices, books = common_voice(tmp_path / "cv"), librispeech(tmp_path / "books")
    write_text(voices / "de" / "train.tsv", "client_id\tpath\tsentence")  # another language of the release, which is not read
    (voices / "de" / "clips").mkdir()
    for folder, speakers, overrides in ((voices, TRAIN, ()), (books, 3 * TRAIN, (kind,))):
        prepared = prepare(read_experiment(EXPERIMENTS / "pfl4asr.toml", [cache, *overrides], folder), weights=False)
        assert (prepared.experiment.population.size, prepared.task.held_out_units) == (speakers, HELD_OUT)
    with pytest.raises(ConfigError, match=r"'librispeech', and task\.corpus is 'common_voice' .*\(languages\)"):
        read_experiment(EXPERIMENTS / "pfl4asr.toml", [], books)


def test_more_speakers_than_there_are_is_refused(digits: Path, tmp_path: Path) -> None:
    arguments = ["--data-dir", digits, "--out", tmp_path / "run", "--set", "population.size=1000"]
    status, output = run("run", EXPERIMENTS / "digits.toml", *arguments)
    assert (status, "population" in output, (tmp_path / "run").exists()) == (2, True, False)


@pytest.mark.usefixtures("ray_session")
def test_speech_has_the_bits_of_one_process_on_ray() -> None:
    def params(*overrides: str) -> torch.Tensor:
        prepared = prepare(read_experiment(EXPERIMENTS / "quickstart.toml", [*SMALL, "sampler.cohort=4", *overrides]))
        with open_engine(prepared) as engine:
            for _ in range(2):
                engine.round()
            return engine.state.params

    dropout = ("task.model.dropout=0.1", "task.model.layer_drop=0.2", "task.augment.enabled=true", "task.augment.frequency_width=5")
    assert torch.equal(params("run.engine=process", *dropout), params("run.workers=2", *dropout))


def test_digits_learn(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = [part for key in ("evaluation.every=0", "task.model.dim=64", "task.model.mlp_dim=128") for part in ("--set", key)]
    status, output = run("run", EXPERIMENTS / "digits.toml", "--data-dir", digits, "--out", out, "--rounds", "40", *IN_PROCESS, *small)
    assert status == 0, output
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    # An untrained model's loss a character is over 4, one that knows only how often each letter occurs has about 2.
    assert rows[-1]["eval_loss"] < 1.5 < 3 < rows[0]["train_loss"]


@pytest.mark.slow
def test_digits_reach_ten_percent_on_held_out_recordings(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, output = run("run", EXPERIMENTS / "digits.toml", "--data-dir", digits, "--out", out)
    assert status == 0, output
    assert json.loads((out / "summary.json").read_text())["wer"] <= 0.10


@pytest.mark.usefixtures("ray_session")
def test_languages_and_speakers_have_the_same_figures_in_one_process_and_on_ray(tmp_path: Path) -> None:
    folder = write_stamps(tmp_path / "data")
    overrides = [*SMALL, 'task.languages=["ru", "fr"]', 'task.corpus.languages=["ru", "fr"]', "task.corpus.users_per_language=2"]
    options = [part for key in (*overrides, "run.workers=2", "task.augment.enabled=false", "evaluation.every=1") for part in ("--set", key)]
    written = []
    for engine in ("process", "ray"):
        out = tmp_path / engine
        given = (
            "run",
            EXPERIMENTS / "languages.toml",
            "--data-dir",
            folder,
            "--out",
            out,
            "--rounds",
            "1",
            "--set",
            f"run.engine={engine}",
        )
        status, output = run(*given, *options)
        assert status == 0, output
        summary, speakers = json.loads((out / "summary.json").read_text()), (out / "speakers.jsonl").read_text()
        row = json.loads((out / "metrics.jsonl").read_text())
        same = {k: v for k, v in row.items() if not k.endswith(("_seconds", "_busy", "_per_second"))}
        written.append((same, speakers))
        assert row["wer.fr"] == summary["wer.fr"]
        for said in ("WER by language: fr ", "WER by speaker: median ", "not different people"):
            assert said in output
    assert written[0] == written[1]
    rows = [json.loads(line) for line in written[0][1].splitlines()]
    assert [r["group"] for r in rows] == ["fr", "ru"]
    assert row["wer"] == sum(r["word_errors"] for r in rows) / sum(r["words"] for r in rows)
    assert [row["wer.fr"], row["wer.ru"]] == [r["wer"] for r in rows]
    assert row["wer_worst_decile"] == max(r["wer"] for r in rows)
    status, output = run("evaluate", tmp_path / "ray", "--json")
    assert status == 0, output
    again = json.loads(output)
    assert again["speakers"] == rows
    assert again["note"] == summary["note"]
    assert "not different people" in again["note"]
    status, output = run("evaluate", tmp_path / "ray", "--set", 'task.languages=["fr", "ru"]')
    assert (status, "spells ru, fr" in output) == (2, True), output
