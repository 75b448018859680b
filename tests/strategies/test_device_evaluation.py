"""Evaluation on real devices, of what they hold out."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from flwr.app import Message, MessageType, RecordDict

from clients import messages
from clients.gate import LARGEST_COUNTS, LARGEST_SAID, Asked, Gate, Rejected
from clients.identity import Identity, assume
from strategies.device_evaluation import pooled
from strategies.privacy import releases
from tests.strategies.devices import (
    Device,
    said_otherwise,
)
from tests.strategies.fleets import QUIET, make


def test_devices_evaluate_what_they_hold_out(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, *QUIET, 'evaluation.on="devices"')
    measured = site.fleet.measure()
    here = site.prepared.task.summarise(site.fleet.evaluate_units(), 0)
    assert (measured["wer"], measured["eval_words"] > 0) == (pytest.approx(here["wer"], abs=0.2), True)
    devices[0].hook = said_otherwise(devices[0], lambda said: said["counts"][0].update(words=-1.0))
    devices[1].hook = said_otherwise(devices[1], lambda said: said["counts"][0].pop("words"))
    assert site.fleet.measure()["eval_utterances"] < measured["eval_utterances"]
    assert [r.cause for r in site.warned] == ["malformed", "malformed"]


def test_what_devices_measure_under_noise_is_noised_and_charged(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, 'evaluation.on="devices"')
    account = site.fleet.account
    assert account is not None
    site.fleet.round()
    before = account.spent()
    devices[0].hook = said_otherwise(devices[0], lambda said: said["rates"].update(wer=1e9))
    measured = site.fleet.measure()
    assert {*measured} == {f"{rate}{end}" for rate in ("wer", "cer") for end in ("", "_low", "_high")}
    assert account.spent().epsilon > before.epsilon
    assert [(c.round, c.of, c.bound) for c in account.charges] == [(1, "updates", ANY), (1, "evaluation", pytest.approx(3**0.5))]
    assert account.attempts(1) == 1
    assert releases(site.prepared.experiment) == 5 + 1  # in the last round
    again = site.fleet.measure()
    assert again != measured  # other noise, and another charge
    assert len(account.charges) == 3


def test_a_device_that_holds_nothing_out_is_no_device_whose_rates_are_zero(devices: list[Device], tmp_path: Path) -> None:
    measured = []
    for silent in (True, False):
        (tmp_path / str(silent)).mkdir()
        site = make(
            devices, tmp_path / str(silent), 'evaluation.on="devices"', "deployment.deadline_seconds=1", "privacy.noise_multiplier=0.01"
        )
        devices[2].hook = None if silent else said_otherwise(devices[2], lambda said: said.update(rates={}))
        site.grid.silent = {devices[2].name} if silent else set()
        measured.append(site.fleet.measure())
    assert measured[0] == measured[1]


class Summing:
    """A task whose metrics can be made of words alone; counts how many units it was asked for."""

    def __init__(self) -> None:
        self.units = 0

    def summarise(self, counts: list[dict[str, float]], seed: int) -> dict[str, float]:
        self.units += len(counts)
        return {"words": sum(unit["words"] for unit in counts)}


def of(name: str, *units: dict[str, float]) -> tuple[Asked, list[dict[str, float]]]:
    return Asked(1, name, "", "nonce"), list(units)


def test_counts_are_summed_up_once_however_many_nodes_there_are() -> None:
    task: Any = Summing()
    answers = [of(f"node {n}", {"words": 2.0}, {"words": 1.0}) for n in range(1000)]
    assert pooled(task, answers, pytest.fail) == {"words": 3000}
    assert task.units == 2000


@pytest.mark.parametrize("bad", [set(), {0}, {99}, {17, 18, 60}, {*range(100)}])
def test_replies_that_metrics_cannot_be_made_of_are_found_and_the_others_count(bad: set[int]) -> None:
    task: Any = Summing()
    told: list[tuple[str, str]] = []
    answers = [of(f"node {n}", {"letters": 1.0} if n in bad else {"words": 1.0}) for n in range(100)]
    assert pooled(task, answers, lambda *said: told.append(said[:2])) == ({"words": 100 - len(bad)} if len(bad) < 100 else {})
    assert {*told} == {(f"node {n}", "malformed") for n in bad}
    assert task.units <= 100 * (1 + 8 * len(bad))


def test_names_without_end_are_refused() -> None:
    told: list[str] = []
    answers = [of(f"node {n}", {"words": 1.0} | {f"words.{n} {i}": 1.0 for i in range(90)}) for n in range(20)]
    assert pooled(Summing(), answers, lambda name, *said: told.append(name)) == {"words": 11}  # type: ignore[arg-type]
    assert told == [f"node {n}" for n in range(19, 10, -1)]


def test_whoever_names_most_goes_and_not_those_that_come_after() -> None:
    told: list[str] = []
    liar = of("liar", {f"words.{i}": 1.0 for i in range(999)} | {"words": 1.0})
    honest = [of(f"node {n}", {"words": 1.0, f"words.{n}": 1.0, "others": 1.0}) for n in range(5)]
    assert pooled(Summing(), [liar, *honest], lambda name, *said: told.append(name)) == {"words": 5}  # type: ignore[arg-type]
    assert told == ["liar"]


def answered(units: int, digits: int = 1) -> tuple[Message, Asked]:
    assume(Identity(7, 1, 9))
    request = Message(RecordDict(), 5, MessageType.EVALUATE)
    request.metadata.__dict__["_message_id"] = "id"
    assume(Identity(7, 5, 9))
    counts = [dict.fromkeys(NAMES, 10**digits + n) for n in range(units)]
    named = {"run": "run", "round": 1, "attempt": 0, "nonce": "nonce", "spec": "spec"}
    reply = Message(messages.device_reply(named | {"counts": counts}, {}, lambda text: b""), reply_to=request)
    return reply, Asked(5, "anna", "", "nonce")


NAMES = ("loss_sum", "loss_utterances", "utterances", "words", "word_errors", "characters", "character_errors", "left_out")


def test_thousands_of_units_of_a_node_come_through_and_no_more_than_is_sound() -> None:
    before = assume(Identity(7, 1, 9))
    try:
        gate = partial(Gate, "run", 1, 0, "spec", 0, signed=False, said=LARGEST_COUNTS)
        reply, asked = answered(20_000)
        assert len(str(reply.content.config_records["reply"]["said"])) > 3 * LARGEST_SAID
        assert len(gate().counts(reply, asked)) == 20_000
        assert gate().limit(asked) == LARGEST_COUNTS
        for units, digits, cause in ((20_001, 1, "malformed"), (20_000, 90, "oversized")):
            with pytest.raises(Rejected, match=cause):
                gate().counts(*answered(units, digits))
    finally:
        assume(before)
