"""Samplers: the law of their cohorts, what a draw costs, the privacy event of a round, and what they refuse."""

import itertools
import subprocess
import sys
import time
import tracemalloc

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
from scipy import stats

from fedclip.sampling import Available, FixedSize, Poisson, Sampler

HUGE = 700_000_000


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


@pytest.mark.parametrize("cohort", [1000, 100_000])
@pytest.mark.parametrize("kind", [Poisson, FixedSize])
def test_a_hundred_million_users_cost_no_more_than_the_cohort(kind, cohort):
    peaks = {}
    for population in (10_000_000, 100_000_000, 2**40):
        sampler, start = kind(population, cohort), time.process_time()
        tracemalloc.start()
        drawn = draws(sampler, 3)
        peaks[population] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.process_time() - start < 2.0
        assert all(abs(len(c) - cohort) < 10 * cohort**0.5 for c in drawn)
        assert max(c[-1] for c in drawn) > 0.99 * population  # ids beyond 32 bits too
    # Three cohorts are held here, of 8 bytes and an int each; anything enumerated over the population would take 10 MB at least.
    assert max(peaks.values()) < 150 * cohort
    assert max(peaks.values()) < 1.05 * min(peaks.values()) + 10_000


LAWS = [Poisson(12, 4.0), Poisson(12, 4.0, max_cohort=5), Poisson(12, 4.0, devices_per_user=2), FixedSize(12, 4)]


def set_sizes(sampler):
    """The probability of each size of a cohort; all sets of a size are equally likely."""
    if isinstance(sampler, FixedSize):
        return {sampler.cohort: 1.0}
    law, most = stats.binom(sampler.population, sampler.rate), sampler.max_cohort or sampler.population
    return {n: law.pmf(n) if n < most else law.sf(most - 1) for n in range(most + 1)}


@pytest.mark.parametrize("sampler", LAWS, ids=lambda s: s.name)
def test_users_and_pairs_come_as_often_as_the_law_says(sampler):
    n, people = 12_000, sampler.population
    came = np.zeros((n, people))
    for row, cohort in zip(came, draws(sampler, n), strict=True):
        row[list(cohort)] = 1
    alone = sum(p * size / people for size, p in set_sizes(sampler).items())
    both = sum(p * size * (size - 1) / (people * (people - 1)) for size, p in set_sizes(sampler).items())
    pairs = [came[:, i] @ came[:, j] for i, j in itertools.combinations(range(people), 2)]
    # Each is a sum of n independent coins; a chi-square of one degree for each, and all of them at once by Bonferroni.
    for counts, p in ((came.sum(0), alone), (np.array(pairs), both)):
        scores = (counts - n * p) ** 2 / (n * p * (1 - p))
        assert stats.chi2(1).sf(scores.max()) * len(scores) > 1e-4
    # Every kind of draw from (neither, one, other, both) of the first two users.
    cells = np.bincount((came[:, 0] + 2 * came[:, 1]).astype(int), minlength=4)
    assert stats.chisquare(cells, n * np.array([1 - 2 * alone + both, alone - both, alone - both, both])).pvalue > 1e-4


@pytest.mark.parametrize("sampler", [Poisson(10_000_000, 1000.0), FixedSize(10_000_000, 1000)], ids=lambda s: s.name)
def test_ten_million_users_come_equally_often(sampler):
    ids = np.concatenate(draws(sampler, 400))
    # Buckets of neighbours and of those that are alike modulo a prime: about 400 in each cell.
    for cells in (np.bincount(ids // 10_000, minlength=1000), np.bincount(ids % 997, minlength=997)):
        assert stats.chisquare(cells).pvalue > 1e-4


def test_a_cap_takes_of_those_who_came_a_random_part():
    plain, capped = Poisson(1000, 50.0), Poisson(1000, 50.0, max_cohort=50)
    for seed in range(200):
        everyone, some = draws(plain, 1, seed)[0], draws(capped, 1, seed)[0]
        assert len(some) == min(len(everyone), 50)


def test_the_draws_of_recorded_runs_stay_as_they_were():
    sampler = Poisson(5000, 40.0)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        size = int(rng.binomial(5000, 40.0 / 5000))
        expected = np.sort(rng.choice(5000, size=size, replace=False, shuffle=False))
        assert draws(sampler, 1, seed)[0] == tuple(expected)


@pytest.mark.parametrize(
    "sampler", [Poisson(10_000_000, 1000.0), Poisson(HUGE, 1000.0, max_cohort=1100), FixedSize(HUGE, 1000)], ids=lambda s: s.name
)
def test_a_cohort_of_a_thousand_takes_under_a_millisecond(sampler):
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        sampler.draw(rng)
        seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 1e-3  # 0.03 ms on a free core


def test_memory_does_not_grow_with_the_population():
    def peak(sampler):
        sampler.draw(np.random.default_rng(0))
        tracemalloc.start()
        draws(sampler, 20)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    for kind in (Poisson, FixedSize):
        peaks = [peak(kind(population, 1000)) for population in (1_000_000, 10_000_000, HUGE)]
        # The number of ids varies by a few per cent with the draw, and large ones take no more than small ones.
        assert max(peaks) < 1.2 * min(peaks)


def test_rate_one_takes_everyone_and_small_rates_often_nobody():
    assert Poisson(9, 9.0).draw(np.random.default_rng(0)) == tuple(range(9))
    assert () in draws(Poisson(10, 0.5), 50)


def test_a_fixed_size_is_always_that_size():
    assert {len(c) for c in draws(FixedSize(50, 7), 300)} == {7}
    assert FixedSize(9, 9).draw(np.random.default_rng(0)) == tuple(range(9))


@pytest.mark.parametrize(
    ("sampler", "name", "adjacency"),
    [
        (Poisson(1000, 20.0), "Poisson", "add-or-remove-one"),
        (Poisson(1000, 20.0, max_cohort=30), "Poisson, at most 30 a round", "add-or-remove-one"),
        (Poisson(1000, 20.0, devices_per_user=3), "Poisson, up to 3 devices a user", "add-or-remove-one"),
        (FixedSize(1000, 20), "fixed size", "replace-one"),
    ],
)
def test_a_sampler_says_what_it_is(sampler, name, adjacency):
    assert isinstance(sampler, Sampler)
    assert (sampler.population, sampler.rate, sampler.expected_cohort) == (1000, 0.02, 20.0)
    assert (sampler.name, sampler.adjacency, sampler.unit) == (name, adjacency, "user")
    assert hash(sampler) == hash(type(sampler)(**vars(sampler)))


@pytest.mark.parametrize(
    ("sampler", "event"),
    [
        (Poisson(1000, 20.0), dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(1.5))),
        (Poisson(1000, 1000.0), dp.GaussianDpEvent(1.5)),
        (Poisson(1000, 20.0, max_cohort=30), dp.TruncatedSubsampledGaussianDpEvent(1000, 0.02, 30, 1.5)),
        (Poisson(1000, 20.0, max_cohort=1000), dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(1.5))),
        # Three devices that always come move the sum by 3C.
        (Poisson(1000, 1000.0, devices_per_user=3), dp.GaussianDpEvent(0.5)),
        # Replacing a user moves the sum by up to 2C, which is half the noise.
        (FixedSize(1000, 20), dp.SampledWithoutReplacementDpEvent(1000, 20, dp.GaussianDpEvent(0.75))),
        (FixedSize(1000, 1000), dp.GaussianDpEvent(0.75)),
    ],
)
def test_a_sampler_carries_the_privacy_event_of_its_round(sampler, event):
    assert sampler.event(1.5) == event


def test_of_those_who_are_there_each_comes_by_a_coin_of_its_own_and_no_sampling_is_claimed():
    sampler, n, there = Available(40, 8.0, 1.5), 4000, [*range(3, 40, 2)]
    came = np.zeros((n, 40))
    rng = np.random.default_rng(3)
    for row in came:
        row[list(sampler.draw(rng, there))] = 1
    # q = 1.5 * 8 / 40; five standard errors of a frequency, and of a pair's covariance, over n draws.
    assert np.abs(came[:, there].mean(0) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / n)
    assert not came[:, [u for u in range(40) if u not in there]].any()
    covariance = np.cov(came[:, there].T) - np.diag(np.diag(np.cov(came[:, there].T)))
    assert np.abs(covariance).max() < 5 * 0.3 * 0.7 / np.sqrt(n)
    assert Available(40, 30.0, 2.0).draw(rng) == tuple(range(40)), "at most all"
    for z in (0.7, 2.0):
        assert sampler.event(z) == dp.GaussianDpEvent(z)
    assert sampler.rate == 1.0


def test_who_is_away_moves_nobody_elses_coin():
    sampler = Available(40, 8.0)
    everybody = sampler.draw(np.random.default_rng(5))
    for away in range(40):
        others = [user for user in range(40) if user != away]
        assert sampler.draw(np.random.default_rng(5), others) == tuple(user for user in everybody if user != away)


def test_the_devices_of_a_user_come_by_the_binomial_law():
    event = Poisson(1000, 200.0, devices_per_user=2).event(1.5)
    assert isinstance(event, MixtureOfGaussiansDpEvent)
    assert (event.standard_deviation, event.sensitivities) == (1.5, (0.0, 1.0, 2.0))
    assert event.sampling_probs == pytest.approx((0.64, 0.32, 0.04))
    hash(event)


@pytest.mark.parametrize(("population", "cohort"), [(0, 1.0), (10, 0.0), (10, 11.0), (10, float("nan"))])
def test_rates_that_are_no_probabilities_are_refused(population, cohort):
    with pytest.raises(ValueError, match="Expected"):
        Poisson(population, cohort)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(100, 20.0, max_cohort=19), "at least the expected cohort, 20, got 19"),
        (lambda: Poisson(100, 20.0, devices_per_user=0), "devices_per_user from 1 .* got 0"),
        (lambda: Poisson(100, 20.0, devices_per_user=101), "devices_per_user .* got 101"),
        (lambda: Poisson(100, 20.0, 30, 2), "max_cohort or devices_per_user, got 30 and 2"),
        (lambda: Poisson(100, 20.0, max_cohort=20.5), r"whole max_cohort .* got 20\.5"),
        (lambda: Poisson(100, 20.0, devices_per_user=1.5), r"whole devices_per_user .* got 1\.5"),
        (lambda: Poisson(10.5, 2.0), r"whole population .* got 10\.5"),
        (lambda: Poisson(float("inf"), 2.0), "whole population .* got inf"),
        (lambda: Poisson(float("nan"), 2.0), "whole population .* got nan"),
        (lambda: FixedSize(0, 1), "population of at least 1, got 0"),
        (lambda: FixedSize(10, 0), "from 1 to the population, 10, got 0"),
        (lambda: FixedSize(10, 11), "got 11"),
        (lambda: FixedSize(10, 2.5), r"whole cohort .* got 2\.5"),
        (lambda: FixedSize(10, float("nan")), "whole cohort .* got nan"),
    ],
)
def test_numbers_that_are_no_sampler_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samplers_import_neither_torch_nor_accounting():
    code = "import sys, fedclip.sampling; sys.exit(bool({'torch', 'dp_accounting', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
