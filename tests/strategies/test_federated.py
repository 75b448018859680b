"""The strategy on a plain Flower grid: what nodes send is added as it comes, in any order, and let go."""

import dataclasses
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from clients import messages
from clients.identity import Identity, assume, number
from experiments.prepare import prepare, read_experiment
from fedclip.client import train_blocks
from fedclip.clipping import ClipPerLayer
from fedclip.method import Method
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.round import cost_of, deal
from fedclip.simulation import InProcess
from fedclip.site import WORTH_A_THREAD, Site
from fedclip.spec import Block
from fedclip.tally import Tally
from fedclip.transform import chain
from strategies.federated import Federated

NODES = range(2, 14)


class OneByOne(Grid):
    """Answers the newest message first, one a pull, and says how many of its earlier replies are still held then."""

    def __init__(self, site: Any) -> None:
        self._site, self._out = site, dict[str, Message]()
        self._replies: list[Any] = []
        self.held: list[int] = []
        self.pinned = True

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, content: Any, message_type: str, dst_node_id: int, group_id: str, ttl: Any = None) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return NODES

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for n, message in enumerate(messages):
            number(message, f"m{n}")
            self._out[f"m{n}"] = message
        return list(self._out)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        assert set(message_ids) == set(self._out)
        self.held.append(sum(reply() is not None for reply in self._replies))
        _, message = self._out.popitem()
        request = messages.read_train_request(message.content)
        reply = Message(messages.sums_reply(train_blocks(self._site, request.spec, request.blocks)), reply_to=message)
        self._replies.append(weakref.ref(reply))
        yield reply
        del reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: Any = None) -> Iterable[Message]:
        raise AssertionError("it would return a list of all")


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    before = assume(Identity(1, 1))
    yield
    assume(before)


def test_memory_does_not_grow_with_the_number_of_nodes_nor_do_bits_depend_on_their_order(tmp_path: Path) -> None:
    from tests.experiments.conftest import VISION

    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    prepared = prepare(read_experiment(path, ["sampler.cohort=20"]))
    here = InProcess(prepared.method, prepared.task, "s", "r")
    grid, there = OneByOne(here.site), Federated(prepared.method, prepared.task, prepared.recipe, "s", "r")
    told: list[tuple[int, int, float]] = []
    there.watch = lambda node, users, seconds: told.append((node, users, seconds))
    for _ in range(2):
        users = here.round().tally["users"]
        outcome = there.round(grid)
        assert torch.equal(here.state.params, there.state.params)
        assert outcome.tally["users"] == users
    assert len(grid.held) == 2 * len(NODES)
    assert max(grid.held) <= 1, "the last reply may go with the next"
    assert {node for node, _, _ in told} == set(NODES)
    assert min(seconds for _, _, seconds in told) > 0


def test_speeds_are_of_users_that_did_not_fail_and_count_where_nodes_have_workers_of_their_own(tmp_path: Path) -> None:
    from tests.experiments.conftest import VISION

    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    prepared = prepare(read_experiment(path, ["sampler.cohort=20"]))
    grid, strategy = OneByOne(None), Federated(prepared.method, prepared.task, prepared.recipe, "s", "r")

    def dealt() -> dict[int, list[Block]]:
        list(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid))
        return strategy._dealt

    alike = dealt()
    cost = {node: sum(cost_of(alike[node], prepared.task).values()) for node in NODES}
    tallies: list[Tally] = [{"users": 1.0, "train_seconds": 1.5, "load_seconds": 0.5}, {"failed_users": 3.0}]
    strategy._learn(2, tallies)
    assert strategy._pace.of([2]) == [cost[2] / 4 / 2]
    strategy._learn(3, [{"failed_users": 4.0}])
    assert strategy._pace.of([3]) is None
    for node in NODES[1:]:
        strategy._learn(node, [{"users": 1.0, "train_seconds": 1e6}])
    assert list(dealt()) == [2], "the one that is so much faster has all"
    grid.pinned = False
    assert dealt() == alike


class OnMachines(OneByOne):
    """Its nodes are on as many machines as it is told."""

    count = 3

    def machines(self, nodes: Sequence[int]) -> list[str]:
        return [f"machine {node % self.count}" for node in nodes]


def test_users_with_states_are_dealt_by_machine_where_their_folder_is_lent_to_several(tmp_path: Path) -> None:
    from tests.experiments.conftest import VISION
    from tests.experiments.test_engines import STATEFUL

    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    prepared = prepare(read_experiment(path, [STATEFUL, "sampler.cohort=40", "privacy.noise_multiplier=0.5"]))
    grid = OnMachines(None)

    def dealt(states: Path | str, method: Method = prepared.method) -> tuple[dict[int, list[Block]], list[list[Block]], list[list[Block]]]:
        strategy = Federated(method, prepared.task, prepared.recipe, "s", "r", states=states)
        list(strategy.configure_train(1, strategy.arrays(), ConfigRecord(), grid))
        plan, machines = strategy._plan, grid.machines(NODES)
        assert plan is not None
        there, anywhere = (sorted(filter(None, deal(plan.blocks, len(NODES), prepared.task, None, m))) for m in (machines, None))
        return strategy._dealt, there, anywhere

    def shares(dealt: dict[int, list[Block]]) -> list[list[Block]]:
        return sorted([*share[1:], share[0]] for share in dealt.values())

    got, there, anywhere = dealt("ray:keeper:node:/folder")
    assert shares(got) == there != anywhere
    got, there, anywhere = dealt(tmp_path)
    assert shares(got) == anywhere
    grid.pinned = False
    assert shares(dealt("ray:keeper:node:/folder")[0]) == anywhere, "any worker may get any message"
    grid.pinned, grid.count = True, 1
    assert shares(dealt("ray:keeper:node:/folder")[0]) == anywhere
    stateless = dataclasses.replace(prepared.method, client=chain(ClipPerLayer(0.5)))
    grid.count = 3
    got, there, anywhere = dealt("ray:keeper:node:/folder", stateless)
    assert shares(got) == anywhere != there


class Nodes(OneByOne):
    """Each node trains at a site of its own, and reads ahead what it is told to."""

    def __init__(self, sites: dict[int, Site]) -> None:
        super().__init__(None)
        self.sites = sites

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        _, message = self._out.popitem()
        request, site = messages.read_train_request(message.content), self.sites[message.metadata.dst_node_id]
        reply = Message(messages.sums_reply(train_blocks(site, request.spec, request.blocks)), reply_to=message)
        if request.ahead:
            site.read_ahead(request.ahead, request.spec.streams)
        yield reply


def test_where_reading_takes_time_nodes_read_their_first_users_of_the_next_round_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.experiments.conftest import VISION

    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    prepared = prepare(read_experiment(path, ["sampler.cohort=20"]))
    here, task, read = InProcess(prepared.method, prepared.task, "s", "r"), prepared.task, list[bool]()
    load = task.load_user

    def slowly(user: int, rng: Any) -> Any:
        time.sleep(2 * WORTH_A_THREAD)
        read.append(threading.current_thread() is threading.main_thread())
        return load(user, rng)

    monkeypatch.setattr(task, "load_user", slowly)
    grid = Nodes({node: Site(task, Replica.of(task)) for node in (2, 3)})
    there, waited = Federated(prepared.method, task, prepared.recipe, "s", "r"), list[int]()
    for round in range(4):
        if round == 3:  # what was read is then for nobody
            there._secret = here._secret = "t"
        here.round()
        read.clear()
        there.round(grid)
        assert torch.equal(here.state.params, there.state.params)
        waited.append(sum(read))
    assert waited == [2, 2, 0, 2], "at first nobody knows that reading takes time; then the next round's are read during this one"


def test_data_read_ahead_are_taken_by_those_users_of_that_round_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.experiments.conftest import VISION

    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    task, now = prepare(read_experiment(path, [])).task, Streams("s", "r", 4, 1)
    site = Site(task, Replica.of(task))
    loads, read, going = task.load_user, list[int](), threading.Semaphore(0)

    def slowly(user: int, rng: Any) -> Any:
        read.append(user)
        assert going.acquire(timeout=60)
        if user == 6:
            raise OSError("no such recording")
        return loads(user, rng)

    def ahead(users: Sequence[int], streams: Streams, done: int) -> list[int]:
        """Return whose data are there of 3, 5 and 7, of whom `done` were read and the next one is being read."""
        read.clear()
        site.read_ahead((3, 5, 7), now)
        for _ in range(done):
            going.release()
        while len(read) <= done:
            time.sleep(1e-3)
        threading.Timer(0.1, going.release).start()
        there = site.were_read(users, streams)
        assert site.were_read(users, streams) == {}, "once"
        site.settle()
        assert read == [3, 5, 7][: done + 1], "nobody else's data are read any more"
        return list(there)

    monkeypatch.setattr(task, "load_user", slowly)
    following = Streams("s", "r", 5)
    assert ahead((3, 5, 7, 8), following, 1) == [3, 5]
    assert ahead((3, 8), following, 0) == [3]
    assert ahead((3, 8), following, 1) == [], "5 is for nobody here: it is waited for"
    assert ahead((5, 3, 7), following, 1) == [], "in this order alone are they read one after another"
    for other in (Streams("s", "r", 5, 1), Streams("s", "r", 6), Streams("t", "r", 5)):
        assert ahead((3, 5, 7), other, 1) == []
    abandoned = site.read(8, now)
    while read[-1:] != [8]:
        time.sleep(1e-3)
    threading.Timer(0.1, going.release).start()
    assert site.were_read((3,), following) == {}
    assert abandoned.done(), "a round that was left while it read: nobody reads beside it"
    site.read_ahead((6,), now)
    going.release()
    while read[-1:] != [6]:
        time.sleep(1e-3)
    with pytest.raises(OSError, match="no such recording"):
        site.were_read((6,), following)[6].result()


def test_shares_that_were_foreseen_are_dealt_anew_where_a_worker_has_moved(tmp_path: Path) -> None:
    from tests.experiments.conftest import VISION
    from tests.experiments.test_engines import STATEFUL

    path = tmp_path / "vision.toml"
    path.write_text(VISION, encoding="utf-8")
    prepared = prepare(read_experiment(path, [STATEFUL, "sampler.cohort=40"]))
    grid, strategy = (
        OnMachines(None),
        Federated(prepared.method, prepared.task, prepared.recipe, "s", "r", states="ray:keeper:node:/folder"),
    )
    strategy._reads = True
    list(strategy._requests(grid))
    strategy.state = dataclasses.replace(strategy.state, round=1)
    foreseen = strategy._foreseen
    list(strategy._requests(grid))
    assert foreseen is not None
    assert strategy._dealt is foreseen.shares
    strategy.state, foreseen, grid.count = dataclasses.replace(strategy.state, round=2), strategy._foreseen, 2
    list(strategy._requests(grid))
    assert foreseen is not None
    assert strategy._dealt != foreseen.shares
