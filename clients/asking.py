"""`Asking`: messages to real devices, and their replies as they come, until a deadline. Who was away is asked again."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from flwr.app import Message

from clients.gate import Asked, Cause, Gate
from clients.identity import is_unreached
from clients.link import Link, LinkError, Unanswered
from clients.pulling import Oversized

SECONDS_BETWEEN_PULLS = 0.5

ROUNDS_LATE = 20
"""What comes later than so many rounds is not even counted."""


class Asking:
    """Sends messages and yields the replies, one time of asking after another.

    Args:
        link: the SuperLink.
        deadline: seconds that replies are waited for.
        reject: is told of each reply that is none: the name of its node, the cause and what is said of it.
    """

    def __init__(self, link: Link, deadline: float, reject: Callable[[str, Cause, str], None]) -> None:
        self._link, self._deadline, self._reject = link, deadline, reject
        self._sent: dict[Asked, Message] = {}
        self._late: deque[tuple[Gate, dict[str, Asked]]] = deque(maxlen=ROUNDS_LATE)

    def push(self, out: Iterable[tuple[Message, Asked]]) -> dict[str, Asked]:
        """Send messages, and return what they ask by their ids. One that the SuperLink does not take is a node that does not answer.

        Raises:
            LinkError: the SuperLink does not answer within the deadline, or has ended the run.
        """
        pairs = list(out)
        self._sent = {asked: message for message, asked in pairs}
        return self._push([asked for _, asked in pairs])

    def replies(self, out: dict[str, Asked], gate: Gate, enough: Callable[[], bool] = lambda: False) -> Iterator[tuple[Asked, Message]]:
        """Yield replies as they come, one at a time, until all have come, enough have, or the deadline is there.

        A node that was away, or went, is asked again when it is back.

        Raises:
            LinkError: the SuperLink has ended the run. One that only does not answer is asked until the deadline.
        """
        waiting, absent, end = dict(out), list[Asked](), time.monotonic() + self._deadline
        while (waiting or absent) and time.monotonic() < end and not enough():
            before = len(waiting)
            for id in list(waiting):
                for asked, reply in self._pulled(id, waiting, gate):
                    if is_unreached(reply):
                        self._sent[asked] = _copy(self._sent[asked])  # one id for it, however often it is pushed
                        absent.append(asked)
                    else:
                        yield asked, reply
                if enough():
                    break
            if len(waiting) == before:
                time.sleep(SECONDS_BETWEEN_PULLS)
                waiting |= self._push_again(absent) if absent else {}
        if waiting:
            self._late.append((gate, waiting))

    def count_late(self) -> None:
        """Count the replies that have come since a round went on without them, and drop them."""
        for gate, waiting in self._late:
            for id in [id for id, asked in waiting.items() if asked.nonce]:
                for asked, reply in self._pulled(id, waiting, gate):
                    if not is_unreached(reply):
                        self._reject(asked.name, "late", "")

    def _push(self, asked: list[Asked], patience: float | None = None) -> dict[str, Asked]:
        ids = self._link.push([self._sent[of] for of in asked], patience)
        return {id: of for id, of in zip(ids, asked, strict=True) if id}

    def _push_again(self, absent: list[Asked]) -> dict[str, Asked]:
        """Send the same again to those nodes that are back; each is still taken once. They leave the list of the absent."""
        try:
            there = self._link.node_ids(patience=0)
            back = [asked for asked in absent if asked.node in there]
            pushed = self._push(back, patience=0)
        except Unanswered:
            return {}  # the next time
        absent[:] = [asked for asked in absent if asked.node not in there]
        return pushed

    def _pulled(self, id: str, waiting: dict[str, Asked], gate: Gate) -> Iterator[tuple[Asked, Message]]:
        asked = waiting[id]
        try:
            replies = self._link.pull(id, gate.limit(asked))
        except Unanswered:
            return  # it is asked again
        except LinkError:
            raise
        except Exception as error:  # noqa: BLE001  Flower raises all kinds of things at a reply that is none
            del waiting[id]
            self._reject(asked.name, "oversized" if isinstance(error, Oversized) else "malformed", str(error))
            return
        if replies:
            del waiting[id]
            yield asked, replies.pop()


def _copy(message: Message) -> Message:
    to = message.metadata
    return Message(message.content, to.dst_node_id, to.message_type, ttl=to.ttl, group_id=to.group_id)
