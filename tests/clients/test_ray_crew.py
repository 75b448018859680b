"""How many workers there are, and what becomes of those that are lost or cannot be started; with a Ray that is made up."""

from types import SimpleNamespace

import pytest
import ray

from clients import ray_crew
from clients.ray_crew import Crew
from clients.ray_worker import Resources, room_for_workers


class Cluster:
    """Actors that come up when they are asked where they are, or fail to."""

    def __init__(self, monkeypatch):
        self.room, self.broken, self.now, self.killed, self.begun = 2, False, 100.0, [], 0
        made_up = SimpleNamespace(kill=self.killed.append, get=self.get, exceptions=ray.exceptions)
        monkeypatch.setattr(ray_crew, "ray", made_up)
        monkeypatch.setattr(ray_crew, "room_for_workers", lambda resources: self.room)
        monkeypatch.setattr(ray_crew, "time", SimpleNamespace(monotonic=lambda: self.now))

    def start(self):
        self.begun += 1
        number = self.begun
        return SimpleNamespace(number=number, where=SimpleNamespace(remote=lambda: f"ref {number}"))

    def get(self, ref):
        if self.broken:
            raise ray.exceptions.RayActorError
        return "node", "host", int(ref.split()[1])


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def all_arrive(crew: Crew) -> list[int | None]:
    return [crew.arrived(ref) for ref in list(crew.starting)]


def test_a_lost_worker_has_another_in_its_place(cluster):
    crew = Crew(cluster.start, 2, Resources())
    assert crew.tend() == [0, 1]
    assert all_arrive(crew) == [0, 1]
    crew.lose(0)
    assert [actor.number for actor in cluster.killed] == [1]
    assert (list(crew.posts), crew.replaced, cluster.begun) == ([1], 1, 3)
    assert all_arrive(crew) == [0]
    assert crew.name(0) == "worker 0 (process 3 on host)"
    assert crew.tend() == []


def test_workers_follow_the_room_that_there_is(cluster):
    crew = Crew(cluster.start, None, Resources())
    crew.tend()
    all_arrive(crew)
    cluster.room, cluster.now = 4, cluster.now + 2
    assert crew.tend() == [2, 3]
    assert crew.tend() == [], "it looks now and then"
    all_arrive(crew)
    cluster.room = 1  # a machine is lost, and is known to be
    for worker in (1, 2, 3):
        crew.lose(worker)
    assert (list(crew.posts), crew.starting) == ([0], {})
    cluster.room = 2
    crew.lose(0)  # it is not known yet: two places are asked for, and one given up when it is
    assert len(crew.starting) == 2
    cluster.room, cluster.now = 1, cluster.now + 2
    crew.tend()
    assert len(crew.starting) == len(crew.actors) == 1


def test_a_worker_that_cannot_be_started_rests_and_ends_the_grid_only_where_no_other_is_up(cluster):
    crew = Crew(cluster.start, 2, Resources())
    crew.tend()
    first, second = list(crew.starting)
    assert crew.arrived(first) == 0
    cluster.broken = True
    for rest in (1.0, 2.0, 4.0, 8.0):
        assert crew.arrived(second) is None
        assert crew.restless
        cluster.now += rest - 0.1
        assert crew.tend() == []
        cluster.now += 0.2
        assert crew.tend() == [1]
        [second] = crew.starting
    crew.posts.clear()
    with pytest.raises(RuntimeError, match=r"could not be started 5 times in a row.*\n.*same Python packages at the same paths"):
        crew.arrived(second)


def test_room_is_counted_machine_by_machine(monkeypatch):
    machines = [
        {"Alive": True, "Resources": {"CPU": 7.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: machines)
    assert room_for_workers(Resources(2.0)) == 3 + 1
    assert room_for_workers(Resources(1.0, 0.25)) == 4
    assert room_for_workers(Resources(0.0, 0.25)) == 4
    assert room_for_workers(Resources(0.1)) == 70 + 30, "no worker is lost to rounding"
