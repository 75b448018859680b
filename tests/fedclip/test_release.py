"""The release: noise by layer and in time, public denominators, empty cohorts."""

import math

import numpy as np
import pytest

from fedclip.layout import Layout
from fedclip.release import DrawnAhead, Gaussian, Release
from fedclip.rng import Streams
from fedclip.transform import UNBOUNDED, Bound

D, Z, C = 40_000, 0.7, 0.05


def flat(size):
    return Layout(("w",), ((size,),), ("w",))


def rng(round=1, attempt=0):
    return Streams("s", "r", round, attempt).generator("noise")


def test_noise_has_the_claimed_deviation_in_every_layer():
    noise = Release(Gaussian(Z), 1.0).apply(np.zeros(D), 0.0, Bound(C), flat(D), rng())
    for layer in np.split(noise, [10, 1000, 5000, 20_000]):
        # Five standard errors of a deviation over n numbers: 1 / sqrt(2 n). A tenth too little noise in the layers fails.
        assert abs(layer.std() / (Z * C) - 1) < 5 / math.sqrt(2 * layer.size)
        assert abs(layer.mean()) < 5 * Z * C / math.sqrt(layer.size)


def test_noise_is_normal():
    from scipy import stats

    noise = Gaussian(Z).noise(Bound(C), flat(D), rng())
    assert stats.kstest(noise / (Z * C), "norm").pvalue > 1e-3
    assert noise.dtype == np.float64


def test_noise_is_independent_over_coordinates_rounds_and_attempts():
    a, b, c = (Gaussian(Z).noise(Bound(C), flat(D), rng(*key)) for key in ((1, 0), (2, 0), (1, 1)))
    for x, y in ((a, b), (a, c), (b, c), (a[:-1], a[1:]), (a[: D // 2], a[D // 2 :])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(len(x))


def test_the_same_attempt_has_the_same_noise():
    assert np.array_equal(Gaussian(Z).noise(Bound(C), flat(9), rng()), Gaussian(Z).noise(Bound(C), flat(9), rng()))


@pytest.mark.parametrize("weight", [0.0, 3.0, 1e6])
def test_under_noise_the_denominator_is_public(weight):
    total = np.arange(4.0)
    released = Release(Gaussian(Z), 8.0).apply(total, weight, Bound(C), flat(4), rng())
    assert np.array_equal(released, (total + Gaussian(Z).noise(Bound(C), flat(4), rng())) / 8.0)
    assert np.array_equal(total, np.arange(4.0)), "the input was changed"


def test_an_empty_cohort_under_noise_is_noise_on_zero():
    released = Release(Gaussian(Z), 8.0).apply(np.zeros(D), 0.0, Bound(C), flat(D), rng())
    assert released.std() == pytest.approx(Z * C / 8, rel=0.02)


def test_without_noise_the_mean_is_weighted_and_nobody_gives_zero():
    assert Release().apply(np.array([6.0, 3.0]), 3.0, UNBOUNDED, flat(2), rng()).tolist() == [2, 1]
    assert Release().apply(np.zeros(2), 0.0, UNBOUNDED, flat(2), rng()).tolist() == [0, 0]
    assert Release(None, 6.0).apply(np.array([6.0, 3.0]), 3.0, UNBOUNDED, flat(2), rng()).tolist() == [1, 0.5]


LAYERS = Layout(("a", "e", "b", "c"), ((3, 4), (0,), (50,), ()), ("a", "e", "b", "c"))
PER_LAYER = Bound(math.hypot(0.3, 0.4, 1.2), (0.3, 0.0, 0.4, 1.2))


@pytest.mark.parametrize(("split", "weights"), [("isotropic", ()), ("bounds", ()), ("weights", (3.0, 1.0, 0.2, 5.0))])
def test_every_split_of_the_noise_is_one_mechanism_at_z(split, weights):
    """z = (sum_h (C_h / sigma_h)^2)^(-1/2): scaled to unit noise, a user within the bounds moves the release by at most 1 / z."""
    deviations = Gaussian(Z, split, weights).deviations(PER_LAYER, LAYERS)
    there = [(c, s) for c, s, d in zip(PER_LAYER.per_layer, deviations, LAYERS.layer_sizes, strict=True) if d]
    if split == "isotropic":  # its z holds for every user within C, whatever the layers
        assert {s for _, s in there} == {Z * PER_LAYER.total}
    assert math.fsum((c / s) ** 2 for c, s in there) ** -0.5 == pytest.approx(Z, rel=1e-12)


def test_noise_by_layer_has_the_deviation_of_each_layer():
    layout = Layout(("a", "b"), ((20_000,), (30, 1000)), ("a", "b"))
    mechanism = Gaussian(Z, "weights", (1.0, 4.0))
    bound = Bound(math.hypot(0.3, 0.4), (0.3, 0.4))
    noise = mechanism.noise(bound, layout, rng())
    for part, deviation in zip(np.split(noise, [20_000]), mechanism.deviations(bound, layout), strict=True):
        assert abs(part.std() / deviation - 1) < 5 / math.sqrt(2 * part.size)
    same = Gaussian(Z, "bounds").deviations(bound, layout)
    assert same[1] / same[0] == pytest.approx(4 / 3)


def test_noise_by_layer_needs_bounds_by_layer():
    """In normalize mode a layer may exceed its part of the bound, so that only the total is bounded."""
    for split, weights in (("bounds", ()), ("weights", (1.0, 1.0, 1.0, 1.0))):
        with pytest.raises(ValueError, match="bound for each layer"):
            Gaussian(Z, split, weights).deviations(Bound(1.0), LAYERS)
    with pytest.raises(ValueError, match=r"Expected 4 noise weights.*got 2"):
        Gaussian(Z, "weights", (1.0, 1.0)).deviations(PER_LAYER, LAYERS)
    for split, weights in (("isotropic", (1.0,)), ("weights", ())):
        with pytest.raises(ValueError, match="noise weights with split"):
            Gaussian(Z, split, weights)
    with pytest.raises(ValueError, match="over 0"):
        Gaussian(Z, "weights", (1.0, 0.0))


def test_what_would_not_be_private_is_refused():
    with pytest.raises(ValueError, match="weights"):
        Release(Gaussian(1.0))
    with pytest.raises(ValueError, match="infinite bound"):
        Release(Gaussian(1.0), 1.0).apply(np.zeros(2), 0.0, UNBOUNDED, flat(2), rng())
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise_multiplier"):
            Gaussian(bad)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="denominator"):
            Release(None, bad)


def test_numbers_drawn_ahead_are_those_of_the_stream():
    stream, plain = rng(), rng()
    for size in (1000, 7):
        assert np.array_equal(DrawnAhead(stream, size).standard_normal(size), plain.standard_normal(size))
    with pytest.raises(ValueError, match="the 3 that were drawn ahead, got 4"):
        DrawnAhead(stream, 3).standard_normal(4)
    once = DrawnAhead(stream, 3)
    once.standard_normal(3)
    with pytest.raises(ValueError, match="none any more"):
        once.standard_normal(3)
