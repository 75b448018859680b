"""The largest magnitudes, against a stable sort of all of them: constants, ties, subnormals, and vectors that mislead the sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip import selection
from fedclip.selection import BLOCK, RUN, SAMPLE, SMALL, largest, largest_elsewhere
from tests.strategies_of_data import EXTREMES, vectors

LARGE = SMALL + 4 * BLOCK + 77
"""More than one partition takes, and no multiple of anything."""


def oracle(values, k):
    """By definition: sort by (-|x|, index), keep the first k, in ascending order."""
    return np.sort(np.argsort(-np.abs(values.astype(np.float64)), kind="stable")[:k])


def check(values, *ks):
    values = np.asarray(values, dtype=np.float32)
    before = values.tobytes()
    for k in ks:
        found = largest(torch.from_numpy(values), k)
        assert found.dtype == torch.int64
        assert np.array_equal(found.numpy(), oracle(values, k)), k
    assert values.tobytes() == before


@given(st.integers(0, 60).flatmap(vectors), st.integers(0, 70))
def test_small_vectors_agree_with_a_sort(vector, k):
    check(vector.numpy(), k)
    if 0 < k <= vector.numel():
        assert np.array_equal(largest_elsewhere(vector, k).numpy(), oracle(vector.numpy(), k))


KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "extremes": lambda rng, n: rng.choice(EXTREMES, n),
    "subnormal": lambda rng, n: rng.integers(-50, 50, n) * 1.4e-45,
    "coarse grid": lambda rng, n: rng.integers(-3, 4, n),
    "few not zero": lambda rng, n: np.where(rng.random(n) < 1e-3, rng.standard_normal(n), 0.0),
    "clustered": lambda rng, n: rng.standard_normal(n) * np.repeat(np.exp(3 * rng.standard_normal(n // 256 + 1)), 256)[:n],
    "sorted": lambda rng, n: np.sort(rng.standard_normal(n)),
    "blocks of equals": lambda rng, n: np.repeat(rng.standard_normal(n // 1000 + 1), 1000)[:n],
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), k=st.one_of(st.integers(1, 3), st.integers(1, LARGE // 8), st.integers(LARGE // 8, LARGE + 5)))
def test_large_vectors_agree_with_a_sort(kind, seed, k):
    check(KINDS[kind](np.random.default_rng(seed), LARGE).astype(np.float32), k)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 1.4e-45, 3e38, np.inf])
def test_constants_give_the_first_indices(value):
    check(np.full(LARGE, value), 0, 1, 1000, LARGE // 9, LARGE - 1, LARGE, LARGE + 1)


def test_both_zeros_tie():
    values = np.where(np.arange(LARGE) % 2, -0.0, 0.0)
    check(values, 10, 5000)


@pytest.mark.parametrize("rising", [True, False])
def test_a_ramp_fills_the_memory_of_survivors_again_and_again(rising):
    ramp = np.arange(LARGE)
    check(ramp if rising else ramp[::-1], 1, 100, 5000, LARGE // 8)


def sampled(n):
    """The coordinates that the sample takes."""
    runs = n // RUN
    marks = np.zeros((runs, RUN), bool)
    marks[:: max(1, runs * RUN // SAMPLE)] = True
    return np.concatenate([marks.ravel(), np.zeros(n - runs * RUN, bool)])


def test_a_sample_that_sees_only_small_ones_is_exact():
    rng = np.random.default_rng(0)
    check(np.where(sampled(LARGE), 1e-3, 1.0) * rng.standard_normal(LARGE), 1, 300, LARGE // 10)
    check(np.where(sampled(LARGE), 0.0, 1.0), 1, 300, LARGE // 10)


def test_a_sample_that_sees_only_large_ones_is_exact():
    rng = np.random.default_rng(0)
    marks = sampled(LARGE)
    for k in (marks.sum() + 1, marks.sum() + 100, marks.sum() * 2):
        check(np.where(marks, 1.0, 1e-3) * (1 + rng.random(LARGE)), k)
        check(np.where(marks, 1.0, 0.0), k)
        check(np.where(marks, 1.0 + rng.random(LARGE), rng.integers(0, 2, LARGE)), k)


def test_the_memory_of_survivors_is_bounded(monkeypatch):
    seen = []
    prune = selection._prune
    monkeypatch.setattr(selection, "_prune", lambda i, m, k: seen.append(sum(map(len, i))) or prune(i, m, k))
    check(np.where(sampled(LARGE), 0, np.arange(LARGE)), 100)
    assert len(seen) > 3
    assert max(seen) <= 4 * 100 + 2 * BLOCK


def test_infinities_are_largest():
    values = np.ones(LARGE)
    values[[3, 70_000, LARGE - 1]] = [np.inf, -np.inf, np.inf]
    check(values, 1, 2, 3, 4)


def test_views_with_strides_are_taken_as_they_are():
    wide = torch.randn(2 * LARGE, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(largest(wide[::2], 500).numpy(), oracle(wide[::2].numpy(), 500))


def test_gradients_do_not_follow():
    assert largest(torch.tensor([1.0, 2.0], requires_grad=True), 1).tolist() == [1]


@pytest.mark.parametrize(
    ("vector", "k", "said"),
    [
        (torch.zeros(2, 2), 1, r"float32 vector, got torch.float32 of shape \(2, 2\)"),
        (torch.zeros(2, dtype=torch.float64), 1, "float64"),
        (torch.zeros(2), -1, "k >= 0, got -1"),
    ],
)
def test_other_arguments_are_refused(vector, k, said):
    with pytest.raises(ValueError, match=said):
        largest(vector, k)
