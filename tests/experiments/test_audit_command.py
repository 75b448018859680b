"""`fedclip audit` as a person meets it: an experiment, a run, a ledger that was changed, nothing to audit."""

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import experiments.audit
from experiments.cli import app
from experiments.prepare import prepare, read_experiment
from fedclip.account import read_ledger
from fedclip.audit.suite import Effort
from strategies.privacy import build_account

LIGHT = functools.partial(Effort, contributions=300, hostile_rounds=2, cohorts=300, canaries=300)


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of the audit's power are elsewhere."""
    monkeypatch.setattr(experiments.audit, "Effort", LIGHT)


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of three rounds under noise."""
    from tests.experiments.conftest import VISION

    folder = tmp_path_factory.mktemp("runs")
    (folder / "vision.toml").write_text(VISION, encoding="utf-8")
    options = ["--set", "run.engine=process", "--set", "evaluation.every=0", "--quiet"]
    status, output = run("run", folder / "vision.toml", "--out", folder / "run", *options)
    assert status == 0, output
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the run's folder."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_an_experiment_is_audited(vision: Path) -> None:
    status, output = run("audit", vision, "--set", "privacy.noise_multiplier=1.0", "--trials", "2000", "--rounds", "1")
    assert status == 0, output
    assert output.startswith("claim: epsilon ")
    for said in ("noise: deviation", "replay: one user's effect", "cohort: size", "distinguishing: epsilon", "all within the claim"):
        assert said in output
    assert "ledger" not in output
    assert "FAIL" not in output


def test_a_run_is_audited_with_its_ledger_and_machines_may_read_it(finished: Path) -> None:
    status, output = run("audit", finished, "--trials", "2000", "--rounds", "1", "--json")
    assert status == 0, output
    report = json.loads(output)
    assert report["passed"] is True
    assert (report["claim"]["rounds"], report["claim"]["noise_multiplier"]) == (3, 0.05)
    names = {f["name"] for f in report["findings"]}
    assert {"ledger: whole", "ledger: as configured", "ledger: epsilon", "noise: deviation", "one-shot canaries: epsilon"} <= names


@pytest.mark.parametrize("what", ["line", "noise", "epsilon"])
def test_a_run_that_was_changed_fails(copy: Path, what: str) -> None:
    ledger, summary = copy / "ledger.jsonl", copy / "summary.json"
    if what == "line":
        ledger.write_text("".join(ledger.read_text().splitlines(True)[:-1]))
    elif what == "noise":
        # The run made its releases with less noise than its configuration now says.
        (copy / "config.toml").write_text((copy / "config.toml").read_text().replace("noise_multiplier = 0.05", "noise_multiplier = 0.5"))
    else:
        values = json.loads(summary.read_text())
        values["measured"]["epsilon"] *= 0.5
        summary.write_text(json.dumps(values))
    status, output = run("audit", copy, "--trials", "1000", "--rounds", "1")
    assert status == 1, output
    wrong = [line for line in output.splitlines() if line.startswith("FAIL")]
    assert wrong
    assert all(line.startswith("FAIL ledger: ") for line in wrong)
    assert "exceed" in output


def test_a_release_that_was_lost_is_claimed_too(copy: Path) -> None:
    shutil.move(copy / "ledger.jsonl", copy / "before.jsonl")
    charges = read_ledger(copy / "before.jsonl")
    prepared = prepare(read_experiment(copy / "config.toml", []))
    account = build_account(prepared.experiment, prepared.method.sampler.population, copy / "ledger.jsonl")
    assert account is not None
    lines = [(c.round, 0, c.bound) for c in charges] + [(3, 1, charges[-1].bound)]
    for round, attempt, bound in lines:
        account.charge(charges[0].run, round, attempt, account.noise_multiplier, bound)
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["attempt"] = 1
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (copy / "summary.json").unlink()
    status, output = run("audit", copy, "--rounds", "1", "--trials", "2000", "--json")
    assert status == 0, output
    claim = json.loads(output)["claim"]
    assert claim["rounds"] == 4
    assert claim["epsilon"] == account.spent().epsilon


def test_a_run_without_a_summary_is_audited_too(copy: Path) -> None:
    (copy / "summary.json").unlink()
    status, output = run("audit", copy, "--trials", "1000", "--rounds", "1")
    assert status == 0, output
    assert "ledger: epsilon" not in output


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("empty", "holds no run: there is no config.toml"),
        ("missing.toml", "No such experiment file"),
        ("quiet.toml", "There is nothing to audit: small adds no noise"),
        ("broken", "metrics.jsonl cannot be read"),
    ],
)
def test_bad_input_is_one_clear_message_and_status_2(vision: Path, copy: Path, tmp_path: Path, target: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "quiet.toml").write_text(vision.read_text().replace("noise_multiplier = 0.05", ""))
    copy.rename(tmp_path / "broken")
    (tmp_path / "broken" / "metrics.jsonl").write_text("{")
    status, output = run("audit", tmp_path / target)
    assert status == 2, output
    assert said in output
    assert "Traceback" not in output


def test_help_shows_an_example_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom experiments.cli import app\ntry:\n    app(['audit', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'scipy' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert result.returncode == 0, result.stderr
    assert "fedclip audit" in result.stdout
