"""Evaluation on real devices, of what they hold out."""

from pathlib import Path
from unittest.mock import ANY

import pytest

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
