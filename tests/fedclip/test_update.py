"""`Update`: sparse and dense say the same, norms never overflow, nothing changes in place."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.layout import ROW, Layout
from fedclip.update import (
    NORM_ERROR,
    SPAN,
    Dense,
    Sparse,
    add,
    finite_or_zero,
    is_finite,
    layer_norms,
    layer_sparsity,
    measured,
    norm,
    pieces,
    quick_layer_norms,
    scale,
    scale_layers,
    subtract,
    subtracted,
    to_dense,
    values_of,
)
from tests.strategies_of_data import bits, flat, float64_norm, updates_with_layouts


@given(updates_with_layouts())
def test_norms_agree_with_float64_and_with_the_dense_form(case):
    layout, update = case
    layout = layout.grouped("block")
    whole = to_dense(update, layout)
    assert norm(update) == pytest.approx(float64_norm(whole), rel=1e-12)
    parts = layout.split(whole)
    for h, n in enumerate(layer_norms(update, layout)):
        of_layer = [p.numpy() for p, layer in zip(parts, layout.layer_of, strict=True) if layer == h]
        assert n == pytest.approx(float64_norm(np.concatenate(of_layer)), rel=1e-12)


@pytest.mark.parametrize("sizes", [(1,), (255,), (256,), (257,), (100_000,), (1000, 1, 0, 5000), (256, 512, 300), (3, 4, 5)])
@pytest.mark.parametrize("scale", [1e-44, 1e-25, 1e-12, 1.0, 1e15, 1e20, 3e38])
@pytest.mark.parametrize("spread", [1.0, 1e-8])
def test_quick_norms_are_within_their_error(sizes, scale, spread):
    layout = flat(*sizes)
    values = np.random.default_rng(sum(sizes)).uniform(0.5, 1.0, layout.size)
    values[1:] *= spread  # one large number, after which each small one of its row is rounded away
    update = Dense(torch.from_numpy((values * scale).astype(np.float32)))
    assert quick_layer_norms(update, layout) == pytest.approx(layer_norms(update, layout), rel=NORM_ERROR)


@given(updates_with_layouts())
def test_quick_norms_of_blocks_are_those_of_layers(case):
    layout, update = case
    layout = layout.grouped("block")
    assert quick_layer_norms(update, layout) == pytest.approx(layer_norms(update, layout), rel=NORM_ERROR)


@given(updates_with_layouts())
def test_sparsity_is_the_share_of_zeros_of_each_layer_sparse_or_dense(case):
    layout, update = case
    layout, whole = layout.grouped("block"), to_dense(update, layout)
    found = layer_sparsity(update, layout)
    assert found == layer_sparsity(Dense(whole), layout)
    for h, share in enumerate(found):
        of_layer = [p.numpy() for p, layer in zip(layout.split(whole), layout.layer_of, strict=True) if layer == h]
        values = np.concatenate(of_layer)
        assert share == pytest.approx((values == 0).mean() if values.size else 0.0)


@given(updates_with_layouts(), st.sampled_from([0.0, 1.0, 0.3, 1e-35, 1e-44]))
def test_scaling_rounds_the_exact_product_and_changes_no_input(case, factor):
    layout, update = case
    before = bits(values_of(update))
    scaled = values_of(scale(update, factor))
    exact = values_of(update).double() * factor
    assert torch.allclose(scaled.double(), exact, rtol=2e-7, atol=1.5e-45)
    assert bits(values_of(update)) == before
    factors = [factor] * len(layout.layer_names)
    assert bits(values_of(scale_layers(update, layout, factors))) == bits(scaled)
    assert bits(values_of(update)) == before


@pytest.mark.parametrize(("value", "factor"), [(1e-40, 1e42), (3e38, 1e-40), (1.4e-45, 1e45)])
def test_factors_that_are_no_float32_numbers_still_scale(value, factor):
    x = torch.tensor([value])
    assert float(values_of(scale(Dense(x), factor))[0]) == pytest.approx(float(x[0]) * factor, rel=1e-6)


def test_factor_one_gives_the_same_object():
    update = Dense(torch.tensor([1.0]))
    assert scale(update, 1.0) is update
    assert scale_layers(update, flat(1), [1.0]) is update


@given(updates_with_layouts())
def test_pieces_cut_sparse_values_by_tensor(case):
    layout, update = case
    for dense, kept, start, size in zip(
        layout.split(to_dense(update, layout)), pieces(update, layout), np.cumsum([0, *layout.sizes]), layout.sizes, strict=False
    ):
        if isinstance(update, Sparse):
            inside = (update.indices >= start) & (update.indices < start + size)
            assert torch.equal(kept, update.values[inside])
        else:
            assert torch.equal(kept, dense)


def test_add_and_subtract_with_known_numbers():
    layout = flat(3)
    a, b = Dense(torch.tensor([1.0, 2.0, 3.0])), Sparse(torch.tensor([1]), torch.tensor([5.0]))
    assert add(a, b, layout).vector.tolist() == [1, 7, 3]
    assert subtract(a, b, layout).vector.tolist() == [1, -3, 3]
    assert a.vector.tolist() == [1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_value_that_is_not_finite_makes_the_whole_update_zero(bad, place):
    vector = torch.ones(7)
    vector[place] = bad
    for update in (Dense(vector), Sparse(torch.arange(7), vector)):
        zero, finite = finite_or_zero(update)
        assert not finite
        assert not is_finite(update)
        assert type(zero) is type(update)
        assert values_of(zero).tolist() == [0] * 7


def test_finite_updates_are_kept_as_they_are():
    for values in (torch.zeros(0), torch.tensor([3e38, -3e38]), torch.tensor([1e-45])):
        update = Dense(values)
        assert finite_or_zero(update) == (update, True)


@given(updates_with_layouts(), st.integers(0, 2**32 - 1))
def test_layers_of_a_sparse_update_are_as_if_done_one_by_one(case, seed):
    layout, update = case
    kept = torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(layout.size) < 0.7))
    sparse = Sparse(kept, to_dense(update, layout)[kept])
    parts = pieces(sparse, layout)
    squares = [0.0] * len(layout.layer_names)
    for layer, part in zip(layout.layer_of, parts, strict=True):
        squares[layer] += float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
    assert layer_norms(sparse, layout) == pytest.approx([s**0.5 for s in squares], rel=1e-12)
    for factors in ([0.0, 1.0, 0.3, 1e-30, 1e30, 7e-12], [1e-33, 1.0, 0.1]):
        drawn = np.random.default_rng(seed).choice(factors, len(layout.layer_names)).tolist()
        of_parts = zip(parts, [drawn[h] for h in layout.layer_of], strict=True)
        alone = [p if f == 1.0 else scale(Sparse(kept, p), f).values for p, f in of_parts]
        assert bits(scale_layers(sparse, layout, drawn).values) == bits(torch.cat(alone))


@pytest.mark.parametrize("size", [0, 1, ROW - 1, ROW, SPAN, SPAN + 3 * ROW + 7])
def test_a_difference_is_that_of_torch_in_place_and_its_norms_are_those_of_its_vector(size):
    before, after = (torch.from_numpy(np.random.default_rng(n).standard_normal(size).astype(np.float32)) for n in (1, 2))
    expected, layout = before - after, Layout.of(torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size))]))
    update = measured(after, subtracted(before, after))
    assert update.vector is after
    assert torch.equal(after, expected)
    assert is_finite(update)
    assert update.energies is not None
    assert quick_layer_norms(update, layout) == quick_layer_norms(Dense(expected), layout)


@pytest.mark.parametrize("at", [0, ROW, SPAN + 5, SPAN + 2 * ROW, -1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_difference_that_is_not_finite_is_seen_in_rows_and_after_them(at, bad):
    after = torch.zeros(SPAN + 2 * ROW + 3)
    after[at] = bad
    assert not is_finite(measured(after, subtracted(torch.zeros_like(after), after)))


def test_squares_that_overflow_make_no_difference_infinite():
    after = torch.full((3 * ROW + 1,), 1e38)
    update = measured(after, subtracted(torch.zeros_like(after), after))
    assert not np.isfinite(update.energies).any()
    assert is_finite(update)
    assert finite_or_zero(update) == (update, True)
