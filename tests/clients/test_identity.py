"""That Flower still keeps a process's identity where `clients.identity` puts it, and fetches replies as it takes it to."""

import time
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

from clients.identity import SERVER_NODE_ID, Identity, Oversized, Stalled, assume, number, pull_at_most, stripped


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


class Client:
    """Hands objects out as a SuperLink does; what is empty was announced and has not come."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects, self.pulled = objects, 0

    def PullObject(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        self.pulled += 1
        content = self.objects[request.object_id]
        return SimpleNamespace(object_found=True, object_available=content != b"", object_content=content)


class Link:
    """A grid whose replies are fetched object by object and put together by Flower's own code."""

    def __init__(self, top: str, objects: dict[str, bytes]) -> None:
        self.top, self._runtime_client = top, Client(objects)

    def pull_messages(self, ids: list[str]) -> list[Any]:
        pull = make_pull_object_fn_protobuf(self._runtime_client.PullObject, Node(), 1)
        return [inflate_object_from_contents(self.top, pull_objects(list(self._runtime_client.objects), pull))]


def objects_of(top: InflatableObject) -> dict[str, bytes]:
    return {id: each.deflate() for id, each in get_all_nested_objects(top).items()}


def link_of(array: Array, times: int = 1) -> Any:
    """Return a link with an array which, by its own account, is so many times the part that is sent."""
    objects = objects_of(array)
    top = array.object_id
    objects[top] = objects[top].replace(b"[0]", b"[" + b",".join([b"0"] * times) + b"]")
    head, body = objects[top].split(b"\0", 1)
    objects[top] = head.rpartition(b" ")[0] + f" {len(body)}".encode() + b"\0" + body
    return Link(top, objects)


def test_a_reply_of_few_bytes_that_is_put_together_to_many_is_not_taken():
    array = Array(dtype="uint8", shape=(1000,), stype="bytes", data=bytes(1000))
    assert pull_at_most(link_of(array), "id", 2000)[0].data == array.data  # Flower's format is what it is taken for here
    assert len(pull_at_most(link_of(array, 50), "id", 10**6)[0].data) == 50_000
    with pytest.raises(Oversized):
        pull_at_most(link_of(array, 50), "id", 2000)


def test_many_arrays_of_one_part_count_each():
    arrays = ArrayRecord({str(n): Array(dtype="uint8", shape=(n,), stype="bytes", data=bytes(10_000)) for n in range(20)})
    grid = Link(arrays.object_id, objects_of(arrays))
    sent = sum(map(len, grid._runtime_client.objects.values()))
    assert sent < 20_000
    with pytest.raises(Oversized):
        pull_at_most(grid, "id", 100_000)
    assert len(pull_at_most(grid, "id", 300_000)[0]) == 20


def test_a_reply_that_was_announced_and_does_not_come_is_waited_for_no_longer():
    array = Array(dtype="uint8", shape=(1000,), stype="bytes", data=bytes(1000))
    grid = link_of(array)
    part = next(id for id in grid._runtime_client.objects if id != grid.top)
    grid._runtime_client.objects[part] = b""
    start = time.monotonic()
    with pytest.raises(Stalled):
        pull_at_most(grid, "id", 2000, start + 0.2)
    assert time.monotonic() - start < 10
    assert "PullObject" not in vars(grid._runtime_client)
