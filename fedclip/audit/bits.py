"""The clip bits of adaptive clipping: noised, centred, apart from the update's noise, and all that the next bounds are made of."""

import dataclasses

import numpy as np

from fedclip.audit.bench import Bench
from fedclip.audit.claims import Claim
from fedclip.audit.findings import Finding, all_likely, of_squares, two_sided
from fedclip.round import Outcome, Plan

SAMPLES = 4000
"""Noised bits to look at."""

STEP = 0.01
"""The rate at which bounds move here: so little that none reaches a limit, and their movement tells the noised bits."""


def audit_bits(bench: Bench, claim: Claim, *, level: float = 1e-3) -> tuple[Finding, ...]:
    """Return what the released clip bits are made of; nothing for a method without adaptive clipping.

    Args:
        bench: the method on a layout of one element or few a tensor.
        claim: its claim on that layout.
        level: how likely a right mechanism fails any of the tests.
    """
    adaptive = bench.method.adaptive
    if adaptive is None or not claim.clip_bits:
        return ()
    slow = dataclasses.replace(bench.method, adaptive=adaptive.model_copy(update={"lr": STEP}))
    bench = dataclasses.replace(bench, method=slow)
    rounds = min(max(-(-SAMPLES // claim.clip_bits), 64), SAMPLES)
    x, noise = np.empty((rounds, claim.clip_bits)), np.empty((rounds, claim.clip_bits))
    for round in range(1, rounds + 1):
        plan = bench.plan(round)
        outcome = bench.outcome(plan, [bench.nobody(plan, round % 3)])
        x[round - 1] = (_fractions(bench, plan, outcome) - 0.5) * bench.method.sampler.expected_cohort / claim.bits_deviation
        noise[round - 1] = np.resize(bench.seen(outcome) / claim.by_coordinate, claim.clip_bits)
    columns = np.square(x).sum(axis=0)
    p = np.append(of_squares(columns, rounds), of_squares(columns.sum(), x.size))
    z = np.array([x.sum() / np.sqrt(x.size), (x[:-1] * x[1:]).sum() / max(np.linalg.norm(x[:-1]), 1e-300)])
    shared = float((x * noise).sum()) / max(float(np.linalg.norm(noise)), 1e-300)
    size = f"{x.size:,} noised bits of {claim.clip_bits} bounds"
    return (
        Finding(
            "clip bits: deviation",
            1.0,
            float(np.sqrt(np.square(x).mean())),
            all_likely(p, level / 3),
            f"of the noise on the sum of bits, in units of the claimed deviation; {size}",
        ),
        Finding("clip bits: mean", 0.0, float(x.mean()), all_likely(two_sided(z), level / 3), f"of bits that cancel; {size}"),
        Finding(
            "clip bits: apart from the update",
            0.0,
            abs(shared) / np.sqrt(x.size),
            all_likely(two_sided(shared)[None], level / 3),
            "correlation of the bits' noise with the first of the update's noise",
        ),
        _one_user(bench),
    )


def _fractions(bench: Bench, plan: Plan, outcome: Outcome) -> np.ndarray:
    """Return the noised fractions that moved the bounds, from how far they moved."""
    adaptive = bench.method.adaptive
    if adaptive is None:
        raise ValueError("Expected a method with adaptive clipping.")
    streams = plan.spec.streams
    before = np.asarray(bench.state(streams.round, streams.attempt).thresholds)
    return np.asarray(adaptive.quantile - np.log(np.asarray(outcome.state.thresholds) / before) / adaptive.lr)


def _one_user(bench: Bench) -> Finding:
    """Test that one user moves the sum of each bit by no more than 1/2: the same noise with and without the user."""
    plan, worst = bench.plan(1), 0.0
    cohort, zero = bench.method.sampler.expected_cohort, np.zeros(bench.layout.size)
    others = bench.sums_of(plan, [zero] * 3)
    without = _fractions(bench, plan, bench.outcome(plan, [others]))
    for bit in (True, False):
        partials = [others, bench.sums_of(plan, [zero], (bit,) * plan.spec.clip_bits)]
        moved = _fractions(bench, plan, bench.outcome(plan, partials)) - without
        worst = max(worst, float(np.max(np.abs(moved))) * cohort)
    passed = worst <= 0.5 * (1 + 1e-6)
    return Finding("clip bits: effect of one user", 0.5, worst, passed, "on the sum of each bit, under the same noise")
