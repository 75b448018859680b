"""Which message of a `RayGrid` goes to which worker; knows nothing of Ray."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from clients.identity import SERVER_NODE_ID

FIRST_NODE_ID = SERVER_NODE_ID + 1


@dataclass(frozen=True)
class Parcel:
    """A message on its way: without its content, whose records go apart, so that what many messages share is stored once."""

    node: int
    message: Message
    names: tuple[str, ...]
    records: tuple[Any, ...]


class Lanes:
    """Which message goes to which worker next: first come first served, never two at once to a worker or a node."""

    def __init__(self, workers: int, *, pinned: bool) -> None:
        """Start with no messages and all workers free; pinned, each worker has a queue of its own instead of all sharing one."""
        self._free = deque(range(workers))
        self._lanes: list[deque[Parcel]] = [deque() for _ in range(workers if pinned else 1)]
        self._held: dict[int, deque[Parcel]] = {}  # node at work -> the messages it has yet to get

    def push(self, parcel: Parcel) -> None:
        """Queue a message."""
        self._lane(parcel.node).append(parcel)

    def pairs(self) -> Iterator[tuple[int, Parcel]]:
        """Give each free worker that has one its next message."""
        for worker in [self._free.popleft() for _ in range(len(self._free))]:
            lane = self._lanes[worker % len(self._lanes)]
            while lane and lane[0].node in self._held:
                self._held[lane[0].node].append(lane.popleft())
            if lane:
                self._held[lane[0].node] = deque()
                yield worker, lane.popleft()
            else:
                self._free.append(worker)

    def free(self, worker: int) -> None:
        """Let a worker have another message."""
        self._free.append(worker)

    def release(self, node: int) -> None:
        """Let the next messages of a node go, before all others as they have waited longest."""
        self._lane(node).extendleft(reversed(self._held.pop(node)))

    def drop(self, message_ids: set[str]) -> None:
        """Forget messages that no worker has begun."""
        for lane in (*self._lanes, *self._held.values()):
            kept = [parcel for parcel in lane if parcel.message.metadata.message_id not in message_ids]
            lane.clear()
            lane.extend(kept)

    def _lane(self, node: int) -> deque[Parcel]:
        return self._lanes[(node - FIRST_NODE_ID) % len(self._lanes)]
