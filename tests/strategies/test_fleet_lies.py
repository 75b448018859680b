"""What real devices send that is not as it must be: counted by its cause, and it moves nothing or no more than the bound."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message

from clients.gate import AROUND, LARGEST_SAID, Asked, Gate, Rejected
from clients.signing import read_private, sign
from fedclip.layout import Layout
from fedclip.packed import PackedCodec
from fedclip.update import Dense
from tests.strategies.devices import (
    Device,
    Hook,
    said_otherwise,
    sent_otherwise,
)
from tests.strategies.fleets import QUIET, make, payload_of, set_to, without, without_records


def twice(said: dict[str, Any]) -> None:
    said["users"] *= 2


def of_another(said: dict[str, Any]) -> None:
    said["users"][0]["user"] += 1


def unlike(said: dict[str, Any]) -> None:
    said["users"][0]["payload"] = "0" * 64


def raising(request: Message, reply: Message) -> list[Message]:
    return [Message(Error(0, "<class 'OSError'>: gone"), reply_to=request)]


def from_another_node(request: Message, reply: Message) -> list[Message]:
    reply.metadata.__dict__["_src_node_id"] = 100
    return [reply]


def deeply_nested(device: Device) -> Hook:
    def hook(request: Message, reply: Message) -> list[Message]:
        text = "[" * 100_000
        reply.content.config_records["reply"]["said"] = text
        reply.content.config_records["reply"]["signature"] = sign(read_private(device.key), text.encode())
        return [reply]

    return hook


def dense_again(payload: bytes) -> bytes:
    """Return an update of the same model that no user of the chain can have: all its values."""
    size = int.from_bytes(payload[8:16], "little")
    return PackedCodec().encode(Dense(torch.randn(size, generator=torch.Generator().manual_seed(0))), Layout(("x",), ((size,),), ("x",)))


LIES: dict[str, tuple[str, Callable[[Device], Hook]]] = {
    "raises": ("failed", lambda d: raising),
    "of another node": ("unknown node", lambda d: from_another_node),
    "no records": ("malformed", lambda d: without_records),
    "deep": ("malformed", deeply_nested),
    "more than is asked": ("malformed", lambda d: said_otherwise(d, set_to("more", 1))),
    "another run": ("wrong run", lambda d: said_otherwise(d, set_to("run", "another"))),
    "the round before": ("wrong round", lambda d: said_otherwise(d, set_to("round", 1))),
    "another attempt": ("wrong attempt", lambda d: said_otherwise(d, set_to("attempt", 1))),
    "another message": ("wrong nonce", lambda d: said_otherwise(d, set_to("nonce", "00"))),
    "another model": ("wrong spec", lambda d: said_otherwise(d, set_to("spec", "00"))),
    "signed before": ("bad signature", lambda d: said_otherwise(d, lambda said: said["users"][0].update(weight=0.5), sign_again=False)),
    "another payload": ("bad signature", lambda d: said_otherwise(d, unlike)),
    "a user twice": ("wrong users", lambda d: said_otherwise(d, twice)),
    "another's user": ("wrong users", lambda d: said_otherwise(d, of_another)),
    "an infinite weight": ("malformed", lambda d: said_otherwise(d, lambda said: said["users"][0].update(weight=float("inf")))),
    "no update": ("undecodable", lambda d: sent_otherwise(d, payload_of("no update"))),
    "a cut update": ("undecodable", lambda d: sent_otherwise(d, lambda payload: payload[:-1])),
    "a long update": ("oversized", lambda d: sent_otherwise(d, lambda payload: payload + bytes(10**7))),
    "a dense update where few values are sent": ("oversized", lambda d: sent_otherwise(d, dense_again)),
    "clip bits": ("undecodable", lambda d: said_otherwise(d, lambda said: said["users"][0].update(clip_bits="ff"))),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_is_not_as_it_must_be_moves_nothing_and_is_counted(
    devices: list[Device], absent: torch.Tensor, tmp_path: Path, lie: str
) -> None:
    cause, hook = LIES[lie]
    site = make(devices, tmp_path)
    site.fleet.round()
    devices[2].hook = hook(devices[2])
    site.fleet.round()
    assert [(r.node, r.round, r.cause) for r in site.warned] == [(devices[2].name, 2, cause)]
    assert site.fleet.rejected == {cause: 1}
    assert torch.equal(site.fleet.state.params, absent)
    assert site.fleet.remembered[2] == [2, 1, 0]  # what its device keeps of the second round does not count


def test_no_more_of_a_reply_is_fetched_than_the_chain_of_the_round_can_make(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path)
    link = site.fleet._link
    pull, limits = link.pull, list[int]()
    link.pull = lambda id, limit: limits.append(limit) or pull(id, limit)
    for _ in range(2):
        site.fleet.round()
    values = [site.prepared.method.client.stored(round, site.fleet.layout) or 0 for round in (1, 2)]  # fewer after the warm-up
    room = [limit - LARGEST_SAID for limit in limits]
    assert [7 * n < bytes < 7 * n + 5000 + AROUND for n, bytes in zip([values[0]] * 3 + [values[1]] * 3, room, strict=True)] == [True] * 6
    assert values[1] < values[0] / 3 < site.fleet.layout.size / 9


def test_what_a_device_remembers_counts_only_where_its_update_was_taken(devices: list[Device], tmp_path: Path) -> None:
    (tmp_path / "lied").mkdir()
    lied = make(devices, tmp_path / "lied")
    for round in range(3):
        devices[2].hook = said_otherwise(devices[2], set_to("run", "another")) if round == 1 else None
        lied.fleet.round()
    for device in devices:
        device.forget()
    silent = without(devices, tmp_path / "silent", devices[2].name, 2)
    silent.grid.silent = set()
    silent.fleet.round()
    assert torch.equal(lied.fleet.state.params, silent.fleet.state.params)


def test_the_same_reply_counts_once(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, "deployment.users_per_message=1")
    reply: list[Message] = []
    devices[2].hook = lambda request, honest: [reply.append(honest) or honest]
    site.fleet.round()
    gate = Gate(site.fleet.run, 1, 0, json.loads(str(reply[0].content.config_records["reply"]["said"]))["spec"], 10**6)
    said = json.loads(str(reply[0].content.config_records["reply"]["said"]))
    asked = Asked(102, devices[2].name, devices[2].public, said["nonce"], (2,))
    assert len(gate.updates(reply[0], asked, heaviest=None, measured=False)) == 1
    with pytest.raises(Rejected, match="duplicate"):
        gate.updates(reply[0], asked, heaviest=None, measured=False)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_malicious_device_moves_the_mean_by_at_most_its_bound(
    devices: list[Device], absent: torch.Tensor, tmp_path: Path, value: float
) -> None:
    site = make(devices, tmp_path)
    site.fleet.round()
    layout = site.fleet.layout
    payload = site.prepared.method.codec.encode(Dense(torch.full((layout.size,), value)), layout)
    devices[2].hook = sent_otherwise(devices[2], lambda honest: payload)
    before = site.fleet.state
    site.fleet.round()
    assert not site.warned
    bound = site.prepared.method.bound(layout).total
    moved = float((site.fleet.state.params - absent).norm()) / 0.1  # the server's learning rate
    assert moved <= bound / 3 * (1 + 1e-5)
    assert moved == (0 if math.isnan(value) else pytest.approx(bound / 3, rel=1e-3))
    assert before.round == 1


@pytest.mark.parametrize("reason", [" ", "\n", ""])
def test_a_device_that_fails_and_does_not_say_why_costs_the_round_its_update_alone(
    devices: list[Device], absent: torch.Tensor, tmp_path: Path, reason: str
) -> None:
    site = make(devices, tmp_path)
    site.fleet.round()
    devices[2].hook = lambda request, reply: [Message(Error(0, reason), reply_to=request)]
    site.fleet.round()
    assert [r.cause for r in site.warned] == ["failed"]
    assert torch.equal(site.fleet.state.params, absent)


def test_without_noise_a_weight_is_at_most_what_a_user_can_have(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, *QUIET, 'strategy.weighting="examples"', "strategy.max_examples=2")
    devices[2].hook = said_otherwise(devices[2], lambda said: said["users"][0].update(weight=60000.0))
    assert site.fleet.round().tally["weight"] <= 3
