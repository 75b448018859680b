"""Where a message says that the states of users are: a folder, or one that is lent to Ray nodes which do not have its disk.

It is the folder of the run, on the machine that leads it: a run goes on after a crash, whatever became of the other machines.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from clients.lanes import MessageLost
from fedclip.storage import Chunk, Storage
from fedclip.user_states import StatesInFolder, UserStates

LENT = "ray"
"""A place is a folder, or `ray:KEEPER:NODE:FOLDER`: a keeper on the Ray node of the folder, whose workers use it directly."""


@contextmanager
def lent(folder: Path) -> Iterator[str]:
    """Lend a folder of this machine to all nodes of the Ray cluster, and give what messages say of it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    name, node = f"states-{uuid4().hex}", ray.get_runtime_context().get_node_id()
    # Files are all that it knows, so that Ray may start it anew, and do what it was at again.
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"name": name, "num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    keeper: Any = ray.remote(Storage).options(**options).remote()
    try:
        yield f"{LENT}:{name}:{node}:{folder.absolute()}"
    finally:
        if ray.is_initialized():
            ray.kill(keeper)


def states_at(place: str) -> UserStates | None:
    """Return the states of users at a place; None where it is empty: the chain keeps none."""
    if not place.startswith(f"{LENT}:"):
        return StatesInFolder(Path(place)) if place else None
    import ray

    _, name, node, folder = place.split(":", 3)
    here = ray.get_runtime_context().get_node_id() == node
    return StatesInFolder(Path(folder), None if here else Elsewhere(ray.get_actor(name)))


class Elsewhere(Storage):
    """The files of another machine, by way of an actor there that is a `Storage`.

    What the file operations raise there is raised here. Where the actor cannot be asked, each raises `MessageLost`: no user is to blame.
    """

    def __init__(self, keeper: Any) -> None:
        self._keeper = keeper

    def exists(self, path: Path) -> bool:
        """Return whether there is a file."""
        return bool(self._ask("exists", path))

    def read(self, path: Path) -> bytes:
        """Return a file's content."""
        return cast(bytes, self._ask("read", path))

    def names(self, folder: Path) -> list[str]:
        """Return the names of the files in a folder, sorted; none where there is no folder."""
        return cast(list[str], self._ask("names", folder))

    def folders(self, folder: Path) -> list[str]:
        """Return the names of the folders in a folder, sorted; none where there is no folder."""
        return cast(list[str], self._ask("folders", folder))

    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it, where they are not there."""
        self._ask("make_folder", folder)

    def write(self, path: Path, chunks: Iterable[Chunk]) -> None:
        """Make a file anew, or in the place of an old one. Nothing is synced."""
        self._ask("write", path, [bytes(chunk) for chunk in chunks])

    def append(self, path: Path, data: bytes) -> None:
        """Refuse: what is done again where a machine died must not add twice."""
        raise NotImplementedError("Files of another machine are written whole.")

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file to its first bytes. Nothing is synced."""
        self._ask("truncate", path, size)

    def sync(self, path: Path) -> None:
        """Wait until a file's content is on the disk."""
        self._ask("sync", path)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file another name, in the place of a file that has it."""
        self._ask("rename", old, new)

    def sync_folder(self, folder: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        self._ask("sync_folder", folder)

    def remove(self, path: Path) -> None:
        """Take a file away."""
        self._ask("remove", path)

    def _ask(self, operation: str, *arguments: Any) -> Any:
        import ray

        try:
            return ray.get(getattr(self._keeper, operation).remote(*arguments))
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise MessageLost(f"The states of users cannot be reached: {error}") from error
