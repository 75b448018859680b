"""A registered node that lies, on a real deployment: TLS, keys, processes. The others' run goes on, with the bits that it would have."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments.deployment.loopback import Loopback, Node
from experiments.folder import read_metrics
from fedclip.client import Client
from tests.experiments.deployment.malicious import attacks
from tests.experiments.deployment.watched import InMemory, Watched, causes, settings, written
from tests.strategies.devices import Device, speakers_apart

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

DEADLINE, SLACK = 75.0, 16 << 20

PLAN: dict[str, str | None] = {
    "honest": None,
    "withheld": None,
    "wrong run": "wrong run",
    "wrong round": "wrong round",
    "wrong attempt": "wrong attempt",
    "wrong nonce": "wrong nonce",
    "wrong spec": "wrong spec",
    "replay": "wrong round",
    "another key": "bad signature",
    "swapped": "bad signature",
    "other users": "wrong users",
    "twice": "wrong users",
    "another size": "undecodable",
    "truncated": "undecodable",
    "bomb": "undecodable",
    "bomb that lies": "undecodable",
    "one piece time and again": "oversized",
    "oversized": "oversized",
    "one object": "oversized",
    "long payload": "oversized",
    "no json": "malformed",
    "nested": "malformed",
    "no records": "malformed",
    "many arrays": "malformed",
    "crash": "failed",
    "not a number": None,
    "huge": None,
    "late": "late",
    "honest again": None,
    "honest once more": None,
}
"""The attacks, one a round, and why nothing is taken; of those without a cause something is, but of what was withheld."""

ROUNDS = {name: round for round, name in enumerate(PLAN, 1)}
TAKEN = ("honest", "not a number", "huge", "honest again", "honest once more")


class Memory(InMemory):
    """The same rounds, in which the attacker is silent, or sends what would be taken of it."""

    def __init__(self, folder: Path, devices: list[Device], attacker: str) -> None:
        super().__init__(folder, devices)
        self.attacker = attacker

    def models(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Return the model after each round, and what it would be without the attacker in that round alone."""
        state, remembered, found = self.fleet().state, list[list[int]](), {}
        for round, name in enumerate(PLAN, 1):
            after = []
            for silent in (True, False) if name in TAKEN else (True,):
                fleet = self.fleet(*[self.attacker] if silent else [])
                fleet.restore(state)
                fleet.remembered = remembered
                with monkeypatch.context() as patch:
                    if not silent:
                        self._let_attack(patch, name)
                    fleet.round()
                after.append(fleet.state.params)
            state, remembered = fleet.state, fleet.remembered
            found[round] = (after[-1], after[0])
        return found

    def _let_attack(self, patch: pytest.MonkeyPatch, name: str) -> None:
        """Let the attacker, and nobody else, attack."""
        from clients import messages

        make, begin, user = messages.device_reply, Client.__init__, [d.name for d in self.devices].index(self.attacker)

        def remember(client, *args, **kwargs):
            begin(client, *args, **kwargs)
            attacks.seen["layout"] = client.layout

        def device_reply(said, payloads, sign):
            attack = attacks.ATTACKS[name] if name in ("not a number", "huge") and user in payloads else None
            return make(said, payloads, sign) if attack is None else attack(said, payloads, sign, make)

        patch.setattr(Client, "__init__", remember)
        patch.setattr(messages, "device_reply", device_reply)


def test_an_attack_a_round_costs_the_attacker_its_update_and_nobody_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = speakers_apart(tmp_path / "speakers")
    names = written(tmp_path, devices, len(PLAN))
    evil, own = devices[0].name, tmp_path / "evil"
    own.mkdir()
    plan = {str(round): name for round, name in enumerate(PLAN, 1) if name in attacks.ATTACKS}
    environment = {"PYTHONPATH": str(Path(attacks.__file__).parent), attacks.PLAN: json.dumps(plan), attacks.FOLDER: str(own)}
    environment[attacks.LATE_SECONDS] = str(DEADLINE + 5)
    nodes = [Node(d.name, d.folder, environment=environment if d.name == evil else {}) for d in devices]
    with Loopback(tmp_path / "deployment", nodes) as loopback, Watched(loopback.folder / "run") as watched:
        said = settings(loopback.roster, deadline_seconds=DEADLINE, least_users=3)
        loopback.submit(set="; ".join(said), out=str(watched.run), **names)
        summary = loopback.wait(watched.run, seconds=1500)
    rows = {row["round"]: row for row in read_metrics(watched.run)}
    print({name: (round, rows[round]["round_seconds"], watched.peaks.get(round, 0) >> 20) for name, round in ROUNDS.items()})

    assert (summary["status"], summary["rounds"]) == ("done", len(PLAN))
    found = causes(watched.security(), evil)
    # What was withheld, once the SuperLink gives it up; and what came after the deadline.
    assert [round > ROUNDS["late"] for round, said in found.items() for cause in said if cause == "late"] == [False, True]
    other = [(round, cause) for round, said in found.items() for cause in said if cause != "late"]
    assert other == [(ROUNDS[name], cause) for name, cause in PLAN.items() if cause not in (None, "late")]
    assert {line["node"] for line in watched.security()} == {evil}
    for name, round in ROUNDS.items():
        assert rows[round]["users"] == (3 if name in TAKEN else 2), name
    assert max(rows[round]["round_seconds"] for name, round in ROUNDS.items()) < DEADLINE + 15

    memory = Memory(tmp_path, devices, evil)
    template = memory.fleet().state.server
    models = {round: watched.params(round, memory.name, template) for round in ROUNDS.values()}
    expected = memory.models(monkeypatch)
    for name, round in ROUNDS.items():
        assert torch.equal(models[round], expected[round][0]), name

    method, layout = memory.prepared.method, memory.fleet().layout
    bound, rate = method.bound(layout).total, 0.1
    moved = {name: (expected[ROUNDS[name]][1] - models[ROUNDS[name]]).double() / rate for name in TAKEN}
    assert not moved["not a number"].any()
    assert float(moved["huge"].norm()) == pytest.approx(bound / 3, rel=1e-3)
    # All values alike, and a bound for each tensor by its share of d: the projection has all values alike, too.
    assert torch.allclose(moved["huge"], torch.full((layout.size,), bound / math.sqrt(layout.size) / 3, dtype=torch.float64), rtol=0.01)

    for name in ("bomb", "bomb that lies", "one piece time and again", "oversized", "one object", "many arrays"):
        assert watched.peaks[ROUNDS[name]] - watched.peaks[ROUNDS["truncated"]] < SLACK, name
