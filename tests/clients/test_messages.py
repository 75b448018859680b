"""Messages: what is said on one side is what is read on the other, bit for bit, and foreign ones are refused."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from clients import messages
from fedclip.collector import Contribution, Partial
from fedclip.fold import Grid
from fedclip.rng import Streams
from fedclip.spec import RoundSpec

SPEC = RoundSpec(
    Streams("secret", "run", 3, 1),
    {"local_sgd": {"lr": 0.1, "steps": 2}},
    ({"clip_per_layer": {"max_norm": 0.1}}, {"clip_by_global_norm": {"max_norm": 1e-7}}),
    {"dense": {}},
    "examples",
    7,
    True,
    3,
    Grid(45, 0.1, 2**20),
    bytes(range(256)),
)
BLOCKS = [(0, (5, 7)), (3, ()), (2, (99_999_999, 2**40))]


def carried(content):
    """The content as it comes off the wire."""
    return recorddict_from_proto(recorddict_to_proto(content))


@pytest.mark.parametrize("blocks", [BLOCKS, [(0, (1,))]])
def test_a_training_request(blocks):
    content = messages.train_request(SPEC, blocks, '{"task": 1}', "cpu", "sums", messages.model_record(SPEC.params))
    request = messages.read_train_request(carried(content))
    assert dataclasses.asdict(request.spec) == dataclasses.asdict(SPEC)
    assert request.spec.digest == SPEC.digest
    assert request.blocks == tuple(blocks)
    assert (request.task, request.device, request.reply) == ('{"task": 1}', "cpu", "sums")


def test_a_request_of_a_hundred_thousand_users_is_four_bytes_for_each():
    users = np.sort(np.random.default_rng(1).choice(10**8, 100_000, replace=False)).tolist()
    blocks = [(n, tuple(users[n::64])) for n in range(64)]
    content = messages.train_request(SPEC, blocks, "", "cpu", "sums", messages.model_record(SPEC.params))
    assert len(recorddict_to_proto(content).SerializeToString()) < 4 * len(users) + 5000
    tracemalloc.start()
    request = messages.read_train_request(carried(content))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert request.blocks == tuple(blocks)
    assert peak < 150 * len(users)


def test_a_reply_of_sums():
    total = np.array([0, 1, -1, 2**62, -(2**62) + 1])
    partial = Partial(total, 3, {4: {"users": 3.0, "h": [0.1, 1 / 3]}, 0: {"failed_users": 1.0}}, ("user 9: é",), (3, -1))
    read = messages.read_sums_reply(carried(messages.sums_reply(partial)))
    assert np.array_equal(read.total, total)
    assert (read.users, read.tallies, read.errors, read.clip_bits) == (3, partial.tallies, partial.errors, (3, -1))


def test_a_reply_of_updates():
    said = [
        (2, Contribution(7, b"\x00\xff" * 9, 0.1 + 0.2, {"users": 1.0, "h": [1 / 3]}, clip_bits=b"\x80\xff")),
        (2, Contribution(8, None, 0.0, {"failed_users": 1.0}, "user 8: OSError: gone")),
        (5, Contribution(123_456_789, b"", 1.0, {})),
    ]
    read = messages.read_updates_reply(carried(messages.updates_reply(said)))
    assert [(b, dataclasses.asdict(c)) for b, c in read] == [(b, dataclasses.asdict(c)) for b, c in said]


def test_an_evaluation_and_its_reply():
    content = messages.evaluate_request([3, 1], "task", "cpu", messages.model_record(b"model"))
    assert dataclasses.asdict(messages.read_evaluate_request(carried(content))) == {
        "params": b"model",
        "units": (3, 1),
        "task": "task",
        "device": "cpu",
        "errand": None,
    }
    counts = [(3, {"loss": 1 / 3, "hits": 2.0}), (1, {"loss": math.inf})]
    assert messages.read_evaluate_reply(carried(messages.evaluate_reply(counts))) == counts


def test_foreign_records_are_refused():
    array = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=b"x")
    with pytest.raises(ValueError, match=r"numpy\.ndarray"):
        messages.model_bytes(ArrayRecord({"model": array}))
    good = messages.train_request(SPEC, BLOCKS, "t", "cpu", "sums", messages.model_record(b""))
    for key, bad in (("users", "5"), ("spec", 3), ("task", 1.0)):
        config = ConfigRecord(dict(good.config_records["request"]) | {key: bad})
        with pytest.raises(ValueError, match=f"'{key}'"):
            messages.read_train_request(RecordDict({"request": config, "model": good.array_records["model"]}))
