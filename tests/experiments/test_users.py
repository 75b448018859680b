"""`fedclip users` on images that are dealt, on speech and on a task of one's own."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app

DOOR = """
import numpy as np


class Words:
    users, held_out_units = 90_000_000, 1

    def load_user(self, user, rng):
        if user < 0:
            raise OSError
        return ["a"] * (3 + user % 2)

    def cost(self, user):
        return 1.0


def make(population, data_dir, seed, broken=False):
    task = Words()
    if broken:
        task.load_user = None
    return task
"""


def users(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["users", *(str(a) for a in arguments)])
    return result.exit_code, result.output


def test_dealt_images_are_counted_by_user_and_label(vision: Path, tmp_path: Path) -> None:
    partition = 'task.partition={name="shard", num_shards_per_partition=1}'
    status, output = users(vision, "--set", partition, "--json", "--out", tmp_path / "users.png")
    assert status == 0, output
    found = json.loads(output)
    # 1,438 training images in 60 shards of floor(1438 / 60) = 23.
    assert (found["users"], found["looked_at"], found["everybody"], found["examples_total"]) == (60, 60, True, 1438)
    sizes = found["examples_per_user"]
    assert (sizes["minimum"], sizes["maximum"], sizes["total"], sizes["counts"]) == (23, 23, 1380, [60])
    assert found["labels"] == list(range(10))
    assert sum(found["label_shares"]) == pytest.approx(1)
    assert found["labels_per_user"]["maximum"] == 2  # about 144 images a label: a shard lies in two labels at most
    assert found["label_total_variation_mean"] > 0.8
    assert (tmp_path / "users.png").read_bytes()[1:4] == b"PNG"
    status, output = users(vision, "--set", partition)
    assert status == 0
    assert "1,380 of 1,438 training examples are dealt" in output
    status, output = users(vision, "--sample", "7", "--out", tmp_path / "users.svg")
    assert (status, "7 of them, drawn by the seed" in output) == (0, True)
    assert "<svg" in (tmp_path / "users.svg").read_text()


def test_a_hundred_million_users_answer_from_a_sample(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(DOOR, encoding="utf-8")
    task = f"task={{name='{tmp_path}/words.py:make'}}"
    status, output = users(vision, "--set", task, "--set", "population.size=90000000", "--json", "--sample", "400")
    assert status == 0, output
    found = json.loads(output)
    assert (found["users"], found["looked_at"], found["everybody"]) == (90_000_000, 400, False)
    sizes = found["examples_per_user"]
    assert (sizes["users"], sizes["minimum"], sizes["maximum"], sum(sizes["counts"])) == (400, 3, 4, 400)
    assert "labels" not in found
    assert "seconds_per_user" not in found


def test_seconds_of_speakers_are_predicted(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "experiments" / "quickstart.toml"
    status, output = users(
        file, "--sample", "2", "--json", "--set", "task.cache_mb=0", "--set", "population.size=100000000", "--out", tmp_path / "u.pdf"
    )
    assert status == 0, output
    found = json.loads(output)
    assert found["examples_per_user"]["users"] == found["seconds_per_user"]["users"] == 2
    assert 6 <= found["examples_per_user"]["minimum"] <= found["examples_per_user"]["maximum"] <= 10
    assert 4 < found["seconds_per_user"]["mean"] < 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "population.size=100000"], "population.size: expected at most 1438 users"),
        (["--set", 'task.partition={name="natural_id"}'], "needs data that says who made each example"),
        (["--out", "users.xyz"], "--out: users.xyz cannot be drawn"),
    ],
)
def test_bad_input_is_one_message_and_status_2(vision: Path, arguments: list[str], said: str) -> None:
    status, output = users(vision, *arguments)
    assert status == 2, output
    assert said in output
    assert "Traceback" not in output


def test_data_that_cannot_be_read_is_bad_input(vision: Path, tmp_path: Path) -> None:
    (tmp_path / "words.py").write_text(DOOR, encoding="utf-8")
    task = f"task={{name='{tmp_path}/words.py:make', arguments={{broken=true}}}}"
    status, output = users(vision, "--set", task)
    assert (status, "cannot give the data of users: TypeError" in output) == (2, True)
