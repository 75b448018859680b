"""What a reply may say without ending a run: whatever is in it is taken as one user's, or refused."""

import json
import math

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict

from clients.gate import Asked, Gate, Rejected
from clients.identity import Identity, assume
from clients.messages import device_reply
from experiments.rows import row_of

ASKED = Asked(5, "anna", "", "nonce", (3,))


@pytest.fixture(autouse=True)
def _identity():
    before = assume(Identity(7, 5, 9))
    yield
    assume(before)


def answered(content: RecordDict | None = None, error: Error | None = None) -> Message:
    request = Message(RecordDict(), 5, MessageType.TRAIN)
    request.metadata.__dict__["_message_id"] = "id"
    return Message(content, reply_to=request) if error is None else Message(error, reply_to=request)


def said(**of_user: object) -> Message:
    user = {"user": 3, "payload": None, "clip_bits": "", "weight": 1.0} | of_user
    named = {"run": "run", "round": 1, "attempt": 0, "nonce": "nonce", "spec": "spec"}
    return answered(device_reply(named | {"users": [user]}, {}, lambda text: b""))


def taken(reply: Message):
    return Gate("run", 1, 0, "spec", 100, signed=False).updates(reply, ASKED, heaviest=math.inf, measured=True)


@pytest.mark.parametrize("reason", ["", " ", "\n \n", "why\n\n"])
def test_an_error_without_a_word_is_a_failure_like_others(reason):
    with pytest.raises(Rejected, match=r"failed: (no reason given|why)"):
        taken(answered(error=Error(0, reason)))


def test_a_user_is_one_failed_user_at_most():
    (contribution,) = taken(said(tally={"failed_users": 1e9, "users": 1e9, "uplink_bytes": 1e9, "chain.update_norm": 2.0}))
    assert contribution.tally == {"failed_users": 1.0, "chain.update_norm": 2.0}


@pytest.mark.parametrize("value", [1e101, -1e101, 10**400])
def test_numbers_that_could_add_up_to_infinity_are_refused(value):
    with pytest.raises(Rejected, match="malformed"):
        taken(said(tally={"examples_left_out": value}))


def test_no_measurement_takes_the_place_of_a_rows_own():
    row = row_of({"users": 1.0, "chain.round": 99.0, "chain.users": 99.0, "chain.norm": 2.0}, 1, 0, 1.0)
    assert (row["round"], row["users"], row["norm"]) == (1, 1, 2.0)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, '{"run": "\ud800"}', json.dumps({"run": 1})])
def test_texts_that_are_none_are_refused(text):
    content = RecordDict({"updates": ArrayRecord(), "reply": ConfigRecord({"said": text, "signature": b""})})
    with pytest.raises(Rejected, match="malformed"):
        taken(answered(content))
