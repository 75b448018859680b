"""`Account`: the ledger of a run's releases, what they cost together, and the budget that they must not exceed. Imports no PyTorch."""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from fedclip.accounting import Guarantee, affordable_rounds, guarantee
from fedclip.sampling import Sampler
from fedclip.stages import describe_stage
from fedclip.storage import Storage, append


class BudgetSpent(Exception):  # noqa: N818 - an event to stop at, not a fault
    """Another release would exceed the budget. Nothing was drawn for it."""


class LedgerError(Exception):
    """A ledger that cannot be trusted: what it says was changed, cut or belongs to something else."""


@dataclass(frozen=True)
class Charge:
    """One line of the ledger: a release that was, or was about to be, made.

    Attributes:
        run: the name of the run in its random streams.
        round: round number, from 1.
        attempt: how many releases the round had before.
        sampler: how the cohort was drawn, as a stage description.
        sampling_rate: q.
        noise_multiplier: z of all channels together.
        bound: C, the bound on a user's update in that round.
        event: the privacy event, as the accountant prints it.
        previous: the hash of the line before, empty in the first.
        of: what was released: the mean of the updates, or that of the users' own evaluations of a round's model.

    The line ends with the hash of all that, so that no line can be changed, the last one neither.
    """

    run: str
    round: int
    attempt: int
    sampler: dict[str, object]
    sampling_rate: float
    noise_multiplier: float
    bound: float
    event: str
    previous: str
    of: Literal["updates", "evaluation"] = "updates"

    @property
    def hash(self) -> str:
        """The hash of the line."""
        return hashlib.blake2b(json.dumps(self._said(), sort_keys=True).encode(), digest_size=16).hexdigest()

    def line(self) -> str:
        """Return the line without its end."""
        return json.dumps(self._said() | {"this": self.hash}, sort_keys=True)

    def _said(self) -> dict[str, object]:
        return {key: value for key, value in asdict(self).items() if (key, value) != ("of", "updates")}


def read_ledger(path: Path, storage: Storage | None = None) -> list[Charge]:
    """Return the charges of a ledger; none where there is no file.

    Raises:
        LedgerError: a line is not a charge, is cut off, or its hash of the line before does not fit.
    """
    charges, torn = _read_ledger(path, storage or Storage())
    if torn:
        raise LedgerError(f"{path}: line {len(charges) + 1} is cut off; a release may be missing from it.")
    return charges


def _read_ledger(path: Path, storage: Storage) -> tuple[list[Charge], int]:
    """Return the charges, and how many bytes follow the last whole line."""
    if not storage.exists(path):
        return [], 0
    content, charges, previous = storage.read(path), list[Charge](), ""
    whole, end, torn = content.rpartition(b"\n")
    for number, raw in enumerate((whole + end).split(b"\n")[:-1], 1):
        try:
            line = raw.decode("ascii")
            fields = json.loads(line)
            charge = Charge(**{key: value for key, value in fields.items() if key != "this"})
        except (ValueError, TypeError, AttributeError) as error:
            raise LedgerError(f"{path}, line {number}: no line of a ledger ({error}).") from error
        if charge.previous != previous or charge.line() != line:
            raise LedgerError(f"{path}, line {number}: it does not follow from the line before; the ledger was changed.")
        previous = charge.hash
        charges.append(charge)
    return charges, len(torn)


class Account:
    """What the releases of one run cost. A line is on disk before the release that it pays for is made.

    Args:
        sampler: how cohorts are drawn; it carries the privacy event.
        noise_multiplier: z of all channels together.
        delta: delta of every epsilon that the account states.
        budget: the epsilon that must not be exceeded; None: no limit.
        path: the ledger's file, made at the first charge; None keeps the ledger in memory.
        extrapolation: the same noise on the mean at another population and cohort: their sampler and noise multiplier.
        storage: the disk.

    Attributes:
        before_line: called before a line is written, to wait for what has to be durable by then; None: there is nothing.

    Raises:
        LedgerError: the file is there and cannot be trusted, or is of another mechanism.
        ValueError: delta or the budget is out of range.
    """

    def __init__(
        self,
        sampler: Sampler,
        noise_multiplier: float,
        delta: float,
        budget: float | None = None,
        path: Path | None = None,
        extrapolation: tuple[Sampler, float] | None = None,
        storage: Storage | None = None,
    ) -> None:
        if not 0 < delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
        if budget is not None and not budget > 0:
            raise ValueError(f"Expected an epsilon budget over 0, got {budget}.")
        self.sampler, self.noise_multiplier, self.delta, self.budget, self.path = sampler, noise_multiplier, delta, budget, path
        self._extrapolation, self._storage = extrapolation, storage or Storage()
        self.charges, self._torn = _read_ledger(path, self._storage) if path is not None else ([], 0)
        self.before_line: Callable[[], None] | None = None
        self._affordable: int | None = None
        self._foreseen: tuple[int, Future[Guarantee]] | None = None
        for charge in self.charges:
            if (charge.sampler, charge.noise_multiplier) != (describe_stage(sampler), noise_multiplier):
                raise LedgerError(f"{path}: round {charge.round} was another mechanism (z = {charge.noise_multiplier}, {charge.event}).")

    @property
    def head(self) -> str:
        """The hash of the last line, which the next one will carry; empty without any."""
        return self.charges[-1].hash if self.charges else ""

    def attempts(self, round: int) -> int:
        """Return how many attempts at a round were charged."""
        return sum(charge.round == round and charge.of == "updates" for charge in self.charges)

    def evaluations(self, round: int) -> int:
        """Return how many releases of the users' own evaluations of a round's model were charged."""
        return sum(charge.round == round and charge.of == "evaluation" for charge in self.charges)

    def verify(self, charges: int, head: str, round: int) -> None:
        """See whether the ledger goes on from a checkpoint.

        Args:
            charges: lines that the ledger had at the checkpoint.
            head: the hash of the last of them.
            round: the rounds done at the checkpoint.

        Raises:
            LedgerError: the ledger is shorter than at the checkpoint, or differs from it.
        """
        if len(self.charges) < charges or (charges and self.charges[charges - 1].hash != head):
            raise LedgerError(
                f"{self.path} has {len(self.charges)} whole lines and does not begin with the {charges} of the checkpoint after round "
                f"{round}; it was changed, cut or taken from another run, and no epsilon can be trusted. Nothing was changed."
            )

    def mend(self) -> None:
        """Take away a line that a crash has torn: it was not durable, so that its release was never made."""
        if self._torn and self.path is not None:
            self._storage.truncate(self.path, len(self._storage.read(self.path)) - self._torn)
            self._storage.sync(self.path)
            self._torn = 0

    def check(self) -> None:
        """Look ahead, before a cohort is drawn.

        Raises:
            BudgetSpent: one more release would exceed the budget.
        """
        if self.budget is None:
            return
        if self._affordable is None:
            self._affordable = affordable_rounds(self.sampler, self.noise_multiplier, self.budget, self.delta)
        if len(self.charges) >= self._affordable:
            raise BudgetSpent(
                f"The budget of epsilon {self.budget:g} at delta {self.delta:g} allows {self._affordable} releases, and "
                f"{len(self.charges)} were made."
            )

    def charge(
        self,
        run: str,
        round: int,
        attempt: int,
        noise_multiplier: float,
        bound: float,
        of: Literal["updates", "evaluation"] = "updates",
    ) -> None:
        """Write down a release that is about to be made.

        Raises:
            ValueError: the release is not of the mechanism that the account is for.
            OSError: the line cannot be made durable; the release must not be made.
        """
        if self._torn:
            raise LedgerError(f"{self.path}: line {len(self.charges) + 1} is cut off; a release may be missing from it.")
        if noise_multiplier != self.noise_multiplier:
            raise ValueError(f"Expected a release at z = {self.noise_multiplier}, the account's, got z = {noise_multiplier}.")
        event = str(self.sampler.event(noise_multiplier))
        description = json.loads(json.dumps(describe_stage(self.sampler)))
        if self.before_line is not None:
            self.before_line()
        charge = Charge(run, round, attempt, description, self.sampler.rate, noise_multiplier, bound, event, self.head, of)
        if self.path is not None:
            append(self._storage, self.path, (charge.line() + "\n").encode("ascii"))
        self.charges.append(charge)

    def foresee(self) -> None:
        """Begin to compute, on another thread, what one more release will have cost: `spent` finds it done after the round."""
        releases, thread = len(self.charges) + 1, ThreadPoolExecutor(1, "fedclip-account")
        self._foreseen = releases, thread.submit(guarantee, self.sampler, self.noise_multiplier, releases, self.delta)
        thread.shutdown(wait=False)  # it ends with what it was given

    def spent(self) -> Guarantee:
        """Return what the releases so far cost: measured, of what this run did."""
        if self._foreseen is not None and self._foreseen[0] == len(self.charges):
            return self._foreseen[1].result()
        return guarantee(self.sampler, self.noise_multiplier, len(self.charges), self.delta)

    def extrapolated(self) -> Guarantee | None:
        """Return what as many releases would cost with the same noise on the mean at the larger population and cohort; None without."""
        if self._extrapolation is None:
            return None
        sampler, noise_multiplier = self._extrapolation
        return replace(guarantee(sampler, noise_multiplier, len(self.charges), self.delta), extrapolated=True)
