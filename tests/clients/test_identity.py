"""That Flower still keeps a process's identity where `clients.identity` puts it."""

from importlib.metadata import version

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from clients.identity import SERVER_NODE_ID, Identity, assume, number, stripped


@pytest.fixture(autouse=True)
def restored():
    before = assume(Identity(7, 8, 9))
    yield
    assume(before)


def make() -> Message:
    return Message(RecordDict({"config": ConfigRecord({"a": 1})}), dst_node_id=5, message_type="train", group_id="3")


def test_messages_carry_the_assumed_identity():
    meta = make().metadata
    found = meta.run_id, meta.src_node_id, meta.src_task_id
    assert found == (7, 8, 9), (
        f"flwr {version('flwr')}: Message() has run, node and task {found} where clients.identity.assume put (7, 8, 9) in "
        "flwr.supercore.task_identity.TaskIdentity. Flower reads another place now: see Message.__init__, then change clients/identity.py."
    )


def test_without_identity_flower_refuses_a_message():
    assume(Identity(None, None, None))
    # If it doesn't any more, clients.identity may no longer be needed.
    with pytest.raises(RuntimeError, match="not set"):
        make()


def test_assume_returns_the_identity_before():
    assert assume(Identity(1, 2, 3)) == Identity(7, 8, 9)
    assert assume(Identity(None, None, None)) == Identity(1, 2, 3)


def test_server_node_id_is_flowers():
    assert SERVER_NODE_ID == SUPERLINK_NODE_ID, "flwr.common.constant.SUPERLINK_NODE_ID changed: change clients.identity.SERVER_NODE_ID."


def test_a_number_is_what_replies_refer_to():
    message = make()
    number(message, "abc")
    reply = Message(RecordDict(), reply_to=message)
    assert (message.metadata.message_id, reply.metadata.reply_to_message_id) == ("abc", "abc")


def test_stripped_copies_share_nothing_with_the_message():
    message = make()
    first, second = stripped(message, "one"), stripped(message, "two")
    assert (first.metadata.message_id, second.metadata.message_id, message.metadata.message_id) == ("one", "two", "two")
    assert not first.content
    assert message.content["config"] == ConfigRecord({"a": 1})
    assert (first.metadata.group_id, first.metadata.dst_node_id) == ("3", 5)
