"""A run on two Ray nodes of which one is lost in the middle of a round and another comes: a process of its own, as it starts a cluster.

Arguments: an experiment file and a folder. Prints, as JSON, what the test looks at.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROUNDS = 6
STATEFUL = (
    "strategy={client=[{with_error_feedback={inner={top_k={density=0.1}}}}, {clip_per_layer={max_norm=0.5}}], server=[{lamb={lr=0.02}}]}"
)


def main(file: Path, folder: Path) -> dict[str, Any]:
    import ray
    import torch
    from ray.cluster_utils import Cluster
    from ray.experimental import get_object_locations

    from experiments.engines import OnGrid, open_engine
    from experiments.prepare import prepare, read_experiment

    torch.set_num_threads(1)
    common = [STATEFUL, "sampler.cohort=20", "local.steps=20"]

    def states(path: Path) -> dict[str, bytes]:
        return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*.state"))}

    here = folder / "process"
    with open_engine(prepare(read_experiment(file, [*common, "run.engine=process"])), here) as engine:
        here.mkdir()
        for _ in range(ROUNDS):
            engine.round()
        expected, kept = engine.state.params, states(here)

    begun, seen = time.monotonic(), dict[str, Any]()
    cluster = Cluster()
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)]
    nodes += [cluster.add_node(num_cpus=1, object_store_memory=100_000_000)]
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
        seen["puts"], seen["copies"] = len(stored), len(get_object_locations(stored)[stored[0]]["node_ids"])
        engine.round()
        seen["heard"] = len(set(heard))

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
        cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
        start = time.monotonic()
        while engine.workers < 2 and time.monotonic() < start + 60:
            time.sleep(0.1)
        seen["workers"].append(engine.workers)
        while engine.state.round < ROUNDS:
            tallies.append(engine.round().tally)
        seen["faults"] = [sum(float(t.get(name, 0)) for t in tallies) for name in ("workers_replaced", "blocks_redone")]
        seen["equal"], seen["states_equal"] = torch.equal(engine.state.params, expected), states(there) == kept
        seen["states"] = len(kept)
    ray.shutdown()
    cluster.shutdown()
    return seen | {"seconds": time.monotonic() - begun}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))), flush=True)
    os._exit(0)  # Ray's own threads may still look for the cluster
