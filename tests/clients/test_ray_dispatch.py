"""What becomes of messages whose worker does not come up, or answers at the last moment; with a Ray that is made up."""

import time
from collections.abc import Iterator
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


class Cluster:
    """Workers, some of which cannot be started; the others answer every message at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken, self.stalled, self.started, self.sent = set[int](), False, count(), count()
        made_up = SimpleNamespace(kill=lambda actor: None, get=self.get, wait=self.wait, exceptions=ray.exceptions)
        monkeypatch.setattr(ray_crew, "ray", made_up)
        monkeypatch.setattr(ray_dispatch, "ray", made_up)

    def start(self) -> SimpleNamespace:
        number = next(self.started)

        def run(message: Message, *rest: object) -> tuple[str, Message]:
            return f"state {next(self.sent)}", Message(RecordDict(), reply_to=message)

        return SimpleNamespace(where=SimpleNamespace(remote=lambda: f"actor {number}"), run=SimpleNamespace(remote=run))

    def wait(self, refs: list[str], timeout: float, **rest: object) -> tuple[list[str], list[str]]:
        """Like Ray's; where it is stalled, a wait with patience finds no reply, as if it came only just after."""
        ready = [ref for ref in refs if timeout == 0 or not (self.stalled and ref.startswith("state"))]
        if not ready:
            time.sleep(min(timeout, 0.01))
        return ready[:1], []

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
    cluster.stalled = True
    dispatcher = Dispatcher(Crew(cluster.start, 1, Resources()), run_id=1, pinned=True, deadline=0.05, retries=0)
    try:
        dispatcher.submit([parcel(0)])
        assert dispatcher.first({"m0"}, 0.3) is None
        cluster.stalled = False
        landed = dispatcher.first({"m0"}, 5.0)
        assert landed is not None
        assert not landed.reply.has_error()
        assert dispatcher.take_faults() == (0, [])
    finally:
        dispatcher.close()
