"""Real devices on this machine, as processes: TLS, keys, recorded speakers; the bits of a simulation, also after kills."""

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from experiments.deployment.loopback import Loopback, Node
from experiments.engines import account_of, secret_of
from experiments.folder import read_metrics
from experiments.live import Reporter
from experiments.prepare import prepare, read_experiment
from experiments.run import run_rounds
from fedclip.account import read_ledger
from fedclip.model_file import load_model
from fedclip.simulation import InProcess
from fedclip.user_states import StatesInFolder
from strategies.naming import run_digest
from tests.strategies.devices import EXPERIMENT, speakers_apart, together

pytestmark = pytest.mark.slow

SETTINGS = ("deployment.seeded=true", "deployment.diagnostics=true", "deployment.least_users=3", "deployment.deadline_seconds=120")


def deployed(folder: Path) -> tuple[Loopback, dict[str, Any]]:
    """Return a deployment of three recorded speakers, and what to submit to it."""
    devices = speakers_apart(folder / "speakers")
    data = together(devices, folder / "together")
    file = folder / "devices.toml"
    file.write_text(EXPERIMENT, encoding="utf-8")
    loopback = Loopback(folder / "deployment", [Node(device.name, device.folder) for device in devices])
    settings = "; ".join([f'deployment.roster="{loopback.roster}"', *SETTINGS])
    return loopback, {"experiment": str(file), "data_dir": str(data), "set": settings}


def simulated(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return the run folder of the same experiment in one process, and its model."""
    prepared = prepare(read_experiment(folder / "devices.toml", [], folder / "together"))
    path = folder / "simulation"
    path.mkdir()
    names, states = (secret_of(prepared), run_digest(prepared.experiment)), StatesInFolder(path / "states")
    engine = InProcess(prepared.method, prepared.task, *names, "cpu", account_of(prepared, path), states)
    with Reporter(5, quiet=True, console=Console(file=io.StringIO())) as reporter:
        assert run_rounds(prepared, engine, path, reporter) == 0
    return path, load_model(path / "checkpoints" / "model.safetensors")[1]


def same(model: dict[str, torch.Tensor], run: Path) -> bool:
    other = load_model(run / "checkpoints" / "model.safetensors")[1]
    return {*model} == {*other} and all(torch.equal(tensor, other[name]) for name, tensor in model.items())


def until(there: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_five_rounds_of_three_speakers_have_the_bits_of_a_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loopback, submitted = deployed(tmp_path)
    path, model = simulated(tmp_path)
    run = loopback.folder / "run"
    with loopback:
        start = time.monotonic()
        loopback.submit(out=str(run), **submitted)
        summary = loopback.wait(run)
        seconds, relay = time.monotonic() - start, loopback.relay
    assert summary["status"] == "done"
    assert same(model, run)
    rows, expected = read_metrics(run), read_metrics(path)
    for row, other in zip(rows, expected, strict=True):
        assert all(row[name] == other[name] for name in ("users", "uplink_bytes", "downlink_bytes", "epsilon"))
        # What is no part of the model is added in the order in which it comes.
        assert all(row[name] == pytest.approx(other[name], rel=1e-9) for name in ("train_loss", "update_norm", "clipped"))
    assert relay.up > summary["uplink_bytes_total"]
    assert relay.down > summary["downlink_bytes_total"]
    assert summary["privacy"] == "seeded: epsilon is nominal; diagnostics of its cohorts are not private"
    assert not (run / "security.jsonl").exists()
    with capsys.disabled():
        payload = f"{summary['uplink_bytes_total']} B up, {summary['downlink_bytes_total']} B down"
        print(f"\n{seconds:.0f} s for 5 rounds; payloads {payload}; sockets {relay.up} B up, {relay.down} B down")


def test_a_node_and_the_server_are_killed_in_a_round_and_nothing_counts_twice(tmp_path: Path) -> None:
    loopback, submitted = deployed(tmp_path)
    _, model = simulated(tmp_path)
    run, node = loopback.folder / "run", next(iter(loopback.nodes))
    states = loopback.nodes[node].data / ".fedclip"
    with loopback:
        loopback.submit(out=str(run), **submitted)
        loopback.wait(run, rounds=2)
        until(lambda: any(states.rglob("00000003-0.state")))  # it has trained in the third round
        loopback.kill(node)
        loopback.kill("superlink")
        done = json.loads((run / "heartbeat.json").read_text())["round"]
        assert done == 2
        assert not (run / "summary.json").exists()
        time.sleep(10)  # what they had started ends when it sees that they are gone
        loopback.start_link()
        loopback.start(node)
        loopback.submit(resume=str(run), set=submitted["set"])
        summary = loopback.wait(run)
    assert (summary["status"], summary["rounds"]) == ("done", 5)
    charges = read_ledger(run / "ledger.jsonl")
    assert [(charge.round, charge.attempt) for charge in charges] == [(round, 0) for round in range(1, 6)]
    assert summary["measured"]["rounds"] == 5
    assert [row["round"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert same(model, run)
