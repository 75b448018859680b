"""What a round's time goes to, on FLAC recordings whose features are kept nowhere."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from experiments.cli import app
from tests.corpora_folders import write, write_text

PROJECT = Path(__file__).parents[2]
SPEAKERS, EACH, SECONDS = 60, 8, 3


def librispeech(folder: Path) -> Path:
    """Write a folder in the layout of LibriSpeech with as much speech a speaker as the embedded corpus has: noise, with a few words."""
    rng, lines = np.random.default_rng(0), ["; ID | SEX | SUBSET | MINUTES | NAME"]
    for subset, speakers in (("train-clean-100", range(100, 100 + SPEAKERS)), ("test-clean", range(900, 902))):
        for speaker in speakers:
            lines.append(f"{speaker} | F | {subset} | 0.4 | Somebody")
            chapter = folder / subset / str(speaker) / "7"
            names = [f"{speaker}-7-{n:04}" for n in range(EACH)]
            for name in names:
                write(chapter / f"{name}.flac", 0.1 * rng.standard_normal(SECONDS * 16_000))
            write_text(chapter / f"{speaker}-7.trans.txt", *(f"{name} TURN ON THE KITCHEN LIGHT" for name in names))
    write_text(folder / "SPEAKERS.TXT", *lines)
    return folder


@pytest.mark.slow
def test_the_trainer_is_busy_while_recordings_are_read(tmp_path: Path) -> None:
    changes = {"run.engine": "process", "task.model": "{}", "task.cache_mb": "0", "sampler.cohort": "40", "evaluation.every": "0"}
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = ["run", str(PROJECT / "experiments" / "quickstart.toml"), "--data-dir", str(librispeech(tmp_path / "corpus"))]
    done = CliRunner().invoke(app, [*command, "--rounds", "3", "--out", str(tmp_path / "run"), *options])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        print({key: round(value, 3) for key, value in row.items() if key.endswith(("_seconds", "_busy"))})
    assert statistics.median(row["trainer_busy"] for row in rows) >= 0.95
