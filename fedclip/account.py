"""`Account`: the ledger of a run's releases, what they cost together, and the budget that they must not exceed. Imports no PyTorch."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedclip.accounting import Guarantee, affordable_rounds, guarantee
from fedclip.sampling import Sampler
from fedclip.stages import describe_stage


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

    def line(self) -> str:
        """Return the line without its end."""
        return json.dumps(asdict(self), sort_keys=True)


def read_ledger(path: Path) -> list[Charge]:
    """Return the charges of a ledger; none where there is no file.

    Raises:
        LedgerError: a line is not a charge, or its hash of the line before does not fit.
    """
    if not path.exists():
        return []
    text, charges, previous = path.read_text(encoding="utf-8"), list[Charge](), ""
    if text and not text.endswith("\n"):
        raise LedgerError(f"{path}: the last line is cut off; a release may be missing from it.")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            charge = Charge(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise LedgerError(f"{path}, line {number}: no line of a ledger ({error}).") from error
        if charge.previous != previous or charge.line() != line:
            raise LedgerError(f"{path}, line {number}: it does not follow from the line before; the ledger was changed.")
        previous = _hash(line)
        charges.append(charge)
    return charges


class Account:
    """What the releases of one run cost. A line is on disk before the release that it pays for is made.

    Args:
        sampler: how cohorts are drawn; it carries the privacy event.
        noise_multiplier: z of all channels together.
        delta: delta of every epsilon that the account states.
        budget: the epsilon that must not be exceeded; None: no limit.
        path: the ledger's file, made at the first charge; None keeps the ledger in memory.
        extrapolation: the same noise on the mean at another population and cohort: their sampler and noise multiplier.

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
    ) -> None:
        if not 0 < delta < 1:
            raise ValueError(f"Expected 0 < delta < 1, got {delta}.")
        if budget is not None and not budget > 0:
            raise ValueError(f"Expected an epsilon budget over 0, got {budget}.")
        self.sampler, self.noise_multiplier, self.delta, self.budget, self.path = sampler, noise_multiplier, delta, budget, path
        self._extrapolation = extrapolation
        self.charges = read_ledger(path) if path is not None else []
        self._affordable: int | None = None
        for charge in self.charges:
            if (charge.sampler, charge.noise_multiplier) != (describe_stage(sampler), noise_multiplier):
                raise LedgerError(f"{path}: round {charge.round} was another mechanism (z = {charge.noise_multiplier}, {charge.event}).")

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

    def charge(self, run: str, round: int, attempt: int, noise_multiplier: float, bound: float) -> None:
        """Write down a release that is about to be made.

        Raises:
            ValueError: the release is not of the mechanism that the account is for.
            OSError: the line cannot be made durable; the release must not be made.
        """
        if noise_multiplier != self.noise_multiplier:
            raise ValueError(f"Expected a release at z = {self.noise_multiplier}, the account's, got z = {noise_multiplier}.")
        previous = _hash(self.charges[-1].line()) if self.charges else ""
        event = str(self.sampler.event(noise_multiplier))
        description = json.loads(json.dumps(describe_stage(self.sampler)))
        charge = Charge(run, round, attempt, description, self.sampler.rate, noise_multiplier, bound, event, previous)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(charge.line() + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.charges.append(charge)

    def spent(self) -> Guarantee:
        """Return what the releases so far cost: measured, of what this run did."""
        return guarantee(self.sampler, self.noise_multiplier, len(self.charges), self.delta)

    def extrapolated(self) -> Guarantee | None:
        """Return what as many releases would cost with the same noise on the mean at the larger population and cohort; None without."""
        if self._extrapolation is None:
            return None
        sampler, noise_multiplier = self._extrapolation
        return replace(guarantee(sampler, noise_multiplier, len(self.charges), self.delta), extrapolated=True)


def _hash(line: str) -> str:
    return hashlib.blake2b(line.encode(), digest_size=16).hexdigest()
