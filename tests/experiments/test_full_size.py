"""The published model of 255.8 million parameters, a whole round of it on one machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.corpora_folders import librispeech

PROJECT = Path(__file__).parents[2]

STAGES = (
    "{method = 'stages', client = [{dgc = {density = 0.001, warmup = []}}, {clip_per_layer = {max_norm = 0.01, split = 'dim'}}],"
    " server = [{lamb = {lr = 0.002, betas = [0.0, 0.999]}}]}"
)
"""Deep Gradient Compression keeps the momentum at the users, so that LAMB has none; the clip comes last."""

CHANGED = {
    "run.engine": "process",
    "task.corpus": "{kind = 'librispeech'}",
    "population.size": "2",
    "sampler.cohort": "2",
    "local.steps": "2",
    "local.batch_size": "2",
    "strategy": STAGES,
    "codec.name": "packed",
    "privacy": "{noise_multiplier = 0.6144}",
    "evaluation.every": "0",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_round_of_the_published_model_takes_at_most_twelve_copies_of_it(tmp_path: Path) -> None:
    data = librispeech(tmp_path / "corpus")
    changes = [part for key, value in CHANGED.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "experiments.cli", "run", "experiments/pfl4asr.toml", "--rounds", "1", "--data-dir", str(data)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run"), *changes], cwd=PROJECT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["parameters"], summary["users_total"], summary["failed_users_total"]) == (255_800_864, 2, 0)
    assert summary["uplink_ratio"] > 600
    copies = (summary["peak_memory_bytes"] - summary["startup_memory_bytes"]) / (4 * summary["parameters"])
    assert copies <= 12
