"""`Link`: what rounds ask of a SuperLink, which may be away for a while. What it did not answer is asked again; nothing is sent twice.

Flower asks again by itself where nobody listens, or a proxy says that nobody does. All else it raises: an error of the SuperLink's own, a
connection that breaks off in a way it does not know, objects that were not taken. Beside `identity` and `pulling`, Flower's inner side:
the names of three errors.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import InvalidRunStatusException, RunNotRunningException
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # it has no types

from clients.pulling import Pulls

SECONDS_BETWEEN_TRIES = 0.5

UNANSWERED = (httpx.HTTPError, ObjectPushError, DecodeError)
"""What is raised where the SuperLink has not answered, or not as a SuperLink does."""

ASK_AGAIN = (408, 429)
"""Of the statuses that blame the request, those that blame its time."""

RESUME = "What was done is kept: go on with the run by resume (docs/devices.md)."

Answer = TypeVar("Answer")


class LinkError(RuntimeError):
    """The SuperLink refuses what a round needs, or has ended the run."""


class Unanswered(LinkError):  # noqa: N818 - the SuperLink's silence
    """The SuperLink has not answered in time."""


class Link:
    """A SuperLink, asked again until it answers.

    A message that is pushed again has the id that it had, under which a SuperLink keeps it once.

    Args:
        grid: Flower's own, or one in memory.
        patience: seconds for which it is asked again.
    """

    def __init__(self, grid: Grid, patience: float) -> None:
        self._grid, self._patience, self._pulls = grid, patience, Pulls(grid)

    def nodes(self) -> list[Any]:
        """Return the nodes that are there, as Flower describes them.

        Raises:
            LinkError: the SuperLink has ended the run, or did not answer in time.
        """
        grid: Any = self._grid
        return self._answer("which nodes are there", lambda: list(grid.get_nodes()), self._patience)

    def node_ids(self, patience: float | None = None) -> set[int]:
        """Return the ids of the nodes that are there. `patience` in the place of the usual. Raises as `nodes`."""
        patience = self._patience if patience is None else patience
        return self._answer("which nodes are there", lambda: {*self._grid.get_node_ids()}, patience)

    def push(self, messages: Iterable[Message], patience: float | None = None) -> list[str | None]:
        """Send messages and return their ids; None for one that the SuperLink does not take.

        Raises:
            LinkError: as `nodes`; or a single message is too long for it, or for a proxy before it.
        """
        pushed, patience = list(messages), self._patience if patience is None else patience
        if not pushed:
            return []
        ids = self._answer("to take messages", lambda: list(self._grid.push_messages(pushed)), patience)
        if len(ids) == len(pushed):
            return [id or None for id in ids]
        if len(pushed) == 1:  # Flower says in its log that the request is too long, and returns nothing
            raise LinkError(f"A single message is too long for the SuperLink; let its proxy take longer requests. {RESUME}")
        return [id for message in pushed for id in self.push([message], patience)]

    def pull(self, message_id: str, limit: int) -> list[Message]:
        """Return the reply to a message as `Pulls.pull` does, once.

        Raises:
            Unanswered: the SuperLink does not answer; the reply can still be pulled.
            LinkError: it has ended the run.
            Oversized, Exception: as `Pulls.pull`.
        """
        try:
            return self._pulls.pull(message_id, limit)
        except (RunNotRunningException, InvalidRunStatusException) as error:
            raise _over() from error
        except httpx.HTTPError as error:
            raise Unanswered(f"The SuperLink was asked for a reply and failed ({_said(error)}).") from error

    def _answer(self, what: str, ask: Callable[[], Answer], patience: float) -> Answer:
        end = time.monotonic() + patience
        while True:
            try:
                return ask()
            except (RunNotRunningException, InvalidRunStatusException) as error:
                raise _over() from error
            except UNANSWERED as error:
                if _refuses(error):
                    raise LinkError(f"The SuperLink was asked {what} and refused ({_said(error)}); see its log. {RESUME}") from error
                if time.monotonic() + SECONDS_BETWEEN_TRIES > end:
                    raise Unanswered(
                        f"The SuperLink was asked {what} for {patience:g} s and failed ({_said(error)}); see its log, and start it again. "
                        + RESUME
                    ) from error
            time.sleep(SECONDS_BETWEEN_TRIES)


def _over() -> LinkError:
    return LinkError(f"The SuperLink has ended this run: by flwr stop, or as it took it for dead. {RESUME}")


def _refuses(error: Exception) -> bool:
    status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
    return 400 <= status < 500 and status not in ASK_AGAIN


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
