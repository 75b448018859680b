"""`fedclip flower`: a Flower user's own app, from its folder, with a million registered nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.ray_grid import KEPT_IDS, RayGrid
from experiments.cli import app
from tests.clients import apps

PROJECT = Path(__file__).parents[2]
PYPROJECT = """
[project]
name = "NAME"
version = "1.0.0"
description = ""
license = "Apache-2.0"

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "NAME.server_app:app"
clientapp = "NAME.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 1
fraction-train = 1.0
model.target = 4.0
seconds = 0.0
"""
SERVER = """
import json
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    config = context.run_config
    strategy = FedAvg(fraction_train=config["fraction-train"], fraction_evaluate=config["fraction-train"])
    found = strategy.start(grid, ArrayRecord({"w": Array(np.full(3, 8.0))}), num_rounds=config["num-server-rounds"])
    measured = {round: dict(record) for round, record in found.evaluate_metrics_clientapp.items()}
    Path("found.json").write_text(json.dumps([found.arrays["w"].numpy().tolist(), measured]))
"""
CLIENT = """
import time
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.train()
def train(message, context):
    time.sleep(context.run_config["seconds"])
    moved = (message.content["arrays"]["w"].numpy() + context.run_config["model.target"]) / 2
    content = RecordDict({"arrays": ArrayRecord({"w": Array(moved)}), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)

@app.evaluate()
def evaluate(message, context):
    time.sleep(context.run_config["seconds"])
    number, nodes = context.node_config["partition-id"], context.node_config["num-partitions"]
    metrics = MetricRecord({"num-examples": 1, "within": int(0 <= number < nodes), "nodes": nodes, "number": number})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
"""


def write_app(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    for file, text in ((f"{name}/server_app.py", SERVER), (f"{name}/client_app.py", CLIENT), (f"{name}/__init__.py", "")):
        (folder / file).write_text(text, encoding="utf-8")
    (folder / "pyproject.toml").write_text(PYPROJECT.replace("NAME", name), encoding="utf-8")
    return folder


@pytest.fixture
def fedclip(monkeypatch, tmp_path):
    """Run a command line in a folder of its own; what the app's import leaves behind is taken back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.usefixtures("ray_session")
def test_an_app_runs_from_its_folder_with_a_million_nodes(fedclip, tmp_path):
    folder = write_app(tmp_path / "mine", "millions")
    config = "num-server-rounds=2 fraction-train=0.00002 model.target=0.0"
    result = fedclip("flower", folder, "--nodes", 1_000_000, "--workers", 2, "--run-config", config)
    assert result.exit_code == 0, result.output
    arrays, measured = json.loads((tmp_path / "found.json").read_text())
    assert arrays == pytest.approx([2.0] * 3), "two rounds, each halfway from 8 to the target of --run-config"
    assert [measured[n]["nodes"] for n in ("1", "2")] == pytest.approx([1_000_000] * 2)
    assert [measured[n]["within"] for n in ("1", "2")] == pytest.approx([1.0] * 2)
    assert measured["1"]["number"] != measured["2"]["number"], "the mean number of twenty nodes, drawn anew"


def break_nothing(folder: Path) -> None:
    pass


def break_import(folder: Path) -> None:
    file = next(folder.glob("*/client_app.py"))
    file.write_text("import no_such_library\n" + file.read_text())


def break_kind(folder: Path) -> None:
    file = next(folder.glob("*/client_app.py"))
    file.write_text(
        file.read_text().replace("app = ClientApp()", "from flwr.serverapp import ServerApp\napp = ClientApp()") + "\napp = 3\n"
    )


def break_components(folder: Path) -> None:
    file = folder / "pyproject.toml"
    file.write_text(file.read_text().replace("clientapp =", "other ="))


def break_toml(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[project\n")


def break_names(folder: Path) -> None:
    (folder / "clients").mkdir()


def break_module_names(folder: Path) -> None:
    (folder / "clients.py").touch()


@pytest.mark.parametrize(
    ("spoil", "words", "said"),
    [
        (break_nothing, ["--run-config", "lr=3"], "'lr' is not present"),
        (break_nothing, ["--run-config", "seconds 3"], "expected 'key=value ...', got 'seconds 3'"),
        (break_nothing, ["--run-config", "seconds=three"], "invalid format"),
        (break_import, [], "No module named 'no_such_library'. Install what the app depends on"),
        (break_kind, [], "expected a flwr ClientApp, got int"),
        (break_components, [], '"clientapp" missing in [tool.flwr.app.components]'),
        (break_toml, [], "missing or invalid"),
        (break_names, [], "its package or module 'clients' has the name of one of fedclip's"),
        (break_module_names, [], "its package or module 'clients' has the name of one of fedclip's"),
        (lambda folder: (folder / "pyproject.toml").unlink(), [], "there is no pyproject.toml. Give the folder of a Flower app"),
    ],
)
def test_what_is_wrong_with_an_app_is_said(fedclip, tmp_path, spoil, words, said):
    folder = write_app(tmp_path / "mine", tmp_path.name)
    spoil(folder)
    result = fedclip("flower", folder, *words)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_ids_are_kept_up_to_a_number_and_are_arithmetic_beyond(ray_session):
    for nodes, kind in ((KEPT_IDS, tuple), (KEPT_IDS + 1, range)):
        with RayGrid(apps.app, nodes=nodes, workers=1) as grid:
            ids = grid.get_node_ids()
            assert type(ids) is kind
            assert (ids[0], ids[-1], len(ids)) == (2, nodes + 1, nodes)


@pytest.mark.slow
def test_a_round_takes_as_long_with_a_million_nodes_as_with_a_thousand(tmp_path):
    """The app sleeps, so that a busy machine counts as little as can be; Flower's engine does the same rounds."""
    folder = write_app(tmp_path / "mine", "sleepy")
    file = folder / "pyproject.toml"
    file.write_text(file.read_text().replace("seconds = 0.0", "seconds = 0.05"))
    sizes = [word for nodes in (1000, 100_000, 1_000_000) for word in ("--nodes", str(nodes))]
    command = [
        sys.executable,
        "-m",
        "experiments.cli",
        "bench",
        "flower",
        str(folder),
        *sizes,
        "--beside",
        "1000",
        "--rounds",
        "9",
        "--json",
    ]
    done = subprocess.run(command, cwd=PROJECT, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    print(*rows, sep="\n")
    medians = [row["median_round_seconds"] for row in rows if row["grid"] == "RayGrid"]
    assert len(medians) == 3
    assert max(medians) < 1.2 * min(medians), rows
    assert [row["nodes"] for row in rows if row["grid"] != "RayGrid"] == [1000]
