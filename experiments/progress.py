"""`Progress`: what the loop of a run adds up over its rounds, and what a checkpoint keeps of that."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fedclip.round import Outcome
from fedclip.tally import number

MOST_FAILED = 0.05
LEAST_FAILED = 10
"""A run without noise stops when over 5% of its users so far failed, and at least 10 of them."""

BETTER = {"wer": -1, "accuracy": 1, "eval_loss": -1}
"""By what models are compared, the first of these that there is: less is better, or more is."""

FAULTS = ("workers_replaced", "blocks_redone")
"""What went wrong on a cluster and was made good."""


@dataclass
class Progress:
    """Sums over the rounds of a run.

    Attributes:
        users: users who gave an update.
        failed: users who failed.
        without_data: users with nothing to train on.
        uplink: payload bytes up.
        downlink: payload bytes down.
        steady: payload bytes up of a user, in the last round that had any: after a warm-up what one costs from then on.
        seconds: time that the run took, over all the processes that worked on it.
        saving_seconds: of that, the time that rounds waited for releases and checkpoints.
        metrics: the last value of each metric.
        best: round, metric and value of the best model so far; empty before the first evaluation.
        faults: how often each of `FAULTS` came about; those that did.
        errors: what the first failed users said, or users whose data could not all be read.
    """

    users: float = 0.0
    failed: float = 0.0
    without_data: float = 0.0
    uplink: float = 0.0
    downlink: float = 0.0
    steady: float = 0.0
    seconds: float = 0.0
    saving_seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return dataclasses.asdict(self)

    def add(self, outcome: Outcome) -> None:
        """Take a round in."""
        users, up = number(outcome.tally, "users"), number(outcome.tally, "uplink_bytes")
        self.users += users
        self.failed += number(outcome.tally, "failed_users")
        self.without_data += number(outcome.tally, "users_without_data")
        self.uplink += up
        self.downlink += number(outcome.tally, "downlink_bytes")
        self.steady = up / users if users else self.steady
        for name in FAULTS:
            if count := int(number(outcome.tally, name)):
                self.faults[name] = self.faults.get(name, 0) + count
        new = [error for error in dict.fromkeys(outcome.errors) if error not in self.errors]
        self.errors += new[: max(0, 5 - len(self.errors))]

    def judge(self, metrics: dict[str, float], round: int) -> bool:
        """Take an evaluation in, and return whether the model is the best so far."""
        metric = next((name for name in BETTER if name in metrics), None)
        if metric is None or (self.best and not BETTER[metric] * (metrics[metric] - self.best["value"]) > 0):
            return False
        self.best = {"round": round, "metric": metric, "value": metrics[metric]}
        return True

    @property
    def nobody_had_data(self) -> bool:
        """Whether there were users, and none of them had anything to train on."""
        return self.without_data > 0 and not self.users and not self.failed

    @property
    def too_many_failed(self) -> bool:
        """Whether so many users failed that the result is in doubt."""
        return self.failed >= LEAST_FAILED and self.failed > MOST_FAILED * (self.users + self.failed)
