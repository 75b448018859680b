"""What becomes of messages whose worker does not come up, or answers at the last moment; with a Ray that is made up."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import count
from types import SimpleNamespace

import pytest
import ray
from flwr.app import Message, RecordDict

from clients import ray_crew, ray_dispatch
from clients.identity import Identity, assume, stripped
from clients.lanes import FIRST_NODE_ID, Parcel
from clients.ray_crew import Crew
from clients.ray_dispatch import Dispatcher
from clients.ray_worker import Resources


class Ref(str):
    """What a worker is asked for is there at once, and Ray says so."""

    __slots__ = ()
    silent = False

    def future(self) -> "Future[RecordDict]":
        told = Future[RecordDict]()
        if not self.silent:
            told.set_result(RecordDict())
        return told


class Untold(Ref):
    """Ray does not say when it is there."""

    __slots__ = ()
    silent = True


class Cluster:
    """Workers, some of which cannot be started; the others answer every message at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken, self.silent, self.late, self.started, self.sent = set[int](), False, 0, count(), count()
        made_up = SimpleNamespace(kill=lambda actor: None, get=self.get, wait=self.wait, exceptions=ray.exceptions)
        monkeypatch.setattr(ray_crew, "ray", made_up)
        monkeypatch.setattr(ray_dispatch, "ray", made_up)

    def start(self) -> SimpleNamespace:
        number = next(self.started)

        def run(message: Message, *rest: object) -> tuple[Ref, Message]:
            return (Untold if self.silent else Ref)(f"state {next(self.sent)}"), Message(RecordDict(), reply_to=message)

        return SimpleNamespace(where=SimpleNamespace(remote=lambda: Ref(f"actor {number}")), run=SimpleNamespace(remote=run))

    def wait(self, refs: list[Ref], num_returns: int = 1, *, timeout: float, fetch_local: bool) -> tuple[list[Ref], list[Ref]]:
        """Like Ray's; replies come only after whoever looked for them so many times."""
        assert timeout == 0, "nobody waits here: who is told of what is done would not hear of it"
        assert not fetch_local
        if self.late and any(ref.startswith("state") for ref in refs):
            self.late -= 1
            return [ref for ref in refs if not ref.startswith("state")][:num_returns], []
        return refs[:num_returns], []

    def get(self, ref: str) -> object:
        kind, number = ref.split()
        if kind == "actor" and int(number) in self.broken:
            raise ray.exceptions.RayActorError
        return ("node", "host", int(number)) if kind == "actor" else RecordDict()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    before = assume(Identity(1, 1))
    yield Cluster(monkeypatch)
    assume(before)


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def parcel(partition: int) -> Parcel:
    node = FIRST_NODE_ID + partition
    return Parcel(node, stripped(Message(RecordDict(), dst_node_id=node, message_type="query"), f"m{partition}"), (), ())


def test_what_waits_for_a_worker_that_cannot_be_started_is_done_by_others(cluster: Cluster) -> None:
    cluster.broken = set(range(1, 100))
    dispatcher = Dispatcher(Crew(cluster.start, 2, Resources()), run_id=1, pinned=True, deadline=None, retries=0)
    try:
        dispatcher.submit([parcel(0), parcel(1)])
        landed = [dispatcher.first({"m0", "m1"}, 5.0) for _ in range(2)]
        assert {found.parcel.id for found in landed if found is not None} == {"m0", "m1"}
        assert list(dispatcher.crew.posts) == [0]
    finally:
        dispatcher.close()


def test_a_reply_that_is_there_at_the_deadline_counts(cluster: Cluster) -> None:
    cluster.silent, cluster.late = True, 1
    dispatcher = Dispatcher(Crew(cluster.start, 1, Resources()), run_id=1, pinned=True, deadline=0.05, retries=0)
    try:
        dispatcher.submit([parcel(0)])
        landed = dispatcher.first({"m0"}, 5.0)
        assert landed is not None
        assert not landed.reply.has_error()
        assert (dispatcher.take_faults(), cluster.late) == ((0, []), 0)
    finally:
        dispatcher.close()


def test_a_reply_that_ray_did_not_tell_of_is_found(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_dispatch, "LOOK_SECONDS", 0.05)
    cluster.silent, cluster.late = True, 2
    dispatcher = Dispatcher(Crew(cluster.start, 1, Resources()), run_id=1, pinned=True, deadline=None, retries=0)
    try:
        dispatcher.submit([parcel(0)])
        assert dispatcher.first({"m0"}, 5.0) is not None
        assert cluster.late == 0
    finally:
        dispatcher.close()


def test_what_ray_did_not_tell_of_is_found_while_others_are_heard_of(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_dispatch, "LOOK_SECONDS", 0.2)
    dispatcher = Dispatcher(Crew(cluster.start, 2, Resources()), run_id=1, pinned=True, deadline=None, retries=0)
    try:
        cluster.silent = True
        dispatcher.submit([parcel(0)])
        assert wait_for(lambda: len(dispatcher._flights) == 1)
        cluster.silent, cluster.late = False, 1
        begun = time.monotonic()
        while dispatcher.first({"m0"}, 0.0) is None:
            assert time.monotonic() - begun < 5
            dispatcher.submit([parcel(1)])
            assert dispatcher.first({"m1"}, 5.0) is not None
    finally:
        dispatcher.close()
