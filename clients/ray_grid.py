"""`RayGrid`: a Flower `Grid` whose nodes live on Ray actors. It knows Flower and Ray, and nothing of models, methods or tasks."""

import copy
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, cast
from uuid import uuid4

import ray
from flwr.app import ArrayRecord, Context, Message, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from clients.identity import SERVER_NODE_ID, Identity, assume, stripped
from clients.lanes import FIRST_NODE_ID, Parcel
from clients.ray_crew import Crew
from clients.ray_dispatch import Dispatcher
from clients.ray_worker import ONE_CORE, ClientCallable, Resources, join_ray, worker_starter

__all__ = ["FIRST_NODE_ID", "RayGrid", "Resources"]

KEPT_IDS = 2_000_000  # so many node ids are kept, at 40 bytes each, as Flower's strategies list them all four times a round
RETRIES = 2
MOST_NODES = 2**31


class RayGrid(Grid):
    """A Flower `Grid` whose nodes live on Ray actors, on this machine or a cluster.

    Registered nodes cost nothing: ids are arithmetic, and only nodes with a non-empty `Context.state` are remembered. A message goes to
    the next free worker; with as many nodes as workers always to the same one, so that a node finds what it left in that process. A
    worker that died or hangs is replaced, and its message done again by whoever is free first, before all others. What the app raises
    comes back as a Flower error reply. A reply stays on the cluster until it is taken.

    Args:
        client_app: `"module:attribute"`, imported by each worker, or a `ClientApp` that pickles.
        nodes: Registered nodes, at least 1: ids from `FIRST_NODE_ID` on, partitions from 0 on. None: those of the workers that are up,
            `nodes_per_worker` each, whatever comes and goes.
        workers: Ray actors, at least 1. None: as many as the cluster has room for, whatever comes and goes.
        fewest: As many must have room for the grid to begin; by default all of them, or 1 where they follow the cluster.
        nodes_per_worker: With `nodes` None. With more than 1 a node has no worker of its own: who is done early takes the next message.
        run_config: What client apps see as `context.run_config`.
        resources: What Ray sets aside for each worker.
        address: A Ray cluster (`"auto"`, `"host:port"`); by default `$RAY_ADDRESS`, and without it Ray is started here. Ignored, as are
            `object_store_bytes` and `log_to_driver`, if Ray is already initialised.
        run_id: Flower's number of the run.
        object_store_bytes: Upper limit of the shared memory of a Ray started here; it's taken as it is used.
        log_to_driver: Show what workers print.
        deadline: Seconds that a worker may take over one message, twice as many each time it is done again; then it counts as hung.
            None: any time.
        retries: So often a message whose worker was lost is done again; then it's an error, as it may be what kills the worker.

    Raises:
        ValueError: A number out of range, a reference without a colon, or a Ray too small for the workers.
    """

    def __init__(
        self,
        client_app: str | ClientCallable,
        *,
        nodes: int | None,
        workers: int | None,
        fewest: int | None = None,
        nodes_per_worker: int = 1,
        run_config: UserConfig | None = None,
        resources: Resources = ONE_CORE,
        address: str | None = None,
        run_id: int = 1,
        object_store_bytes: int = 2**30,
        log_to_driver: bool = False,
        deadline: float | None = None,
        retries: int = RETRIES,
    ) -> None:
        """Start the workers, and Ray if need be."""
        _check_numbers(client_app, nodes, workers, resources)
        self._nodes = range(FIRST_NODE_ID, FIRST_NODE_ID + (MOST_NODES if nodes is None else nodes))
        self._ids: Sequence[int] = tuple(self._nodes) if len(self._nodes) <= KEPT_IDS else self._nodes
        self._each = nodes_per_worker if nodes is None else None
        self._run_config = dict(run_config or {})
        self._run = Run.create_empty(run_id)
        self._closed = False
        self._dispatcher: Dispatcher | None = None
        self._before = assume(Identity(run_id, SERVER_NODE_ID))
        self._owns_ray = not ray.is_initialized()
        try:
            join_ray(address, workers, fewest or workers or 1, resources, object_store_bytes, log_to_driver)
            start = worker_starter(client_app, self._run_config, 0 if nodes is None else nodes, resources)
            pinned = nodes_per_worker == 1 if nodes is None else nodes == workers
            self._dispatcher = Dispatcher(Crew(start, workers, resources), run_id=run_id, pinned=pinned, deadline=deadline, retries=retries)
            if nodes is None:
                self._dispatcher.settle()
        except BaseException:
            self.close()
            raise

    def set_run(self, run: Run) -> None:
        """Set the run; a run of another number finds no node states."""
        if not isinstance(run, Run):
            raise TypeError(f"Expected a flwr Run, got {type(run).__name__}. Run.create_empty(run_id) makes one.")
        at_work = self._at_work
        with at_work.changed:
            if run.run_id != at_work.run_id:
                at_work.states.clear()
            at_work.run_id, self._run = run.run_id, copy.copy(run)
        assume(Identity(run.run_id, SERVER_NODE_ID))

    @property
    def run(self) -> Run:
        """A copy of the run's information."""
        return copy.copy(self._run)

    @property
    def workers(self) -> int:
        """How many workers are up."""
        return len(self._at_work.crew.posts)

    @property
    def pinned(self) -> bool:
        """Whether each node has a worker of its own, which does its messages as long as it is not lost."""
        return self._at_work.pinned

    def context(self) -> Context:
        """Return a fresh `Context` to start a ServerApp with: `server_app(grid, grid.context())`."""
        return Context(self._run.run_id, SERVER_NODE_ID, {}, RecordDict(), dict(self._run_config))

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Create a message, as `Message(...)` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all node ids, up to `KEPT_IDS` of them as a tuple, which is listed much faster than a range.

        Where they are those of the workers that are up, wait until one is.
        """
        if self._each is None:
            return self._ids
        workers = self._at_work.up()
        return [FIRST_NODE_ID + worker for worker in workers] if self._each == 1 else self._nodes[: self._each * len(workers)]

    def node_name(self, node: int) -> str:
        """Return for people which worker a node has for itself, and where; else its number."""
        at_work = self._at_work
        with at_work.changed:
            return at_work.crew.name(node - FIRST_NODE_ID) if self.pinned else f"node {node}"

    def machines(self, nodes: Sequence[int]) -> list[str]:
        """Return the id of the Ray node where each node's own worker is; empty where it is not up."""
        at_work = self._at_work
        with at_work.changed:
            posts = [at_work.crew.posts.get(node - FIRST_NODE_ID) for node in nodes]
        return [post.ray_node if post else "" for post in posts]

    def take_faults(self) -> tuple[int, list[str]]:
        """Return how many workers were replaced since the last time, and the ids of the messages that were done again, once each time."""
        return self._at_work.take_faults()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages over to be run, and return their ids.

        Raises:
            ValueError: A message without content, or to a node that isn't registered.
            RuntimeError: The grid is closed, or Ray has failed.
        """
        parcels = self._pack(list(messages))
        self._at_work.submit(parcels)
        return [parcel.id for parcel in parcels]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return at once the replies that are there, in order of arrival; each is returned once."""
        wanted = message_ids if isinstance(message_ids, set) else set(message_ids)
        return [reply for landed in self._at_work.ready(wanted) if (reply := self._at_work.fetch(landed)) is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for the replies, `timeout` seconds at most; return them in order of arrival.

        Messages that no worker has begun by then are dropped; the others run to their end, unheard.
        """
        return list(self.stream(messages, timeout=timeout))

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Do as `send_and_receive`, but return once they are sent, yield each reply as it comes, and hold none of them."""
        deadline = None if timeout is None else time.monotonic() + timeout
        replies = self._replies(set(self.push_messages(messages)), deadline)
        next(replies)
        return cast(Iterator[Message], replies)

    def _replies(self, waiting: set[str], deadline: float | None) -> Iterator[Message | None]:
        try:
            yield None  # from here on messages are forgotten with their iterator, also where no reply is ever taken
            while waiting:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                landed = self._at_work.first(waiting, left)
                if landed is None:
                    break
                reply = [self._at_work.fetch(landed)]
                del landed
                if reply[0] is not None:
                    waiting.remove(reply[0].metadata.reply_to_message_id)
                    yield reply.pop()
        finally:  # also on Ctrl-C
            if waiting and not self._closed:
                self._at_work.forget(waiting)

    def close(self) -> None:
        """End the workers, and Ray if this grid started it."""
        if self._closed:
            return
        self._closed = True
        if self._dispatcher is not None:
            self._dispatcher.close()
        if ray.is_initialized() and self._owns_ray:
            ray.shutdown()  # ends the actors too; killed one by one at work, each would be reported on the terminal
        elif ray.is_initialized() and self._dispatcher is not None:
            for worker in self._dispatcher.crew.actors.values():
                ray.kill(worker)
        assume(self._before)

    def __enter__(self) -> Self:
        """Return the grid, which the end of the `with` block closes."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the grid."""
        self.close()

    @property
    def _at_work(self) -> Dispatcher:
        if self._dispatcher is None:
            raise RuntimeError("Expected an open RayGrid, got one that could not be opened.")
        return self._dispatcher

    def _pack(self, messages: list[Message]) -> list[Parcel]:
        for message in messages:
            if not message.has_content() or message.metadata.dst_node_id not in self._nodes:
                content = "with" if message.has_content() else "without"
                raise ValueError(
                    f"Expected messages with content to nodes {self._nodes[0]} to {self._nodes[-1]}, got one {content} content to node "
                    f"{message.metadata.dst_node_id}. Take node ids from get_node_ids()."
                )
        uses = Counter(id(record) for message in messages for record in message.content.values() if isinstance(record, ArrayRecord))
        stored: dict[int, Any] = {}  # a model that goes to many is stored once
        parcels = []
        for message in messages:
            for record in message.content.values():
                if uses[id(record)] > 1 and id(record) not in stored:
                    stored[id(record)] = ray.put(record)
            records = tuple(stored.get(id(record), record) for record in message.content.values())
            parcels.append(Parcel(message.metadata.dst_node_id, stripped(message, str(uuid4())), tuple(message.content), records))
        return parcels


def _check_numbers(client_app: str | ClientCallable, nodes: int | None, workers: int | None, resources: Resources) -> None:
    for name, value in (("nodes", nodes), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"Expected {name} >= 1, got {value}. A grid needs a node to send to and a worker to run it.")
    if workers is None and not resources.num_cpus and not resources.num_gpus:
        raise ValueError("Expected a number of workers where they take neither cores nor GPUs: any number has room on the cluster.")
    if isinstance(client_app, str) and not all(client_app.partition(":")):
        raise ValueError(f"Expected client_app as 'module:attribute', got {client_app!r}. Name a module, a colon and its ClientApp.")
