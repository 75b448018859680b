"""One suite for every `Transform` that ships: pure, deterministic, within the bound it states, rebuilt from plain data."""

import json
import math
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.codec import DenseCodec
from fedclip.dgc import DGC
from fedclip.optimizers import LAMB, LARS, SGD, Adagrad, Adam, Moments, Yogi
from fedclip.packed import PackedCodec
from fedclip.quantize import Entropy, Fp16, Quantize, Sign
from fedclip.schedules import Schedule
from fedclip.sparsify import CommonMask, RandomK, TopK
from fedclip.stages import STAGES, build_stage, describe_stage
from fedclip.transform import UNBOUNDED, Bound, Transform, chain, with_error_feedback
from fedclip.update import Dense, finite_or_zero, to_dense, values_of
from fedclip.wire import Wire
from tests.strategies_of_data import bits, context, flat, float64_norm, layouts, updates, vectors

CLIPS = [ClipByGlobalNorm(0.5)] + [
    ClipPerLayer(0.5, split, mode, layers)
    for split in ("uniform", "dim")
    for mode in ("clip", "normalize")
    for layers in ("tensor", "block")
]
BOUNDED = [
    *CLIPS,
    *(with_error_feedback(c) for c in CLIPS),
    chain(ClipPerLayer(2.0), ClipByGlobalNorm(1.0)),
    chain(ClipByGlobalNorm(9.0), with_error_feedback(ClipPerLayer(0.1, "uniform"))),
    with_error_feedback(chain(ClipByGlobalNorm(2.0), ClipPerLayer(1.0))),
]
RATE = Schedule(value=0.1, decay="exponential", every=3)
OPTIMIZERS = [
    SGD(RATE),
    SGD(RATE, 0.9),
    SGD(RATE, 0.9, nesterov=True),
    Adam(RATE),
    Adam(RATE, (0.0, 0.9), weight_decay=0.1),
    LAMB(RATE),
    LAMB(RATE, weight_decay=0.01, trust_bounds=(0.1, 10.0), layers="block"),
    LARS(RATE),
    LARS(RATE, 0.0, weight_decay=0.01, layers="block"),
    Yogi(RATE),
    Adagrad(RATE, initial=0.0),
]
LOSSY = [
    TopK(0.3),
    TopK(0.3, "model"),
    RandomK(0.3, seed=2),
    RandomK(0.3, scale=True),
    CommonMask(0.3),
    Fp16(),
    Quantize(8, 32),
    Quantize(4, 3, stochastic=False),
    Sign(),
    Entropy(1.0),
    DGC(0.3),
    DGC(0.3, nesterov=True, clip_norm=1.0, clip_by="tensor", small="sparse", grid="int8"),
    DGC(0.3, momentum=0.0, clip_norm=1.0, nodes=4, normalization="sum", mask=False, warmup=(), grid="float16"),
]
SHRINKING = [s for s in LOSSY if math.isfinite(s.bound(Bound(1.0), flat(3)).total)]
EVERY = [*BOUNDED, *OPTIMIZERS, *LOSSY, *(with_error_feedback(s) for s in SHRINKING), chain(), chain(ClipByGlobalNorm(1.0), Adam(RATE))]
GUARDED = [
    *(chain(ClipPerLayer(0.5), s) for s in SHRINKING),
    *(chain(s, ClipPerLayer(0.5)) for s in LOSSY),
    *(chain(with_error_feedback(s), ClipByGlobalNorm(0.5)) for s in SHRINKING),
]
"""Every stage that loses something, with a clip: before it where it only shrinks or rounds, else after it."""


def name(stage):
    return repr(stage)[:90]


every = pytest.mark.parametrize("stage", EVERY, ids=name)
bounded = pytest.mark.parametrize("stage", BOUNDED, ids=name)
quick = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


def tensors(state):
    """All the tensors of a state, whose bits tell whether it changed."""
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, Moments):
        return [state.first, state.second]
    return [t for s in state for t in tensors(s)] if isinstance(state, tuple) else []


@st.composite
def streaks(draw, moderate=False):
    """A layout and what one user sends in a few rounds."""
    layout = draw(layouts())
    if moderate:
        seeds = draw(st.lists(st.integers(0, 2**31), min_size=3, max_size=3))
        return layout, [Dense(torch.randn(layout.size, generator=torch.Generator().manual_seed(s))) for s in seeds]
    return layout, draw(st.lists(updates(layout), min_size=1, max_size=4))


def test_every_stage_that_files_can_name_is_here():
    """A transform that ships and is not in this suite fails here; the others in `STAGES` are no transforms."""
    inside = {type(s) for stage in EVERY for s in (stage, *getattr(stage, "stages", ()), getattr(stage, "inner", stage))}
    others = {"poisson", "fixed_size", "available", "local_sgd", "gaussian", "dense", "packed"}
    assert {t.stage_name for t in inside if t.stage_name} == set(STAGES) - others


@every
@quick
@given(case=streaks(moderate=True))
def test_pure_and_deterministic(stage, case):
    layout, sent = case
    params = torch.linspace(-1, 1, layout.size)
    global_states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002 - it must not be touched
    state = stage.init(layout)
    for number, update in enumerate(sent, 1):
        before = bits(update.vector), [bits(t) for t in tensors(state)], bits(params)
        steps = [stage.apply(update, state, context(layout, number, params, seed=3)) for _ in range(2)]
        assert (bits(update.vector), [bits(t) for t in tensors(state)], bits(params)) == before
        assert bits(to_dense(steps[0].update, layout)) == bits(to_dense(steps[1].update, layout))
        assert [bits(t) for t in tensors(steps[0].state)] == [bits(t) for t in tensors(steps[1].state)]
        out = to_dense(steps[0].update, layout)
        assert out.shape == (layout.size,)
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()
        state = steps[0].state
    assert torch.equal(torch.get_rng_state(), global_states[0])
    assert np.random.get_state()[1].tolist() == global_states[1]  # noqa: NPY002


@bounded
@quick
@given(case=streaks())
def test_what_leaves_is_within_the_bound_round_after_round(stage, case):
    layout, sent = case
    state, bound = stage.init(layout), stage.bound(UNBOUNDED, layout)
    assert math.isfinite(bound.total)
    for number, update in enumerate(sent, 1):
        step = stage.apply(update, state, context(layout, number))
        assert all(torch.isfinite(t).all() for t in tensors(step.state))
        state = step.state
        assert float64_norm(values_of(step.update)) <= bound.total
        assert stage.guard.apply(step.update, None, context(layout)).update is step.update


@bounded
@quick
@given(data=st.data())
def test_the_guard_bounds_anything_and_has_no_state(stage, data):
    layout = data.draw(layouts())
    update = Dense(data.draw(vectors(layout.size)))
    guarded = stage.guard.apply(update, stage.guard.init(layout), context(layout))
    assert stage.guard.init(layout) is None
    assert float64_norm(guarded.update.vector) <= stage.bound(UNBOUNDED, layout).total
    assert not any(stage.guard.apply(Dense(torch.zeros(layout.size)), None, context(layout)).update.vector)


@pytest.mark.parametrize("stage", [s for s in BOUNDED if s.bound(UNBOUNDED, flat(2, 3)).per_layer], ids=name)
@quick
@given(case=streaks())
def test_a_stated_bound_of_a_layer_holds(stage, case):
    layout, sent = case
    state, limits = stage.init(layout), stage.bound(UNBOUNDED, layout).per_layer
    grouped = next(g for g in (layout, layout.grouped("block")) if len(g.layer_names) == len(limits))
    step = stage.apply(sent[0], state, context(layout))
    parts = layout.split(to_dense(step.update, layout))
    for h, limit in enumerate(limits):
        layer = [p.numpy() for p, k in zip(parts, grouped.layer_of, strict=True) if k == h]
        assert float64_norm(np.concatenate(layer)) <= limit


@bounded
@quick
@given(case=streaks())
def test_sparse_is_dense(stage, case):
    layout, sent = case
    direct = stage.apply(sent[0], stage.init(layout), context(layout)).update
    through = stage.apply(Dense(to_dense(sent[0], layout)), stage.init(layout), context(layout)).update
    assert torch.allclose(to_dense(direct, layout), to_dense(through, layout), rtol=1e-6, atol=1e-44)


@every
def test_pickles_compares_and_travels_as_plain_data(stage):
    assert pickle.loads(pickle.dumps(stage)) == stage
    assert hash(stage) == hash(pickle.loads(pickle.dumps(stage)))
    parts = stage.stages if isinstance(stage, type(chain())) else (stage,)
    for part in (p for p in parts if not isinstance(getattr(p, "inner", None), type(chain()))):
        assert build_stage(json.loads(json.dumps(describe_stage(part)))) == part


@every
def test_measurements_are_numbers_or_one_number_a_layer(stage):
    layout = flat(2, 0, 3)
    step = stage.apply(Dense(torch.ones(5)), stage.init(layout), context(layout, params=torch.ones(5)))
    for value in step.measurements.values():
        assert isinstance(value, float) or (isinstance(value, tuple) and len(value) == 3)
        assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize("codec", [DenseCodec(), PackedCodec()], ids=repr)
@pytest.mark.parametrize("stage", GUARDED, ids=name)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(case=streaks())
def test_the_guard_holds_the_bound_of_what_was_decoded(codec, stage, case):
    """Whatever a stage lost or rounded up, and through any wire format: what is added to the sum is within the bound."""
    layout, sent = case
    state, bound = stage.init(layout), stage.bound(UNBOUNDED, layout)
    assert math.isfinite(bound.total)
    for number, update in enumerate(sent, 1):
        step = stage.apply(update, state, context(layout, number))
        if not all(torch.isfinite(t).all() for t in tensors(step.state)):
            return
        state, decoded = step.state, finite_or_zero(codec.decode(codec.encode(step.update, layout), layout))[0]
        guarded = stage.guard.apply(decoded, None, context(layout, number)).update
        assert float64_norm(values_of(guarded)) <= bound.total


@pytest.mark.parametrize("codec", [DenseCodec(), PackedCodec()], ids=repr)
@pytest.mark.parametrize("stage", EVERY, ids=name)
@settings(max_examples=5)
@given(case=streaks(moderate=True))
def test_no_payload_of_a_round_is_longer_than_is_said(codec, stage, case):
    layout, several = case
    chained = chain(stage)
    state = chained.init(layout)
    for round, update in enumerate(several, 1):
        wire = Wire(codec, layout, chained.support(round, layout), chained.stored(round, layout))
        step = chained.apply(update, state, context(layout, round))
        assert len(wire.encode(step.update)) <= wire.largest
        state = step.state


@pytest.mark.parametrize("stage", OPTIMIZERS, ids=name)
def test_an_optimizer_bounds_nothing_and_is_no_clip(stage):
    assert stage.bound(ClipByGlobalNorm(1.0).bound(UNBOUNDED, flat(1)), flat(1)) == UNBOUNDED
    assert stage.guard is None


def test_the_suite_would_see_a_stage_that_breaks_its_bound():
    @dataclass(frozen=True)
    class Liar(ClipByGlobalNorm):
        def apply(self, update, state, ctx):
            step = super().apply(update, state, ctx)
            return type(step)(Dense(values_of(step.update) * 1.00001), None, step.measurements)

    liar: Transform = Liar(0.5)
    out = liar.apply(Dense(torch.ones(4)), None, context(flat(4))).update
    assert float64_norm(out.vector) > liar.bound(UNBOUNDED, flat(4)).total
