"""The noise: of the claimed size in every layer, normal, fresh in every round and attempt, there when nobody came."""

import itertools

import numpy as np
from scipy import stats

from fedclip.audit.bench import Bench
from fedclip.audit.claims import Claim, Support
from fedclip.audit.findings import Finding, all_likely, of_squares, two_sided

ROUNDS_COMPARED = 48
"""How many releases are compared with each other, all pairs of them."""

COORDINATES_COMPARED = 4096
"""How many coordinates of two layers are compared in a release."""


def audit_noise(
    bench: Bench, claim: Claim, *, samples: int = 50_000, level: float = 4e-3, support: Support | None = None
) -> tuple[Finding, ...]:
    """Return what releases of zero sums are made of.

    Args:
        bench: the method.
        claim: its claim on the bench's layout.
        samples: at least so many numbers are drawn; 50,000 show a deviation that is 2% off.
        level: how likely a right mechanism fails any of the tests.
        support: where the noise has to be; None: everywhere.
    """
    attempts = [(1, 1), (2, 1), (3, 1), (1, 2)]
    first = None if support is None else support(1)
    rounds = max(8, -(-samples // max(1, bench.layout.size if first is None else int(first.sum()))))
    keys = [(r, 0) for r in range(1, 5)] + attempts + [(r, 0) for r in range(5, rounds + 1)]
    released, wanted = [], np.ones((len(keys), bench.layout.size), dtype=bool)
    claimed = np.tile(claim.by_coordinate, (len(keys), 1))
    for row, (round, attempt) in enumerate(keys):
        plan = bench.plan(round, attempt)
        crowd = [bench.nobody(plan, 2 * int(bench.denominator) + 1)] if row % 2 else []
        released.append(bench.released(plan, crowd))
        there = None if support is None else support(round)
        if there is not None:
            wanted[row], claimed[row] = there, claim.on(there).by_coordinate
    outside = float(np.max(np.abs(np.stack(released)[~wanted]), initial=0.0))
    x = np.where(wanted, np.stack(released) / claimed, 0.0)
    share = level / 6
    return (
        *_size(x, wanted, claim, 2 * share),
        _normality(x[wanted], share),
        _between_releases(x, keys, claim, share),
        _between_layers(x, claim, share),
        _between_neighbours(x, share),
        _replay(bench),
        _crowd(bench, claim),
        Finding("noise: outside the support", 0.0, outside, not outside, "the most that was released on coordinates that nobody sends"),
    )


def _size(x: np.ndarray, wanted: np.ndarray, claim: Claim, level: float) -> tuple[Finding, ...]:
    """Test variance and mean, of all numbers and of each layer's."""
    names = [name for h, name in enumerate(claim.names) if np.any(claim.layers == h)]
    parts = [claim.layers == h for h in range(len(claim.names)) if np.any(claim.layers == h)]
    counts = np.array([wanted[:, part].sum() for part in parts], dtype=np.float64)
    squares = np.array([np.square(x[:, part]).sum() for part in parts])
    sums = np.array([x[:, part].sum() for part in parts])
    ratios, at_all = np.sqrt(squares / np.maximum(1, counts)), counts > 0
    p = np.where(at_all, of_squares(squares, np.maximum(1, counts)), 1.0)
    pooled, total = float(np.sqrt(squares.sum() / counts.sum())), int(counts.sum())
    worst = int(np.argmin(p))
    z = np.append(sums / np.sqrt(np.maximum(1, counts)), sums.sum() / np.sqrt(total))
    return (
        Finding(
            "noise: deviation",
            1.0,
            pooled,
            all_likely(of_squares(squares.sum(), total)[None], level / 4),
            f"of the noise on the sum, in units of the claimed deviation, over {total:,} numbers",
        ),
        Finding(
            "noise: deviation of each layer",
            1.0,
            float(ratios[worst]),
            all_likely(p, level / 4),
            f"the least likely of {len(names)} layers, {names[worst]}, over {int(counts[worst]):,} numbers",
        ),
        Finding(
            "noise: mean",
            0.0,
            float(sums.sum() / total),
            all_likely(two_sided(z), level / 2),
            f"in units of the claimed deviation; tested on the whole and in {len(names)} layers",
        ),
    )


def _normality(values: np.ndarray, level: float) -> Finding:
    values = values[:200_000]
    if len(values) < 20 or not np.ptp(values):
        return Finding("noise: normality", 0.0, 1.0, False, "no noise")
    whole = stats.kstest(values, "norm")
    p = [whole.pvalue, stats.skewtest(values).pvalue, stats.kurtosistest(values).pvalue]
    detail = f"Kolmogorov-Smirnov distance to the claimed normal distribution; {len(values):,} numbers, skewness and tails too"
    return Finding("noise: normality", 0.0, float(whole.statistic), all_likely(p, level), detail)


def _between_releases(x: np.ndarray, keys: list[tuple[int, int]], claim: Claim, level: float) -> Finding:
    """Test all pairs of rounds and attempts, in the whole and in each layer."""
    x, keys = x[:ROUNDS_COMPARED], keys[:ROUNDS_COMPARED]
    parts = [slice(None), *(claim.layers == h for h in range(len(claim.names)))]
    upper = np.triu_indices(len(x), 1)
    shifts, correlations = list[np.ndarray](), list[np.ndarray]()
    for part in parts:
        rows = x[:, part]
        norms = np.maximum(np.linalg.norm(rows, axis=1), 1e-300)
        products = (rows @ rows.T)[upper]
        # Given the one release, the projection of the other on it is exactly standard normal.
        shifts.append(products / norms[upper[0]])
        correlations.append(products / norms[upper[0]] / norms[upper[1]])
    p = two_sided(np.concatenate(shifts))
    worst = int(np.argmax(np.abs(np.concatenate(shifts))))
    a, b = (keys[side[worst % len(upper[0])]] for side in upper)
    detail = f"the least likely of {p.size:,} correlations: (round, attempt) {a} and {b}"
    return Finding("noise: between releases", 0.0, float(abs(np.concatenate(correlations)[worst])), all_likely(p, level), detail)


def _between_layers(x: np.ndarray, claim: Claim, level: float) -> Finding:
    """Test whether two layers of a release hold the same numbers."""
    parts = [x[:, np.flatnonzero(claim.layers == h)[:COORDINATES_COMPARED]] for h in range(len(claim.names))]
    z, found, pair = [0.0], 0.0, ("", "")
    for (a, first), (b, second) in itertools.combinations(zip(claim.names, parts, strict=True), 2):
        n = min(first.shape[1], second.shape[1])
        u, v = first[:, :n], second[:, :n]
        norm = float(np.linalg.norm(u))
        if not norm or not v.any():
            continue
        z.append(float((u * v).sum()) / norm)
        if abs(z[-1]) >= max(map(abs, z)):
            found, pair = abs(z[-1]) / float(np.linalg.norm(v)), (a, b)
    detail = f"the least likely of {len(z) - 1} correlations between layers: {pair[0]} and {pair[1]}" if len(z) > 1 else "one layer"
    return Finding("noise: between layers", 0.0, found, all_likely(two_sided(np.array(z)), level), detail)


def _between_neighbours(x: np.ndarray, level: float) -> Finding:
    products = x[:, :-1] * x[:, 1:]
    energy = float(np.square(x[:, :-1]).sum())
    z = products.sum() / max(np.sqrt(energy), 1e-300)
    found = abs(float(products.sum())) / max(energy, 1e-300)
    return Finding("noise: between coordinates", 0.0, found, all_likely(two_sided(z)[None], level), f"neighbours, {products.size:,} pairs")


def _replay(bench: Bench) -> Finding:
    """Test that what repeats an attempt repeats its bits: else two releases of one sum would average the noise away."""
    differ = sum(
        not np.array_equal(bench.released(bench.plan(round, attempt)), bench.released(bench.plan(round, attempt)))
        for round, attempt in ((1, 0), (2, 0), (2, 1))
    )
    return Finding("noise: the same attempt again", 0.0, float(differ), not differ, "of 3 repeated attempts, those with other bits")


def _crowd(bench: Bench, claim: Claim) -> Finding:
    """Test that the noise does not depend on how many came."""
    size, worst = int(bench.denominator) + 1, 0.0
    for round, users in ((1, 1), (2, size), (3, 3 * size)):
        plan = bench.plan(round)
        empty, full = bench.released(plan), bench.released(plan, [bench.nobody(plan, users)])
        worst = max(worst, float(np.max(np.abs(full - empty) / claim.by_coordinate, initial=0.0)))
    return Finding("noise: empty cohort", 0.0, worst, worst == 0.0, "difference to the noise of a cohort of zeros, in claimed deviations")
