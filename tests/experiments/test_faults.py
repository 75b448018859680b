"""Workers that die, hang or are lost with their node cost time, and not a bit of the result."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.engines import OnGrid, open_engine
from experiments.prepare import Prepared, prepare, read_experiment
from experiments.rows import row_of
from fedclip.round import WorkerError
from tests.tasks_that_fail import DIE, HANG


def prepared_in(vision: Path, folder: Path, *overrides: str) -> Prepared:
    folder.mkdir(exist_ok=True)
    task = f"task={{name='tests.tasks_that_fail:make', arguments={{folder='{folder}'}}}}"
    return prepare(read_experiment(vision, [task, *overrides]))


def params_here(prepared: Prepared, rounds: int) -> torch.Tensor:
    from fedclip.simulation import InProcess
    from strategies.naming import run_digest

    engine = InProcess(prepared.method, prepared.task, f"seed:{prepared.experiment.run.seed}", run_digest(prepared.experiment))
    for _ in range(rounds):
        engine.round()
    return engine.state.params


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_dies_is_replaced_and_changes_no_bit(vision: Path, tmp_path: Path) -> None:
    folder = tmp_path / "orders"
    prepared = prepared_in(vision, folder, "run.workers=2", "ray.messages_per_worker=2")
    with open_engine(prepared) as engine:
        engine.round()
        (folder / DIE).touch()
        row = row_of(engine.round().tally, 2, 0, 1.0)
        assert not list(folder.iterdir()), "a worker obeyed"
        assert torch.equal(engine.state.params, params_here(prepared, 2))
    assert row["workers_replaced"] == 1
    assert 1 <= row["blocks_redone"] < 9, "those of one of its messages"


@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_hangs_is_replaced_and_changes_no_bit(vision: Path, tmp_path: Path) -> None:
    folder = tmp_path / "orders"
    prepared = prepared_in(vision, folder, "run.workers=2", "ray.deadline_seconds=4", "ray.retries=9")
    (folder / HANG).touch()
    with open_engine(prepared) as engine:
        row = row_of(engine.round().tally, 1, 0, 1.0)
        assert not list(folder.iterdir()), "a worker obeyed"
        assert torch.equal(engine.state.params, params_here(prepared, 1))
    assert row["workers_replaced"] >= 1, "a busy machine may have more"


@pytest.mark.usefixtures("ray_session")
def test_a_message_that_ends_every_worker_ends_the_round_and_names_the_worker(vision: Path, tmp_path: Path) -> None:
    folder = tmp_path / "orders"
    with open_engine(prepared_in(vision, folder, "run.workers=1", "ray.retries=0")) as engine:
        (folder / DIE).touch()
        with pytest.raises(WorkerError, match=r"Worker 0 \(process \d+ on \S+\) died, perhaps for want of memory. 1 workers in turn"):
            engine.round()


@pytest.mark.slow
def test_twenty_killed_workers_in_various_places_of_rounds_change_no_bit(vision: Path, tmp_path: Path, ray_session: None) -> None:
    prepared = prepared_in(vision, tmp_path / "orders", "run.workers=2", "ray.retries=99", "local.steps=200", "sampler.cohort=20")
    rng, kills, over = random.Random(3), list[float](), threading.Event()
    with open_engine(prepared) as engine:
        assert isinstance(engine, OnGrid)
        crew = engine._grid._dispatcher.crew  # type: ignore[attr-defined]

        def kill() -> None:
            while len(kills) < 20:
                time.sleep(rng.uniform(0.0, 1.5))
                posts = list(crew.posts.values())
                if posts:
                    kills.append(time.monotonic())
                    os.kill(rng.choice(posts).pid, signal.SIGKILL)
                while len(crew.posts) < 2 and rng.random() < 0.9 and not over.is_set():  # now and then both are gone at once
                    time.sleep(0.1)

        killer = threading.Thread(target=kill)
        killer.start()
        tallies = []
        try:
            while killer.is_alive() or len(tallies) < 3:
                tallies.append(engine.round().tally)
        finally:
            over.set()
        rounds, params = engine.state.round, engine.state.params
    replaced, redone = (sum(float(t.get(name, 0.0)) for t in tallies) for name in ("workers_replaced", "blocks_redone"))  # type: ignore[arg-type]
    print(f"{len(kills)} kills in {rounds} rounds, {replaced:g} replaced in them, {redone:g} blocks redone")
    assert replaced >= 15, "others died when nobody looked"
    assert torch.equal(params, params_here(prepared, rounds))


@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost_in_a_round_and_another_comes(vision: Path, tmp_path: Path) -> None:
    short = Path("/tmp") / f"fc{os.getpid()}"  # names of sockets are short
    driver = Path(__file__).with_name("cluster_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(vision), str(tmp_path)],
        env=os.environ | {"RAY_TMPDIR": str(short), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(driver.parents[2])},
        capture_output=True,
        text=True,
        timeout=400,
    )
    shutil.rmtree(short, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(seen)
    assert seen["equal"]
    assert seen["states_equal"]
    assert seen["states"] > 50
    known, read, put = (seen["crossed"][call] for call in ("newest", "read", "put"))
    assert read[0] < known[0], "of users that come again states are there already"
    assert put[1] > 0
    assert seen["copies"] == [0, 2], "what leads needs none, the other machine has those of before it was lost, and after"
    assert seen["left"] == 0
    assert seen["machines"] == seen["heard"] == 2
    assert (seen["puts"], seen["model_at"]) == (1, 2), "the model is stored once, and goes once to each node"
    assert seen["workers"] == [2, 1, 2], "both; one is lost; another came"
    assert seen["faults"][0] == 1
    assert seen["faults"][1] >= 1


def test_the_command_line_names_a_cluster(vision: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from experiments import cli, commands

    asked = []
    monkeypatch.setattr(commands, "run_command", lambda experiment, *_: asked.append(experiment) or 0)
    assert CliRunner().invoke(cli.app, ["run", str(vision), "--ray-address", "10.0.0.1:6379"]).exit_code == 0
    assert asked[0].ray.address == "10.0.0.1:6379"


def test_faults_are_counted_over_the_run_and_shown_only_where_there_were_any() -> None:
    from experiments.progress import Progress
    from fedclip.round import Outcome

    progress = Progress()
    for tally in ({}, {"workers_replaced": 1.0, "blocks_redone": 4.0}, {"workers_replaced": 2.0}):
        progress.add(Outcome(None, {"users": 1.0, **tally}, ()))  # type: ignore[arg-type]  # the state does not matter
    assert progress.faults == {"workers_replaced": 3, "blocks_redone": 4}
    assert Progress(**progress.plain()) == progress
    assert not {"workers_replaced", "blocks_redone"} & row_of({"users": 1.0}, 1, 0, 1.0).keys()
