"""`RayGrid` as a Flower user meets it: stock strategies, state, failures, timeouts, workers that die."""

import os
import platform
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from clients import ray_worker
from clients.ray_grid import FIRST_NODE_ID, RayGrid, Resources
from tests.clients import apps

APP = f"{apps.__name__}:app"


@pytest.fixture(scope="module")
def grid(ray_session):
    with RayGrid(APP, nodes=4, workers=2, run_config={"lr": 0.5, "forgetful": 3}) as grid:
        yield grid


@pytest.fixture(scope="module")
def resident(ray_session):
    """A grid with as many nodes as workers."""
    with RayGrid(apps.app, nodes=2, workers=2, run_config={"lr": 0.25}) as grid:
        yield grid


def ask(grid: Grid, action: str, partitions: list[int] | None = None, **config: float | int | str) -> list[Message]:
    """One message to each partition, all of the same content."""
    content = RecordDict({"config": ConfigRecord(dict(config))})
    nodes = list(grid.get_node_ids())
    chosen = range(len(nodes)) if partitions is None else partitions
    return [Message(content, dst_node_id=nodes[partition], message_type=f"query.{action}") for partition in chosen]


def answers(replies, key: str) -> dict[int, object]:
    """What each partition replied."""
    return {reply.metadata.src_node_id - FIRST_NODE_ID: reply.content["metrics"][key] for reply in replies}


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_flowers_own_fedavg_runs_in_an_unmodified_server_app(grid):
    app, results = ServerApp(), []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_train=1.0, min_train_nodes=4, min_available_nodes=4)
        results.append(strategy.start(grid, ArrayRecord({"w": Array(apps.np.full(3, 7.5))}), num_rounds=3))

    app(grid, grid.context())
    # Partitions 0..3 pull halfway to themselves, so each round halves the distance to their mean 1.5: 7.5 -> 4.5 -> 3 -> 2.25.
    assert results[0].arrays["w"].numpy() == pytest.approx([2.25] * 3)
    assert results[0].train_metrics_clientapp[1]["loss"] == pytest.approx(1.5)
    assert results[0].evaluate_metrics_clientapp[3]["loss"] == pytest.approx(2.25)


def test_workers_have_one_thread_ignore_ctrl_c_and_know_who_they_are(grid):
    replies = grid.send_and_receive(ask(grid, "look"))
    assert set(answers(replies, "threads").values()) == {1}
    assert set(answers(replies, "quiet").values()) == {1}
    assert set(answers(replies, "lr").values()) == {0.5}
    assert set(answers(replies, "partitions").values()) == {4}
    assert answers(replies, "made_by") == {partition: [1, FIRST_NODE_ID + partition] for partition in range(4)}


def test_state_persists_only_for_nodes_that_keep_some(grid):
    for times in (1, 2, 3):
        assert answers(grid.send_and_receive(ask(grid, "count")), "times") == {0: times, 1: times, 2: times, 3: 1}
    assert sorted(grid._dispatcher.states) == [FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2]


def test_messages_to_one_node_run_one_after_another(grid):
    first = answers(grid.send_and_receive(ask(grid, "count", [0])), "times")[0]
    replies = grid.send_and_receive(ask(grid, "count", [0] * 5))
    assert [reply.content["metrics"]["times"] for reply in replies] == [first + more for more in range(1, 6)]


def test_another_run_starts_without_states(grid):
    grid.send_and_receive(ask(grid, "count"))
    grid.set_run(Run.create_empty(5))
    try:
        replies = list(grid.send_and_receive(ask(grid, "count")))
        assert set(answers(replies, "times").values()) == {1}
        assert {reply.metadata.run_id for reply in replies} == {grid.run.run_id} == {5}
    finally:
        grid.set_run(Run.create_empty(1))


def test_failures_of_the_app_are_error_replies_and_others_go_on(grid):
    before = dict(grid._dispatcher.states)
    replies = {reply.metadata.src_node_id - FIRST_NODE_ID: reply for reply in grid.send_and_receive(ask(grid, "fail"))}
    assert [replies[partition].has_error() for partition in range(4)] == [False, True, True, False]
    assert replies[1].error.code == replies[2].error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert replies[1].error.reason.startswith("<class 'ZeroDivisionError'>:<'a message for the driver'>")
    assert "apps.py" in replies[1].error.reason
    assert "SystemExit" in replies[2].error.reason
    assert grid._dispatcher.states.get(FIRST_NODE_ID + 1) is before.get(FIRST_NODE_ID + 1), (
        "a failed message must leave the state as it was"
    )
    [reply] = grid.send_and_receive(ask(grid, "none", [0]))
    assert "got NoneType" in reply.error.reason


def test_a_worker_killed_in_mid_message_does_it_again(grid, tmp_path):
    assert wait_for(lambda: grid.workers == 2)
    before = {post.pid for post in grid._dispatcher.crew.posts.values()}
    grid.take_faults()
    [message] = ask(grid, "die", [0], deaths=1, folder=str(tmp_path))
    replies = list(grid.send_and_receive([message], timeout=30))
    assert answers(replies, "tries") == {0: 2}
    assert grid.take_faults() == (1, [message.metadata.message_id])
    assert wait_for(lambda: grid.workers == 2)
    assert len({post.pid for post in grid._dispatcher.crew.posts.values()} - before) == 1
    assert grid.take_faults() == (0, [])


def test_a_message_that_a_worker_gives_back_is_done_again_by_another(grid, tmp_path):
    grid.take_faults()
    [message] = ask(grid, "give_back", [0], folder=str(tmp_path))
    assert answers(grid.send_and_receive([message], timeout=30), "fine") == {0: 1}
    assert grid.take_faults() == (1, [message.metadata.message_id])


def test_a_worker_that_hangs_meets_its_deadline_and_another_does_its_message(ray_session, tmp_path):
    with RayGrid(APP, nodes=1, workers=1, deadline=0.5) as grid:
        [reply] = grid.send_and_receive(ask(grid, "hang", times=1, folder=str(tmp_path)), timeout=30)
        assert reply.content["metrics"]["tries"] >= 2
        assert grid.take_faults()[0] >= 1
        [reply] = grid.send_and_receive(ask(grid, "hang", times=99, folder=str(tmp_path)), timeout=60)
        assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
        assert "Worker 0 (process" in reply.error.reason
        assert "took over 2 s over this message; where nothing hangs, raise the deadline. 3 workers in turn" in reply.error.reason


def test_nodes_are_those_of_the_workers_that_are_up(ray_session):
    with RayGrid(APP, nodes=None, workers=2) as own, RayGrid(APP, nodes=None, workers=1, nodes_per_worker=3) as shared:
        assert list(own.get_node_ids()) == [FIRST_NODE_ID, FIRST_NODE_ID + 1]
        assert list(shared.get_node_ids()) == [FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2]
        assert len(set(answers(shared.send_and_receive(ask(shared, "count")), "pid").values())) == 1
        os.kill(answers(own.send_and_receive(ask(own, "count", [0])), "pid")[0], signal.SIGKILL)
        replies = list(own.send_and_receive(ask(own, "count"), timeout=30))
        assert len(replies) == 2, "the other did both"
        assert len(set(answers(replies, "pid").values())) == 1
        assert list(own.get_node_ids()) == [FIRST_NODE_ID + 1]
        machine = ray.get_runtime_context().get_node_id()
        assert set(own.machines([FIRST_NODE_ID, FIRST_NODE_ID + 1, FIRST_NODE_ID + 2])[1:]) == {machine, ""}
        assert wait_for(lambda: own.workers == 2)
        assert own.machines([FIRST_NODE_ID + 1, FIRST_NODE_ID]) == [machine] * 2


def test_replies_stream_one_by_one_and_stay_on_the_cluster_till_then(grid):
    messages = ask(grid, "large", bytes=10_000_000)
    stream = grid.stream(messages)
    sizes = [len(next(stream).content["arrays"]["x"].data)]
    assert wait_for(lambda: len(grid._dispatcher._landed) == 3)
    assert all(isinstance(landed.reply, ray.ObjectRef) for landed in grid._dispatcher._landed.values())
    tracemalloc.start()
    try:
        for reply in stream:
            sizes.append(len(reply.content["arrays"]["x"].data))
            del reply
        assert 10e6 < tracemalloc.get_traced_memory()[1] < 19e6, "one at a time"
    finally:
        tracemalloc.stop()
    assert sizes == [10_000_000] * 4
    assert not grid._dispatcher._landed


@pytest.mark.parametrize("taken", [0, 1])
def test_a_stream_that_is_left_forgets_what_it_waited_for(grid, taken):
    stream = grid.stream(ask(grid, "sleep", seconds=0.1))
    assert len(grid._dispatcher._awaited | set(grid._dispatcher._landed)) == 4, "sent at once"
    for _ in range(taken):
        next(stream)
    stream.close()
    assert not grid._dispatcher._awaited
    assert not grid._dispatcher._landed


def test_a_message_that_always_kills_its_worker_is_an_error_and_the_next_goes_on(grid, tmp_path):
    [reply] = grid.send_and_receive(ask(grid, "die", [1], deaths=99, folder=str(tmp_path)), timeout=30)
    assert reply.error.code == ErrorCode.CLIENT_APP_CRASHED
    assert "died, perhaps for want of memory. 3 workers in turn were lost over this message." in reply.error.reason
    assert len(list(grid.send_and_receive(ask(grid, "look"), timeout=30))) == 4
    assert wait_for(lambda: grid.workers == 2), "others need both"


def test_timeout_returns_what_is_there_and_drops_what_has_not_begun(grid):
    begun = time.monotonic()
    slow, quick = ask(grid, "sleep", [0], seconds=1.5), ask(grid, "sleep", [1], seconds=0.0)
    replies = grid.send_and_receive([*slow, *quick], timeout=0.7)
    assert set(answers(replies, "slept")) == {1}
    assert 0.6 < time.monotonic() - begun < 1.2
    assert list(grid.send_and_receive(ask(grid, "sleep", [0, 2], seconds=0.3), timeout=0.0)) == []
    assert set(answers(grid.send_and_receive(ask(grid, "sleep", [0], seconds=0.0)), "slept")) == {0}
    assert not grid._dispatcher._landed
    assert not grid._dispatcher._awaited


def test_replies_are_pulled_in_order_of_arrival_once(grid):
    slow, quick = ask(grid, "sleep", [0], seconds=0.5), ask(grid, "sleep", [1, 2, 3], seconds=0.0)
    message_ids = list(grid.push_messages([*slow, *quick]))
    assert len(set(message_ids)) == 4
    assert [message.metadata.message_id for message in slow] == message_ids[:1]
    time.sleep(0.9)  # they run though nobody waits
    replies = list(grid.pull_messages(message_ids))
    assert [reply.metadata.reply_to_message_id for reply in replies] == [*message_ids[1:], message_ids[0]]
    assert list(grid.pull_messages(message_ids)) == []


def test_with_as_many_nodes_as_workers_each_node_has_its_own_process(resident):
    seen = [answers(resident.send_and_receive(ask(resident, "look")), "pid") for _ in range(5)]
    assert len(set(seen[0].values())) == 2
    assert seen == [seen[0]] * 5


def test_a_million_registered_nodes_cost_nothing(ray_session):
    seconds = {}
    for nodes in (1000, 1_000_000):
        with RayGrid(APP, nodes=nodes, workers=2) as grid:
            content = RecordDict({"config": ConfigRecord({"seconds": 0.01})})
            chosen = grid.get_node_ids()[:: nodes // 20]
            rounds = []
            for _ in range(4):
                begun = time.perf_counter()
                messages = [Message(content, dst_node_id=node, message_type="query.sleep") for node in chosen]
                assert len(list(grid.send_and_receive(messages))) == 20
                rounds.append(time.perf_counter() - begun)
            seconds[nodes] = min(rounds[1:])
    assert seconds[1_000_000] < 2 * seconds[1000], seconds


def test_a_shared_record_is_sent_once(grid, monkeypatch):
    puts = []
    monkeypatch.setattr(ray, "put", lambda value, real=ray.put: puts.append(value) or real(value))
    arrays = ArrayRecord({"w": Array(apps.np.zeros(3))})
    contents = [RecordDict({"arrays": arrays, "config": ConfigRecord({"n": n})}) for n in range(4)]
    messages = [
        Message(content, dst_node_id=node, message_type="train") for content, node in zip(contents, grid.get_node_ids(), strict=True)
    ]
    assert answers(grid.send_and_receive(messages), "loss") == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0}
    assert puts == [arrays]


def test_an_app_that_cannot_be_loaded_answers_so(ray_session):
    with RayGrid("tests.clients.apps:missing", nodes=1, workers=1) as grid:
        [reply] = grid.send_and_receive(ask(grid, "look"))
        assert reply.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION
        assert "missing" in reply.error.reason


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"nodes": 0, "workers": 1}, "nodes >= 1, got 0"),
        ({"nodes": 1, "workers": 0}, "workers >= 1, got 0"),
        ({"nodes": 1, "workers": 1, "client_app": "nocolon"}, "'module:attribute', got 'nocolon'"),
        ({"nodes": 1, "workers": 50}, "50 CPU free for 50 workers"),
    ],
)
def test_wrong_arguments_are_refused_by_name(ray_session, arguments, text):
    with pytest.raises(ValueError, match=text):
        RayGrid(**({"client_app": APP} | arguments))
    assert ray.is_initialized(), "a Ray that was there before stays"


def test_cores_that_others_hold_are_named(grid, resident, monkeypatch):
    monkeypatch.setattr("clients.ray_worker.ROOM_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"6 CPU free for 6 workers, it has [0-9] of 6"):
        RayGrid(APP, nodes=6, workers=6)


def test_wrong_messages_are_refused_by_name(grid):
    with pytest.raises(ValueError, match="nodes 2 to 5, got one with content to node 6"):
        grid.push_messages([Message(RecordDict(), dst_node_id=6, message_type="query")])
    with pytest.raises(ValueError, match="num_gpus >= 0, got -1"):
        Resources(num_gpus=-1)
    with pytest.raises(TypeError, match="a flwr Run, got int"):
        grid.set_run(3)


def test_a_closed_grid_says_so_and_gives_the_identity_back(ray_session):
    before = TaskIdentity._run_id, TaskIdentity._node_id
    with RayGrid(APP, nodes=1, workers=1, run_id=77) as grid:
        assert (TaskIdentity.run_id, TaskIdentity.node_id) == (77, 1)
    assert (TaskIdentity._run_id, TaskIdentity._node_id) == before
    grid.close()
    with pytest.raises(RuntimeError, match="open RayGrid"):
        grid.pull_messages(["x"])


def test_workers_have_the_allocator_that_ray_brings_and_what_the_driver_says_of_memory_counts(grid, monkeypatch, tmp_path):
    assert wait_for(lambda: grid.workers == 2)
    loaded = [Path(f"/proc/{post.pid}/maps").read_text() for post in grid._dispatcher.crew.posts.values()]
    there = ray_worker.JEMALLOC.is_file() and platform.machine() == "x86_64"
    assert all(("libjemalloc.so" in maps) == there for maps in loaded)
    monkeypatch.setattr(ray_worker, "JEMALLOC", tmp_path / "libjemalloc.so")
    assert "LD_PRELOAD" not in ray_worker.own_runtime()["env_vars"]
    ray_worker.JEMALLOC.touch()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert "LD_PRELOAD" not in ray_worker.own_runtime()["env_vars"]
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name, said in (("MALLOC_CONF", "narenas:2"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0"), ("LD_PRELOAD", "/mine.so")):
        monkeypatch.setenv(name, said)
    told = ray_worker.own_runtime()["env_vars"]
    assert told["MALLOC_CONF"] == ray_worker.MALLOC["MALLOC_CONF"] + ",narenas:2"
    assert told["GLIBC_TUNABLES"].endswith(":glibc.malloc.hugetlb=0")
    assert told["LD_PRELOAD"] == f"/mine.so:{ray_worker.JEMALLOC}", "whose comes first is asked for memory"


DRIVER = """
import os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with it ignored
sys.path.insert(0, sys.argv[1])
from flwr.app import ConfigRecord, Message, RecordDict
from clients.ray_grid import RayGrid
try:
    with RayGrid("tests.clients.apps:app", nodes=2, workers=2, log_to_driver=sys.argv[2] == "log") as grid:
        def send(seconds):
            content = RecordDict({"config": ConfigRecord({"seconds": seconds})})
            return grid.send_and_receive([Message(content, dst_node_id=node, message_type="query.sleep") for node in grid.get_node_ids()])
        send(0.0)
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        programs = {Path(part).name for child in children for part in Path(f"/proc/{child}/cmdline").read_text().split("\\0")}
        print(*sorted(programs & {"gcs_server", "raylet", "log_monitor.py", "monitor.py", "dashboard.py"}), flush=True)
        send(60.0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("log", ["log", "quiet"])
def test_ctrl_c_ends_a_driver_in_another_folder_promptly_and_quietly(tmp_path, log):
    root = Path(__file__).resolve().parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", DRIVER, str(root), log]
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=environment, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert driver.stdout is not None
    passes_on = "log_monitor.py " if log == "log" else ""
    assert driver.stdout.readline() == f"gcs_server {passes_on}raylet\n", "what nobody has a use for was ended"
    begun = time.monotonic()
    os.killpg(driver.pid, signal.SIGINT)
    out, error = driver.communicate(timeout=20)
    assert (driver.returncode, out, error) == (130, "interrupted\n", "")
    assert time.monotonic() - begun < 6
    assert Counter(part for line in Path("/proc").glob("[0-9]*/cmdline") for part in _parts(line))[str(tmp_path)] == 0


def _parts(path: Path) -> list[str]:
    try:
        return path.read_text().split("\0")
    except OSError:
        return []
