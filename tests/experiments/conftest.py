"""What the tests of runs share: the smallest experiment."""

from pathlib import Path

import pytest

VISION = """
[run]
name = "small"
rounds = 3

[task]
name = "vision"

[population]
size = 60

[sampler]
cohort = 9

[local]
lr = 0.1
steps = 3
batch_size = 8
clip_norm = 1.0

[strategy]
method = "pfl4asr"
max_norm = 0.5
server_lr = 0.02

[privacy]
noise_multiplier = 0.05

[evaluation]
every = 2
"""


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """Return the file of a small experiment with noise."""
    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    return path
