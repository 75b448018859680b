"""The ledger of a run: a charge for each release, each as the configuration says, none twice, none missing. Imports no PyTorch."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedclip.account import Charge, LedgerError, read_ledger
from fedclip.accounting import guarantee
from fedclip.audit.findings import Finding
from fedclip.sampling import Sampler
from fedclip.stages import describe_stage


@dataclasses.dataclass(frozen=True)
class Promise:
    """What every charge of a run has to say.

    Attributes:
        run: the name of the run in its random streams.
        sampler: how cohorts are drawn.
        noise_multiplier: z of all channels together.
        delta: delta of the epsilon that is stated.
        bound: C, the bound on a user's update; None where it adapts.
        rates: what devices measure of themselves in an evaluation, which is a release of its own; empty where they do not.
    """

    run: str
    sampler: Sampler
    noise_multiplier: float
    delta: float
    bound: float | None
    rates: tuple[str, ...] = ()


def audit_ledger(path: Path, rounds: Sequence[Mapping[str, Any]], promise: Promise, stated: float | None = None) -> tuple[Finding, ...]:
    """Return what a ledger says, against the rounds of the run and its configuration.

    Args:
        path: the ledger.
        rounds: the lines of `metrics.jsonl`.
        promise: what each charge has to say.
        stated: the epsilon that the run's summary states as measured; None: it states none.
    """
    try:
        charges = read_ledger(path)
    except LedgerError as error:
        return (Finding("ledger: whole", 0.0, 1.0, False, str(error)),)
    keys = [(charge.round, charge.attempt) for charge in charges if charge.of == "updates"]
    done = [(int(row["round"]), int(row.get("attempt", 0))) for row in rounds]
    evaluated = {charge.round for charge in charges if charge.of == "evaluation"}
    missing = [f"({round}, {attempt})" for round, attempt in sorted(set(done) - set(keys))]
    missing += [f"evaluation of {row['round']}" for row in rounds if row["round"] not in evaluated and any(r in row for r in promise.rates)]
    twice = len(charges) - len({(charge.round, charge.attempt, charge.of) for charge in charges})
    # A release beyond those of the metrics is one whose round did not end: a later attempt made up for it, or the run broke off there.
    last, last_done = max(keys, default=(0, 0)), dict(done)
    extra = [key for key in keys if key not in set(done) and key != last and not key[1] < last_done.get(key[0], 0)]
    bounds = {key: row["max_norm"] for key, row in zip(done, rounds, strict=True) if promise.bound is None and "max_norm" in row}
    wrong = [f"round {c.round} attempt {c.attempt}: {said}" for c in charges if (said := _wrong(c, promise, bounds))]
    findings = [
        Finding("ledger: whole", 0.0, 0.0, True, f"{len(charges)} lines, each with the hash of the one before"),
        Finding("ledger: releases without a line", 0.0, float(len(missing)), not missing, f"(round, attempt) {', '.join(missing[:5])}"),
        Finding("ledger: lines without a release", 0.0, float(len(extra)), not extra, f"(round, attempt) {extra[:5]}"),
        Finding("ledger: twice", 0.0, float(twice), not twice, "releases with the same round and attempt"),
        Finding("ledger: as configured", 0.0, float(len(wrong)), not wrong, "; ".join(wrong[:3]) or "run, sampler, q, z, C and event"),
    ]
    if stated is not None:
        spent = guarantee(promise.sampler, promise.noise_multiplier, len(charges), promise.delta).epsilon
        detail = f"stated in summary.json, and computed anew for {len(charges)} releases"
        findings.append(Finding("ledger: epsilon", stated, spent, spent <= stated * (1 + 1e-6), detail))
    return tuple(findings)


def _wrong(charge: Charge, promise: Promise, bounds: Mapping[tuple[int, int], float]) -> str:
    """Return what a charge says that it should not, empty where it is right."""
    sampler, z = promise.sampler, promise.noise_multiplier
    bound = promise.bound if promise.bound is not None else bounds.get((charge.round, charge.attempt), charge.bound)
    if charge.of == "evaluation":  # a node adds a one and its rates, each at most one
        bound = math.sqrt(1 + len(promise.rates))
    right = dataclasses.replace(
        charge,
        run=promise.run,
        sampler=json.loads(json.dumps(describe_stage(sampler))),
        sampling_rate=sampler.rate,
        noise_multiplier=z,
        event=str(sampler.event(z)),
    )
    wrong = [f.name for f in dataclasses.fields(charge) if getattr(charge, f.name) != getattr(right, f.name)]
    if abs(charge.bound - bound) > 1e-9 * bound:
        wrong.append("bound")
    return ", ".join(wrong)
