"""The Ray actors under `RayGrid`: how Ray and they are started, and what one does with a message."""

import importlib
import logging
import math
import os
import platform
import signal
import site
import socket
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from pickle import PickleBuffer
from typing import Any, cast

import ray
from flwr.app import Array, Context, Error, Message, RecordDict, UserConfig
from flwr.common.constant import ErrorCode

from clients.identity import Identity, assume
from clients.lanes import FIRST_NODE_ID

ROOM_SECONDS = 20.0  # how long to wait for cores and GPUs that others hold
JEMALLOC = Path(ray.__file__).parent / "core" / "libjemalloc.so"
"""The allocator that Ray brings, where it does: small networks train in 0.95 of the time that they take with glibc's. Tried on x86-64
alone, and no path with a space can be preloaded."""

MALLOC = {
    "MALLOC_CONF": "thp:always,dirty_decay_ms:1000000000,muzzy_decay_ms:1000000000,oversize_threshold:33554432,narenas:1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.tcache_count=1000",
}
"""How workers ask for memory, of either allocator: in large pages, where the system gives them, as what trains goes over whole models again
and again; with as many small pieces at hand as an operator of a network asks for and lets go; and only 32 MB and more are handed back, as
replies are (jemalloc would keep these too, were the decay of the others -1). What the driver's own environment says comes after it, and
counts."""

ClientCallable = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class Resources:
    """What Ray sets aside for each worker.

    Args:
        num_cpus: Processor cores, at least 0. Whatever it says, a worker computes on one thread.
        num_gpus: GPUs, at least 0; a fraction lets workers share one.
    """

    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in (("num_cpus", self.num_cpus), ("num_gpus", self.num_gpus)):
            if not 0 <= value < math.inf:
                raise ValueError(f"Expected {name} >= 0, got {value}. Give what one worker needs, such as num_cpus=1, num_gpus=0.5.")


ONE_CORE = Resources()


class Worker:
    """The actor: holds the client app, and runs it on one message at a time."""

    def __init__(self, app: str | bytes, run_config: UserConfig, nodes: int) -> None:
        """Load the app; where that fails, say so in answer to each message."""
        # Ctrl-C reaches every process of the terminal; the driver alone decides how the run ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        register_arrays()
        self._run_config, self._nodes = run_config, nodes
        self._app: ClientCallable | None = None
        self._failure = ""
        try:
            self._app = _load(app)
        except (Exception, SystemExit) as error:  # noqa: BLE001  answered to each message; a failed actor is mute
            self._failure = _reason(error)
        if "torch" in sys.modules:  # an app that imports it later finds OMP_NUM_THREADS
            sys.modules["torch"].set_num_threads(1)

    def where(self) -> tuple[str, str, int]:
        """Return the id of this worker's Ray node, the name of its machine and its process: an answer says that it is up."""
        return ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid()

    @ray.method(num_returns=2)
    def run(self, message: Message, state: RecordDict | None, names: tuple[str, ...], *records: Any) -> tuple[RecordDict | None, Message]:
        """Run the app on a message; return the node's new state, None (as it was) if the app failed, and the reply.

        Two results: the reply may be large, and stays where it is until the server takes it.
        """
        meta = message.metadata
        assume(Identity(meta.run_id, meta.dst_node_id))
        if self._app is None:
            return None, Message(Error(ErrorCode.LOAD_CLIENT_APP_EXCEPTION, self._failure), reply_to=message)
        config: UserConfig = {"partition-id": meta.dst_node_id - FIRST_NODE_ID, "num-partitions": self._nodes}
        context = Context(meta.run_id, meta.dst_node_id, config, RecordDict() if state is None else state, dict(self._run_config))
        try:
            message.content = RecordDict(dict(zip(names, records, strict=True)))
            reply = self._app(message, context)
            if not isinstance(reply, Message) or reply.metadata.reply_to_message_id != meta.message_id:
                raise TypeError(f"Expected the client app to return Message(content, reply_to=message), got {type(reply).__name__}.")
        except (Exception, SystemExit) as error:  # noqa: BLE001  an exit would end the actor, unexplained
            return None, Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _reason(error)), reply_to=message)
        return context.state, reply


def join_ray(
    address: str | None, workers: int | None, fewest: int, resources: Resources, object_store_bytes: int, log_to_driver: bool
) -> None:
    """Start Ray, or connect to a cluster, unless this process has done so; quietly, and with no more cores than the workers need.

    Raises:
        ValueError: Ray has too little for the fewest workers to begin with, or too little of it free.
    """
    if not ray.is_initialized():
        # Ray reads both from the environment only: it would report usage to its makers, and warn of a default that is to change.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default they give way to whatever else runs on the machine
        where = address or os.environ.get("RAY_ADDRESS") or "local"
        room: dict[str, Any] = {}
        if where == "local" and workers is not None:
            room = {"num_cpus": max(workers, math.ceil(workers * resources.num_cpus)), "object_store_memory": object_store_bytes}
            if not resources.num_gpus:
                room["num_gpus"] = 0
        ray.init(address=where, include_dashboard=False, log_to_driver=log_to_driver, logging_level=logging.ERROR, **room)
        if where == "local":
            _end_unused(log_to_driver)
    _await_room(fewest, resources)


def _end_unused(log_to_driver: bool) -> None:
    """End those of the processes of a Ray started here that have nothing to do: they take 1.5% of two cores, and 200 MB.

    One asks for machines, one serves pages, one passes on what workers print. Ray starts them whatever it is told, and has no public way to
    do without; where its own way is another one day, they stay.
    """
    for name in ("monitor", "dashboard", *(() if log_to_driver else ("log_monitor",))):
        with suppress(Exception):
            getattr(ray._private.worker._global_node, f"kill_{name}")(check_alive=False)


def _await_room(workers: int, resources: Resources) -> None:
    """Wait a while for what the workers need, as Ray would wait for ever and say nothing; what a closed grid held comes back late."""
    needed = {name: workers * each for name, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus))}
    deadline = time.monotonic() + ROOM_SECONDS
    while True:
        # Ray gives neither of them types.
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        short = {name: amount for name, amount in needed.items() if amount > free.get(name, 0.0) + 1e-6}
        if not short:
            return
        if time.monotonic() > deadline or any(amount > total.get(name, 0.0) + 1e-6 for name, amount in short.items()):
            name, amount = next(iter(short.items()))
            raise ValueError(
                f"Expected Ray to have {amount:g} {name} free for {workers} workers, it has {free.get(name, 0.0):g} of "
                f"{total.get(name, 0.0):g}. Ask for fewer workers or less for each, give Ray more, or close what holds the rest."
            )
        time.sleep(0.05)


def room_for_workers(resources: Resources) -> int:
    """Return how many workers the machines of the cluster have room for, each with its own cores and GPUs, whoever uses them now."""
    needs = {name: each for name, each in (("CPU", resources.num_cpus), ("GPU", resources.num_gpus)) if each}
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray gives it no types
    return sum(min(int(machine.get(name, 0.0) / each + 1e-6) for name, each in needs.items()) for machine in machines)


def worker_starter(app: str | ClientCallable, run_config: UserConfig, nodes: int, resources: Resources) -> Callable[[], Any]:
    """Return a function that starts an actor, without waiting for it. What becomes of one that dies is left to whoever started it."""
    register_arrays()
    actor = ray.remote(Worker).options(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        max_restarts=0,
        max_task_retries=0,
        runtime_env=own_runtime(),
    )
    # As bytes, so that what can't be unpickled there is answered by the actor rather than ending it.
    portable = app if isinstance(app, str) else cast(bytes, ray.cloudpickle.dumps(app))  # type: ignore[no-untyped-call]  # Ray gives it no types
    return lambda: actor.remote(portable, run_config, nodes)


def own_runtime() -> dict[str, Any]:
    """Return Ray's `runtime_env` for processes that run the code of this one."""
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(own_paths())}
    for name, separator in (("MALLOC_CONF", ","), ("GLIBC_TUNABLES", ":")):
        env[name] = separator.join(filter(None, [MALLOC[name], os.environ.get(name, "")]))
    if JEMALLOC.is_file() and platform.machine() == "x86_64" and not set(str(JEMALLOC)) & {" ", ":"}:
        env["LD_PRELOAD"] = ":".join(filter(None, [os.environ.get("LD_PRELOAD", ""), str(JEMALLOC)]))
    return {"env_vars": env}


def register_arrays() -> None:
    """Let this process send Flower arrays, their data beside the pickle, which would copy them once more on either side.

    Those whose `object_id` was computed hold memory views, which don't pickle.
    """
    ray.util.register_serializer(
        Array,
        serializer=lambda array: (array.dtype, array.shape, array.stype, PickleBuffer(array.data)),
        deserializer=lambda fields: Array(fields[0], fields[1], fields[2], bytes(fields[3])),
    )


def own_paths() -> list[str]:
    """Return the import paths of this process that another one with the same Python would lack."""
    common = {*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages()}
    paths = [Path(path).absolute() for path in sys.path if not path.endswith(".zip")]
    here = [str(path) for path in paths if common.isdisjoint((str(path), str(path.parent)))]
    return [*dict.fromkeys([*here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])]


def _load(app: str | bytes) -> ClientCallable:
    if isinstance(app, bytes):
        return cast(ClientCallable, ray.cloudpickle.loads(app))
    module, _, attribute = app.partition(":")
    return cast(ClientCallable, reduce(getattr, attribute.split("."), importlib.import_module(module)))


def _reason(error: BaseException) -> str:
    """Return Flower's own form of an error's reason, and where it was raised, as a worker's terminal isn't shown."""
    return f"{type(error)}:<'{error}'>\n" + "".join(traceback.format_exception(error)).rstrip()
