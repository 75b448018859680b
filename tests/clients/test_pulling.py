"""Replies are pulled whole, up to a limit, and without waiting: with Flower's own grid before a SuperLink that is none."""

import json

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid.http_grid import HttpGrid

from clients.identity import Identity, assume
from clients.pulling import Oversized, Pulls

LIMIT = 20_000


class Link:
    """A SuperLink with one reply, which it gives away once."""

    def __init__(self, message: Message) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        self.objects = {id: thing.deflate() for id, thing in get_all_nested_objects(message).items()}
        self.withheld: set[str] = set()
        self.tree, self.message = get_object_tree(message), message_to_proto(remove_content_from_message(message))
        self.given = self.asked = 0
        self.down = False
        self._client = httpx.Client()  # where Flower's client has its own

    def PullMessages(self, request):  # noqa: N802  Flower's names
        self.given += 1
        there = self.given == 1
        return PullAppMessagesResponse(messages_list=[self.message] if there else [], message_object_trees=[self.tree] if there else [])

    def PullObject(self, request):  # noqa: N802
        self.asked += 1
        if self.down:
            raise httpx.ConnectError("down")
        there = request.object_id not in self.withheld
        content = self.objects.get(request.object_id)
        return PullObjectResponse(object_found=content is not None, object_available=there, object_content=content or b"" if there else b"")

    def ConfirmMessageReceived(self, request):  # noqa: N802
        return ConfirmMessageReceivedResponse()


@pytest.fixture(autouse=True)
def _identity():
    before = assume(Identity(7, 8, 9))
    yield
    assume(before)


def reply(*arrays: Array) -> Message:
    records = {"updates": ArrayRecord({str(n): array for n, array in enumerate(arrays)}), "reply": ConfigRecord({"said": "x"})}
    return Message(RecordDict(records), dst_node_id=1, message_type="train")


def of(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="fedclip.bytes", data=data)


def before(link: Link) -> Pulls:
    grid = HttpGrid(token="token")
    grid._client = link
    grid.set_run(Run.create_empty(7))
    return Pulls(grid)


def replaced(link: Link, old: str, content: bytes) -> None:
    """Put another object in the place of one, and name it in whatever named the old one."""
    new = get_object_id(content)
    objects = {id: thing for id, thing in link.objects.items() if id != old}
    link.objects = objects | {new: content}
    for node in _nodes(link.tree):
        if node.object_id == old:
            node.object_id = new
    for id, thing in objects.items():
        if old.encode() in thing:
            replaced(link, id, thing.replace(old.encode(), new.encode()))
            return
    link.message.metadata.message_id = new


def _nodes(tree):
    return [tree, *(node for child in tree.children for node in _nodes(child))]


def body(kind: str, children: list[str], text: bytes) -> bytes:
    return f"{kind} {','.join(children)} {len(text)}".encode() + b"\x00" + text


def test_a_reply_comes_as_it_was_sent_and_the_client_is_left_as_it_was():
    link = Link(reply(of(b"abc" * 1000), of(b"")))
    (message,) = before(link).pull("id", LIMIT)
    assert message.content.array_records["updates"]["0"].data == b"abc" * 1000
    assert message.content.config_records["reply"]["said"] == "x"
    assert not {"PullMessages", "PullObject"} & {*vars(link)}


def test_what_is_not_there_whole_is_not_waited_for_and_comes_later():
    link = Link(reply(of(b"abc" * 1000)))
    last = next(id for id, thing in link.objects.items() if thing.startswith(b"ArrayChunk"))
    link.withheld = {last}
    pulls = before(link)
    assert pulls.pull("id", LIMIT) == []
    asked = link.asked
    assert pulls.pull("id", LIMIT) == []
    assert link.asked == asked + 1  # for the one that is missing
    link.withheld = set()
    assert [m.content.array_records["updates"]["0"].data for m in pulls.pull("id", LIMIT)] == [b"abc" * 1000]
    assert link.given == 1


def test_a_sender_that_never_sends_the_rest_is_known_once_the_superlink_gives_up():
    link = Link(reply(of(b"abc")))
    last = next(id for id, thing in link.objects.items() if thing.startswith(b"ArrayChunk"))
    link.withheld, pulls = {last}, before(link)
    assert pulls.pull("id", LIMIT) == []
    del link.objects[last]
    (message,) = pulls.pull("id", LIMIT)
    assert message.has_error()


def test_a_superlink_that_is_gone_on_the_way_is_asked_again():
    link, pulls = (made := Link(reply(of(b"abc")))), before(made)
    link.down = True
    with pytest.raises(httpx.HTTPError):
        pulls.pull("id", LIMIT)
    link.down = False
    assert len(pulls.pull("id", LIMIT)) == 1


def test_an_object_that_is_too_long_is_not_read_at_all():
    read = []

    def body():
        read.append(0)
        yield b"x"

    def answer(request):
        return httpx.Response(200, headers={"content-length": "1000000000"}, content=body())

    link = Link(reply(of(b"abc")))
    link._client = httpx.Client(transport=httpx.MockTransport(answer))
    link.PullObject = lambda request: link._client.post("https://link/v1/runtime/pull-object")
    pulls = before(link)
    with pytest.raises(Oversized):
        pulls.pull("id", LIMIT)
    assert not read
    with pytest.raises(Oversized):
        link._client.post("https://link/v1/runtime/pull-object")  # by a thread that goes on
    assert link._client.post("https://link/v1/runtime/get-nodes").content == b"x"


def test_no_more_than_the_limit_is_fetched():
    link = Link(reply(*(of(bytes([n]) * 4000) for n in range(200))))
    with pytest.raises(Oversized):
        before(link).pull("id", 250_000)
    assert link.asked < len(link.objects) / 2


def test_a_list_of_objects_without_end_is_too_long_itself():
    with pytest.raises(Oversized):
        before(Link(reply(*(of(str(n).encode()) for n in range(300))))).pull("id", LIMIT)


@pytest.mark.parametrize("first", ["ArrayChunk", "Array "])
def test_an_array_that_names_a_piece_time_and_again_counts_as_long_as_it_would_become(first):
    link = Link(reply(of(b"a" * 1000)))
    id, content = next((id, thing) for id, thing in link.objects.items() if thing.startswith(b"Array "))
    piece = content.split()[1].decode()
    said = {"dtype": "uint8", "shape": [1], "stype": "fedclip.bytes", "arraychunk_ids": [0] * 18}
    replaced(link, id, body("Array", [piece], json.dumps(said).encode()))
    order = sorted(_nodes(link.tree), key=lambda node: not link.objects[node.object_id].startswith(first.encode()))
    assert len(before(link).pull("id", LIMIT)[0].content.array_records["updates"]["0"].data) == 18_000
    link.given = 0
    del link.tree.children[:]
    link.tree.children.extend([type(link.tree)(object_id=node.object_id) for node in order if node is not link.tree])
    with pytest.raises(Oversized):
        before(link).pull("id", 18_000)


def test_arrays_of_arrays_are_refused():
    link = Link(reply(of(b"a" * 1000)))
    id = next(id for id, thing in link.objects.items() if thing.startswith(b"Array "))
    said = {"dtype": "uint8", "shape": [1], "stype": "fedclip.bytes", "arraychunk_ids": [0] * 9}
    outer = body("Array", [id], json.dumps(said).encode())
    link.tree = type(link.tree)(
        object_id=get_object_id(outer), children=[type(link.tree)(object_id=n.object_id) for n in _nodes(link.tree)]
    )
    link.objects[get_object_id(outer)] = outer
    with pytest.raises(ValueError, match="array of Array"):
        before(link).pull("id", LIMIT)
