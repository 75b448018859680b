"""Updates on coordinates that everybody knows: only values travel, only there is noise, and nothing else comes in."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.adaptive import AdaptiveClip
from fedclip.checkpoints import Checkpoint, Checkpoints
from fedclip.client import Client
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.codec import DenseCodec, WireError
from fedclip.collector import Collector, Contribution, pack_bits
from fedclip.dgc import DGC
from fedclip.local import LocalSGD
from fedclip.method import Method, ServerState, noise_to_bound
from fedclip.optimizers import SGD
from fedclip.packed import PackedCodec
from fedclip.quantize import Entropy, Quantize
from fedclip.release import Gaussian, Release
from fedclip.replica import Replica
from fedclip.round import begin, finish
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.site import Site
from fedclip.sparsify import CommonMask, RandomK
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions
from fedclip.transform import chain, with_error_feedback
from fedclip.update import Codes, Dense, Sparse, to_dense, values_of
from fedclip.user_states import StatesInMemory
from fedclip.wire import Wire, pack_support, support_of
from tests.strategies_of_data import bits, context, flat, layouts

LAYOUT = flat(500, 0, 1, 300)


def method(*stages, codec=None, z=1.0, **more):
    sampler = Poisson(100, 20.0)
    mechanism = Gaussian(z) if z else None
    release = Release(mechanism, 20.0 if z else "weights")
    server = chain(SGD(Schedule.of(1.0)))
    return Method(sampler, LocalSGD(0.1, steps=1), chain(*stages), server, release, codec=codec or DenseCodec(), **more)


def state_of(masked, layout=LAYOUT, **more):
    return dataclasses.replace(ServerState.initial(torch.zeros(layout.size), masked, layout), **more)


@given(layouts(), st.floats(0.01, 1.0), st.integers(0, 5))
def test_a_restricted_layout_counts_what_is_there_of_each_tensor(layout, density, seed):
    support = RandomK(density, seed).support(1, layout) if layout.size else torch.zeros(0, dtype=torch.int64)
    restricted = layout.restricted(support)
    ends = np.cumsum([0, *layout.sizes])
    assert restricted.sizes == tuple(int(((support >= a) & (support < b)).sum()) for a, b in itertools.pairwise(ends))
    assert restricted.layer_names == layout.layer_names
    assert restricted.size == support.numel()


@pytest.mark.parametrize("codec", [DenseCodec(), PackedCodec()], ids=repr)
@pytest.mark.parametrize("rounding", [None, Quantize(8, 32), Quantize(4, 7, stochastic=False)], ids=repr)
def test_only_values_travel_and_all_come_back(codec, rounding):
    support = CommonMask(0.1).support(3, LAYOUT)
    update = Sparse(support, torch.randn(support.numel(), generator=torch.Generator().manual_seed(0)))
    if rounding is not None:
        update = rounding.apply(update, None, context(LAYOUT)).update
    wire = Wire(codec, LAYOUT, support)
    payload = wire.encode(update)
    back = wire.decode(payload)
    assert bits(to_dense(back, LAYOUT)) == bits(to_dense(update, LAYOUT))
    assert wire.encode(back) == payload
    if isinstance(codec, DenseCodec):
        assert len(payload) == 20 + 4 * support.numel()
    elif rounding is None:
        assert len(payload) < 20 + 4 * support.numel() + 20
        assert len(payload) < len(codec.encode(update, LAYOUT)), "positions cost nothing"


def test_zeros_on_the_support_stay_on_it():
    """The codec may write few values as a sparse update of the values; they come back at their places."""
    support = CommonMask(0.1).support(1, LAYOUT)
    values = torch.zeros(support.numel())
    values[7] = 3.0
    wire = Wire(PackedCodec(), LAYOUT, support)
    back = to_dense(wire.decode(wire.encode(Sparse(support, values))), LAYOUT)
    assert back[support[7]] == 3.0
    assert back.count_nonzero() == 1


def test_nothing_comes_in_beside_the_support():
    masked = method(CommonMask(0.1), ClipByGlobalNorm(1.0))
    plan = begin(masked, state_of(masked), LAYOUT, "s", "r")
    support = masked.client.support(1, LAYOUT)
    wire = Wire.of(plan.spec, masked.client, LAYOUT)
    collector = Collector(plan.spec, LAYOUT)
    collector.take(0, Contribution(1, wire.encode(Dense(torch.full((LAYOUT.size,), 7.0))), 1.0, {"users": 1.0}))
    total = collector.fold.result()
    there = torch.zeros(LAYOUT.size, dtype=torch.bool)
    there[support] = True
    assert not total[~there].any()
    assert float(total.norm()) <= 1.0
    # A payload of all coordinates is no payload of this round.
    with pytest.raises(WireError):
        wire.decode(DenseCodec().encode(Dense(torch.ones(LAYOUT.size)), LAYOUT))


def test_noise_is_on_the_support_alone_and_has_its_deviation():
    masked, squares, seen = method(CommonMask(0.05), ClipPerLayer(0.5), z=2.0), [], torch.zeros(LAYOUT.size)
    state = state_of(masked)
    for _ in range(40):
        plan = begin(masked, state, LAYOUT, "s", "r")
        support = support_of(plan.spec, masked.client, LAYOUT)
        outcome = finish(masked, state, LAYOUT, plan, [])
        mean = (state.params - outcome.state.params) * 20
        there = torch.zeros(LAYOUT.size, dtype=torch.bool)
        there[support] = True
        assert not mean[~there].any()
        squares.append(mean[there].double().square())
        seen += there
        state = outcome.state
    assert torch.equal(seen, torch.full_like(seen, 2.0)), "each coordinate once in a period of 20 rounds"
    z = float(torch.cat(squares).mean().sqrt()) / 0.5
    assert z == pytest.approx(2.0, rel=0.05)
    assert noise_to_bound(masked, LAYOUT) == pytest.approx(2.0 * np.sqrt(41) / 20, rel=0.02)


def test_a_mask_follows_what_was_released_and_visits_everything():
    masked = method(CommonMask(0.2, fresh=0.25), ClipByGlobalNorm(1.0), z=1e-3)
    period = masked.client.stages[0].period(LAYOUT)
    assert period == 20
    state, seen = state_of(masked), torch.zeros(LAYOUT.size, dtype=torch.bool)
    for number in range(1, period + 1):
        plan = begin(masked, state, LAYOUT, "s", "r")
        support = support_of(plan.spec, masked.client, LAYOUT)
        assert (len(plan.spec.support) > 0) == (number > 1)
        assert plan.downlink_bytes == sum(len(u) for _, u in plan.blocks) * (len(plan.spec.params) + len(plan.spec.support))
        if state.average is not None:
            top = state.average.abs().topk(119)  # a fifth of 801 less the fresh ones
            assert set(top.indices[top.values > 0].tolist()) <= set(support.tolist())
        seen[support] = True
        state = finish(masked, state, LAYOUT, plan, []).state
    assert bool(seen.all())


def test_the_average_of_a_coordinate_moves_where_it_was_released():
    masked = method(CommonMask(0.5, fresh=0.5), ClipByGlobalNorm(100.0), z=0)
    before = torch.linspace(-1, 1, LAYOUT.size)
    state = state_of(masked, average=before)
    plan = begin(masked, state, LAYOUT, "s", "r")
    support = support_of(plan.spec, masked.client, LAYOUT)
    collector, wire = Collector(plan.spec, LAYOUT), Wire.of(plan.spec, masked.client, LAYOUT)
    collector.take(0, Contribution(1, wire.encode(Dense(torch.full((LAYOUT.size,), 2.0))), 1.0, {"users": 1.0}))
    after = finish(masked, state, LAYOUT, plan, [collector.partial()]).state.average
    assert torch.allclose(after[support], (before[support] + 2.0) / 2)
    rest = torch.ones(LAYOUT.size, dtype=torch.bool)
    rest[support] = False
    assert torch.equal(after[rest], before[rest])


def test_a_checkpoint_keeps_the_average(tmp_path):
    masked = method(CommonMask(0.5, fresh=0.5), ClipByGlobalNorm(1.0))
    state, kept = state_of(masked, average=torch.arange(float(LAYOUT.size))), Checkpoints(tmp_path, "r")
    kept.save(Checkpoint(state, 0, "", {}))
    assert torch.equal(kept.last(masked.server.init(LAYOUT)).state.average, state.average)


@given(st.floats(0.05, 1.0), st.integers(1, 9))
def test_a_support_is_told_whole(density, round):
    support = RandomK(density, 1).support(round, LAYOUT)
    masked = method(RandomK(density, 1), ClipByGlobalNorm(1.0))
    plan = begin(masked, state_of(masked), LAYOUT, "s", "r")
    spec = dataclasses.replace(plan.spec, support=pack_support(support, LAYOUT))
    assert torch.equal(support_of(spec, chain(), LAYOUT), support)
    assert torch.equal(support_of(type(spec).from_shared(spec.shared(), spec.params), chain(), LAYOUT), support)


def test_two_masks_and_a_state_after_a_mask_are_refused():
    with pytest.raises(ValueError, match="got 2 in chain"):
        method(CommonMask(0.1), RandomK(0.1), ClipByGlobalNorm(1.0))
    with pytest.raises(ValueError, match="keeps a state after common_mask"):
        method(CommonMask(0.1), with_error_feedback(ClipByGlobalNorm(1.0)))
    assert method(with_error_feedback(CommonMask(0.1)), ClipByGlobalNorm(1.0)).stateful


def test_a_user_of_a_task_sends_on_the_support():
    task = build_vision(VisionOptions(name="vision"), population=20, seed=1)
    site = Site(task, Replica(task.make_model()))
    layout = site.replica.layout
    masked = method(with_error_feedback(CommonMask(0.1)), ClipByGlobalNorm(0.5))
    plan = begin(masked, state_of(masked, layout), layout, "s", "r")
    client = Client(site, plan.spec, StatesInMemory())
    contribution = client.train_user(3)
    assert contribution.error is None
    support = support_of(plan.spec, masked.client, layout)
    assert contribution.tally["uplink_bytes"] == 20 + 4 * support.numel()
    update = client.wire.decode(contribution.payload)
    assert torch.equal(update.indices, support)
    assert float(values_of(update).norm()) <= 0.5


def test_few_values_of_the_support_stay_on_their_grid():
    support = CommonMask(0.5).support(1, LAYOUT)
    update = Sparse(support, torch.randn(support.numel(), generator=torch.Generator().manual_seed(0)))
    few = Entropy(2.0).apply(update, None, context(LAYOUT)).update
    assert 0 < few.indices.numel() < support.numel()
    wire = Wire(PackedCodec(), LAYOUT, support)
    back = wire.decode(wire.encode(few))
    assert bits(to_dense(back, LAYOUT)) == bits(to_dense(few, LAYOUT))
    assert isinstance(back.grid, Codes)
    assert torch.equal(back.grid.codes, few.grid.codes)


def test_bounds_of_layers_that_nobody_could_send_stay():
    """A layer without a coordinate on the mask is within its bound at everybody: its bits say nothing."""
    layout = flat(400, 3)
    masked = method(CommonMask(0.02), ClipPerLayer(0.5), z=0, adaptive=AdaptiveClip())
    state = state_of(masked, layout)
    for _ in range(30):
        plan = begin(masked, state, layout, "s", "r")
        support = support_of(plan.spec, masked.client, layout)
        collector, wire = Collector(plan.spec, layout), Wire.of(plan.spec, masked.client, layout)
        step = masked.for_round(state.thresholds, layout).client.apply(
            Dense(torch.full((layout.size,), 1e-3)), (None, None), context(layout, plan.spec.streams.round)
        )
        collector.take(0, Contribution(1, wire.encode(step.update), 1.0, {"users": 1.0}, clip_bits=pack_bits(step.clip_bits)))
        after = finish(masked, state, layout, plan, [collector.partial()]).state
        moved = [a != b for a, b in zip(state.thresholds, after.thresholds, strict=True)]
        assert moved == [True, bool((support >= 400).any())]
        state = after


def test_what_the_sum_would_refuse_is_not_remembered_as_sent():
    task = build_vision(VisionOptions(name="vision"), population=20, seed=1)
    site = Site(task, Replica(task.make_model()))
    layout = site.replica.layout
    greedy = Method(
        Poisson(20, 5.0), LocalSGD(1e4, steps=1), chain(DGC(0.01, warmup=())), chain(SGD(Schedule.of(1.0), momentum_1d=0.9)), Release()
    )
    plan, states = begin(greedy, state_of(greedy, layout), layout, "s", "r"), StatesInMemory()
    contribution = Client(site, plan.spec, states).train_user(3)
    assert "FoldOverflow" in contribution.error
    fresh = greedy.client.init(layout)
    assert states.load(3, 2, fresh) is fresh


def test_bytes_of_what_was_refused_were_sent_all_the_same():
    plain = method(ClipByGlobalNorm(1.0))
    plan = begin(plain, state_of(plain), LAYOUT, "s", "r")
    collector = Collector(plan.spec, LAYOUT)
    collector.take(0, Contribution(1, b"not a payload", 1.0, {"users": 1.0, "uplink_bytes": 13.0}))
    assert collector.tallies[0].pop("fold_seconds") > 0
    assert collector.tallies[0] == {"failed_users": 1.0, "uplink_bytes": 13.0}
