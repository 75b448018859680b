"""White-box distinguishing: releases with and without a canary, told apart as well as they can be, and the epsilon which that proves.

Each canary moves the release along a direction of its own, orthogonal to the others', by as much as a user can; the noise on orthogonal
directions is independent, so that one release is one trial for each of many canaries (as in arXiv 2305.08846, with the noise's own
statistic). Clopper-Pearson bounds on the two error rates give a lower bound on the distance of the two worlds (arXiv 2302.07956).
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from fedclip.audit.bench import Bench, System, compact, users_of
from fedclip.audit.claims import Claim, claim_of, mechanism_of, with_noise
from fedclip.audit.findings import Finding, all_likely, proportion_bounds
from fedclip.layout import Layout
from fedclip.method import Method

CANARIES = 256
"""Canaries in a release."""

LEAST_NOISE, MOST_NOISE = 0.5, 4.0
"""Between these noise multipliers counting tells how far two worlds overlap; a method with other noise is looked at with z = 1."""


@dataclasses.dataclass(frozen=True, eq=False)
class Canaries:
    """Directions, and what is seen of them.

    Attributes:
        bench: the method on a layout with as many elements in each tensor as there are canaries.
        claim: its claim there.
        vectors: what each canary sends, float64, shape (canaries, d).
    """

    bench: Bench
    claim: Claim
    vectors: np.ndarray

    @classmethod
    def of(cls, method: Method, layout: Layout, system: System, count: int, secret: str = "audit") -> "Canaries":
        """Return canaries, each of which uses all of the bound: in every layer one coordinate that no other canary uses."""
        small = compact(layout, count)
        bench = Bench(method, small, system, secret)
        claim = claim_of(bench.method, small)
        vectors = np.zeros((count, small.size))
        for h, norm in enumerate(claim.largest_update):
            there = np.flatnonzero(claim.layers == h)[:count]
            if len(there):
                # Under the bound by more than float32 rounds, so that no guard changes it.
                vectors[np.arange(count), there] = norm * (1 - 1e-6)
        return cls(bench, claim, vectors)

    def seen(self, released: np.ndarray) -> np.ndarray:
        """Return the best statistic of each canary: standard normal without it, moved by `claim.update_shift` with it."""
        whitened = self.vectors / self.claim.by_coordinate
        return np.asarray(whitened @ (released / self.claim.by_coordinate) / np.linalg.norm(whitened, axis=1))


def fit_for_counting(method: Method, layout: Layout) -> Method:
    """Return the method where its z is neither small nor large, else with z = 1, and then without adaptive bounds if need be."""
    if LEAST_NOISE <= mechanism_of(method).noise_multiplier <= MOST_NOISE:
        return method
    changed = with_noise(method, 1.0)
    try:
        changed.check(layout)
    except ValueError:
        return dataclasses.replace(changed, adaptive=None)
    return changed


def audit_distinguishing(
    method: Method,
    layout: Layout,
    epsilon: Callable[[float], float],
    *,
    trials: int = 50_000,
    level: float = 2e-3,
    system: System | None = None,
    secret: str = "audit",
) -> Finding:
    """Return the claimed epsilon against the one that the releases prove.

    Args:
        method: the method, with noise that is `fit_for_counting`.
        layout: its layout; the tensors are given other sizes.
        epsilon: the epsilon of a noise multiplier, at the claim's sampler, rounds and delta.
        trials: observations of each world.
        level: how likely a right mechanism seems to prove more than it claims.
        system: the functions of a round.
        secret: the master secret of the random streams.
    """
    canaries = Canaries.of(method, layout, system or System(), CANARIES, secret)
    bench, claim = canaries.bench, canaries.claim
    inside, outside = list[np.ndarray](), list[np.ndarray]()
    for round in range(1, 2 * math.ceil(trials / CANARIES) + 1, 2):
        plan = bench.plan(round)
        if round == 1:
            them = bench.sums_of(plan, canaries.vectors)
        inside.append(canaries.seen(bench.released(plan, [them])))
        outside.append(canaries.seen(bench.released(bench.plan(round + 1))))
    shift = shift_at_least(np.concatenate(inside), np.concatenate(outside), claim.update_shift, level)
    # The clip bits are a channel of their own; what they tell beside is as claimed, and audited apart.
    z = 1 / math.hypot(shift, claim.bits_shift) if shift or claim.bits_shift else math.inf
    claimed, found = epsilon(claim.noise_multiplier), epsilon(z) if z < math.inf else 0.0
    detail = (
        f"epsilon at z = {claim.noise_multiplier:.3g}, and what {len(inside) * CANARIES:,} trials prove of it with "
        f"{100 * (1 - level):g}% confidence: z at most {z:.3g}"
    )
    return Finding("distinguishing: epsilon", claimed, found, found <= claimed * (1 + 1e-9), detail)


def shift_at_least(inside: np.ndarray, outside: np.ndarray, expected: float, level: float) -> float:
    """Return a lower bound on mu, where the best test between two worlds is one between N(0, 1) and N(mu, 1).

    Args:
        inside: the statistic in trials with the canary, large where it shows.
        outside: the statistic in trials without it.
        expected: where to expect mu; it only chooses the threshold, half of it.
        level: how likely the bound is wrong.
    """
    power, _ = proportion_bounds(int((inside > expected / 2).sum()), inside.size, level / 2)
    _, alarms = proportion_bounds(int((outside > expected / 2).sum()), outside.size, level / 2)
    if not (0 < power < 1 and 0 < alarms < 1):
        return 0.0
    return max(0.0, float(stats.norm.ppf(power) - stats.norm.ppf(alarms)))


def audit_retry(
    method: Method,
    layout: Layout,
    *,
    canaries: int = 1500,
    level: float = 1e-3,
    system: System | None = None,
    secret: str = "audit",
) -> tuple[Finding, ...]:
    """Return what two attempts at a round tell of the users of the first one.

    A second release on the same cohort is no second draw: both hold the same users, and their average has the noise z / sqrt(2) on
    them. So the canaries of the first cohort must show in the second release as often as they are drawn, and no more; and the two
    releases must differ by two noises, else their difference is that of the sums.

    Args:
        method: the method, with noise that is `fit_for_counting`.
        layout: its layout; the tensors are given other sizes.
        canaries: at least so many users are followed.
        level: how likely a right method fails.
        system: the functions of a round.
        secret: the master secret of the random streams.
    """
    count = int(min(CANARIES, max(1, math.ceil(method.sampler.expected_cohort))))
    them = Canaries.of(method, layout, system or System(), count, secret)
    first, later, noise = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    for round in range(1, 400):
        if sum(map(len, first)) >= canaries:
            break
        crowd = users_of(them.bench.plan(round))[:count]
        seen, there = zip(*(_attempt(them, round, attempt, crowd) for attempt in (0, 1)), strict=True)
        first.append(seen[0][: len(crowd)] / them.claim.update_shift)
        later.append(seen[1][: len(crowd)] / them.claim.update_shift)
        noise.append((seen[1] - seen[0] - (there[1] - there[0]) * them.claim.update_shift) / math.sqrt(2))
    rate, again = method.sampler.rate, np.concatenate(later)
    error = math.sqrt((them.claim.update_shift**-2 + rate * (1 - rate)) / max(1, again.size))
    found = float(again.mean()) if again.size else 0.0
    differences = np.concatenate(noise)
    p = stats.chi2.cdf(float(np.square(differences).sum()), differences.size)
    return (
        Finding(
            "retry: seen again",
            rate,
            found,
            bool(stats.norm.sf((found - rate) / error) >= level / 2),
            f"the share of the first attempt's users that shows in the release of the second; {again.size:,} canaries",
        ),
        Finding(
            "retry: fresh noise",
            1.0,
            float(np.sqrt(np.square(differences).mean())),
            all_likely([p], level / 2),
            "deviation of the difference of two attempts' releases, over that of two noises",
        ),
    )


def _attempt(them: Canaries, round: int, attempt: int, crowd: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return what is seen of each canary in an attempt, and which of them took part."""
    plan = them.bench.plan(round, attempt)
    cohort = set(users_of(plan))
    there = np.array([n < len(crowd) and crowd[n] in cohort for n in range(len(them.vectors))])
    partial = them.bench.sums_of(plan, them.vectors[there])
    return them.seen(them.bench.released(plan, [partial])), there.astype(np.float64)
