"""Many nodes and many users a node on a real deployment: the server holds a message's updates at a time, and never all of a round."""

from pathlib import Path

import pytest

from experiments.deployment.loopback import Loopback, Node
from experiments.folder import read_metrics
from tests.experiments import many_users
from tests.experiments.deployment.watched import Watched, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

EXPERIMENT = f"""
[run]
name = "scale"
rounds = 1

[task]
name = "{many_users.__file__}:make"

[sampler]
name = "available"
cohort = COHORT

[local]
lr = 0.1
steps = 1
batch_size = 4

[strategy]
client = [{{ clip_by_global_norm = {{ max_norm = 1.0 }} }}]
server = [{{ sgd = {{ lr = 1.0 }} }}]

[privacy]
noise_multiplier = 1.0
"""

USERS_PER_MESSAGE = 4

MODEL = 4 * many_users.WIDTH * (many_users.WIDTH + 1)


def round_of(folder: Path, users: list[int]) -> tuple[int, float]:
    """Return the most memory that the ServerApp had in a round of nodes with so many users each, and the round's seconds."""
    nodes = []
    for number, count in enumerate(users):
        data = folder / f"node{number}"
        data.mkdir(parents=True)
        (data / "users").write_text(str(count), encoding="utf-8")
        nodes.append(Node(data.name, data, count))
    (folder / "users").write_text(str(sum(users)), encoding="utf-8")
    (folder / "scale.toml").write_text(EXPERIMENT.replace("COHORT", str(sum(users))), encoding="utf-8")
    with Loopback(folder / "deployment", nodes) as loopback, Watched(loopback.folder / "run") as watched:
        told = {"users_per_message": USERS_PER_MESSAGE, "least_users": sum(users), "deadline_seconds": 900}
        names = {"experiment": str(folder / "scale.toml"), "data_dir": str(folder), "out": str(watched.run)}
        loopback.submit(set="; ".join(settings(loopback.roster, **told)), **names)
        summary = loopback.wait(watched.run, seconds=1200)
    assert (summary["status"], summary["rounds"]) == ("done", 1)
    assert not watched.security()
    (row,) = read_metrics(watched.run)
    assert row["users"] == sum(users)
    return watched.peaks[1], row["round_seconds"]


def test_a_round_of_fifty_users_takes_the_memory_of_a_message(tmp_path: Path) -> None:
    few, few_seconds = round_of(tmp_path / "few", [1, 1])
    many, seconds = round_of(tmp_path / "many", [*[1] * 10, 40])
    print({"few": few >> 20, "many": many >> 20, "models": (many - few) / MODEL, "seconds": (few_seconds, seconds)})
    # A message is there as Flower fetches it, as it puts it together and as an array; then one update is decoded. All users are 50 models.
    assert many - few < (4 * USERS_PER_MESSAGE + 4) * MODEL + (16 << 20)
