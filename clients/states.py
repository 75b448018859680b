"""Where a message says that the states of users are: a folder, or one that is lent to Ray nodes which do not have its disk.

It is the folder of the run, on the machine that leads it: a run goes on after a crash, whatever became of the other machines. Each of
those keeps copies of what was written there last, so that a user's newest state need not cross the network again.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from clients.lanes import MessageLost
from fedclip.sealed import SealedFileError
from fedclip.transform import State
from fedclip.user_states import StatesInFolder, UserStates, file_of, state_in

log = logging.getLogger(__name__)

LENT = "ray"
"""A place is a folder, or `ray:KEEPER:NODE:FOLDER`: a keeper on the Ray node of the folder, whose workers use it directly."""

NAMESPACE = "fedclip"
"""Of keepers, in Ray: whoever clears up asks for those of other runs too."""

AT_A_TIME = 8
"""Calls that a keeper is at: it waits for its disk most of the time."""

NEAR_VERSIONS = 2
"""Newest copies of each user on another machine: of the round that is not over, and what it started from, for when that is done again."""

LEFT_FREE = 0.1
"""Of the disk where copies are: Ray, which has its own files there, fails where it is full."""

CLEAR_SECONDS = 30.0
"""That machines have to take copies away; who does not answer is taken for lost."""


@contextmanager
def lent(folder: Path) -> Iterator[str]:
    """Lend a folder of this machine to all nodes of the Ray cluster, and give what messages say of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from clients.ray_worker import own_runtime

    def on(node: str) -> dict[str, Any]:
        return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False), "runtime_env": own_runtime()}

    name, own = f"states-{uuid4().hex}", ray.get_runtime_context().get_node_id()
    # Files are all that it knows, so that Ray may start it anew, and do what it was at again.
    options = {"name": name, "namespace": NAMESPACE, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": AT_A_TIME, **on(own)}
    keeper: Any = ray.remote(StatesInFolder).options(**options).remote(folder.absolute())
    try:
        yield f"{LENT}:{name}:{own}:{folder.absolute()}"
    finally:
        if ray.is_initialized():
            # First, so that it answers nobody any more. Who has its answer may yet write a copy: it goes at the end of the next run.
            ray.kill(keeper)
            nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray gives it no types
            cleared = [ray.remote(clear).options(max_retries=0, **on(node["NodeID"])).remote(name) for node in nodes]
            ready, _ = ray.wait(cleared, num_returns=len(cleared), timeout=CLEAR_SECONDS)
            for node, answer in zip(nodes, cleared, strict=True):
                try:
                    if answer in ready:
                        ray.get(answer)
                        continue
                    why = f"no answer in {CLEAR_SECONDS:g} s"
                except ray.exceptions.RayError as error:
                    why = str(error)
                where = f"{node['NodeID']} ({node['NodeManagerHostname']})"
                log.warning(
                    "Copies of users' states may be left on the Ray node %s; the end of the next run there tries again: %s", where, why
                )


def near(keeper: str) -> Path:
    """Return the folder of this Ray node for copies of what a keeper has."""
    import ray

    folder, start = _copies()
    return folder / f"{start}{keeper}-{ray.get_runtime_context().get_node_id()}"


def clear(gone: str) -> None:
    """Take away the copies on this machine of what a keeper had that is gone, and of others of this cluster whose run was killed.

    Raises:
        OSError: some are still there.
    """
    import ray

    left: list[Path] = []
    folder, start = _copies()
    for copies in (path for path in folder.iterdir() if path.name.startswith(start)):
        keeper, _, _ = copies.name.removeprefix(start).rpartition("-")
        try:
            there = keeper != gone and bool(ray.get_actor(keeper, NAMESPACE))
        except ValueError:
            there = False
        if not there:
            shutil.rmtree(copies, ignore_errors=True)  # nodes of one machine do so side by side
            left += [copies] if os.path.lexists(copies) else []
    if left:
        raise OSError(f"{', '.join(map(str, left))} cannot be removed; see whose they are, and remove them.")


@contextmanager
def copies_in(folder: Path) -> Iterator[StatesInFolder]:
    """Give the copies in a folder, by whatever name it has meanwhile: others may have the right to move it, or put another in its place.

    Raises:
        OSError: it is not there, or not for this user alone.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise PermissionError(f"{folder} is of user {status.st_uid} with mode {status.st_mode:o}, expected one for this user alone.")
        yield StatesInFolder(Path(f"/proc/self/fd/{descriptor}"), kept=NEAR_VERSIONS)
    finally:
        os.close(descriptor)


def _copies() -> tuple[Path, str]:
    """Return where this machine has its folders of copies, and how the names of this cluster's begin."""
    import ray

    context = ray.get_runtime_context()
    folder = getattr(context, "get_temp_dir", tempfile.gettempdir)()  # older releases of Ray do not say
    return Path(folder), f"{NAMESPACE}-{context.gcs_address}-"


def states_at(place: str) -> UserStates | None:
    """Return the states of users at a place; None where it is empty: the chain keeps none."""
    if not place.startswith(f"{LENT}:"):
        return StatesInFolder(Path(place)) if place else None
    import ray

    _, name, node, folder = place.split(":", 3)
    if ray.get_runtime_context().get_node_id() == node:
        return StatesInFolder(Path(folder))
    return StatesElsewhere(Path(folder), ray.get_actor(name, NAMESPACE), near(name))


class StatesElsewhere:
    """The states of users in a folder of another machine, and copies of the newest that were written here.

    What cannot be done there is raised here. Where nobody answers, all raise `MessageLost`: no user is to blame. A copy that is damaged
    or cannot be written costs time, and nothing else: what counts as a user's state is asked for, with the checksum of its file, and what
    is not here comes from there.

    Args:
        folder: the folder there.
        keeper: an actor there, that is a `StatesInFolder`.
        near: the folder here; made when first needed, and used as long as it is for this user alone.
    """

    def __init__(self, folder: Path, keeper: Any, near: Path) -> None:
        self._folder, self._keeper, self._near = folder, keeper, near
        self._staged: list[Path] = []

    def load(self, user: int, round: int, template: State) -> State:
        """Return what the user had after its last round before `round`; the template where it was never seen.

        Raises:
            SealedFileError, ValueError: as `StatesInFolder`, of the file there.
        """
        newest = self._ask("newest_digest", user, round)
        if newest is None:
            return template
        path, digest = newest
        with suppress(OSError, SealedFileError, ValueError), copies_in(self._near) as copies:
            return state_in(copies, copies.folder / path.relative_to(self._folder), user, template, digest)
        return state_in(self, path, user, template)

    def read(self, path: Path) -> bytes:
        """Return the content of a file there."""
        return bytes(self._ask("read", path))

    def stage(self, user: int, round: int, attempt: int, state: State) -> None:
        """Keep what the user has after a round that is not over yet; the oldest of its states goes."""
        content = [bytes(chunk) for chunk in file_of(user, state)]
        self._staged.append(self._ask("put", user, round, attempt, content))
        with suppress(OSError):
            disk = shutil.disk_usage(self._near.parent)
            if disk.free - sum(map(len, content)) > LEFT_FREE * disk.total:
                self._near.mkdir(mode=0o700, exist_ok=True)
                with copies_in(self._near) as copies:
                    copies.put(user, round, attempt, content)

    def sync(self) -> None:
        """Wait until all that was staged since the last time is durable there."""
        self._ask("settle", self._staged)
        self._staged = []

    def _ask(self, operation: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._keeper, operation).remote(*arguments))
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise MessageLost(f"The states of users cannot be reached: {error}") from error
