"""Who is not let in on a real deployment: without a key, with an unknown one, not in the roster, or no longer. None moves the model."""

import os
import signal
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from clients.roster import Roster
from experiments.deployment.loopback import BIN, HOST, Loopback, Node, free_port
from experiments.deployment.refusals import refused_connections
from experiments.folder import read_metrics
from tests.experiments.deployment.watched import InMemory, Watched, causes, settings, written
from tests.strategies.devices import speakers_apart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDS = 4


def supernode(loopback: Loopback, *options: str | Path) -> str:
    """Start a SuperNode and return what it said until it gave up."""
    address = ["--superlink", f"{HOST}:{loopback.port}", "--host", HOST, "--port", str(free_port()), "--max-retries", "1"]
    command = [str(BIN / "flower-supernode"), *address, *map(str, options)]
    off = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(loopback.folder / "stray")}
    off["PATH"] = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    with (loopback.folder / "stray.log").open("w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=dict(os.environ) | off, stdout=log, stderr=log, start_new_session=True)
        try:
            assert process.wait(120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)  # its helper, which goes on for a while
        log.seek(0)
        return log.read()


def test_strangers_are_counted_and_move_nothing(tmp_path: Path) -> None:
    devices = speakers_apart(tmp_path / "speakers")
    names = written(tmp_path, devices, ROUNDS)
    expelled = devices[2].name
    (tmp_path / "nothing").mkdir()
    strangers = [Node("stranger", tmp_path / "nothing", enroll=False), Node("outsider", tmp_path / "nothing", enroll=False, register=False)]
    with (
        Loopback(tmp_path / "deployment", [*(Node(d.name, d.folder) for d in devices), *strangers]) as loopback,
        Watched(loopback.folder / "run") as watched,
    ):
        ca, log = loopback.folder / "keys" / "ca.crt", loopback.log("superlink")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{HOST}:{loopback.port}/v1/fleet/pull-messages")
        assert "disconnected" in supernode(loopback, "--insecure")
        key = loopback.folder / "keys" / "outsider"
        assert "Failed to activate" in supernode(loopback, "--root-certificates", ca, "--auth-supernode-private-key", key)
        assert "must be registered" in supernode(loopback, "--root-certificates", ca)
        trust = ssl.create_default_context(cafile=ca)
        as_protobuf = dict.fromkeys(("content-type", "accept"), "application/protobuf")
        unsigned = httpx.post(f"https://{HOST}:{loopback.port}/v1/fleet/pull-messages", content=b"", headers=as_protobuf, verify=trust)
        assert unsigned.status_code == 401
        loopback.submit(set="; ".join(settings(loopback.roster, deadline_seconds=200, least_users=2)), out=str(watched.run), **names)
        loopback.wait(watched.run, rounds=1)
        Roster.read(loopback.roster).revoke(expelled).write(loopback.roster)
        summary = loopback.wait(watched.run)
        for name in ("stranger", expelled):
            assert loopback.alive(name)
    assert (summary["status"], summary["rounds"]) == ("done", ROUNDS)
    refused = refused_connections(log)
    assert refused == {"key not registered": 1, "no registered key": 1, "not authenticated": 1}

    lines = watched.security()
    out = causes(lines, expelled)
    last = min(out)
    assert last in (2, 3)
    assert out == {round: ["revoked"] for round in range(last, ROUNDS + 1)}
    (stranger,) = {line["node"] for line in lines} - {expelled}
    assert causes(lines, stranger) == {round: ["unregistered"] for round in range(1, ROUNDS + 1)}
    assert [row["users"] for row in read_metrics(watched.run)] == [3 if round < last else 2 for round in range(1, ROUNDS + 1)]

    memory = InMemory(tmp_path, devices)
    fleet = memory.fleet()
    for round in range(1, ROUNDS + 1):
        if round == last:
            Roster.read(memory.roster).revoke(expelled).write(memory.roster)
        fleet.round()
        assert torch.equal(watched.params(round, memory.name, fleet.state.server), fleet.state.params)
