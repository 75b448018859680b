"""Clipping: a test for each line of the guarantees, over random layouts and extreme values, norms summed in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from fedclip import clipping
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer, clip_factor
from fedclip.layout import Layout
from fedclip.update import NORM_ERROR, Dense, Sparse, layer_norms, to_dense, values_of
from tests.strategies_of_data import bits, context, flat, float64_norm, layouts, updates, updates_with_layouts

LOWEST = 1 - 1.8e-5
"""A clipped layer is no further under its bound: the slack of 1e-6, the error of a quick norm, twice, and float32 rounding."""

BOUNDS = st.sampled_from([1e-30, 1e-12, 0.01, 1.0, 123.0, 1e20, 1e30])


def layer_values(update, layout):
    parts = layout.split(to_dense(update, layout))
    of = [[p.numpy() for p, h in zip(parts, layout.layer_of, strict=True) if h == k] for k in range(len(layout.layer_names))]
    return [np.concatenate(parts) for parts in of]


@st.composite
def clips_per_layer(draw, layout, mode):
    split, layers = draw(st.sampled_from(["uniform", "dim", "weights"])), draw(st.sampled_from(["tensor", "block"]))
    count = len(layout.grouped(layers).layer_names)
    weights = tuple(draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))) if split == "weights" else ()
    return ClipPerLayer(draw(BOUNDS), split, mode, layers, weights)


@st.composite
def cases(draw, mode):
    layout = draw(layouts())
    return layout, draw(updates(layout)), draw(clips_per_layer(layout, mode))


@given(updates_with_layouts(), BOUNDS)
def test_global_clip_bounds_the_whole(case, bound):
    layout, update = case
    before = bits(values_of(update))
    step = ClipByGlobalNorm(bound).apply(update, None, context(layout))
    total = float64_norm(values_of(update))
    assert float64_norm(values_of(step.update)) <= bound
    assert bits(values_of(update)) == before, "the input was changed"
    if total <= bound * (1 - 1e-9):
        assert step.update is update
    elif total > bound * (1 + 1e-9):
        assert float64_norm(values_of(step.update)) >= bound * LOWEST
        assert step.measurements["clipped"] == 1.0
    assert isinstance(step.update, type(update))


@given(cases("clip"))
def test_per_layer_clip_bounds_each_layer_and_the_whole(case):
    layout, update, clip = case
    before = bits(values_of(update))
    grouped = layout.grouped(clip.layers)
    step, bound = clip.apply(update, None, context(layout)), clip.bound(None, layout)
    assert float64_norm(values_of(step.update)) <= bound.total
    assert bound.total == pytest.approx(clip.max_norm, rel=1e-12)
    whole = zip(layer_values(update, grouped), layer_values(step.update, grouped), bound.per_layer, strict=True)
    for was, now, limit in whole:
        assert float64_norm(now) <= limit
        if float64_norm(was) <= limit * (1 - 1e-9):
            assert now.tobytes() == was.tobytes(), "a layer within its bound must keep its bits"
        elif limit > 1e-30:
            assert float64_norm(now) >= limit * LOWEST
    assert bits(values_of(update)) == before, "the input was changed"


@given(cases("normalize"))
def test_normalize_leaves_small_updates_and_scales_every_layer_of_others(case):
    layout, update, clip = case
    before, grouped = bits(values_of(update)), layout.grouped(clip.layers)
    step, bound = clip.apply(update, None, context(layout)), clip.bound(None, layout)
    total = float64_norm(values_of(update))
    assert bound.per_layer is None, "the gate lets a layer exceed its part, so that only the whole is bounded"
    assert float64_norm(values_of(step.update)) <= bound.total
    assert bits(values_of(update)) == before, "the input was changed"
    if total < clip.max_norm * (1 - 1e-9):
        assert step.update is update
    elif total > clip.max_norm * (1 + 1e-9):
        for was, now, limit in zip(layer_values(update, grouped), layer_values(step.update, grouped), clip.bounds(grouped), strict=True):
            if was.any():
                # A number within 1e-7 of the smallest float32 ones rounds more.
                assert limit < 1e-35 or float64_norm(now) == pytest.approx(limit, rel=1 - LOWEST)
            else:
                assert not now.any()


@pytest.mark.parametrize("off", [1 - NORM_ERROR, 1 + NORM_ERROR])
@pytest.mark.parametrize("over", [1 - 1e-9, 1 + 1e-9, 1 + 1e-7, 1 + NORM_ERROR, 1 + 2.1 * NORM_ERROR, 2.0])
def test_the_bound_holds_and_decides_whatever_a_quick_norm_is_off_by(monkeypatch, off, over):
    monkeypatch.setattr(clipping, "quick_layer_norms", lambda update, layout: [n * off for n in layer_norms(update, layout)])
    values = torch.from_numpy(np.random.default_rng(0).standard_normal(4096).astype(np.float32))
    size = float64_norm(values)
    for clip in (ClipByGlobalNorm(size / over), ClipPerLayer(size / over, "dim"), ClipPerLayer(size / over, "dim", "normalize")):
        update = Dense(values)
        step = clip.apply(update, None, context(flat(4096)))
        assert step.measurements["clipped"] == float(over > 1)
        if over < 1:
            assert step.update is update
        else:
            assert size / over * LOWEST <= float64_norm(values_of(step.update)) <= size / over


@given(st.one_of(cases("clip"), cases("normalize")))
def test_the_guard_finds_nothing_to_do_on_a_clipped_update(case):
    layout, update, clip = case
    clipped = clip.apply(update, None, context(layout)).update
    assert clip.guard.apply(clipped, None, context(layout)).update is clipped
    assert clip.guard.bound(None, layout).total <= clip.bound(None, layout).total * (1 + 1e-12)


@given(st.one_of(cases("clip"), cases("normalize")))
def test_the_guard_bounds_what_was_never_clipped(case):
    layout, update, clip = case
    assert float64_norm(values_of(clip.guard.apply(update, None, context(layout)).update)) <= clip.bound(None, layout).total


@given(updates_with_layouts(), BOUNDS)
def test_the_guard_of_the_global_clip_finds_nothing_to_do(case, bound):
    layout, update = case
    clip = ClipByGlobalNorm(bound)
    clipped = clip.apply(update, None, context(layout)).update
    assert clip.guard.apply(clipped, None, context(layout)).update is clipped


def test_the_guard_is_the_same_clip_or_in_normalize_mode_the_global_one():
    assert ClipPerLayer(0.5, "uniform").guard == ClipPerLayer(0.5, "uniform")
    assert ClipPerLayer(0.5, "uniform", "normalize").guard == ClipByGlobalNorm(0.5)


def test_normalize_scales_a_small_layer_up():
    step = ClipPerLayer(1.0, "uniform", "normalize").apply(Dense(torch.tensor([3.0, 4.0, 0.01, 0.0])), None, context(flat(2, 1, 1)))
    c = 1 / math.sqrt(3)
    assert step.update.vector.tolist() == pytest.approx([0.6 * c, 0.8 * c, c, 0.0], rel=1 - LOWEST)


def test_measurements_are_of_the_update_before():
    step = ClipPerLayer(1.0, "uniform").apply(Dense(torch.tensor([3.0, 4.0, 0.1])), None, context(flat(2, 1)))
    assert step.measurements["layer_norm"] == pytest.approx((5.0, 0.1))
    assert step.measurements["layer_clipped"] == (1.0, 0.0)
    assert step.measurements["update_norm"] == pytest.approx(math.sqrt(25.01))
    assert step.measurements["clipped"] == 1.0


def test_sparse_and_dense_clip_alike():
    layout, kept = flat(3, 2), torch.tensor([1, 3])
    sparse = Sparse(kept, torch.tensor([5.0, 0.1]))
    for clip in (ClipByGlobalNorm(1.0), ClipPerLayer(1.0), ClipPerLayer(1.0, mode="normalize")):
        from_sparse = clip.apply(sparse, None, context(layout)).update
        from_dense = clip.apply(Dense(to_dense(sparse, layout)), None, context(layout)).update
        assert torch.equal(to_dense(from_sparse, layout), from_dense.vector)


def test_the_splits_have_known_numbers():
    layout = flat(1, 3, 0, 12)
    assert ClipPerLayer(2.0, "dim").bounds(layout) == pytest.approx((0.5, math.sqrt(0.75), 0.0, math.sqrt(3)))
    assert ClipPerLayer(3.0, "uniform").bounds(layout) == pytest.approx((math.sqrt(3), math.sqrt(3), 0.0, math.sqrt(3)))
    # The empty layer takes no part of the bound, whatever its weight.
    assert ClipPerLayer(5.0, "weights", weights=(3.0, 4.0, 9.0, 12.0)).bounds(layout) == pytest.approx((15 / 13, 20 / 13, 0, 60 / 13))


def paper_layout():
    """H = 296 tensors and d = 255,800,864 coordinates (arXiv 2310.00098), a LayerNorm(768) scale and a 768 x 3072 matrix among them."""
    rest = 255_800_864 - 768 - 768 * 3072
    sizes = [768, 768 * 3072, *[rest // 294] * 293, rest - 293 * (rest // 294)]
    names = tuple(f"t{i}" for i in range(296))
    return Layout(names, tuple((s,) for s in sizes), names)


def test_the_bounds_of_the_paper():
    # arXiv 2310.00098: C = 0.01 over H = 296 layers is 5.81e-4 uniform; dim: 1.73e-5 for a LayerNorm(768), 9.6e-4 for 768 x 3072.
    layout = paper_layout()
    assert (len(layout.layer_names), layout.size) == (296, 255_800_864)
    assert ClipPerLayer(0.01, "uniform").bounds(layout) == pytest.approx((5.81e-4,) * 296, rel=1e-3)
    dim = ClipPerLayer(0.01, "dim").bounds(layout)
    assert dim[0] == pytest.approx(1.73e-5, rel=2e-3)
    assert dim[1] == pytest.approx(9.6e-4, rel=2e-3)
    assert math.fsum(c * c for c in dim) == pytest.approx(1e-4, rel=1e-12)


# The table in the docstring of clip_factor.
@pytest.mark.parametrize(("norm", "bound", "factor"), [(0.0, 1.0, 1.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0), (2.0, 1.0, 0.5), (2.0, 0.0, 0.0)])
def test_the_table_of_factors(norm, bound, factor):
    assert clip_factor(norm, bound) == pytest.approx(factor, rel=1.1e-6)


def test_the_factor_is_under_what_the_bound_asks_for():
    assert clip_factor(2.0, 1.0) == 0.5 * (1 - 1e-6)


@given(st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3), st.sampled_from([1e-150, 1.0, 1e200]))
def test_weights_say_proportions_only(weights, unit):
    assume(all(math.isfinite(w * unit) for w in weights))
    plain = ClipPerLayer(1.0, "weights", weights=tuple(weights)).bounds(flat(1, 2, 3))
    assert ClipPerLayer(1.0, "weights", weights=tuple(w * unit for w in weights)).bounds(flat(1, 2, 3)) == pytest.approx(plain)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, 1e-31, 1e31])
def test_impossible_bounds_are_refused(bad):
    for make in (ClipByGlobalNorm, ClipPerLayer):
        with pytest.raises(ValueError, match="max_norm"):
            make(bad)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"split": "even"}, "uniform, dim, weights; got 'even'"),
        ({"mode": "project"}, "clip, normalize"),
        ({"layers": "head"}, "tensor, block"),
        ({"split": "weights"}, "weights"),
        ({"weights": (1.0,)}, "only then"),
        ({"split": "weights", "weights": (1.0, 0.0)}, "over 0"),
        ({"split": "weights", "weights": (1.0, math.inf)}, "over 0"),
        ({"split": "weights", "weights": (1.0, 1e-7)}, "within a factor"),
    ],
)
def test_impossible_splits_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        ClipPerLayer(1.0, **changes)


def test_another_number_of_weights_than_layers_is_refused_with_the_layers():
    with pytest.raises(ValueError, match=r"Expected 2 weights.*t0, t1; got 3"):
        ClipPerLayer(1.0, "weights", weights=(1.0, 1.0, 1.0)).bounds(flat(1, 2))
