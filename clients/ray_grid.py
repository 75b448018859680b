"""`RayGrid`: a Flower `Grid` whose nodes live on Ray actors. It knows Flower and Ray, and nothing of models, methods or tasks."""

import copy
import threading
import time
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import ray
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict, UserConfig
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from clients.identity import SERVER_NODE_ID, Identity, assume, number, stripped
from clients.lanes import FIRST_NODE_ID, Lanes, Parcel
from clients.ray_worker import ONE_CORE, TASK_RETRIES, ClientCallable, Resources, join_ray, start_workers

__all__ = ["FIRST_NODE_ID", "RayGrid", "Resources"]

KEPT_IDS = 2_000_000  # so many node ids are kept, at 40 bytes each, as Flower's strategies list them all four times a round
POLL_SECONDS = 0.1  # what is sent while others run is listened for after this at the latest


class RayGrid(Grid):
    """A Flower `Grid` whose nodes live on Ray actors, on this machine or a cluster.

    Registered nodes cost nothing: ids are arithmetic, and only nodes with a non-empty `Context.state` are remembered. A message goes to
    the next free worker; with as many nodes as workers always to the same one, so that a node finds what it left in that process. A
    worker that died is started anew, and its message done again. What the app raises comes back as a Flower error reply.

    Args:
        client_app: `"module:attribute"`, imported by each worker, or a `ClientApp` that pickles.
        nodes: Registered nodes, at least 1: ids from `FIRST_NODE_ID` on, partitions from 0 on.
        workers: Ray actors, at least 1.
        run_config: What client apps see as `context.run_config`.
        resources: What Ray sets aside for each worker.
        address: A Ray cluster (`"auto"`, `"host:port"`); by default `$RAY_ADDRESS`, and without it Ray is started here. Ignored, as are
            `object_store_bytes` and `log_to_driver`, if Ray is already initialised.
        run_id: Flower's number of the run.
        object_store_bytes: Upper limit of the shared memory of a Ray started here; it's taken as it is used.
        log_to_driver: Show what workers print.

    Raises:
        ValueError: A number out of range, a reference without a colon, or a Ray too small for the workers.
    """

    def __init__(
        self,
        client_app: str | ClientCallable,
        *,
        nodes: int,
        workers: int,
        run_config: UserConfig | None = None,
        resources: Resources = ONE_CORE,
        address: str | None = None,
        run_id: int = 1,
        object_store_bytes: int = 2**30,
        log_to_driver: bool = False,
    ) -> None:
        """Start the workers, and Ray if need be."""
        for name, value in (("nodes", nodes), ("workers", workers)):
            if value < 1:
                raise ValueError(f"Expected {name} >= 1, got {value}. A grid needs a node to send to and a worker to run it.")
        if isinstance(client_app, str) and not all(client_app.partition(":")):
            raise ValueError(f"Expected client_app as 'module:attribute', got {client_app!r}. Name a module, a colon and its ClientApp.")
        self._nodes, self._run_config = range(FIRST_NODE_ID, FIRST_NODE_ID + nodes), dict(run_config or {})
        self._ids = tuple(self._nodes) if nodes <= KEPT_IDS else self._nodes
        self._run = Run.create_empty(run_id)
        self._changed = threading.Condition()  # guards what follows, up to the thread
        self._lanes = Lanes(workers, pinned=nodes == workers)
        self._flights: dict[Any, tuple[int, Parcel]] = {}
        self._awaited: set[str] = set()
        self._replies: dict[str, Message] = {}  # in order of arrival
        self._states: dict[int, RecordDict] = {}
        self._closed = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="ray-grid", daemon=True)
        self._workers: list[Any] = []
        self._before = assume(Identity(run_id, SERVER_NODE_ID))
        self._owns_ray = not ray.is_initialized()
        try:
            join_ray(address, workers, resources, object_store_bytes, log_to_driver)
            self._workers = start_workers(client_app, self._run_config, nodes, workers, resources)
        except BaseException:
            self.close()
            raise
        self._thread.start()

    def set_run(self, run: Run) -> None:
        """Set the run; a run of another number finds no node states."""
        if not isinstance(run, Run):
            raise TypeError(f"Expected a flwr Run, got {type(run).__name__}. Run.create_empty(run_id) makes one.")
        with self._changed:
            if run.run_id != self._run.run_id:
                self._states.clear()
            self._run = copy.copy(run)
        assume(Identity(run.run_id, SERVER_NODE_ID))

    @property
    def run(self) -> Run:
        """A copy of the run's information."""
        return copy.copy(self._run)

    def context(self) -> Context:
        """Return a fresh `Context` to start a ServerApp with: `server_app(grid, grid.context())`."""
        return Context(self._run.run_id, SERVER_NODE_ID, {}, RecordDict(), dict(self._run_config))

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """Create a message, as `Message(...)` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all node ids: up to `KEPT_IDS` as a tuple, which is listed several times as fast as a range, and beyond as a range."""
        return self._ids

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages over to be run, and return their ids.

        Raises:
            ValueError: A message without content, or to a node that isn't registered.
            RuntimeError: The grid is closed, or Ray has failed.
        """
        parcels = self._pack(list(messages))
        message_ids = [parcel.message.metadata.message_id for parcel in parcels]
        with self._changed:
            self._check()
            self._awaited.update(message_ids)
            for parcel in parcels:
                self._lanes.push(parcel)
            self._dispatch()
            self._changed.notify_all()
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return at once the replies that are there, in order of arrival; each is returned once."""
        with self._changed:
            self._check()
            wanted = message_ids if isinstance(message_ids, set) else set(message_ids)
            found = [message_id for message_id in self._replies if message_id in wanted]
            return [self._replies.pop(message_id) for message_id in found]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push messages and wait for the replies, `timeout` seconds at most; return them in order of arrival.

        Messages that no worker has begun by then are dropped; the others run to their end, unheard.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        try:
            while waiting and (deadline is None or time.monotonic() < deadline):
                left = None if deadline is None else deadline - time.monotonic()
                with self._changed:
                    self._changed.wait_for(lambda: self._failure or self._closed or any(key in waiting for key in self._replies), left)
                arrived = list(self.pull_messages(waiting))
                waiting.difference_update(reply.metadata.reply_to_message_id for reply in arrived)
                replies += arrived
        finally:  # also on Ctrl-C
            if waiting:
                self._forget(waiting)
        return replies

    def close(self) -> None:
        """End the workers, and Ray if this grid started it."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if ray.is_initialized() and self._owns_ray:
            ray.shutdown()  # ends the actors too; killed one by one at work, each would be reported on the terminal
        elif ray.is_initialized():
            for worker in self._workers:
                ray.kill(worker)
        self._flights.clear()
        assume(self._before)

    def __enter__(self) -> Self:
        """Return the grid, which the end of the `with` block closes."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the grid."""
        self.close()

    def _check(self) -> None:
        if self._closed:
            raise RuntimeError("Expected an open RayGrid, got a closed one. Use it inside its `with` block.")
        if self._failure is not None:
            raise RuntimeError(f"Ray failed under this grid: {self._failure!r}. Close the grid and start a new one.") from self._failure

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

    def _forget(self, message_ids: set[str]) -> None:
        with self._changed:
            self._awaited -= message_ids
            self._lanes.drop(message_ids)
            for message_id in message_ids & self._replies.keys():
                del self._replies[message_id]

    def _dispatch(self) -> None:
        for worker, parcel in self._lanes.pairs():
            ref = self._workers[worker].run.remote(parcel.message, self._states.get(parcel.node), parcel.names, *parcel.records)
            self._flights[ref] = worker, parcel

    def _serve(self) -> None:
        """Hand messages out as workers get free, so that they run whether or not the driver is waiting."""
        try:
            while not self._closed:
                with self._changed:
                    self._changed.wait_for(lambda: self._flights or self._closed)
                self._listen()
        except Exception as error:  # noqa: BLE001  told to the driver, which waits
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _listen(self) -> None:
        with self._changed:
            flying = list(self._flights)
        done = ray.wait(flying, num_returns=1, timeout=POLL_SECONDS)[0] if flying else []
        with self._changed:
            landed = [(ref, *self._flights.pop(ref)) for ref in done]
            for _, worker, _ in landed:
                self._lanes.free(worker)
            self._dispatch()  # before the reply is read, so that the worker needn't wait for that
        for ref, _, parcel in landed:
            self._land(parcel, *_receive(ref, parcel))

    def _land(self, parcel: Parcel, reply: Message, state: RecordDict | None) -> None:
        meta = parcel.message.metadata
        with self._changed:
            if state is not None and meta.run_id == self._run.run_id:
                self._states.pop(parcel.node, None)
                if state:
                    self._states[parcel.node] = state
            if meta.message_id in self._awaited:
                self._awaited.remove(meta.message_id)
                self._replies[meta.message_id] = reply
            self._lanes.release(parcel.node)
            self._dispatch()
            self._changed.notify_all()


def _receive(ref: Any, parcel: Parcel) -> tuple[Message, RecordDict | None]:
    """Return a worker's reply and state, or an error reply if it has none."""
    try:
        reply, state = ray.get(ref)
    except ray.exceptions.RayActorError as error:
        reason = f"The worker died {TASK_RETRIES + 1} times over this message, perhaps for want of memory: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_CRASHED, reason), reply_to=parcel.message), None
    except ray.exceptions.RayError as error:
        reason = f"Ray could not run this message or return its reply: {error}"
        return Message(Error(ErrorCode.UNKNOWN, reason), reply_to=parcel.message), None
    number(reply, str(uuid4()))
    return reply, state
