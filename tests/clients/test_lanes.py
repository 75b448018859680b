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


def lanes_of(workers: int, *, pinned: bool) -> Lanes:
    lanes = Lanes(pinned=pinned)
    for worker in range(workers):
        lanes.expect(worker)
        lanes.free(worker)
    return lanes


def again(lanes: Lanes, node: int, message_id: str, *, holds: bool = True) -> None:
    message = stripped(Message(RecordDict(), dst_node_id=FIRST_NODE_ID + node, message_type="query"), message_id)
    lanes.again(Parcel(FIRST_NODE_ID + node, message, (), ()), holds=holds)


def test_free_workers_share_one_queue_in_order():
    lanes = filled(lanes_of(2, pinned=False), "5678")
    assert given(lanes) == [(0, 5, "0"), (1, 6, "1")]
    assert given(lanes) == []
    lanes.free(1)
    assert given(lanes) == [(1, 7, "2")]


def test_pinned_nodes_wait_for_their_own_worker():
    lanes = filled(lanes_of(2, pinned=True), "0011")
    assert given(lanes) == [(0, 0, "0"), (1, 1, "2")]
    lanes.release(FIRST_NODE_ID + 1)
    lanes.free(1)
    assert given(lanes) == [(1, 1, "3")]


def test_a_node_has_one_message_at_a_time_in_order():
    lanes = filled(lanes_of(3, pinned=False), "000001")
    assert given(lanes) == [(0, 0, "0"), (1, 1, "5")]
    lanes.free(0)
    assert given(lanes) == []
    lanes.release(FIRST_NODE_ID)
    assert [message for _, _, message in given(lanes)] == ["1"]


def test_dropped_messages_are_not_given():
    lanes = filled(lanes_of(1, pinned=False), "0001")
    assert given(lanes) == [(0, 0, "0")]
    lanes.drop({"0", "1"})
    lanes.free(0)
    assert given(lanes) == [(0, 1, "3")]
    lanes.free(0)
    lanes.release(FIRST_NODE_ID)
    assert given(lanes) == [(0, 0, "2")]


def test_a_lost_workers_messages_go_to_whoever_is_free_the_one_it_was_at_first():
    lanes = filled(lanes_of(2, pinned=True), "0001")
    assert given(lanes) == [(0, 0, "0"), (1, 1, "3")]
    lanes.leave(0)
    again(lanes, 0, "0")
    filled(lanes, "0")  # its node's messages wait for nobody
    lanes.free(1)
    assert given(lanes) == [(1, 0, "0")]
    lanes.release(FIRST_NODE_ID)
    lanes.free(1)
    assert given(lanes) == [(1, 0, "1")]


def test_what_is_done_again_goes_before_what_waits_for_a_worker_of_its_own():
    lanes = filled(lanes_of(2, pinned=True), "011")
    assert given(lanes) == [(0, 0, "0"), (1, 1, "1")]
    lanes.leave(0)
    again(lanes, 0, "0")
    lanes.release(FIRST_NODE_ID + 1)
    lanes.free(1)
    assert given(lanes) == [(1, 0, "0")]


def test_a_reply_that_was_lost_later_does_not_let_two_messages_of_its_node_run_at_once():
    lanes = filled(lanes_of(2, pinned=False), "00")
    assert given(lanes) == [(0, 0, "0")]
    lanes.release(FIRST_NODE_ID)
    assert given(lanes) == [(1, 0, "1")]
    again(lanes, 0, "0", holds=False)
    lanes.free(0)
    assert given(lanes) == []
    lanes.release(FIRST_NODE_ID)
    assert given(lanes) == [(0, 0, "0")]


def test_a_worker_that_was_lost_while_free_gets_nothing_until_it_is_back():
    lanes = lanes_of(2, pinned=True)
    lanes.leave(0)
    filled(lanes, "01")
    assert given(lanes) == [(1, 1, "1")]
    lanes.expect(0)
    lanes.free(0)
    assert given(lanes) == [(0, 0, "0")]
