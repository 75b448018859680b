"""Who is not let in on a real deployment: without TLS, without trust, on the operators' paths, without a key, with an unknown one, not in
the roster, or no longer. None moves the model."""

import os
import signal
import ssl
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import torch

from clients.roster import Roster
from experiments.deployment.front import nginx
from experiments.deployment.loopback import BIN, HOST, Loopback, Node, fedclip, free_port
from experiments.deployment.refusals import refused_connections
from experiments.folder import read_metrics
from tests.experiments.deployment.watched import InMemory, Watched, causes, settings, written
from tests.strategies.devices import speakers_apart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROUNDS = 4


def supernode(loopback: Loopback, *options: str | Path) -> str:
    """Start a SuperNode and return what it said until it gave up."""
    address = ["--superlink", f"{HOST}:{loopback.entry}", "--host", HOST, "--port", str(free_port()), "--max-retries", "1"]
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


def post(port: int, ca: Path, path: str) -> int:
    """Return how a request of nobody's is answered."""
    as_protobuf = dict.fromkeys(("content-type", "accept"), "application/protobuf")
    trust = ssl.create_default_context(cafile=ca)
    return httpx.post(f"https://{HOST}:{port}{path}", content=b"", headers=as_protobuf, verify=trust).status_code


def without_tls_or_trust(loopback: Loopback, front: bool) -> None:
    """Come in plain HTTP, and with other certificates: two of each."""
    plain, other = f"http://{HOST}:{loopback.entry}/v1/fleet/pull-messages", loopback.folder / "other"
    fedclip("keys", "server", str(other), "--host", HOST)
    if front:
        assert httpx.get(plain).status_code == 400
        assert "400 Bad Request" in supernode(loopback, "--insecure")
    else:
        with pytest.raises(httpx.HTTPError):
            httpx.get(plain)
        assert "disconnected" in supernode(loopback, "--insecure")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        post(loopback.entry, other / "ca.crt", "/v1/fleet/pull-messages")
    key = loopback.folder / "keys" / "outsider"
    said = supernode(loopback, "--root-certificates", other / "ca.crt", "--auth-supernode-private-key", key)
    assert "CERTIFICATE_VERIFY_FAILED" in said


def test_strangers_are_counted_and_move_nothing(tmp_path: Path) -> None:
    devices, front = speakers_apart(tmp_path / "speakers"), nginx() is not None
    names = written(tmp_path, devices, ROUNDS)
    expelled = devices[2].name
    (tmp_path / "nothing").mkdir()
    strangers = [Node("stranger", tmp_path / "nothing", enroll=False), Node("outsider", tmp_path / "nothing", enroll=False, register=False)]
    with (
        Loopback(tmp_path / "deployment", [*(Node(d.name, d.folder) for d in devices), *strangers], front) as loopback,
        Watched(loopback.folder / "run") as watched,
    ):
        ca, log = loopback.folder / "keys" / "ca.crt", loopback.log("superlink")
        without_tls_or_trust(loopback, front)
        key = loopback.folder / "keys" / "outsider"
        assert "Failed to activate" in supernode(loopback, "--root-certificates", ca, "--auth-supernode-private-key", key)
        assert "must be registered" in supernode(loopback, "--root-certificates", ca)
        assert post(loopback.entry, ca, "/v1/fleet/pull-messages") == 401
        assert post(loopback.port, ca, "/v1/control/list-nodes") == 200
        if front:
            assert post(loopback.entry, ca, "/v1/control/list-nodes") == 403
        start = time.monotonic()
        loopback.submit(set="; ".join(settings(loopback.roster, deadline_seconds=200, least_users=2)), out=str(watched.run), **names)
        loopback.wait(watched.run, rounds=1)
        Roster.read(loopback.roster).revoke(expelled).write(loopback.roster)
        summary = loopback.wait(watched.run)
        seconds, relay = time.monotonic() - start, loopback.relay
        for name in ("stranger", expelled):
            assert loopback.alive(name)
    assert (summary["status"], summary["rounds"]) == ("done", ROUNDS)
    assert refused_connections(log) == {"key not registered": 1, "no registered key": 1, "not authenticated": 1}
    if front:
        assert refused_connections(loopback.log("front")) == {"plain HTTP": 2, "TLS refused": 2, "not for nodes": 1}

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
    print(f"\n{seconds:.0f} s for {ROUNDS} rounds{' through the front' if front else ''}; {relay.up} B up, {relay.down} B down")
    if not front:
        pytest.skip("The rest holds; nginx is not installed, so that nothing went through a front.")
