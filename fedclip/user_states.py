"""What is remembered of a user between rounds: by user id, made at the first participation, committed with the round.

It is the state of the client chain, and a control variate where the method has them.
A state of round r counts once round r is over: a user who takes part in a later round starts from the newest state of a round before it.
Whatever a round that did not end has left behind is rolled back. There is no eviction: it would make one user's state depend on others.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from fedclip.layout import Layout
from fedclip.sealed import Reader, digest_of, pack_state, read_sealed, sealed, unpack_state
from fedclip.shapes import shapes_only, tensor_bytes
from fedclip.storage import Chunk, Storage
from fedclip.transform import State

if TYPE_CHECKING:
    from fedclip.method import Method

KEPT_VERSIONS = 3
"""Newest states kept of each user: as many as the checkpoints that a run may have to go back to, and one more."""

USERS_A_FOLDER = 1000

TOP_OF_HALF = 2.0**15
"""The largest magnitude of a tensor is scaled to at most this power of two, so that float16 keeps 11 bits of all but tiny values."""

KIND = "user-state"
END = ".state"


def halved(state: State) -> State:
    """Return a state with each float32 tensor as a pair: float16 numbers, and the power of two that they were divided by."""
    if isinstance(state, tuple):
        return tuple(halved(part) for part in state)
    if not isinstance(state, torch.Tensor) or state.dtype != torch.float32:
        return state
    largest = float(state.abs().amax()) if state.numel() else 0.0
    scale = 2.0 ** math.ceil(math.log2(largest / TOP_OF_HALF)) if largest >= 2.0**-100 else 1.0
    return (state / scale).half(), scale


def restored(kept: State, template: State) -> State:
    """Return the state that `halved` made smaller, in the structure of a template."""
    if isinstance(template, tuple):
        return tuple(restored(part, of) for part, of in zip(kept, template, strict=True))
    if not isinstance(template, torch.Tensor) or template.dtype != torch.float32:
        return kept
    return kept[0].float() * kept[1]


def apart(state: State, vector: torch.Tensor) -> State:
    """Return a state that shares no memory with a vector that will change."""
    if isinstance(state, tuple):
        return tuple(apart(part, vector) for part in state)
    shares = isinstance(state, torch.Tensor) and state.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    return state.clone() if shares else state


@dataclass(frozen=True)
class Forecast:
    """How much room the states of users will take.

    Attributes:
        participations: how often a user takes part over the run, on average.
        users: how many users take part at least once, as expected.
        each: bytes of one state.
        total: bytes of all that is kept, as expected: of each user the newest few states.
    """

    participations: float
    users: float
    each: int
    total: float

    @classmethod
    def of(cls, method: "Method", layout: Layout, rounds: int) -> "Forecast":
        """Return the forecast for a number of rounds of a method."""
        fresh, sampler = shapes_only(partial(method.user_state, layout)), method.sampler
        each = tensor_bytes(fresh, half=method.half_states)
        times = rounds * sampler.rate
        users = sampler.population * -math.expm1(rounds * math.log1p(-sampler.rate)) if sampler.rate < 1 else float(sampler.population)
        kept = min(KEPT_VERSIONS, sampler.population * times / users) if users else 0.0
        return cls(times, users, each, users * kept * each)


class UserStates(Protocol):
    """Where the states of users are."""

    def load(self, user: int, round: int, template: State) -> State:
        """Return what the user had after its last round before `round`; the template where it was never seen."""

    def stage(self, user: int, round: int, attempt: int, state: State) -> None:
        """Keep what the user has after a round that is not over yet."""

    def sync(self) -> None:
        """Wait until all that was staged is durable."""


class StatesInMemory:
    """The states of users in this process."""

    def __init__(self) -> None:
        self._versions: dict[int, list[tuple[int, State]]] = {}

    def load(self, user: int, round: int, template: State) -> State:
        """Return what the user had after its last round before `round`; the template where it was never seen."""
        return next((state for r, state in reversed(self._versions.get(user, [])) if r < round), template)

    def stage(self, user: int, round: int, attempt: int, state: State) -> None:
        """Keep what the user has after a round."""
        versions = [v for v in self._versions.get(user, []) if v[0] < round]
        self._versions[user] = [*versions[1 - KEPT_VERSIONS :], (round, state)]

    def sync(self) -> None:
        """Nothing outlives this process."""


def state_in(files: Reader, path: Path, user: int, template: State, asked: bytes | None = None) -> State:
    """Return the state of a user in a file.

    Raises:
        SealedFileError: the file is damaged, or not the one with the checksum that is asked for.
        ValueError: it is the state of another user, or of another chain.
    """
    data, tensors = read_sealed(files, path, KIND, asked)
    if data["user"] != user:
        raise ValueError(f"{path} holds the state of user {data['user']}, expected that of user {user}; files were swapped.")
    return unpack_state(template, data["state"], tensors)


def file_of(user: int, state: State) -> Iterator[Chunk]:
    """Return the content of the file of a user's state."""
    numbers, tensors = pack_state(state)
    return sealed(KIND, {"user": user, "state": numbers}, tensors)


class StatesInFolder:
    """The states of users as files: `FOLDER/<id // 1000>/<id>/<round>-<attempt>.state`. Workers that share the folder share the states.

    Args:
        folder: where; made when first needed.
        storage: the disk.
        kept: newest states kept of each user.
    """

    def __init__(self, folder: Path, storage: Storage | None = None, kept: int = KEPT_VERSIONS) -> None:
        self.folder, self._storage, self._kept = folder, storage or Storage(), kept
        self._staged: list[Path] = []

    def load(self, user: int, round: int, template: State) -> State:
        """Return what the user had after its last round before `round`; the template where it was never seen.

        Raises:
            SealedFileError, ValueError: as `state_in`.
        """
        path = self.newest(user, round)
        return template if path is None else state_in(self, path, user, template)

    def newest(self, user: int, round: int) -> Path | None:
        """Return the file of what the user had after its last round before `round`; None where it was never seen."""
        before = [path for r, _, path in self._versions(self._place(user)) if r < round]
        return before[-1] if before else None

    def newest_digest(self, user: int, round: int) -> tuple[Path, bytes] | None:
        """Return the file that is `newest`, and the checksum that it ends in.

        Raises:
            SealedFileError: as `digest_of`.
        """
        path = self.newest(user, round)
        return None if path is None else (path, digest_of(self._storage, path))

    def read(self, path: Path) -> bytes:
        """Return a file's content."""
        return self._storage.read(path)

    def stage(self, user: int, round: int, attempt: int, state: State) -> None:
        """Keep what the user has after a round that is not over yet; the oldest of its states goes."""
        self._staged.append(self.put(user, round, attempt, file_of(user, state)))

    def put(self, user: int, round: int, attempt: int, content: Iterable[Chunk]) -> Path:
        """Write the file of what the user has after a round, and return where; the oldest of its files goes."""
        versions = [v for v in self._versions(self._place(user)) if v[0] < round]
        for _, _, old in versions[: 1 - self._kept]:
            self._storage.remove(old)
        return self._write(self._path(user, round, attempt), content)

    def _write(self, path: Path, content: Iterable[Chunk]) -> Path:
        self._storage.make_folder(path.parent)
        self._storage.write(path, content)
        return path

    def sync(self) -> None:
        """Wait until all that was staged since the last time is durable."""
        self.settle(self._staged)
        self._staged = []

    def settle(self, paths: Sequence[Path]) -> None:
        """Wait until files, and their names, are durable."""
        for path in paths:
            self._storage.sync(path)
        for folder in sorted({folder for path in paths for folder in self._folders(path)}):
            self._storage.sync_folder(folder)

    def roll_back(self, round: int) -> None:
        """Take away what was staged after round `round`: rounds that did not end."""
        for path in self._files():
            if int(path.name.partition("-")[0]) > round:
                self._storage.remove(path)

    def _place(self, user: int) -> Path:
        return self.folder / str(user // USERS_A_FOLDER) / str(user)

    def _path(self, user: int, round: int, attempt: int) -> Path:
        return self._place(user) / f"{round:08d}-{attempt}{END}"

    def _versions(self, place: Path) -> list[tuple[int, int, Path]]:
        found = []
        for name in self._storage.names(place):
            if name.endswith(END):
                round, _, attempt = name[: -len(END)].partition("-")
                found.append((int(round), int(attempt), place / name))
        return sorted(found)

    def _files(self) -> Iterable[Path]:
        for shelf in self._storage.folders(self.folder):
            for place in self._storage.folders(self.folder / shelf):
                for _, _, path in self._versions(self.folder / shelf / place):
                    yield path

    def _folders(self, path: Path) -> list[Path]:
        return [path.parent, path.parent.parent, self.folder, self.folder.parent]


class StatesOnDevice(StatesInFolder):
    """The states of a device's own users: one counts where the server says that it took the update that was sent with it.

    What a device sent and the server never took, or took in an attempt that was not released, is as if it had never been trained.

    Args:
        folder: where; made when first needed.
        taken: the round and the attempt of each user's last update that was taken; users without one start afresh.
        storage: the disk.
    """

    def __init__(self, folder: Path, taken: Mapping[int, tuple[int, int]], storage: Storage | None = None) -> None:
        super().__init__(folder, storage)
        self._taken = taken

    def load(self, user: int, round: int, template: State) -> State:
        """Return what the user had when its last update was taken; the template where none was, or the device has lost it.

        Raises:
            SealedFileError, ValueError: as `state_in`.
        """
        path = self._path(user, *self._taken[user]) if user in self._taken else None
        return state_in(self, path, user, template) if path is not None and self._storage.exists(path) else template

    def put(self, user: int, round: int, attempt: int, content: Iterable[Chunk]) -> Path:
        """Write the file of what the user has after an attempt at a round, beside what counts; whatever else there is goes."""
        kept = self._path(user, *self._taken[user]) if user in self._taken else None
        for _, _, old in self._versions(self._place(user)):
            if old != kept:
                self._storage.remove(old)
        return self._write(self._path(user, round, attempt), content)
