"""Who this process is to Flower: the one place that touches what Flower keeps to itself.

Flower's own processes are told their run, task and node before they create a `Message`; any other process that creates one has to say so
itself. Flower has no public call for it, so the private names are used here and nowhere else.
"""

import copy
import json
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from flwr.app import Array, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content

try:
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise ImportError(
        f"flwr {version('flwr')} has no flwr.supercore.task_identity.TaskIdentity: it was moved or renamed after 1.41, for which this was "
        "written. Install flwr[simulation]==1.41.*, or follow Message.__init__ to its new place and change clients/identity.py."
    ) from error

SERVER_NODE_ID = 1  # Flower's own number for the ServerApp, flwr.common.constant.SUPERLINK_NODE_ID
TASK_ID = 1  # Flower's simulation gives every process this one; nothing reads it where no SuperLink hands tasks out


@dataclass(frozen=True)
class Identity:
    """The run, node and task for which a process creates messages; None where it hasn't been told.

    Args:
        run_id: Flower's number of the run.
        node_id: The node that the messages come from; `SERVER_NODE_ID` in the ServerApp.
        task_id: The task within the run.
    """

    run_id: int | None
    node_id: int | None
    task_id: int | None = TASK_ID


def assume(identity: Identity) -> Identity:
    """Give this process an identity, so that it can create Flower messages.

    Args:
        identity: Whom every `Message` that this process creates from now on comes from.

    Returns:
        The identity before, to be assumed again at the end.
    """
    before = Identity(TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
    for name in ("run_id", "node_id", "task_id"):
        setattr(TaskIdentity, name, getattr(identity, name))  # by name, as None, which takes an identity away, isn't in the setters' types
    return before


class Oversized(Exception):  # noqa: N818 - an event to count
    """A reply with more bytes than it may have; the rest of it was not fetched."""


class Stalled(Exception):  # noqa: N818 - an event to count
    """A reply that was not there in whole when it had to be: its node said that it comes, and did not send all of it."""


def pull_at_most(grid: Grid, message_id: str, limit: int, until: float = math.inf) -> list[Message]:
    """Return the reply to a message as `grid.pull_messages` does, but fetch no more than `limit` bytes of it, and none after `until`.

    Flower fetches all of a reply, however long, before it gives it away, and waits up to hours for parts that a node has announced; its
    client is told here to stop on the way. An array may name a part of it time and again: it counts by what it would be put together.

    Raises:
        Oversized: there is more.
        Stalled: at `until`, in the seconds of `time.monotonic`, it was not there in whole.
    """
    client = getattr(grid, "_runtime_client", None)
    if client is None:  # a grid whose replies are in memory already
        return list(grid.pull_messages([message_id]))
    meter, pull = _Meter(limit), client.PullObject

    def counted(request: Any) -> Any:
        if time.monotonic() >= until:
            raise Stalled("a part of it had not come")
        response = pull(request)
        meter.add(request.object_id, response.object_content)
        return response

    client.PullObject = counted
    try:
        return list(grid.pull_messages([message_id]))
    finally:
        del client.PullObject  # the method of its class is there again


class _Meter:
    """Counts the bytes of the objects of a message as they are fetched, on several threads, and those of the arrays they make up."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._fetched = self._made = 0
        self._sizes, self._named = dict[str, int](), Counter[str]()

    def add(self, object_id: str, content: bytes) -> None:
        parts = Counter(_parts_of(content))
        with self._lock:
            self._fetched += len(content)
            self._sizes[object_id] = len(content)
            self._made += self._named[object_id] * len(content) + sum(self._sizes.get(part, 0) * n for part, n in parts.items())
            self._named += parts
            if max(self._fetched, self._made) > self._limit:
                raise Oversized(f"over {self._limit} bytes")


def _parts_of(content: bytes) -> list[str]:
    """Return the ids of the objects that an array is put together of, as often as they are in it; of any other object none."""
    if not content.startswith(b"Array "):
        return []
    _, children, _ = get_object_head_values_from_object_content(content)
    return [children[n] for n in json.loads(get_object_body(content, Array))["arraychunk_ids"]]


def is_unreached(reply: Message) -> bool:
    """Return whether a reply is the SuperLink's own word that the node is not there, or has lost the message: it may be sent again."""
    return reply.has_error() and reply.error.code in (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE)


def number(message: Message, message_id: str) -> None:
    """Give a message its id, which replies refer to; Flower's links do the same, and `Metadata` has no setter for it."""
    message.metadata.__dict__["_message_id"] = message_id


def stripped(message: Message, message_id: str) -> Message:
    """Number a message, and return a copy of it without its content; pushed twice, it leaves two copies with two ids."""
    number(message, message_id)
    bare = copy.copy(message)
    bare.__dict__["_metadata"] = copy.copy(message.metadata)
    bare.content = RecordDict()
    return bare
