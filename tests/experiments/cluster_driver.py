"""A run on two Ray nodes of which one is lost in the middle of a round and another comes: a process of its own, as it starts a cluster.

Arguments: an experiment file and a folder. Prints, as JSON, what the test looks at.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedclip.storage import Chunk
from fedclip.user_states import StatesInFolder

LOST, ROUNDS = 5, 8
STATEFUL = "strategy={client=[{dgc={density=0.1}}, {clip_per_layer={max_norm=0.5}}], server=[{sgd={lr=1.0, momentum_1d=0.9}}]}"


class Counting(StatesInFolder):
    """Writes down what it was asked for: the call, and the bytes that crossed; `newest` of users who were never seen aside."""

    def newest(self, user: int, round: int) -> Path | None:
        path = super().newest(user, round)
        return path and self._crossed("newest", path, 0)

    def read(self, path: Path) -> bytes:
        content = super().read(path)
        self._crossed("read", path, len(content))
        return content

    def put(self, user: int, round: int, attempt: int, content: Iterable[Chunk]) -> Path:
        return self._crossed("put", super().put(user, round, attempt, content), sum(map(len, content)))

    def _crossed(self, call: str, path: Path, size: int) -> Path:
        with (self.folder.parent / "crossed").open("a", encoding="ascii") as file:
            file.write(f"{call} {size}\n")
        return path


def main(file: Path, folder: Path) -> dict[str, Any]:
    import ray
    import torch
    from ray.cluster_utils import Cluster
    from ray.experimental import get_object_locations

    from clients import states as states_module
    from experiments.engines import OnGrid, open_engine
    from experiments.prepare import prepare, read_experiment

    torch.set_num_threads(1)
    common = [STATEFUL, "sampler.cohort=20", "local.steps=20"]
    states_module.StatesInFolder = Counting  # type: ignore[misc]

    def states(path: Path) -> dict[str, bytes]:
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*.state"))}

    def crossed(path: Path) -> dict[str, list[int]]:
        """Return for each call how often it was made, and the bytes that crossed."""
        lines = [line.split() for line in (path / "crossed").read_text(encoding="ascii").splitlines()]
        sizes = {call: [int(size) for name, size in lines if name == call] for call in ("newest", "read", "put")}
        return {call: [len(each), sum(each)] for call, each in sizes.items()}

    here = folder / "process"
    with open_engine(prepare(read_experiment(file, [*common, "run.engine=process"])), here) as engine:
        here.mkdir()
        for _ in range(ROUNDS):
            engine.round()
        expected, kept = engine.state.params, states(here)

    begun, seen = time.monotonic(), dict[str, Any]()
    cluster = Cluster()
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)]
    other = Path(os.environ["RAY_TMPDIR"]) / "b"  # of a machine that is lost and comes again
    nodes += [cluster.add_node(num_cpus=1, object_store_memory=100_000_000, temp_dir=str(other))]
    stored: list[Any] = []
    put = ray.put
    ray.put = lambda value: stored.append(put(value)) or stored[-1]
    there = folder / "cluster"
    with open_engine(prepare(read_experiment(file, [*common, f"ray.address='{cluster.address}'"])), there) as engine:
        assert isinstance(engine, OnGrid)
        there.mkdir()
        grid: Any = engine._grid
        heard: list[str] = []
        engine.watch(lambda name, users, seconds: heard.append(name))
        seen["start_seconds"], seen["workers"] = time.monotonic() - begun, [engine.workers]
        seen["machines"] = len({post.ray_node for post in grid._dispatcher.crew.posts.values()})
        engine.round()
        seen["puts"], seen["model_at"] = len(stored), len(get_object_locations(stored)[stored[0]]["node_ids"])
        while engine.state.round < LOST - 1:
            engine.round()
        seen["heard"] = len(set(heard))
        seen["crossed"] = crossed(there)

        def end_of_a_node() -> None:
            while len(grid._dispatcher._flights) < 2:
                time.sleep(0.001)
            cluster.remove_node(nodes[1], allow_graceful=False)

        threading.Thread(target=end_of_a_node).start()
        start = time.monotonic()
        tallies = [engine.round().tally]
        seen["lost_seconds"] = time.monotonic() - start
        tallies.append(engine.round().tally)
        seen["workers"].append(engine.workers)
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000, temp_dir=str(other))
        start = time.monotonic()
        while engine.workers < 2 and time.monotonic() < start + 60:
            time.sleep(0.1)
        seen["workers"].append(engine.workers)
        while engine.state.round < ROUNDS:
            tallies.append(engine.round().tally)
        seen["faults"] = [sum(float(t.get(name, 0)) for t in tallies) for name in ("workers_replaced", "blocks_redone")]
        seen["equal"], seen["states_equal"] = torch.equal(engine.state.params, expected), states(there) == kept
        seen["states"] = len(kept)
        temporary, seen["crossed_in_all"] = ray.get_runtime_context().get_temp_dir(), crossed(there)
        seen["copies"] = [len(list(Path(place).glob("fedclip-*"))) for place in (temporary, other)]
    seen["left"] = len([*Path(temporary).glob("fedclip-*"), *other.glob("fedclip-*")])
    ray.shutdown()
    cluster.shutdown()
    return seen | {"seconds": time.monotonic() - begun}


if __name__ == "__main__":
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))), flush=True)
    os._exit(0)  # Ray's own threads may still look for the cluster
