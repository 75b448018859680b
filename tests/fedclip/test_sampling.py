"""Poisson sampling: its law, its cost, its refusals."""

import time
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from fedclip.sampling import Poisson


def draws(sampler, n, seed=0):
    rng = np.random.default_rng(seed)
    return [sampler.draw(rng) for _ in range(n)]


def test_cohort_sizes_follow_the_binomial_law():
    sampler, n = Poisson(60, 6.0), 4000
    sizes = np.array([len(c) for c in draws(sampler, n)])
    law = stats.binom(60, 0.1)
    # Cells 0..1, 2, …, 11, 12 and more: each expects over 30. A wrong law (a fixed size, a Poisson one) gives p under 1e-6.
    edges = [-1, *range(1, 12), 60]
    expected = n * np.diff(law.cdf(edges))
    observed = np.histogram(sizes, bins=np.array(edges) + 0.5)[0]
    assert expected.min() > 20
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_each_user_comes_equally_often_and_pairs_are_independent():
    sampler, n = Poisson(20, 5.0), 6000
    came = np.zeros((n, 20))
    for row, cohort in zip(came, draws(sampler, n), strict=True):
        row[list(cohort)] = 1
    # q = 1/4; five standard errors of a frequency, and of a pair's covariance, over n draws.
    assert np.abs(came.mean(0) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / n)
    covariance = np.cov(came.T) - np.diag(np.diag(np.cov(came.T)))
    assert np.abs(covariance).max() < 5 * 0.25 * 0.75 / np.sqrt(n)


def test_ids_are_distinct_sorted_and_in_range():
    for population, cohort in ((7, 3.0), (100_000, 2_000.0), (20_000, 9_000.0)):
        ids = Poisson(population, cohort).draw(np.random.default_rng(1))
        assert list(ids) == sorted(set(ids))
        assert ids[0] >= 0
        assert ids[-1] < population
        assert all(type(i) is int for i in ids)


def test_a_hundred_million_users_cost_no_more_than_the_cohort():
    sampler = Poisson(100_000_000, 1000.0)
    start = time.perf_counter()
    tracemalloc.start()
    cohorts = draws(sampler, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - start < 2.0
    assert peak < 2_000_000, "anything enumerated over the population would take 100 MB at least"
    assert all(800 < len(c) < 1200 for c in cohorts)


def test_rate_one_takes_everyone_and_small_rates_often_nobody():
    assert Poisson(9, 9.0).draw(np.random.default_rng(0)) == tuple(range(9))
    assert () in draws(Poisson(10, 0.5), 50)


def test_the_rate_and_the_public_cohort():
    sampler = Poisson(1000, 20.0)
    assert (sampler.rate, sampler.expected_cohort) == (0.02, 20.0)


@pytest.mark.parametrize(("population", "cohort"), [(0, 1.0), (10, 0.0), (10, 11.0), (10, float("nan"))])
def test_rates_that_are_no_probabilities_are_refused(population, cohort):
    with pytest.raises(ValueError, match="Expected"):
        Poisson(population, cohort)
