"""The gate: what a server takes of the replies of real devices. Nothing about a reply is trusted before it is checked here.

A reply is taken once, from the node that was asked, for the run, round, attempt, message and model that it was asked for, signed with
the key that the roster has of that node; of users that it was asked for, in payloads no longer than an update of this model can be. What
is wrong with one becomes a `Rejected` with its cause, to be counted, and never anything worse. What passes is then decoded into no more
than the layout, made finite, and projected onto the bound of the chain (`fedclip.collector.Collector`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeVar

from flwr.app import Message
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clients.device import digest_of
from clients.messages import read_device_reply
from clients.signing import verified
from fedclip.collector import Contribution
from fedclip.tally import MOST_CHARACTERS, Tally

Cause = Literal[
    "failed",
    "oversized",
    "malformed",
    "unknown node",
    "wrong run",
    "wrong round",
    "wrong attempt",
    "wrong nonce",
    "duplicate",
    "late",
    "bad signature",
    "wrong spec",
    "wrong users",
    "undecodable",
    "revoked",
    "unregistered",
]
"""Why a reply was not taken: the device said that it failed; more bytes than it can have; not of this format; from another node than was
asked; naming another run, round, attempt, message or model; taken already; after the deadline; not signed by the node; of users that were
not asked for; a payload that is no update of this model. The last two: a node that is there and is not asked."""

LARGEST_SAID = 1 << 20
"""Bytes of what a reply says beside its payloads and its users, at most."""

LARGEST_COUNTS, MOST_UNITS, MOST_COUNTS = 8 << 20, 20_000, 100
"""Bytes of what an evaluation's reply says, at most; units that it may be of, and counts of each."""

AROUND = 1 << 15
"""Bytes around the payload of a user, at most: what is said of the user, and what Flower writes."""

LARGEST_BITS = 10_000
"""Clip bits of a user, at most, in hexadecimal digits."""

MEASURED: Final = (
    "train_loss",
    "examples_left_out",
    "load_seconds",
    "read_seconds",
    "train_seconds",
    *(f"chain.{name}" for name in ("update_norm", "clipped", "local_clipped", "density", "compression_error")),
)
"""What a device may say that it measured; what else counts users the server sees for itself."""

LARGEST_MEASURED = 1e12
"""Greatest absolute value of it: sums over devices stay finite."""

Finite = Annotated[float, Field(ge=-1e100, le=1e100)]
"""Never infinite, nor is the sum over any number of users."""

Name = Annotated[str, Field(max_length=100)]

Count = Annotated[float, Field(ge=0, le=1e100)]

Hash = Annotated[str, Field(max_length=64)]


class Rejected(Exception):  # noqa: N818 - an event to count, not a fault of this program
    """A reply that is not taken, and why."""

    def __init__(self, cause: Cause, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause: Cause = cause


@dataclass(frozen=True)
class Asked:
    """A message that is out: to which node, whose key, of which users, under which nonce."""

    node: int
    name: str
    key: str
    nonce: str
    users: tuple[int, ...] = ()


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    run: Annotated[str, Field(max_length=200)]
    round: int
    attempt: int
    nonce: Annotated[str, Field(max_length=100)]
    spec: Hash


class _OfUser(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    user: int
    payload: Hash | None
    clip_bits: Annotated[str, Field(max_length=LARGEST_BITS, pattern="^([0-9a-f]{2})*$")]
    weight: Annotated[float, Field(ge=0, le=2.0**16)]
    error: Annotated[str, Field(max_length=MOST_CHARACTERS)] | None = None
    tally: dict[Name, Finite] = Field(default={}, max_length=100)


Said = TypeVar("Said", bound=_Said)


class _Updates(_Said):
    users: list[_OfUser]


class _Counts(_Said):
    counts: Annotated[list[Annotated[dict[Name, Count], Field(max_length=MOST_COUNTS)]], Field(max_length=MOST_UNITS)]


class _Rates(_Said):
    rates: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(max_length=10)


class Gate:
    """What is taken in one attempt at one round.

    Args:
        run: the name of the run.
        round: the round.
        attempt: the attempt.
        spec: the hash of what the devices were told.
        largest: bytes that the payload of a user's update has at most; 0 where none is asked for.
        signed: whether replies must be signed.
        said: bytes of what a reply may say beside payloads and users.
    """

    def __init__(
        self, run: str, round: int, attempt: int, spec: str, largest: int, *, signed: bool = True, said: int = LARGEST_SAID
    ) -> None:
        self._named = {"run": run, "round": round, "attempt": attempt}
        self._spec, self._signed, self._answered = spec, signed, set[str]()
        self.largest, self._said = largest, said

    def limit(self, asked: Asked) -> int:
        """Return how many bytes a reply may have in all."""
        return self._said + (self.largest + AROUND) * len(asked.users)

    def updates(self, reply: Message, asked: Asked, *, heaviest: float | None, measured: bool) -> list[Contribution]:
        """Return what the users of a reply give.

        Args:
            reply: as it came.
            asked: the message that it answers.
            heaviest: users say by how much they count, and that is at most this; None: each counts as one.
            measured: whether users say what they measured; it is dropped otherwise.

        Raises:
            Rejected: anything of it is not as it must be.
        """
        said, payloads = self._open(reply, asked, _Updates)
        users = [of.user for of in said.users]
        if len({*users}) != len(users) or not {*users} <= {*asked.users}:
            raise Rejected("wrong users", f"{len(users)} users, of which it was asked for {len({*users} & {*asked.users})}")
        if {*payloads} != {str(of.user) for of in said.users if of.payload is not None}:
            raise Rejected("malformed", "payloads that are not those of its users")
        for of in said.users:
            payload = payloads.get(str(of.user), b"")
            if len(payload) > self.largest:
                raise Rejected("oversized", f"{len(payload)} bytes for one update")
            if of.payload is not None and digest_of(payload) != of.payload:
                raise Rejected("bad signature", "a payload that is not the one that was signed")
        return [_contribution(of, payloads, heaviest, measured) for of in said.users]

    def counts(self, reply: Message, asked: Asked) -> list[dict[str, float]]:
        """Return what the held-out units of a node counted. Raises as `updates`."""
        return self._open(reply, asked, _Counts)[0].counts

    def rates(self, reply: Message, asked: Asked) -> dict[str, float]:
        """Return a node's own rates, each between 0 and 1. Raises as `updates`."""
        return {name: min(1.0, max(0.0, rate)) for name, rate in self._open(reply, asked, _Rates)[0].rates.items()}

    def _open(self, reply: Message, asked: Asked, kind: type[Said]) -> tuple[Said, Mapping[str, bytes]]:
        if reply.has_error():  # also what the SuperLink says of a node that is gone, or whose reply is not whole
            lines = [line for line in (reply.error.reason or "").splitlines() if line.strip()]
            raise Rejected("failed", lines[-1][:MOST_CHARACTERS] if lines else "no reason given")
        if reply.metadata.src_node_id != asked.node:
            raise Rejected("unknown node", f"node {reply.metadata.src_node_id} in the place of {asked.name}")
        try:
            text, signature, payloads = read_device_reply(reply.content)
            if len(text) > self._said + AROUND * len(asked.users):
                raise Rejected("oversized", f"{len(text)} characters beside the payloads")
            said = kind.model_validate_json(text)
        except (ValidationError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Rejected("malformed", str(error).splitlines()[0][:MOST_CHARACTERS]) from None
        for name, value in self._named.items():
            if getattr(said, name) != value:
                raise Rejected(_WRONG[name], f"{getattr(said, name)!r}, expected {value!r}")
        if said.nonce in self._answered:
            raise Rejected("duplicate", asked.name)
        if said.nonce != asked.nonce:
            raise Rejected("wrong nonce", asked.name)
        if said.spec != self._spec:
            raise Rejected("wrong spec", said.spec)
        if self._signed and not verified(asked.key, text.encode(), signature):
            raise Rejected("bad signature", asked.name)
        self._answered.add(said.nonce)
        return said, payloads


_WRONG: dict[str, Cause] = {"run": "wrong run", "round": "wrong round", "attempt": "wrong attempt"}


def _contribution(of: _OfUser, payloads: Mapping[str, bytes], heaviest: float | None, measured: bool) -> Contribution:
    payload, bits = payloads.get(str(of.user)), bytes.fromhex(of.clip_bits)
    said = of.tally if measured else {}
    tally: Tally = {name: said[name] for name in MEASURED if abs(said.get(name, math.inf)) <= LARGEST_MEASURED}
    # What the server can see it counts itself.
    tally |= {"losses": 1.0} if "train_loss" in tally else {}
    if payload is not None:
        tally |= {"users": 1.0, "uplink_bytes": float(len(payload) + len(bits))}
    else:
        tally |= {"users_without_data" if "users_without_data" in said else "failed_users": 1.0}
    weight = 1.0 if heaviest is None else min(of.weight, heaviest)
    return Contribution(of.user, payload, weight, tally, of.error if measured else None, bits)
