"""The line of `metrics.jsonl` for a round: what was measured of it, as plain numbers."""

from typing import Any

from experiments.progress import FAULTS
from fedclip.tally import Tally, number

STAGES = ("load", "train", "chain", "fold", "release", "server")
"""What a round's time goes to: waiting for users' data, local training, client chain and encoding, decoding and guard and sum, noise and
division, server chain. The first four are added up over users, whichever worker they were on."""


def times_of(tally: Tally, seconds: float, workers: int) -> dict[str, float]:
    """Return what the time of a round went to; nothing where it was not measured."""
    if "train_seconds" not in tally:
        return {}
    of_stages = {f"{stage}_seconds": number(tally, f"{stage}_seconds") for stage in STAGES}
    return of_stages | {"read_seconds": number(tally, "read_seconds"), "trainer_busy": of_stages["train_seconds"] / (seconds * workers)}


def row_of(tally: Tally, round: int, attempt: int, seconds: float, *, public: bool = False) -> dict[str, Any]:
    """Return the line of `metrics.jsonl` for a round: sums become means over the users who gave an update.

    `public` leaves out all that is not private: what is left was released, or follows from it. How long the round took does not: it tells
    whether somebody was waited for until the deadline.
    """
    if public:
        released = {name.removeprefix("server."): value for name, value in tally.items() if name.startswith("server.")}
        return {"round": round, "attempt": attempt} | released
    users, losses = number(tally, "users"), number(tally, "losses")
    row: dict[str, Any] = {
        "round": round,
        "attempt": attempt,
        "train_loss": number(tally, "train_loss") / losses if losses else None,
        "users": int(users),
        "failed_users": int(number(tally, "failed_users")),
        "uplink_bytes": int(number(tally, "uplink_bytes")),
        "downlink_bytes": int(number(tally, "downlink_bytes")),
        "users_per_second": users / seconds,
        "round_seconds": seconds,
    }
    for name, value in tally.items():
        stage, _, measured = name.partition(".")
        if stage == "chain" and users:
            row.setdefault(measured, [v / users for v in value] if isinstance(value, list) else value / users)  # real devices name it
        elif stage == "server":
            row[measured] = value
    for name in ("not_finite", "users_without_data", "examples_left_out", "unanswered_users", *FAULTS):
        if number(tally, name):
            row[name] = int(number(tally, name))
    return row
