"""`Pulls`: replies are fetched up to a limit, and nobody waits for one that is not there whole. Beside `identity`, Flower's inner side.

A SuperLink gives a reply away once, as soon as its sender has named the objects that it consists of, and before they are there. Flower
then waits for them, for minutes if need be, and takes as many bytes as come. A sender may leave one out, may send without end, and may say
that an array is one and the same object ten million times over, which Flower would write out. None of this is to cost the others a round.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import httpx
from flwr.app import Array, Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_object_body
from flwr.supercore.inflatable.inflatable_object import get_object_head_values_from_object_content as head_of

PIECE = "ArrayChunk"
"""Flower's name for what the bytes of an array are made of."""

AROUND = 4096
"""Bytes that Flower writes around an object, at most."""


class Oversized(Exception):  # noqa: N818 - an event to count
    """A reply with more bytes than it may have; the rest of it was not fetched."""


class _NotYet(Exception):  # noqa: N818 - not a fault
    """An object of a reply is not there."""


@dataclass
class _Begun:
    """What the SuperLink has said of a reply, which it says once, and the request for an object that was not there."""

    response: Any = None
    missing: Any = None


class Pulls:
    """Pulls the replies to messages, one after another.

    Args:
        grid: where they are; Flower's own, or one whose replies are in memory already.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid, self._begun, self._limit = grid, dict[str, _Begun](), 0

    def pull(self, message_id: str, limit: int) -> list[Message]:
        """Return the reply to a message as `Grid.pull_messages` does; nothing as long as it is not there whole.

        Args:
            message_id: of the message.
            limit: bytes that the reply may have, as it travels and as it is when it is here.

        Raises:
            Oversized: it has more.
            httpx.HTTPError: the SuperLink does not answer; the reply can still be pulled.
            Exception: it is no reply. Flower raises all kinds of things then.
        """
        client: Any = getattr(self._grid, "_runtime_client", None)
        if client is None:
            return list(self._grid.pull_messages([message_id]))
        begun = self._begun.pop(message_id, None) or _Begun()
        try:
            replies = self._pulled(client, message_id, begun, limit)
        except (_NotYet, httpx.HTTPError) as error:
            if begun.response is not None:
                self._begun[message_id] = begun
            if isinstance(error, _NotYet):
                return []
            raise
        return replies

    def _pulled(self, client: Any, message_id: str, begun: _Begun, limit: int) -> list[Message]:
        if begun.missing is not None:  # ask for this one alone: all others would be fetched for nothing
            _there(client.PullObject(begun.missing))
        counted = _Counted(client.PullMessages, client.PullObject, begun, limit)
        hooks, self._limit = client._client.event_hooks, limit
        if self._before_the_body not in hooks["response"]:
            client._client.event_hooks = hooks | {"response": [*hooks["response"], self._before_the_body]}
        client.PullMessages, client.PullObject = counted.messages, counted.object
        try:
            return list(self._grid.pull_messages([message_id]))
        finally:
            del client.PullMessages, client.PullObject  # the methods of its class are there again

    def _before_the_body(self, response: httpx.Response) -> None:
        """Stop before a single object that is too long is read. It stays: Flower's threads may go on when a pull is over."""
        pulled = response.request.url.path.endswith(("/pull-object", "/pull-messages"))
        if pulled and int(response.headers.get("content-length", 0)) > self._limit + AROUND:
            raise Oversized(f"over {self._limit} bytes")


@dataclass
class _Counted:
    """Stands before two calls of Flower's client, which makes the second one on a few threads."""

    pull_messages: Any
    pull_object: Any
    begun: _Begun
    limit: int
    total: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    lock: Lock = field(default_factory=Lock)

    def messages(self, request: Any) -> Any:
        """Ask whether there is a reply, if that is not known yet."""
        response = self.pull_messages(request) if self.begun.response is None else self.begun.response
        if response.messages_list:
            self.begun.response = response
        self._add(response.ByteSize())
        return response

    def object(self, request: Any) -> Any:
        """Ask for an object."""
        response = self.pull_object(request)
        try:
            _there(response)
        except _NotYet:
            self.begun.missing = request
            raise
        if response.object_found:
            with self.lock:
                self._count(request.object_id, response.object_content)
        return response

    def _count(self, id: str, content: bytes) -> None:
        """Count an object, and what is made of it: each time that an array names a piece, its bytes are written out once more."""
        kind, children, _ = head_of(content)
        if self.uses[id] and kind != PIECE:
            raise ValueError(f"an array of {kind}")
        self.kinds[id], self.sizes[id] = kind, len(content)
        self._add(len(content) * max(1, self.uses[id]))
        if kind != Array.__qualname__:
            return
        places = json.loads(get_object_body(content, Array))["arraychunk_ids"]
        for piece, times in Counter(children[place] for place in places).items():
            if self.kinds.get(piece, PIECE) != PIECE:  # arrays of arrays would multiply
                raise ValueError(f"an array of {self.kinds[piece]}")
            self._add(self.sizes.get(piece, 0) * (times if self.uses[piece] else times - 1))
            self.uses[piece] += times

    def _add(self, size: int) -> None:
        self.total += size
        if self.total > self.limit:
            raise Oversized(f"over {self.limit} bytes")


def _there(response: Any) -> None:
    if response.object_found and not response.object_available:
        raise _NotYet
