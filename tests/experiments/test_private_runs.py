"""Runs under noise: a ledger, an epsilon in every row, a budget that ends the run before a round, calibration, two figures never one."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.prepare import prepare, read_experiment
from fedclip.account import read_ledger
from fedclip.accounting import guarantee
from fedclip.sampling import FixedSize, Poisson
from strategies.naming import run_digest
from strategies.privacy import build_account, noise_multiplier

runner = CliRunner()


def run(vision: Path, out: Path, *sets: str, rounds: int = 3) -> tuple[int, str]:
    options = [option for s in ("run.engine=process", "evaluation.every=0", *sets) for option in ("--set", s)]
    result = runner.invoke(app, ["run", str(vision), "--out", str(out), "--rounds", str(rounds), *options])
    return result.exit_code, result.output


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary_of(out: Path) -> dict[str, object]:
    return json.loads((out / "summary.json").read_text())


def test_every_round_is_in_the_ledger_and_says_its_epsilon(vision: Path, tmp_path: Path) -> None:
    status, output = run(vision, tmp_path / "run", "privacy.noise_multiplier=2.0", "privacy.delta=1e-5")
    assert status == 0, output
    charges = read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert [(c.round, c.attempt, c.noise_multiplier, c.bound) for c in charges] == [(r, 0, 2.0, 0.5) for r in (1, 2, 3)]
    sampler = Poisson(60, 9.0)
    expected = [guarantee(sampler, 2.0, t, 1e-5).epsilon for t in (1, 2, 3)]
    assert [r["epsilon"] for r in rows_of(tmp_path / "run")] == expected
    assert {r["delta"] for r in rows_of(tmp_path / "run")} == {1e-5}
    assert summary_of(tmp_path / "run")["measured"] == guarantee(sampler, 2.0, 3, 1e-5).plain()
    assert "(measured;" in output
    assert "extrapolated" not in output
    for said in ("add-or-remove-one", "user", "Poisson", "nominal"):
        assert said in " ".join(output.split()), said


def test_the_budget_ends_a_run_before_the_round_that_would_exceed_it(vision: Path, tmp_path: Path) -> None:
    budget = guarantee(Poisson(60, 9.0), 2.0, 2, 1e-5).epsilon * 1.001
    sets = ("privacy.noise_multiplier=2.0", "privacy.delta=1e-5", f"privacy.epsilon_budget={budget}")
    status, output = run(vision, tmp_path / "run", *sets, rounds=9)
    assert status == 0
    assert "allows 2 releases" in " ".join(output.split())
    assert len(rows_of(tmp_path / "run")) == len(read_ledger(tmp_path / "run" / "ledger.jsonl")) == 2
    summary = summary_of(tmp_path / "run")
    assert summary["status"] == "budget spent"
    assert summary["rounds"] == 2
    assert summary["epsilon"] <= budget


def test_a_budget_that_allows_no_round_is_refused_before_anything_is_made(vision: Path, tmp_path: Path) -> None:
    status, output = run(vision, tmp_path / "run", "privacy.noise_multiplier=0.1", "privacy.epsilon_budget=0.5")
    assert status == 2
    assert "allows 0 releases" in " ".join(output.split())
    assert not (tmp_path / "run").exists()


def test_a_target_epsilon_gives_the_noise_and_is_the_budget(vision: Path, tmp_path: Path) -> None:
    del tmp_path
    sets = ["run.engine='process'", "run.rounds=7", "privacy={target_epsilon=3.0, delta=1e-5}"]
    prepared = prepare(read_experiment(vision, sets))
    privacy = prepared.experiment.privacy
    assert (privacy.target_epsilon, privacy.epsilon_budget) == (None, 3.0)
    z = prepared.method.release.mechanism.noise_multiplier
    assert z == privacy.noise_multiplier
    sampler = prepared.method.sampler
    assert 2.9 < guarantee(sampler, z, 7, 1e-5).epsilon <= 3.0


def test_the_noise_of_a_larger_cohort_is_trained_with_and_stated_apart(vision: Path, tmp_path: Path) -> None:
    sets = ("privacy.noise_multiplier=1.5", "privacy.noise_cohort_size=300", "privacy.noise_population=5000", "privacy.delta=1e-5")
    status, output = run(vision, tmp_path / "run", *sets)
    assert status == 0, output
    summary = summary_of(tmp_path / "run")
    real = 1.5 * 9 / 300
    assert summary["measured"] == guarantee(Poisson(60, 9.0), real, 3, 1e-5).plain()
    extrapolated = guarantee(Poisson(5000, 300.0), 1.5, 3, 1e-5).plain()
    assert summary["extrapolated"] == {**extrapolated, "extrapolated": True}
    assert summary["epsilon"] == summary["measured"]["epsilon"] > summary["extrapolated"]["epsilon"]
    assert "(extrapolated;" in output
    assert {c.noise_multiplier for c in read_ledger(tmp_path / "run" / "ledger.jsonl")} == {real}
    direct = read_experiment(vision, [f"privacy.noise_multiplier={real}"])
    assert run_digest(read_experiment(vision, list(sets))) == run_digest(direct), "the same noise on the mean is the same run"


def test_a_larger_cohort_has_as_large_a_cap(vision: Path) -> None:
    sets = ["sampler.max_cohort=12", "privacy={noise_multiplier=1.5, delta=1e-5, noise_cohort_size=300, noise_population=5000}"]
    account = build_account(read_experiment(vision, sets), 60)
    assert account is not None
    account.charge("run", 1, 0, account.noise_multiplier, 1.0)
    extrapolated = account.extrapolated()
    assert extrapolated is not None
    assert extrapolated.epsilon == guarantee(Poisson(5000, 300.0, max_cohort=400), 1.5, 1, 1e-5).epsilon


def test_a_target_for_the_larger_cohort_is_no_budget_of_this_run(vision: Path) -> None:
    sets = ["run.rounds=7", "privacy={target_epsilon=3.0, delta=1e-5, noise_cohort_size=500, noise_population=5000}"]
    prepared = prepare(read_experiment(vision, sets))
    privacy = prepared.experiment.privacy
    assert privacy.epsilon_budget is None
    assert 2.9 < guarantee(Poisson(5000, 500.0), privacy.noise_multiplier, 7, 1e-5).epsilon <= 3.0
    assert prepared.method.release.mechanism.noise_multiplier == noise_multiplier(prepared.experiment) < privacy.noise_multiplier


def test_a_fixed_cohort_is_accounted_as_one(vision: Path, tmp_path: Path) -> None:
    sets = ("sampler.name=fixed_size", "privacy.noise_multiplier=2.0", "privacy.delta=1e-5")
    status, output = run(vision, tmp_path / "run", *sets)
    assert status == 0, output
    assert {r["users"] for r in rows_of(tmp_path / "run")} == {9}
    measured = summary_of(tmp_path / "run")["measured"]
    assert measured == guarantee(FixedSize(60, 9), 2.0, 3, 1e-5).plain()
    assert measured["adjacency"] == "replace-one"
    assert measured["epsilon"] > 2 * guarantee(Poisson(60, 9.0), 2.0, 3, 1e-5).epsilon


@pytest.mark.parametrize("layers", ["tensor", "global"])
def test_adaptive_bounds_move_and_are_recorded(vision: Path, tmp_path: Path, layers: str) -> None:
    method = "pfl4asr" if layers == "tensor" else "fedopt"
    strategy = f"strategy={{method='{method}', max_norm=0.5, server_lr=0.02, adaptive={{quantile=0.6}}}}"
    # 8 layers at most: 10 z sqrt(8) is under a cohort of 40.
    status, output = run(vision, tmp_path / "run", strategy, "privacy.noise_multiplier=1.0", "sampler.cohort=40")
    assert status == 0, output
    bounds = [r["max_norm"] for r in rows_of(tmp_path / "run")]
    assert bounds[0] == pytest.approx(0.5)
    assert len(set(bounds)) == 3
    assert [c.bound for c in read_ledger(tmp_path / "run" / "ledger.jsonl")] == pytest.approx(bounds)
    assert ("layer_max_norm" in rows_of(tmp_path / "run")[0]) == (layers == "tensor")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["privacy={target_epsilon=1.0, noise_multiplier=1.0}"], ["expected noise_multiplier or target_epsilon, got both"]),
        (["privacy={epsilon_budget=1.0}"], ["epsilon_budget without noise"]),
        (["privacy={noise_multiplier=1.0, noise_cohort_size=300}"], ["privacy.noise_cohort_size: expected at most 60", "noise_population"]),
        (
            ["sampler.name=fixed_size", "privacy={noise_multiplier=1.0, noise_cohort_size=20.5}"],
            ["privacy.noise_cohort_size", "whole cohort", "20.5"],
        ),
        (["privacy.noise_population=9"], ["noise_population goes with noise_cohort_size"]),
        (["sampler.name=fixed_size", "sampler.cohort=9.5"], ["whole number", "9.5"]),
        (["sampler.name=fixed_size", "sampler.max_cohort=9"], ["max_cohort"]),
        (["sampler.name=fixed_sise"], ["sampler.name", "'fixed_size'", "fixed_sise"]),
        (["strategy.adaptive={quantile=0.5}", "privacy.noise_multiplier=1.0"], ["Expected a cohort over 2", "adaptive bounds"]),
        (["strategy.adaptive={qantile=0.5}"], ["strategy.adaptive.qantile"]),
        (["strategy.mode=normalize", "privacy.layer_noise=bounds"], ["needs a bound for each layer"]),
        (["privacy.layer_noise=weights", "privacy.layer_noise_weights=[1,2]"], ["noise weights, one for each layer"]),
    ],
)
def test_what_would_not_hold_is_refused(vision: Path, tmp_path: Path, sets: list[str], said: list[str]) -> None:
    status, output = run(vision, tmp_path / "run", *sets)
    assert status == 2, output
    assert all(part in " ".join(output.split()) for part in said), output
    assert not (tmp_path / "run").exists()
