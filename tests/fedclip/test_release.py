"""The release: noise by layer and in time, public denominators, empty cohorts."""

import math

import numpy as np
import pytest

from fedclip.release import Gaussian, Release
from fedclip.rng import Streams
from fedclip.transform import UNBOUNDED, Bound

D, Z, C = 40_000, 0.7, 0.05


def rng(round=1, attempt=0):
    return Streams("s", "r", round, attempt).generator("noise")


def test_noise_has_the_claimed_deviation_in_every_layer():
    noise = Release(Gaussian(Z), 1.0).apply(np.zeros(D), 0.0, Bound(C), rng())
    for layer in np.split(noise, [10, 1000, 5000, 20_000]):
        # Five standard errors of a deviation over n numbers: 1 / sqrt(2 n). A tenth too little noise in the layers fails.
        assert abs(layer.std() / (Z * C) - 1) < 5 / math.sqrt(2 * layer.size)
        assert abs(layer.mean()) < 5 * Z * C / math.sqrt(layer.size)


def test_noise_is_normal():
    from scipy import stats

    noise = Gaussian(Z).noise(D, Bound(C), rng())
    assert stats.kstest(noise / (Z * C), "norm").pvalue > 1e-3
    assert noise.dtype == np.float64


def test_noise_is_independent_over_coordinates_rounds_and_attempts():
    a, b, c = (Gaussian(Z).noise(D, Bound(C), rng(*key)) for key in ((1, 0), (2, 0), (1, 1)))
    for x, y in ((a, b), (a, c), (b, c), (a[:-1], a[1:]), (a[: D // 2], a[D // 2 :])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(len(x))


def test_the_same_attempt_has_the_same_noise():
    assert np.array_equal(Gaussian(Z).noise(9, Bound(C), rng()), Gaussian(Z).noise(9, Bound(C), rng()))


@pytest.mark.parametrize("weight", [0.0, 3.0, 1e6])
def test_under_noise_the_denominator_is_public(weight):
    total = np.arange(4.0)
    released = Release(Gaussian(Z), 8.0).apply(total, weight, Bound(C), rng())
    assert np.array_equal(released, (total + Gaussian(Z).noise(4, Bound(C), rng())) / 8.0)
    assert np.array_equal(total, np.arange(4.0)), "the input was changed"


def test_an_empty_cohort_under_noise_is_noise_on_zero():
    released = Release(Gaussian(Z), 8.0).apply(np.zeros(D), 0.0, Bound(C), rng())
    assert released.std() == pytest.approx(Z * C / 8, rel=0.02)


def test_without_noise_the_mean_is_weighted_and_nobody_gives_zero():
    assert Release().apply(np.array([6.0, 3.0]), 3.0, UNBOUNDED, rng()).tolist() == [2, 1]
    assert Release().apply(np.zeros(2), 0.0, UNBOUNDED, rng()).tolist() == [0, 0]
    assert Release(None, 6.0).apply(np.array([6.0, 3.0]), 3.0, UNBOUNDED, rng()).tolist() == [1, 0.5]


def test_what_would_not_be_private_is_refused():
    with pytest.raises(ValueError, match="weights"):
        Release(Gaussian(1.0))
    with pytest.raises(ValueError, match="infinite bound"):
        Release(Gaussian(1.0), 1.0).apply(np.zeros(2), 0.0, UNBOUNDED, rng())
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise_multiplier"):
            Gaussian(bad)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="denominator"):
            Release(None, bad)
