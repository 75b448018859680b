"""Sparsifiers: which coordinates are kept, that nothing else changes, and what they say of bound and error."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.sparsify import CommonMask, RandomK, TopK, kept_count
from fedclip.transform import UNBOUNDED, Bound, chain, with_error_feedback
from fedclip.update import Dense, Sparse, norm, subtract, to_dense, values_of
from tests.strategies_of_data import bits, context, flat, float64_norm, layouts, updates_with_layouts

DENSITIES = st.sampled_from([0.001, 0.1, 1 / 3, 0.5, 1.0])
STAGES = st.one_of(
    st.builds(TopK, DENSITIES, st.sampled_from(["tensor", "model"])),
    st.builds(RandomK, DENSITIES, st.integers(0, 3)),
    st.builds(CommonMask, DENSITIES, st.integers(0, 3)),
)


def largest_by_sorting(vector, k):
    """The k largest magnitudes, ties by the lowest index, ascending: the definition."""
    order = sorted(range(len(vector)), key=lambda i: (-abs(float(vector[i])), i))
    return sorted(order[:k])


@given(updates_with_layouts(), STAGES, st.integers(1, 9))
def test_kept_values_keep_their_bits_and_the_rest_is_gone(case, stage, round):
    layout, update = case
    before = bits(values_of(update))
    step = stage.apply(update, None, context(layout, round))
    kept, whole = step.update, to_dense(update, layout)
    assert isinstance(kept, Sparse)
    assert kept.indices.dtype == torch.int64
    assert bool((kept.indices.diff() > 0).all())
    assert bits(kept.values) == bits(whole[kept.indices])
    assert bits(values_of(update)) == before, "the input was changed"
    assert step.measurements["density"] == kept.values.numel() / layout.size
    lost = float64_norm(subtract(update, kept, layout).vector) / (float64_norm(whole) or 1.0)
    assert step.measurements["compression_error"] == pytest.approx(lost, abs=3e-8)
    assert norm(kept) <= norm(update)
    assert stage.bound(Bound(2.0, (1.0,)), layout) == Bound(2.0, (1.0,))


@given(updates_with_layouts(), DENSITIES)
def test_top_k_keeps_the_largest_of_each_tensor(case, density):
    layout, update = case
    kept = to_dense(TopK(density).apply(update, None, context(layout)).update, layout)
    for was, now in zip(layout.split(to_dense(update, layout)), layout.split(kept), strict=True):
        k = min(len(was), max(1, round(density * len(was))))
        expected = torch.zeros_like(was)
        where = largest_by_sorting(was, k)
        expected[where] = was[where]
        assert torch.equal(now, expected)


@given(updates_with_layouts(), DENSITIES)
def test_top_k_of_the_model_keeps_the_largest_of_all(case, density):
    layout, update = case
    whole = to_dense(update, layout)
    where = largest_by_sorting(whole, kept_count(density, layout.size))
    expected = torch.zeros_like(whole)
    expected[where] = whole[where]
    assert torch.equal(to_dense(TopK(density, "model").apply(update, None, context(layout)).update, layout), expected)


def test_top_k_drops_the_smallest_and_not_the_last():
    x = torch.tensor([1.0, 2.0, -3.0, 4.0, 0.0, -5.0])
    assert TopK(0.5).apply(Dense(x), None, context(flat(6))).update.indices.tolist() == [2, 3, 5]
    assert TopK(1 / 3).apply(Dense(x), None, context(flat(3, 3))).update.indices.tolist() == [2, 5]
    assert TopK(1 / 3, "model").apply(Dense(x), None, context(flat(3, 3))).update.indices.tolist() == [3, 5]
    assert TopK(0.001).apply(Dense(x), None, context(flat(3, 0, 3))).update.indices.tolist() == [2, 5], "one at least of each tensor"


@pytest.mark.parametrize(("density", "size", "k"), [(0.001, 10, 1), (0.1, 30, 3), (0.5, 3, 2), (1.0, 7, 7), (0.9, 0, 0), (0.99, 1, 1)])
def test_how_many_are_kept(density, size, k):
    assert kept_count(density, size) == k


@given(layouts(), DENSITIES, st.integers(0, 5), st.integers(1, 50))
def test_a_random_support_is_public_and_another_in_each_round(layout, density, seed, round):
    stage = RandomK(density, seed)
    users = [stage.apply(Dense(torch.randn(layout.size)), None, context(layout, round, seed=u)).update.indices for u in range(2)]
    assert torch.equal(users[0], users[1])
    assert users[0].numel() == kept_count(density, layout.size)


def test_supports_depend_on_seed_and_round_and_are_uniform():
    layout = flat(40)
    seen = {(seed, r): tuple(RandomK(0.25, seed).support(r, layout).tolist()) for seed in (0, 1) for r in range(1, 1001)}
    assert len(set(seen.values())) == 2000
    counts = np.bincount(np.concatenate(list(seen.values())), minlength=40)
    # 2000 draws with probability 1/4: 500 expected, standard deviation 19.4.
    assert np.abs(counts - 500).max() < 5 * 19.4


def test_scaled_random_k_is_unbiased_and_bounds_nothing():
    layout, x = flat(7, 5), torch.arange(12.0) - 4
    stage = RandomK(0.25, scale=True)
    mean = torch.stack([to_dense(stage.apply(Dense(x), None, context(layout, r)).update, layout) for r in range(1, 4001)]).mean(0)
    # A coordinate of 7 is 28 with probability 1/4: standard deviation 12.1, of the mean 0.19.
    assert torch.allclose(mean, x, atol=5 * 0.2)
    assert stage.bound(Bound(1.0), layout) == UNBOUNDED
    assert chain(ClipByGlobalNorm(1.0), stage).unbounded_stage() == stage
    assert RandomK(1.0, scale=True).bound(Bound(1.0), layout) == Bound(1.0)


@given(layouts(), st.sampled_from([0.001, 0.1, 0.25, 1 / 3, 0.3, 0.5, 0.9, 1.0]), st.integers(0, 5), st.integers(0, 3))
def test_a_common_mask_visits_every_coordinate_once_in_a_period(layout, density, seed, cycle):
    stage = CommonMask(density, seed)
    period = stage.period(layout)
    supports = [stage.support(cycle * period + r, layout) for r in range(1, period + 1)]
    assert torch.equal(torch.cat(supports).sort().values, torch.arange(layout.size))
    assert max(len(s) for s in supports) - min(len(s) for s in supports) <= 1
    assert period == min(layout.size, {1 / 3: 3}.get(density, math.ceil(1 / density)))


def test_another_partition_in_the_next_period_and_for_another_seed():
    layout = flat(1000)
    first = CommonMask(0.1).support(1, layout)
    assert not torch.equal(first, CommonMask(0.1).support(11, layout))
    assert not torch.equal(first, CommonMask(0.1, 1).support(1, layout))
    assert torch.equal(first, CommonMask(0.1).support(1, layout))


def test_each_tensor_has_its_share_of_a_common_mask():
    layout = flat(100, 300)
    for r in range(1, 20):
        chosen = CommonMask(0.1).support(r, layout)
        assert (int((chosen < 100).sum()), len(chosen)) == (10, 40)


@given(updates_with_layouts(), STAGES)
def test_with_error_feedback_nothing_is_lost(case, stage):
    layout, _ = case
    loop, state, sent = with_error_feedback(stage), None, torch.zeros(layout.size)
    state = loop.init(layout)
    numbers = [torch.randint(-9, 9, (layout.size,), generator=torch.Generator().manual_seed(s)).float() for s in range(6)]
    for r, update in enumerate(numbers, 1):
        step = loop.apply(Dense(update), state, context(layout, r))
        state, sent = step.state, sent + to_dense(step.update, layout)
    assert torch.equal(sent + state[0], sum(numbers))


@given(updates_with_layouts(), STAGES, st.sampled_from([1e-12, 0.1, 10.0]))
def test_the_guard_finds_nothing_to_do_after_a_clip_and_a_sparsifier(case, stage, bound):
    layout, update = case
    for clip in (ClipByGlobalNorm(bound), ClipPerLayer(bound), ClipPerLayer(bound, mode="normalize", layers="block")):
        for stages in (chain(clip, stage), chain(stage, clip)):
            sent = stages.apply(update, (None, None), context(layout)).update
            assert stages.guard.apply(sent, None, context(layout)).update is sent
            assert float64_norm(values_of(sent)) <= stages.bound(UNBOUNDED, layout).total


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("stage", [TopK, RandomK, CommonMask])
def test_impossible_densities_are_refused(stage, density):
    with pytest.raises(ValueError, match="0 < density <= 1"):
        stage(density)


@pytest.mark.parametrize(
    ("make", "said"), [(lambda: TopK(0.1, "row"), "tensor, model; got 'row'"), (lambda: RandomK(0.1, -1), "seed >= 0")]
)
def test_impossible_arguments_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
