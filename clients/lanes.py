"""Which message of a `RayGrid` goes to which worker; knows nothing of Ray."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from clients.identity import SERVER_NODE_ID

FIRST_NODE_ID = SERVER_NODE_ID + 1


class MessageLost(BaseException):
    """Raised on a worker that lost what it needs of the cluster: another one is to do its message again, as if it had died.

    No `Exception`, so that nobody takes it for a failure of the app or of a user.
    """


@dataclass(frozen=True)
class Parcel:
    """A message on its way: without its content, whose records go apart, so that what many messages share is stored once.

    `losses` says how many workers were lost over it.
    """

    node: int
    message: Message
    names: tuple[str, ...]
    records: tuple[Any, ...]
    losses: int = 0

    @property
    def id(self) -> str:
        """The id of the message, which its reply refers to."""
        return self.message.metadata.message_id


class Lanes:
    """Which message goes to which worker next: first come first served, never two at once to a worker or a node.

    Pinned, a worker that is expected has a queue of its own for its node; what no worker has a queue for, any free one takes.
    """

    def __init__(self, *, pinned: bool) -> None:
        """Start with no messages and no workers."""
        self.pinned = pinned
        self._free: deque[int] = deque()
        self._own: dict[int, deque[Parcel]] = {}
        self._common: deque[Parcel] = deque()
        self._lost: deque[Parcel] = deque()  # to be done again
        self._held: dict[int, deque[Parcel]] = {}  # node at work -> the messages it has yet to get

    def expect(self, worker: int) -> None:
        """Keep the messages of a worker's node for it from now on, also while it is not free yet."""
        if self.pinned:
            self._own.setdefault(worker, deque())

    def leave(self, worker: int) -> None:
        """Forget a worker that was lost; what waited for it goes to whoever is free."""
        if worker in self._free:
            self._free.remove(worker)
        self._common.extend(self._own.pop(worker, ()))

    def push(self, parcel: Parcel) -> None:
        """Queue a message."""
        self._lane(parcel.node).append(parcel)

    def again(self, parcel: Parcel, *, holds: bool = True) -> None:
        """Queue a message anew before all others, for any worker: the one that had it was lost.

        `holds` says that its node is still at work with it; otherwise the node may have gone on to another message.
        """
        if holds:
            self.release(parcel.node)
        self._lost.append(parcel)

    def pairs(self) -> Iterator[tuple[int, Parcel]]:
        """Give each free worker that has one its next message."""
        for worker in [self._free.popleft() for _ in range(len(self._free))]:
            parcel = self._next(self._lost) or self._next(self._own.get(worker)) or self._next(self._common)
            if parcel is None:
                self._free.append(worker)
            else:
                self._held[parcel.node] = deque()
                yield worker, parcel

    def free(self, worker: int) -> None:
        """Let a worker have another message."""
        self._free.append(worker)

    def release(self, node: int) -> None:
        """Let the next messages of a node go, before all others as they have waited longest."""
        self._lane(node).extendleft(reversed(self._held.pop(node, ())))

    def drop(self, message_ids: set[str]) -> None:
        """Forget messages that no worker has begun."""
        for lane in (*self._own.values(), self._common, self._lost, *self._held.values()):
            kept = [parcel for parcel in lane if parcel.id not in message_ids]
            lane.clear()
            lane.extend(kept)

    def _lane(self, node: int) -> deque[Parcel]:
        return self._own.get(node - FIRST_NODE_ID, self._common)

    def _next(self, lane: deque[Parcel] | None) -> Parcel | None:
        while lane and lane[0].node in self._held:
            self._held[lane[0].node].append(lane.popleft())
        return lane.popleft() if lane else None
