"""Who this process is to Flower: the one place that touches what Flower keeps to itself.

Flower's own processes are told their run, task and node before they create a `Message`; any other process that creates one has to say so
itself. Flower has no public call for it, so the private names are used here and nowhere else.
"""

import copy
from dataclasses import dataclass
from importlib.metadata import version

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode

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


def is_unreached(reply: Message) -> bool:
    """Return whether a reply is the SuperLink's own word that the node is not there: the message may be sent again."""
    return reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE


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
