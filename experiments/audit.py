"""`fedclip audit`: what an experiment or a run claims of its privacy, against what is found. Imports PyTorch."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.folder import LEDGER, deployed_as, read_metrics
from experiments.prepare import Prepared, prepare, read_experiment
from experiments.run import CHECK_FAILED, DONE
from fedclip.account import LedgerError, read_ledger
from fedclip.accounting import Guarantee, guarantee
from fedclip.audit.findings import Finding
from fedclip.audit.ledgers import Promise, audit_ledger
from fedclip.audit.suite import FALSE_ALARM, Effort, parts
from fedclip.layout import Layout
from fedclip.options import ConfigError
from strategies.naming import run_digest
from strategies.privacy import rates_of_devices, releases


def audit_command(target: Path, overrides: list[str], data_dir: Path | None, rounds: int, trials: int, as_json: bool) -> int:
    """Audit an experiment file or a run folder, print a line for each finding, and return the exit status.

    Raises:
        ConfigError: the file or the folder is refused, or its method has no noise.
    """
    start = time.perf_counter()
    prepared = prepare(read_experiment(_config_of(target), overrides, data_dir))
    claim, findings = _claim(prepared, target), list[Finding]()
    if not as_json:
        print(f"claim: {claim.describe()}")
    for finding in _findings(prepared, claim, target, Effort(rounds=rounds, trials=trials)):
        findings.append(finding)
        if not as_json:
            print(_line(finding), flush=True)
    wrong = sum(not finding.passed for finding in findings)
    if as_json:
        rows = [_finite(finding.plain()) for finding in findings]
        print(json.dumps({"passed": not wrong, "claim": _finite(claim.plain()), "findings": rows}, indent=2, allow_nan=False))
    else:
        said = f"{wrong} of {len(findings)} findings exceed the claim" if wrong else f"{len(findings)} findings, all within the claim"
        print(f"{said}; {time.perf_counter() - start:.0f} s. A right method fails with a chance of at most {100 * FALSE_ALARM:g}%.")
    return CHECK_FAILED if wrong else DONE


def _config_of(target: Path) -> Path:
    if not target.is_dir():
        return target
    if not (target / "config.toml").is_file():
        raise ConfigError(f"{target} holds no run: there is no config.toml; give a run folder or an experiment file.")
    return target / "config.toml"


def _claim(prepared: Prepared, target: Path) -> Guarantee:
    """Return what is claimed: of the releases that a run made, or of those that an experiment plans."""
    mechanism, experiment = prepared.method.release.mechanism, prepared.experiment
    if mechanism is None:
        raise ConfigError(
            f"There is nothing to audit: {experiment.run.name} adds no noise and claims no privacy; set privacy.noise_multiplier."
        )
    made = _releases_of(target) if target.is_dir() else releases(experiment)
    try:
        return guarantee(prepared.method.sampler, mechanism.noise_multiplier, max(1, made), experiment.privacy.delta)
    except ValueError as error:
        raise ConfigError(f"privacy: {error}") from error


def _releases_of(target: Path) -> int:
    """Return how many releases a run was charged for, whatever became of them; where its ledger says less than its rounds, those."""
    try:
        charged = len(read_ledger(target / LEDGER))
    except LedgerError:  # a finding says why
        charged = 0
    return max(charged, len(_rows(target)))


def _findings(prepared: Prepared, claim: Guarantee, target: Path, effort: Effort) -> Iterator[Finding]:
    method, layout = prepared.method, Layout.of(prepared.task.make_model())
    if target.is_dir():
        bound = None if method.adaptive is not None else method.bound(layout).total
        # The run's own name, whatever was set anew for the audit.
        began = read_experiment(target / "config.toml", [])
        run = deployed_as(target) or run_digest(began)
        promise = Promise(run, method.sampler, claim.noise_multiplier, claim.delta, bound, rates_of_devices(began))
        yield from audit_ledger(target / LEDGER, _rows(target), promise, _stated(target))
    seed = prepared.experiment.run.seed
    for part in parts(method, layout, claim.rounds, claim.delta, prepared.task, effort, seed):
        yield from part()


def _rows(target: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{target / 'metrics.jsonl'} cannot be read: {error}.") from error


def _stated(target: Path) -> float | None:
    """Return the epsilon that a run's summary states as measured; None where there is no summary."""
    try:
        measured = json.loads((target / "summary.json").read_text(encoding="utf-8")).get("measured", {})
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{target / 'summary.json'} cannot be read: {error}.") from error
    epsilon = measured.get("epsilon")
    return math.inf if epsilon is None else float(epsilon)


def _line(finding: Finding) -> str:
    verdict = "ok" if finding.passed else "FAIL"
    return f"{verdict:4} {finding.name:36} claim {finding.claim:<9.4g} found {finding.found:<9.4g} {finding.detail}"


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return values as JSON can hold them: what is not finite becomes null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
