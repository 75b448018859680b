"""The account: a line on disk before each release, a chain that shows every change, a budget that looks ahead and stays spent."""

import json

import numpy as np
import pytest
import torch

from fedclip.account import Account, BudgetSpent, LedgerError, read_ledger
from fedclip.accounting import affordable_rounds, guarantee
from fedclip.clipping import ClipByGlobalNorm
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method, ServerState
from fedclip.optimizers import SGD
from fedclip.release import Gaussian, Release
from fedclip.round import begin, finish
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.transform import chain

SAMPLER, Z, DELTA = Poisson(1000, 10.0), 1.0, 1e-6
LAYOUT = Layout(("w",), ((4,),), ("w",))


def account(path=None, **changes):
    return Account(**{"sampler": SAMPLER, "noise_multiplier": Z, "delta": DELTA, "path": path} | changes)


def filled(path, rounds=4):
    kept = account(path)
    for round in range(1, rounds + 1):
        kept.charge("run", round, 0, Z, 0.5)
    return kept


def test_every_release_is_a_line_that_names_its_mechanism(tmp_path):
    path = tmp_path / "ledger.jsonl"
    kept = filled(path)
    assert read_ledger(path) == kept.charges
    first, second = (json.loads(line) for line in path.read_text().splitlines()[:2])
    assert (first["run"], first["round"], first["attempt"], first["noise_multiplier"], first["bound"]) == ("run", 1, 0, Z, 0.5)
    assert (first["sampling_rate"], first["sampler"]) == (0.01, second["sampler"])
    assert "0.01" in first["event"]
    assert "Gaussian" in first["event"]
    assert first["previous"] == ""
    assert len(second["previous"]) == 32
    assert account(path).spent() == kept.spent() == guarantee(SAMPLER, Z, 4, DELTA)


def changed(lines):
    yield "a line taken away", [lines[0], *lines[2:]]
    yield "two lines swapped", [lines[1], lines[0], *lines[2:]]
    yield "a line twice", [*lines, lines[-1]]
    yield "a number changed", [lines[0], lines[1].replace('"noise_multiplier": 1.0', '"noise_multiplier": 2.0'), *lines[2:]]
    yield "the last line's bound changed", [*lines[:-1], lines[-1].replace('"bound": 0.5', '"bound": 0.1')]
    yield "a space added", [lines[0].replace(": ", ":  ", 1), *lines[1:]]
    yield "not JSON", [*lines[:-1], lines[-1][:-2]]
    yield "another key", [*lines[:-1], lines[-1][:-1] + ', "x": 1}']


@pytest.mark.parametrize("case", range(8))
def test_a_ledger_that_was_changed_is_refused(tmp_path, case):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    _, lines = list(changed(path.read_text().splitlines()))[case]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LedgerError, match="line"):
        read_ledger(path)


def test_a_ledger_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    path.write_text(path.read_text()[:-1])
    with pytest.raises(LedgerError, match="line 4 is cut off"):
        read_ledger(path)
    kept, before = account(path), path.read_text()
    with pytest.raises(LedgerError, match="line 4 is cut off"):
        kept.charge("run", 4, 0, Z, 0.5)
    assert path.read_text() == before


def test_a_ledger_of_another_mechanism_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    filled(path)
    for changes in ({"noise_multiplier": 2.0}, {"sampler": Poisson(1000, 20.0)}):
        with pytest.raises(LedgerError, match="another mechanism"):
            account(path, **changes)
    with pytest.raises(ValueError, match=r"z = 1\.0.*got z = 2\.0"):
        account().charge("run", 1, 0, 2.0, 0.5)


def test_the_budget_stops_before_a_round_and_stays_spent(tmp_path):
    path, budget = tmp_path / "ledger.jsonl", guarantee(SAMPLER, Z, 3, DELTA).epsilon * 1.0001
    assert affordable_rounds(SAMPLER, Z, budget, DELTA) == 3
    kept = account(path, budget=budget)
    for round in range(1, 4):
        kept.check()
        kept.charge("run", round, 0, Z, 0.5)
    assert kept.spent().epsilon <= budget
    for again in (kept, account(path, budget=budget)):
        with pytest.raises(BudgetSpent, match="allows 3 releases, and 3 were made"):
            again.check()


def test_an_attempt_that_was_charged_counts_whatever_became_of_it():
    kept = account()
    kept.charge("run", 1, 0, Z, 0.5)
    kept.charge("run", 1, 1, Z, 0.5)
    assert kept.spent() == guarantee(SAMPLER, Z, 2, DELTA)


def test_measured_and_extrapolated_are_two_figures():
    kept = account(noise_multiplier=0.01, extrapolation=(Poisson(1000, 1000.0), 1.0))
    kept.charge("run", 1, 0, 0.01, 0.5)
    measured, extrapolated = kept.spent(), kept.extrapolated()
    assert (measured.extrapolated, extrapolated.extrapolated) == (False, True)
    assert extrapolated.noise_multiplier == 1.0
    assert extrapolated.sampling_rate == 1.0
    assert extrapolated.epsilon < measured.epsilon
    assert account().extrapolated() is None


def test_numbers_out_of_range_are_refused():
    for changes in ({"delta": 0.0}, {"delta": 1.0}, {"budget": 0.0}):
        with pytest.raises(ValueError, match="Expected"):
            account(**changes)


def method():
    server = chain(SGD(Schedule.of(0.1)))
    return Method(Poisson(1000, 10.0), LocalSGD(0.1, steps=1), chain(ClipByGlobalNorm(0.5)), server, Release(Gaussian(Z), 10.0))


class Failing(Account):
    def charge(self, *args):
        raise OSError("no space left")


def test_a_release_whose_line_cannot_be_written_is_never_made(monkeypatch):
    noised = method()
    state = ServerState.initial(torch.zeros(4), noised, LAYOUT)
    plan = begin(noised, state, LAYOUT, "seed:1", "run")
    monkeypatch.setattr(Gaussian, "noise", lambda *args: pytest.fail("noise was drawn before the release was charged"))
    with pytest.raises(OSError, match="no space"):
        finish(noised, state, LAYOUT, plan, [], Failing(SAMPLER, Z, DELTA))


def test_a_round_charges_the_joint_noise_multiplier_and_the_bound(tmp_path):
    from fedclip.adaptive import AdaptiveClip

    path, adapted = tmp_path / "ledger.jsonl", method()
    adapted = Method(**{**vars(adapted), "adaptive": AdaptiveClip(bits_noise=0.5)})
    state = ServerState.initial(torch.zeros(4), adapted, LAYOUT)
    kept = account(path)
    for _ in range(2):
        plan = begin(adapted, state, LAYOUT, "seed:1", "run", kept)
        state = finish(adapted, state, LAYOUT, plan, [], kept).state
    bounds = [c.bound for c in read_ledger(path)]
    assert [c.noise_multiplier for c in read_ledger(path)] == [Z, Z]
    assert bounds[0] == 0.5 != bounds[1] == state_bound(adapted, path)


def state_bound(adapted, path):
    """The bound of the second round, followed from the first one's noise alone: nobody came."""
    streams = begin(adapted, ServerState.initial(torch.zeros(4), adapted, LAYOUT), LAYOUT, "seed:1", "run").spec.streams
    noise = streams.generator("noise")
    noise.standard_normal(4)
    return adapted.adaptive.step((0.5,), adapted.adaptive.fractions(np.zeros(1), 0, 10.0, noise).tolist())[0]


def test_no_cohort_is_drawn_when_the_budget_is_spent(monkeypatch):
    kept = account(budget=1e-9)
    monkeypatch.setattr(Poisson, "draw", lambda *args: pytest.fail("a cohort was drawn"))
    with pytest.raises(BudgetSpent):
        begin(method(), ServerState.initial(torch.zeros(4), method(), LAYOUT), LAYOUT, "seed:1", "run", kept)


def test_what_is_foreseen_is_what_is_spent():
    kept, plain = account(), account()
    for round in range(1, 4):
        kept.foresee()
        for ledger in (kept, plain):
            ledger.charge("run", round, 0, Z, 0.5)
        assert kept.spent() == plain.spent()
    kept.foresee()  # of a release that is not made, and another that is foreseen by nobody
    assert kept.spent() == plain.spent()
    for ledger in (kept, plain):
        ledger.charge("run", 4, 0, Z, 0.5)
        ledger.charge("run", 5, 0, Z, 0.5)
    assert kept.spent() == plain.spent()
