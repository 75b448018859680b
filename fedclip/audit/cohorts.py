"""The cohort: drawn as the privacy event says, anew in every round and attempt, and never what the sum is divided by."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
from scipy import stats

from fedclip.audit.bench import Bench, users_of
from fedclip.audit.claims import Claim
from fedclip.audit.findings import Finding, all_likely, bins_of, two_sided
from fedclip.sampling import Sampler

IDS_DRAWN = 400_000
"""At most about so many ids are drawn in all, but for 200 rounds."""

GROUPS = 100
"""Ids are counted in so many groups at most."""


def audit_cohorts(bench: Bench, *, rounds: int = 2000, level: float = 2e-3) -> tuple[Finding, ...]:
    """Return what the cohorts of many rounds are, against the law that the sampler's event claims.

    Args:
        bench: the method on a small layout.
        rounds: at most so many rounds.
        level: how likely a right sampler fails any of the tests.
    """
    sampler, share = bench.method.sampler, level / 3
    draws = int(min(max(IDS_DRAWN / sampler.expected_cohort, 200), rounds))
    cohorts = [users_of(bench.plan(round)) for round in range(1, draws + 1)]
    again = [users_of(bench.plan(round, 1)) for round in range(1, draws + 1)]
    strange = sum(len(set(c)) != len(c) or (bool(c) and not 0 <= min(c) <= max(c) < sampler.population) for c in cohorts)
    differ = sum(users_of(bench.plan(round)) != cohorts[round - 1] for round in range(1, 11))
    return (
        _sizes([len(c) for c in cohorts], sampler, share),
        _inclusion(cohorts, sampler.population, share),
        _overlap(cohorts, again, sampler.population, share),
        Finding("cohort: ids", 0.0, float(strange), not strange, f"of {draws:,} cohorts, those with an id twice or out of range"),
        Finding("cohort: the same attempt again", 0.0, float(differ), not differ, "of 10 attempts that were repeated, other cohorts"),
    )


def law_of_sizes(sampler: Sampler, event: Any) -> tuple[Any, int | None]:
    """Return the distribution of a cohort's size that a privacy event stands for, and a cap on it.

    Raises:
        ValueError: an event that is not known.
    """
    import dp_accounting as dp
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

    k = sampler.population
    if isinstance(event, dp.PoissonSampledDpEvent):
        return stats.binom(k, event.sampling_probability), None
    if isinstance(event, dp.TruncatedSubsampledGaussianDpEvent):
        return stats.binom(k, event.sampling_probability), int(event.truncated_batch_size)
    if isinstance(event, MixtureOfGaussiansDpEvent):
        return stats.binom(k, sampler.rate), None
    if isinstance(event, dp.SampledWithoutReplacementDpEvent):
        return None, int(event.sample_size)
    if isinstance(event, dp.GaussianDpEvent):  # no amplification is claimed, whoever comes
        return None, None
    raise ValueError(f"Expected the event of a known sampler, got {type(event).__name__}; the audit does not know its law.")


def _sizes(sizes: list[int], sampler: Sampler, level: float) -> Finding:
    law, cap = law_of_sizes(sampler, sampler.event(1.0))
    mean, draws = float(np.mean(sizes)), len(sizes)
    if law is None:
        claim = sampler.expected_cohort if cap is None else float(cap)
        odd = 0 if cap is None else sum(size != cap for size in sizes)
        detail = "no sampling is claimed" if cap is None else f"a fixed size is claimed; {odd} of {draws:,} cohorts have another"
        return Finding("cohort: size", claim, mean, not odd, detail)
    top = int(law.ppf(1 - 1e-12)) + 1
    pmf = law.pmf(np.arange(top + 1))
    if cap is not None and cap < top:
        pmf = np.append(pmf[:cap], pmf[cap:].sum())
    cuts = bins_of(pmf, draws)
    expected = np.add.reduceat(pmf, cuts) * draws
    found = np.bincount(np.searchsorted(cuts, sizes, side="right") - 1, minlength=len(cuts))
    statistic = float((np.square(found - expected) / expected).sum())
    p = stats.chi2.sf(statistic, len(cuts) - 1) if len(cuts) > 1 else 1.0
    claimed = float(np.arange(len(pmf)) @ pmf)
    shape = f"variance {np.var(sizes):.4g}, claimed {float(np.square(np.arange(len(pmf)) - claimed) @ pmf):.4g}"
    detail = f"mean of {draws:,} cohorts, tested as a whole distribution ({shape})"
    return Finding("cohort: size", claimed, mean, all_likely([p], level), detail)


def _inclusion(cohorts: list[list[int]], population: int, level: float) -> Finding:
    """Test that, given the sizes, every id is as likely as any other."""
    drawn = sum(map(len, cohorts))
    groups = int(min(GROUPS, population, drawn // 10))
    spread = math.fsum(len(c) * (population - len(c)) / max(1, population - 1) for c in cohorts)
    if groups < 2 or not spread:
        return Finding("cohort: inclusion", 1.0, 1.0, True, "everyone takes part, or too few to tell")
    ids = np.fromiter((u for c in cohorts for u in c), dtype=np.int64, count=drawn)
    edges = [-(-g * population // groups) for g in range(groups + 1)]
    weights = np.diff(edges) / population
    counts = np.bincount(ids * groups // population, minlength=groups)
    # The counts of a cohort of fixed size have the covariance (K - s) / (K - 1) s (diag(w) - w w').
    statistic = float((np.square(counts - drawn * weights) / (spread * weights)).sum())
    ratio = counts / (drawn * weights)
    worst = float(ratio[np.argmax(np.abs(ratio - 1))])
    p = float(stats.chi2.sf(statistic, groups - 1))
    return Finding("cohort: inclusion", 1.0, worst, all_likely([p], level), f"the furthest of {groups} groups of ids from its share")


def _overlap(cohorts: list[list[int]], again: list[list[int]], population: int, level: float) -> Finding:
    """Test that another attempt, and the next round, draw their cohorts whatever the one before was."""
    pairs = [*zip(cohorts, again, strict=True), *itertools.pairwise(cohorts)]
    halves, p, found, claimed = (pairs[: len(cohorts)], pairs[len(cohorts) :]), list[float](), 0.0, 0.0
    for half in halves:
        common = sum(len(set(a) & set(b)) for a, b in half)
        mean = math.fsum(len(a) * len(b) / population for a, b in half)
        variance = math.fsum(
            len(a) * len(b) * (population - len(a)) * (population - len(b)) / population**2 / max(1, population - 1) for a, b in half
        )
        found, claimed = found + common, claimed + mean
        if variance > 100:
            p.append(float(two_sided((common - mean) / math.sqrt(variance))))
        elif variance > 0:
            p.append(float(stats.poisson.sf(common - 1, mean)))
    base = max(1, sum(len(a) for a, _ in pairs))
    detail = "of a cohort, how many are in that of another attempt or of the next round"
    return Finding("cohort: drawn anew", claimed / base, found / base, all_likely(p, level), detail)


def audit_denominator(bench: Bench, claim: Claim) -> Finding:
    """Return what the sum is divided by when none, one and many come.

    The same attempt is released with and without many users, so that the noise cancels.
    """
    direction = np.zeros(bench.layout.size)
    for h, size in enumerate(claim.largest_update):
        first = np.flatnonzero(claim.layers == h)
        if len(first):
            direction[first[0]] = size * (1 - 1e-6)
    worst = bench.denominator
    for round, users in ((1, 1), (2, 2 * int(bench.denominator) + 2), (3, max(1, int(bench.denominator) // 2))):
        plan = bench.plan(round)
        one = bench.sums_of(plan, [direction])
        many = dataclasses.replace(bench.nobody(plan, users), total=one.total * 1000)
        without = bench.released(plan, [bench.nobody(plan, 0)]) / bench.denominator
        with_them = bench.released(plan, [many]) / bench.denominator
        moved = float((with_them - without) @ direction)
        found = 1000 * float(direction @ direction) / moved if moved else math.inf
        worst = max(worst, found, key=lambda s: abs(math.log(s / bench.denominator)) if 0 < s < math.inf else math.inf)
    passed = 0 < worst < math.inf and abs(worst / bench.denominator - 1) < 1e-2
    return Finding("denominator", bench.denominator, worst, passed, "what the sum is divided by, whoever comes: the one furthest off")
