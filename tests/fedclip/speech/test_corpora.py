"""Published corpora: each layout is found, indexed, read and trained on; who is held out; what is kept; what damage does."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from experiments.cli import app
from experiments.prepare import corpus_kind
from fedclip.speech.build import build_corpus
from fedclip.speech.options import ListedOptions
from fedclip.speech.recorded import RecordedCorpus
from tests.corpora_folders import EACH, FOLDERS, TRAIN

SECTION: TypeAdapter[ListedOptions] = TypeAdapter(ListedOptions)
EXPERIMENT = Path(__file__).parents[3] / "experiments" / "quickstart.toml"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in FOLDERS.items()}


def open_corpus(folder: Path, kind: str, cache: Path, **options: object) -> RecordedCorpus:
    section = SECTION.validate_python({"kind": kind, **options})
    corpus = build_corpus(section, population=None, data_dir=folder, seed=1, cache_dir=cache)
    assert isinstance(corpus, RecordedCorpus)
    return corpus


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_layout_is_found_read_trained_on_and_evaluated(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = folders[kind]
    assert corpus_kind(folder) == kind
    corpus = open_corpus(folder, kind, tmp_path / "cache")
    speakers = 3 * TRAIN if kind == "librispeech" else TRAIN
    assert corpus.train_speakers == speakers
    assert corpus.held_out_speakers == 2
    rng = np.random.default_rng(0)
    for utterance in (u for s in range(speakers) for u in corpus.train(s, rng)):
        assert len(utterance.audio) == pytest.approx(0.6 * 16_000, rel=0.02)
        assert np.abs(utterance.audio).max() == pytest.approx(0.3, rel=0.2)
        assert utterance.language == "en"
    assert sum(len(corpus.held_out(s)) for s in range(2)) == 2 * EACH
    assert corpus.train_seconds(0) == pytest.approx(EACH * 0.6, rel=0.1)

    keys = ["run.engine=process", f'task.cache_dir="{tmp_path / "cache"}"', "task.model.dim=16", "task.model.convolutions=1"]
    keys += ["task.model.mlp_dim=32", "task.features.n_mels=20", "local.steps=1", "evaluation.every=0"]
    arguments = ["run", str(EXPERIMENT), "--data-dir", str(folder), "--out", str(tmp_path / "run"), "--rounds", "2"]
    result = CliRunner().invoke(app, arguments + [part for key in keys for part in ("--set", key)])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["population"], summary["failed_users_total"], summary["eval_utterances"]) == (speakers, 0, 2 * EACH)
