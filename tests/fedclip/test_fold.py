"""The exact sum: no order, no partition and no other user changes what one user adds."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.fold import Addend, Fold, FoldOverflow, Grid
from fedclip.update import SPAN, Dense, Scaled, Sparse, times, to_dense
from tests.strategies_of_data import flat, float64_norm

D = 6


@st.composite
def cohorts(draw, bound=1.0):
    """Up to twelve users' updates within a bound, dense and sparse, of many scales."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    users = []
    for _ in range(draw(st.integers(1, 12))):
        vector = rng.standard_normal(D) * 10.0 ** rng.uniform(-20, 0, D)
        vector = torch.from_numpy((vector / max(1.0, np.linalg.norm(vector) / bound / 0.99)).astype(np.float32))
        kept = torch.from_numpy(np.flatnonzero(rng.random(D) < 0.5))
        users.append(Dense(vector) if rng.random() < 0.5 else Sparse(kept, vector[kept]))
    return users


def folded(users, grid, weight=1.0):
    fold = Fold(D, grid)
    for user in users:
        fold.add(user, weight)
    return fold


@given(cohorts(), st.data())
def test_any_partition_and_order_has_the_same_bits(users, data):
    grid = Grid.for_bound(1.0, len(users))
    whole = folded(users, grid)
    shuffled = data.draw(st.permutations(users))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(users)), max_size=4)))
    folds = [folded(shuffled[a:b], grid) for a, b in zip([0, *cuts], [*cuts, len(users)], strict=True)]
    total = Fold(D, grid)
    for fold in data.draw(st.permutations(folds)):
        total.merge(fold.total.numpy(), fold.users)
    assert torch.equal(total.total, whole.total)
    assert total.users == whole.users == len(users)
    assert total.result().numpy().tobytes() == whole.result().numpy().tobytes()


@given(cohorts(), st.data())
def test_removing_one_user_takes_away_exactly_its_own_integers(users, data):
    grid = Grid.for_bound(1.0, len(users))
    gone = data.draw(st.integers(0, len(users) - 1))
    without = folded(users[:gone] + users[gone + 1 :], grid)
    assert torch.equal(folded(users, grid).total - without.total, folded([users[gone]], grid).total)


@given(cohorts())
def test_the_grid_never_raises_a_norm_and_sparse_is_dense(users):
    grid = Grid.for_bound(1.0, 1)
    for user in users:
        alone, exact = folded([user], grid).result().numpy(), to_dense(user, flat(D)).numpy().astype(np.float64)
        assert np.all(np.abs(alone) <= np.abs(exact))
        assert np.all(alone * exact >= 0)
        assert np.all(np.abs(alone - exact) < 2.0**-grid.exponent)
        assert float64_norm(alone) <= float64_norm(exact)
        assert torch.equal(folded([user], grid).total, folded([Dense(to_dense(user, flat(D)))], grid).total)


@given(st.integers(0, 2**32 - 1), st.integers(-60, 142), st.floats(-30, 1), st.booleans())
def test_factors_taken_by_the_sum_give_the_digits_of_the_products(seed, exponent, size, spread):
    """Of all sizes of factors and values, down to those that float32 holds with few bits, on grids from coarse to the finest."""
    rng = np.random.default_rng(seed)
    lengths = rng.multinomial(40, [0.2] * 5).tolist()
    factors = [1.0, *(10.0 ** rng.uniform(-20 if spread else -3, 0, 4)).tolist()]
    reach = 61 - exponent - math.log2(1e3)  # what is on the grid, and from there down by as many as float32 has
    values = rng.standard_normal(40) * 2.0 ** (min(reach, 120) - rng.uniform(0, 40 if spread else 200, 40)) * 10.0 ** min(size, 0)
    update = Scaled(torch.from_numpy(values.astype(np.float32)), list(zip(lengths, factors, strict=True)))
    grid = Grid(exponent, math.inf, 4)
    mine = Fold(40, grid)
    mine.add(update, within=True)
    assert mine.users == 1
    assert exponent > 99 or min(factors) * 2.0**exponent < 1e-30 or "vector" not in vars(update), "the products were formed"
    products = torch.cat([times(v, f) for v, f in zip(torch.split(update.unscaled, lengths), factors, strict=True)])
    assert update.vector.numpy().tobytes() == products.numpy().tobytes()
    exact = np.trunc(products.double().numpy() * 2.0**exponent)  # a float64 number holds the product with a power of two
    assert mine.total.tolist() == [int(x) for x in exact]


def test_products_that_float32_holds_with_few_bits_keep_them_on_the_finest_grid():
    grid = Grid.for_bound(1e-30, 1)
    update = Scaled(torch.from_numpy(np.random.default_rng(1).uniform(1e-29, 1e-27, 20_000).astype(np.float32)), [(20_000, 1e-13)])
    lazy = Fold(20_000, grid)  # rounding makes a difference to one in some 500
    lazy.add(update, within=True)
    assert lazy.total.tolist() == [int(x) for x in times(update.unscaled, 1e-13).double().numpy() * 2.0**grid.exponent]
    assert lazy.total.min() > 0


def test_a_part_longer_than_what_is_summed_in_one_step_is_summed_whole():
    values = torch.from_numpy(np.random.default_rng(3).standard_normal(2 * SPAN + 9).astype(np.float32))
    grid, size = Grid(40, 64.0, 4), values.numel()
    parts = [(5, 1.0), (SPAN + 3, 0.3), (SPAN + 1, 1 / 3)]
    for weight in (1.0, 0.7):
        lazy, eager = Fold(size, grid), Fold(size, grid)
        lazy.add(Scaled(values, parts), weight)
        eager.add(Dense(Scaled(values, parts).vector), weight)
        exact = Scaled(values, parts).vector.double() * weight
        assert torch.equal(lazy.total, eager.total)
        assert torch.equal(lazy.total, (exact * 2.0**40).long())


def test_rounding_is_toward_zero_on_both_sides():
    grid = Grid(exponent=2, largest=10.0, capacity=4)
    update = Dense(torch.tensor([0.99, -0.99, 0.24, -0.24, 0.25, -0.25]))
    assert folded([update], grid).total.tolist() == [3, -3, 0, 0, 1, -1]


@pytest.mark.parametrize("bound", [1e-30, 0.01, 0.7, 1.0, 1.0000001, 3.0, 1e30])
def test_a_bounded_grid_resolves_a_millionth_of_a_millionth_of_the_bound(bound):
    grid = Grid.for_bound(bound, 5)
    assert 2.0**-grid.exponent <= 1e-12 * bound
    assert grid.capacity == 2**20
    assert grid == Grid.for_bound(bound, 50_000), "the grid of a private sum must not depend on who came"
    # A full sum of the greatest coordinates, in integers, is under 2^63.
    assert grid.capacity * math.floor(float(bound) * 2.0**grid.exponent) < 2**63


@pytest.mark.parametrize("users", [1, 2, 3, 1000, 2**20])
def test_an_unbounded_grid_has_room_for_its_users(users):
    grid = Grid.for_bound(math.inf, users, 65536.0)
    assert grid.capacity > users
    assert users * math.floor(grid.largest * 2.0**grid.exponent) < 2**63
    assert grid.largest == 64.0 * 65536


def test_the_greatest_sum_does_not_wrap():
    grid = Grid(exponent=58, largest=1.0, capacity=8)
    fold = folded([Dense(torch.ones(D))] * 8, grid)
    assert fold.result().tolist() == [8.0] * D


def test_weights_multiply_before_the_grid():
    grid = Grid.for_bound(math.inf, 4, 100.0)
    fold = Fold(D, grid)
    fold.add(Dense(torch.full((D,), 0.1)), 3.0)
    fold.add(Sparse(torch.tensor([2]), torch.tensor([0.5])), 2.0)
    expected = np.full(D, 3 * float(np.float32(0.1)))
    expected[2] += 1.0
    assert fold.result().tolist() == pytest.approx(expected.tolist(), abs=2.0**-30)


@pytest.mark.parametrize("bad", [1.1, -1.1, math.inf, math.nan])
def test_what_does_not_fit_is_an_error_and_changes_nothing(bad):
    fold = folded([Dense(torch.full((D,), 0.5))], Grid.for_bound(1.0, 1))
    before = fold.total.clone()
    vector = torch.zeros(D)
    vector[3] = bad
    for update in (Dense(vector), Sparse(torch.tensor([3]), vector[3:4])):
        with pytest.raises(FoldOverflow, match="up to 1"):
            fold.add(update)
    assert torch.equal(fold.total, before)
    assert fold.users == 1


def test_a_weight_can_push_a_coordinate_over_the_limit():
    with pytest.raises(FoldOverflow):
        Fold(D, Grid.for_bound(1.0, 1)).add(Dense(torch.full((D,), 0.6)), 2.0)


def test_more_users_than_there_is_room_for_is_an_error_and_changes_nothing():
    grid = Grid(exponent=10, largest=1.0, capacity=2)
    fold = folded([Dense(torch.ones(D))] * 2, grid)
    with pytest.raises(FoldOverflow, match="at most 2 users"):
        fold.add(Dense(torch.ones(D)))
    with pytest.raises(FoldOverflow, match="at most 2 users"):
        fold.merge(np.ones(D, dtype=np.int64), 1)
    assert (fold.users, fold.total.tolist()) == (2, [2048] * D)


@given(cohorts(), st.data())
def test_users_added_together_are_added_as_one_by_one_and_what_does_not_fit_hurts_nobody(users, data):
    grid = dataclasses.replace(Grid.for_bound(1.0, len(users)), capacity=data.draw(st.integers(1, 12)))
    users.insert(data.draw(st.integers(0, len(users))), Dense(torch.full((D,), 1.5)))
    together, alone, refused = Fold(D, grid), Fold(D, grid), []
    for user in users:
        try:
            alone.add(user)
            refused.append(None)
        except FoldOverflow as error:
            refused.append(str(error))
    found = together.add_all([Addend(user) for user in users])
    assert [error and str(error) for error in found] == refused
    assert torch.equal(together.total, alone.total)
    assert together.users == alone.users == refused.count(None)


@pytest.mark.parametrize("other", [np.ones(1, dtype=np.int64), np.ones(D), np.ones(D + 1, dtype=np.int64)])
def test_a_sum_of_another_shape_or_type_is_refused(other):
    with pytest.raises(ValueError, match="int64 sum"):
        Fold(D, Grid.for_bound(1.0, 1)).merge(other, 1)


def test_an_update_without_values_is_a_user():
    fold = folded([Sparse(torch.zeros(0, dtype=torch.int64), torch.zeros(0))], Grid.for_bound(1.0, 1))
    assert (fold.users, fold.total.tolist()) == (1, [0] * D)
