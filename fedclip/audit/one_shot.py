"""One-shot canaries (arXiv 2302.03098): many random directions go along in one run, and their cosines with its model estimate epsilon.

An estimate, not a bound: it rests on the canaries' own directions and on the shape of two normal distributions. It fails an audit only
where it is far over the claim.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from fedclip.accounting import extrapolate
from fedclip.audit.bench import Bench, System, compact, users_of
from fedclip.audit.claims import claim_of, mechanism_of
from fedclip.audit.findings import Finding
from fedclip.layout import Layout
from fedclip.method import Method
from fedclip.sampling import Poisson, Sampler

USERS, RATE, ROUNDS, COORDINATES = 128, 0.25, 10, 16_384
"""How many users there are, all of them canaries; at least how often one takes part; for how many rounds; about how many coordinates."""

FAR = 2.0
"""The estimate fails where it is over so many times the claim, four standard errors taken off."""


def audit_one_shot(
    method: Method,
    layout: Layout,
    epsilon: Callable[[Sampler, float, int], float],
    at_delta: Callable[[float], float],
    *,
    seed: int = 0,
    system: System | None = None,
    secret: str = "audit",
) -> Finding:
    """Return the claimed epsilon of a short run against the estimate from its model.

    The run has users of its own, all of them canaries, drawn by the method's sampler at its own rate, or at 1/4 where that is less:
    with few canaries a round there would be nothing to see.

    Args:
        method: the method, with noise that is `fit_for_counting`.
        layout: its layout; the tensors are given other sizes.
        epsilon: the epsilon of a sampler, a noise multiplier and a number of rounds, at the claim's delta.
        at_delta: the epsilon, at that delta, of telling N(0, 1) from N(mu, 1).
        seed: which directions.
        system: the functions of a round.
        secret: the master secret of the random streams.
    """
    crowd = _crowd(method)
    small = compact(layout, max(2, COORDINATES // max(1, sum(size > 0 for size in layout.sizes))))
    bench = Bench(dataclasses.replace(method, sampler=crowd, adaptive=None), small, system or System(), secret)
    claim = claim_of(bench.method, small)
    directions = _directions(bench, claim.largest_update, claim.layers, seed)
    total = np.zeros(small.size)
    for round in range(1, ROUNDS + 1):
        plan = bench.plan(round)
        total += bench.released(plan, [bench.sums_of(plan, (directions[u] for u in users_of(plan)))]) / claim.by_coordinate
    whitened = directions / claim.by_coordinate
    cosines = whitened @ total / np.linalg.norm(whitened, axis=1) / max(float(np.linalg.norm(total)), 1e-300)
    # Without the canary a cosine has the deviation 1 / sqrt(d).
    shifts = cosines * math.sqrt(small.size)
    mean, error = float(shifts.mean()), float(shifts.std()) / math.sqrt(USERS)
    claimed, found = epsilon(crowd, claim.noise_multiplier, ROUNDS), at_delta(max(0.0, mean))
    passed = at_delta(max(0.0, mean - 4 * error)) <= FAR * claimed
    detail = (
        f"an estimate, no bound, of the epsilon of {ROUNDS} rounds at q = {crowd.rate:.3g}, z = {claim.noise_multiplier:.3g} over "
        f"{USERS} canaries in one run; it fails above {FAR:g} times the claim"
    )
    return Finding("one-shot canaries: epsilon", claimed, found, passed, detail)


def _crowd(method: Method) -> Sampler:
    """Return the method's sampler over the canaries, of which it can tell no more apart than there are."""
    sampler = method.sampler
    if isinstance(sampler, Poisson) and sampler.devices_per_user > USERS:
        sampler = dataclasses.replace(sampler, devices_per_user=USERS)
    return extrapolate(sampler, mechanism_of(method).noise_multiplier, USERS, math.ceil(USERS * max(RATE, sampler.rate)))[0]


def _directions(bench: Bench, norms: np.ndarray, layers: np.ndarray, seed: int) -> np.ndarray:
    """Return a random vector for each canary, with the largest norm that each layer may have; float64, shape (users, d)."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((USERS, bench.layout.size))
    for h, norm in enumerate(norms):
        there = layers == h
        lengths = np.linalg.norm(directions[:, there], axis=1, keepdims=True)
        directions[:, there] *= norm * (1 - 1e-6) / np.maximum(lengths, 1e-300)
    return directions.astype(np.float32).astype(np.float64)
