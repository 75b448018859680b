"""The order in which workers get messages, without Ray."""

import pytest
from flwr.app import Message, RecordDict

from clients.identity import Identity, assume, stripped
from clients.lanes import FIRST_NODE_ID, Lanes, Parcel


@pytest.fixture(autouse=True)
def identity():
    before = assume(Identity(1, 1))
    yield
    assume(before)


def filled(lanes: Lanes, partitions: str) -> Lanes:
    for place, partition in enumerate(partitions):
        node = FIRST_NODE_ID + int(partition)
        message = stripped(Message(RecordDict(), dst_node_id=node, message_type="query"), str(place))
        lanes.push(Parcel(node, message, (), ()))
    return lanes


def given(lanes: Lanes) -> list[tuple[int, int, str]]:
    return [(worker, parcel.node - FIRST_NODE_ID, parcel.message.metadata.message_id) for worker, parcel in lanes.pairs()]


def test_free_workers_share_one_queue_in_order():
    lanes = filled(Lanes(2, pinned=False), "5678")
    assert given(lanes) == [(0, 5, "0"), (1, 6, "1")]
    assert given(lanes) == []
    lanes.free(1)
    assert given(lanes) == [(1, 7, "2")]


def test_pinned_nodes_wait_for_their_own_worker():
    lanes = filled(Lanes(2, pinned=True), "0011")
    assert given(lanes) == [(0, 0, "0"), (1, 1, "2")]
    lanes.release(FIRST_NODE_ID + 1)
    lanes.free(1)
    assert given(lanes) == [(1, 1, "3")]


def test_a_node_has_one_message_at_a_time_in_order():
    lanes = filled(Lanes(3, pinned=False), "000001")
    assert given(lanes) == [(0, 0, "0"), (1, 1, "5")]
    lanes.free(0)
    assert given(lanes) == []
    lanes.release(FIRST_NODE_ID)
    assert [message for _, _, message in given(lanes)] == ["1"]


def test_dropped_messages_are_not_given():
    lanes = filled(Lanes(1, pinned=False), "0001")
    assert given(lanes) == [(0, 0, "0")]
    lanes.drop({"0", "1"})
    lanes.free(0)
    assert given(lanes) == [(0, 1, "3")]
    lanes.free(0)
    lanes.release(FIRST_NODE_ID)
    assert given(lanes) == [(0, 0, "2")]
