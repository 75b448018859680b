"""`Checkpoints`: what a run needs to go on after any crash, and what was released since. One folder, files that are whole or refused."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedclip.downlink import Sent
from fedclip.method import ServerState
from fedclip.round import Released
from fedclip.sealed import SealedFileError, pack_state, read_sealed, unpack_state, write_sealed
from fedclip.storage import TEMPORARY, Storage
from fedclip.transform import State

KEPT = 2
"""Newest checkpoints that are kept, beside the one of the best model."""

CHECKPOINT, CHECKPOINT_END = "checkpoint", ".ckpt"
RELEASE, RELEASE_END = "release", ".sum"


class CheckpointError(Exception):
    """A run that cannot be gone on with as it lies there. The message says why, and what is still good."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A run after a round.

    Attributes:
        state: what the next round starts from.
        charges: lines of the ledger.
        head: the hash of the last of them; empty without any.
        notes: what the loop of the run keeps: plain data.
    """

    state: ServerState
    charges: int
    head: str
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        run: the name of the run in its random streams; files of another run are refused.
        storage: the disk.
    """

    def __init__(self, folder: Path, run: str, storage: Storage | None = None) -> None:
        self.folder, self._run, self._storage = folder, run, storage or Storage()

    def save(self, point: Checkpoint, keep: Collection[int] = ()) -> None:
        """Make a checkpoint durable; then take away those it replaces, but for the rounds in `keep`, and what was released before it."""
        state = point.state
        numbers, tensors = pack_state(state.server)
        data = {
            "run": self._run,
            "round": state.round,
            "thresholds": list(state.thresholds),
            "server": numbers,
            "charges": point.charges,
            "head": point.head,
            "notes": point.notes,
        }
        tensors |= {} if state.average is None else {"average": state.average}
        tensors |= {} if state.control is None else {"control": state.control}
        tensors |= {"params": state.params} | ({} if state.sent is None else {f"sent.{k}": v for k, v in vars(state.sent).items()})
        write_sealed(self._storage, self._checkpoint(state.round), CHECKPOINT, data, tensors)
        rounds = [r for r in self.rounds() if r <= state.round]
        for round in rounds[:-KEPT]:
            if round not in keep:
                self._storage.remove(self._checkpoint(round))
        for name in self._storage.names(self.folder):
            over = name.endswith(RELEASE_END) and int(name.partition("-")[0]) <= state.round
            if over or name.endswith((CHECKPOINT_END + TEMPORARY, RELEASE_END + TEMPORARY)):
                self._storage.remove(self.folder / name)

    def rounds(self) -> list[int]:
        """Return the rounds that there are checkpoints of, in ascending order."""
        return [int(n[: -len(CHECKPOINT_END)]) for n in self._storage.names(self.folder) if n.endswith(CHECKPOINT_END)]

    def last(self, template: State) -> Checkpoint:
        """Return the newest checkpoint.

        Args:
            template: the state of a fresh server chain, whose structure the saved one must have.

        Raises:
            CheckpointError: there is none, or the newest is damaged, of another run or of another method; the message names the
                newest good one.
        """
        rounds = self.rounds()
        if not rounds:
            raise CheckpointError(f"There is no checkpoint in {self.folder}; it holds no run that can be gone on with.")
        try:
            return self._read(rounds[-1], template)
        except CheckpointError as error:
            good = next((self._checkpoint(r) for r in reversed(rounds[:-1]) if self._is_good(r, template)), None)
            remedy = f"the last good checkpoint is {good}; take the other away to go on from it" if good else "no other checkpoint is good"
            raise CheckpointError(f"{error} Nothing was changed; {remedy}.") from error

    def keep_released(self, released: Released) -> None:
        """Make what was released durable, before the server step is taken on it."""
        data = {
            "run": self._run,
            "round": released.round,
            "attempt": released.attempt,
            "fractions": None if released.fractions is None else list(released.fractions),
            "tally": released.tally,
            "errors": list(released.errors),
            "accepted": list(released.accepted),
        }
        write_sealed(self._storage, self._release(released.round, released.attempt), RELEASE, data, {"mean": released.mean})

    def released(self, round: int, attempt: int) -> Released | None:
        """Return what an attempt at a round released; None where it never got so far.

        Raises:
            CheckpointError: the file is damaged, or of another run or round.
        """
        path = self._release(round, attempt)
        if not self._storage.exists(path):
            return None
        data, tensors = self._open(path, RELEASE, {"round": round, "attempt": attempt})
        fractions = None if data["fractions"] is None else tuple(data["fractions"])
        accepted = tuple(data.get("accepted", ()))
        return Released(round, attempt, tensors["mean"], fractions, data["tally"], tuple(data["errors"]), accepted)

    def releases(self) -> list[tuple[int, int]]:
        """Return the rounds and attempts of what was released and is kept."""
        names = [n[: -len(RELEASE_END)].partition("-") for n in self._storage.names(self.folder) if n.endswith(RELEASE_END)]
        return sorted((int(round), int(attempt)) for round, _, attempt in names)

    def _checkpoint(self, round: int) -> Path:
        return self.folder / f"{round:08d}{CHECKPOINT_END}"

    def _release(self, round: int, attempt: int) -> Path:
        return self.folder / f"{round:08d}-{attempt}{RELEASE_END}"

    def _read(self, round: int, template: State) -> Checkpoint:
        path = self._checkpoint(round)
        data, tensors = self._open(path, CHECKPOINT, {"round": round})
        try:
            server = unpack_state(template, data["server"], tensors)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        sent = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith("sent.")}
        downlink = Sent(**sent) if sent else None
        state = ServerState(
            tensors["params"],
            server,
            round,
            thresholds=tuple(data["thresholds"]),
            sent=downlink,
            average=tensors.get("average"),
            control=tensors.get("control"),
        )
        return Checkpoint(state, data["charges"], data["head"], data["notes"])

    def _is_good(self, round: int, template: State) -> bool:
        try:
            self._read(round, template)
        except CheckpointError:
            return False
        return True

    def _open(self, path: Path, kind: str, expected: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        try:
            data, tensors = read_sealed(self._storage, path, kind)
        except SealedFileError as error:
            raise CheckpointError(str(error)) from error
        for key, value in ({"run": self._run} | expected).items():
            if data[key] != value:
                raise CheckpointError(f"{path} is of {key} {data[key]}, expected {value}; files were swapped.")
        return data, tensors
