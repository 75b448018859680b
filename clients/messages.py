"""The message format: what server and clients say to each other, as Flower records. All of it is in this file.

A training request holds the round's specification (JSON of plain data), the task's recipe, the blocks of users, and the encoded model as
an `Array` of bytes. A reply holds either the exact sum over the users (an int64 `Array`) or each user's encoded update, and what was
measured. Nothing is unpickled.

A message to a real device says beside that what its reply must name (`Errand`); the reply is one signed text, and the encoded updates
that the text has the hashes of.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedclip.collector import Contribution, Partial
from fedclip.spec import Block, RoundSpec
from fedclip.tasks.base import Counts

SAID = ("user", "weight", "tally", "error")
"""What a client says of a user beside payload and clip bits. Nothing else of a `Contribution` is taken from a message."""

BYTES_TYPE = "fedclip.bytes"
"""The `stype` of an `Array` whose data are a codec's payload."""


@dataclass(frozen=True)
class Errand:
    """What a message tells a real device beside the work.

    Attributes:
        run: the name of the run.
        round: the round.
        attempt: how many releases the round had before.
        nonce: names this message; the reply must too, and is taken once.
        first: the id of the node's first user.
        users: how many users the node has.
        taken: of the node's users, the round and the attempt of the last update that was taken.
        private: whether what comes of it is released with noise.
        diagnostics: whether the node is to say what it measured.
    """

    run: str
    round: int
    attempt: int
    nonce: str
    first: int
    users: int
    taken: Mapping[int, tuple[int, int]]
    private: bool
    diagnostics: bool

    def to_json(self) -> str:
        """Return the errand as text."""
        return json.dumps(asdict(self) | {"taken": [[user, *last] for user, last in self.taken.items()]})

    @classmethod
    def from_json(cls, text: str) -> "Errand":
        """Return the errand that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"taken": {user: (round, attempt) for user, round, attempt in values["taken"]}})


@dataclass(frozen=True, eq=False)
class TrainRequest:
    """Train the users of some blocks.

    `reply` is `"sums"` or `"updates"`; `task` is a recipe as JSON; `states` is where the users' states are in a simulation
    (`clients.states`), empty where the chain has none. `ahead`: the users who are likely to be the first here in the next round, to read
    meanwhile. `errand` is there for a real device.
    """

    spec: RoundSpec
    blocks: tuple[Block, ...]
    task: str
    device: str
    reply: str
    states: str
    errand: Errand | None = None
    ahead: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class EvaluateRequest:
    """Evaluate an encoded model on some held-out units; a real device, to which an errand is said, on all its own."""

    params: bytes
    units: tuple[int, ...]
    task: str
    device: str
    errand: Errand | None = None


def model_record(params: bytes, control: bytes = b"") -> ArrayRecord:
    """Return the record of an encoded model, and of a control variate where there is one, to be shared by the messages of a round."""
    vectors = {"model": params} | ({"control": control} if control else {})
    return ArrayRecord({name: _bytes_array(vector) for name, vector in vectors.items()})


def model_bytes(arrays: ArrayRecord) -> bytes:
    """Return the encoded model of a record."""
    return _payload(arrays, "model")


def train_request(
    plan: RoundSpec,
    blocks: Sequence[Block],
    task: str,
    device: str,
    reply: str,
    model: ArrayRecord,
    states: str = "",
    errand: Errand | None = None,
    ahead: Sequence[int] = (),
) -> RecordDict:
    """Return the content of a training request."""
    config = ConfigRecord({"spec": json.dumps(plan.shared()), "task": task, "device": device, "reply": reply, "states": states})
    config.update(_pack_blocks(blocks))
    config.update(_pack_errand(errand))
    if ahead:
        config["ahead"] = list(ahead)
    return RecordDict({"request": config, "model": model})


def read_train_request(content: RecordDict) -> TrainRequest:
    """Return the training request of a message's content."""
    config = content.config_records["request"]
    vectors = content.array_records["model"]
    control = _payload(vectors, "control") if "control" in vectors else b""
    spec = RoundSpec.from_shared(json.loads(_text(config, "spec")), model_bytes(vectors), control)
    task, device, reply, states = (_text(config, key) for key in ("task", "device", "reply", "states"))
    ahead = _integers(config, "ahead") if "ahead" in config else []
    return TrainRequest(spec, _unpack_blocks(config), task, device, reply, states, _unpack_errand(config), tuple(ahead))


def sums_reply(partial: Partial) -> RecordDict:
    """Return the content of a reply with the exact sum over users."""
    data = partial.total.astype("<i8", copy=False).tobytes()
    array = Array(dtype="int64", shape=partial.total.shape, stype=BYTES_TYPE, data=data)
    said = {
        "users": partial.users,
        "tallies": list(partial.tallies.items()),
        "errors": list(partial.errors),
        "clip_bits": list(partial.clip_bits),
    }
    return RecordDict({"sum": ArrayRecord({"sum": array}), "reply": ConfigRecord({"partial": json.dumps(said)})})


def read_sums_reply(content: RecordDict) -> Partial:
    """Return the partial sum of a reply; its numbers are the reply's own memory, which is not written to."""
    said = json.loads(_text(content.config_records["reply"], "partial"))
    total = np.frombuffer(_payload(content.array_records["sum"], "sum"), dtype="<i8").astype(np.int64, copy=False)
    tallies = {int(block): tally for block, tally in said["tallies"]}
    return Partial(total, said["users"], tallies, tuple(said["errors"]), tuple(said["clip_bits"]))


def updates_reply(contributions: Iterable[tuple[int, Contribution]]) -> RecordDict:
    """Return the content of a reply with each user's encoded update; each comes with the number of its block."""
    arrays, said = ArrayRecord(), []
    for block, contribution in contributions:
        own = {name: getattr(contribution, name) for name in SAID}
        said.append({"block": block, **own, "clip_bits": contribution.clip_bits.hex()})
        if contribution.payload is not None:
            arrays[str(contribution.user)] = _bytes_array(contribution.payload)
    return RecordDict({"updates": arrays, "reply": ConfigRecord({"contributions": json.dumps(said)})})


def read_updates_reply(content: RecordDict) -> list[tuple[int, Contribution]]:
    """Return the contributions of a reply, each with the number of its block."""
    arrays = content.array_records["updates"]
    contributions = []
    for said in json.loads(_text(content.config_records["reply"], "contributions")):
        key, bits = str(said["user"]), bytes.fromhex(said["clip_bits"])
        payload, own = _payload(arrays, key) if key in arrays else None, {name: said[name] for name in SAID}
        contributions.append((said["block"], Contribution(payload=payload, clip_bits=bits, **own)))
    return contributions


def device_reply(said: Mapping[str, Any], payloads: Mapping[int, bytes], sign: Callable[[bytes], bytes]) -> RecordDict:
    """Return the content of a real device's reply: what it says, signed, and the encoded updates of its users."""
    text = json.dumps(said)
    arrays = ArrayRecord({str(user): _bytes_array(payload) for user, payload in payloads.items()})
    return RecordDict({"updates": arrays, "reply": ConfigRecord({"said": text, "signature": sign(text.encode())})})


def read_device_reply(content: RecordDict) -> tuple[str, bytes, dict[str, bytes]]:
    """Return what a real device's reply says as text, its signature, and the payloads by the text of their user's id.

    Raises:
        KeyError, ValueError: it is no such reply.
    """
    config, arrays = content.config_records["reply"], content.array_records["updates"]
    signature = config["signature"]
    if not isinstance(signature, bytes):
        raise ValueError(f"Expected bytes as the signature, got {type(signature).__name__}.")
    return _text(config, "said"), signature, {key: _payload(arrays, key) for key in arrays}


def evaluate_request(units: Sequence[int], task: str, device: str, model: ArrayRecord, errand: Errand | None = None) -> RecordDict:
    """Return the content of an evaluation request."""
    config = ConfigRecord({"units": list(units), "task": task, "device": device, **_pack_errand(errand)})
    return RecordDict({"request": config, "model": model})


def read_evaluate_request(content: RecordDict) -> EvaluateRequest:
    """Return the evaluation request of a message's content."""
    config = content.config_records["request"]
    units = tuple(_integers(config, "units"))
    task, device = _text(config, "task"), _text(config, "device")
    return EvaluateRequest(model_bytes(content.array_records["model"]), units, task, device, _unpack_errand(config))


def evaluate_reply(counts: Sequence[tuple[int, Counts]]) -> RecordDict:
    """Return the content of a reply with what each unit counted."""
    return RecordDict({"reply": ConfigRecord({"counts": json.dumps([[unit, dict(c)] for unit, c in counts])})})


def read_evaluate_reply(content: RecordDict) -> list[tuple[int, Counts]]:
    """Return the units' counts of a reply."""
    return [(int(unit), c) for unit, c in json.loads(_text(content.config_records["reply"], "counts"))]


def _pack_blocks(blocks: Sequence[Block]) -> dict[str, list[int]]:
    return {
        "block_numbers": [number for number, _ in blocks],
        "block_sizes": [len(users) for _, users in blocks],
        "users": [user for _, users in blocks for user in users],
    }


def _unpack_blocks(config: ConfigRecord) -> tuple[Block, ...]:
    users = iter(_integers(config, "users"))
    sizes = zip(_integers(config, "block_numbers"), _integers(config, "block_sizes"), strict=True)
    return tuple((number, tuple(next(users) for _ in range(size))) for number, size in sizes)


def _pack_errand(errand: Errand | None) -> dict[str, str]:
    return {} if errand is None else {"errand": errand.to_json()}


def _unpack_errand(config: ConfigRecord) -> Errand | None:
    return Errand.from_json(_text(config, "errand")) if "errand" in config else None


def _bytes_array(payload: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(payload),), stype=BYTES_TYPE, data=payload)


def _payload(arrays: ArrayRecord, key: str) -> bytes:
    array = arrays[key]
    if array.stype != BYTES_TYPE:
        raise ValueError(f"Expected an Array of type {BYTES_TYPE} under '{key}', got '{array.stype}'; sent by another program?")
    return array.data


def _text(config: ConfigRecord, key: str) -> str:
    value: Any = config[key]
    if not isinstance(value, str):
        raise ValueError(f"Expected text under '{key}', got {type(value).__name__}; sent by another program?")
    return value


def _integers(config: ConfigRecord, key: str) -> list[int]:
    value: Any = config[key]
    if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
        raise ValueError(f"Expected integers under '{key}', got {value!r:.80}; sent by another program?")
    return value
