"""Adaptive clipping: it finds the quantile, shares one noise multiplier with the update, and is refused where it cannot."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedclip.adaptive import AdaptiveClip
from fedclip.clipping import LARGEST_SPREAD, ClipByGlobalNorm, ClipPerLayer
from fedclip.collector import Collector, Contribution, pack_bits, unpack_bits
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method, ServerState
from fedclip.optimizers import SGD
from fedclip.release import Gaussian, Release
from fedclip.round import Plan, begin, finish
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.transform import chain

LAYOUT = Layout(("a", "none", "b"), ((2, 3), (0,), (5,)), ("a", "none", "b"))


def method(clip=None, z=1.0, cohort=200.0, population=20_000, adaptive=None):
    return Method(
        Poisson(population, cohort),
        LocalSGD(0.1, steps=1),
        chain(clip or ClipByGlobalNorm(1.0)),
        chain(SGD(Schedule.of(0.1))),
        Release(Gaussian(z), cohort) if z else Release(),
        adaptive=adaptive or AdaptiveClip(),
    )


def rounds_on_norms(start, norms_of, rounds, clip, z=1.0, cohort=200.0):
    """Run rounds of real messages whose updates have norms drawn from `norms_of(rng)`: one norm a layer."""
    adapted = method(clip(start), z, cohort)
    state = ServerState.initial(torch.zeros(LAYOUT.size), adapted, LAYOUT)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        plan = begin(adapted, state, LAYOUT, "seed:1", "test")
        now = adapted.for_round(state.thresholds, LAYOUT)
        collector = Collector(plan.spec, LAYOUT)
        for block, users in plan.blocks:
            for user in users:
                vector = torch.cat([torch.full((d,), n / math.sqrt(d)) for n, d in zip(norms_of(rng), (6, 5), strict=True)])
                step = now.client.apply(_dense(vector), now.client.init(LAYOUT), _ctx())
                payload = adapted.codec.encode(step.update, LAYOUT)
                collector.take(block, Contribution(user, payload, 1.0, {"users": 1.0}, clip_bits=pack_bits(step.clip_bits)))
        state = finish(adapted, state, LAYOUT, plan, [collector.partial()]).state
    return state.thresholds


def _dense(vector):
    from fedclip.update import Dense

    return Dense(vector)


def _ctx():
    from fedclip.transform import Ctx

    return Ctx(LAYOUT, np.random.default_rng(0), 1, torch.zeros(LAYOUT.size))


MEDIAN = 3.0


@pytest.mark.parametrize("start", [0.1, 0.9, *(pytest.param(far, marks=pytest.mark.slow) for far in (1.1, 10.0))])
def test_the_bound_finds_the_median_of_log_normal_norms(start):
    """Log-sd 1, S = 200, eta 0.2, target 0.5: within 10% of the median after 100 rounds, bits noised at S/20."""

    def norms(rng):
        norm = MEDIAN * math.exp(rng.standard_normal())
        return 0.6 * norm, 0.8 * norm

    (found,) = rounds_on_norms(start * MEDIAN, norms, 100, ClipByGlobalNorm)
    assert abs(found / MEDIAN - 1) < 0.1


def test_each_layer_finds_its_own_median():
    medians = (0.5, 8.0)

    def norms(rng):
        return tuple(m * math.exp(rng.standard_normal()) for m in medians)

    found = rounds_on_norms(1.0, norms, 100, lambda start: ClipPerLayer(start, "uniform"))
    assert len(found) == 2, "a layer without elements has no bound to adapt"
    for bound, median in zip(found, medians, strict=True):
        assert abs(bound / median - 1) < 0.15


def test_without_noise_the_bits_are_exact():
    (found,) = rounds_on_norms(2.0, lambda rng: (1.0, 0.0), 1, ClipByGlobalNorm, z=None)
    assert found == pytest.approx(2.0 * math.exp(-0.2 * 0.5), rel=1e-12)


@given(
    z=st.floats(1e-3, 50),
    bounds=st.integers(1, 400),
    cohort=st.floats(1, 1e6),
    ratio=st.floats(1e-3, 0.9),
)
def test_update_and_bits_together_are_one_mechanism_at_z(z, bounds, cohort, ratio):
    """A user moves the update's release by C at z_delta C, and each of H bits by 1/2 at s: z^-2 = z_delta^-2 + H (2 s)^-2."""
    adaptive = AdaptiveClip(bits_noise=ratio)
    least = z * math.sqrt(bounds) / (2 * ratio)
    if cohort <= least * 1.0001:
        with pytest.raises(ValueError, match="Expected a cohort over"):
            adaptive.delta_multiplier(z, min(cohort, least), bounds)
        return
    delta = adaptive.delta_multiplier(z, cohort, bounds)
    assert delta >= z
    sensitivity = math.sqrt(bounds) / 2
    assert (delta**-2 + (sensitivity / (ratio * cohort)) ** 2) ** -0.5 == pytest.approx(z, rel=1e-6)


def test_the_smallest_cohort_is_named_when_the_method_is_checked():
    per_layer = method(ClipPerLayer(1.0), z=1.0, cohort=14.0)
    with pytest.raises(ValueError, match=r"cohort over 14\.1421 .* 2 adaptive bounds .* got 14"):
        per_layer.check(LAYOUT)
    method(ClipPerLayer(1.0), z=1.0, cohort=14.2).check(LAYOUT)


def test_the_round_uses_the_bounds_of_its_state_and_the_part_of_z():
    adapted = method(ClipPerLayer(1.0), z=1.0)
    now = adapted.for_round((0.25, 4.0), LAYOUT)
    assert now.bound(LAYOUT).per_layer == pytest.approx((0.25, 0.0, 4.0), rel=1e-12)
    assert now.release.mechanism.noise_multiplier == AdaptiveClip().delta_multiplier(1.0, 200.0, 2) > 1.0
    state = dataclasses.replace(ServerState.initial(torch.zeros(11), adapted, LAYOUT), thresholds=(0.25, 4.0))
    plan = begin(adapted, state, LAYOUT, "seed:1", "test")
    assert plan.spec.clip_bits == 2
    assert plan.spec.grid.largest == pytest.approx(math.hypot(0.25, 4.0))


def test_the_bits_noise_has_its_deviation():
    adaptive, cohort = AdaptiveClip(), 200.0
    fractions = adaptive.fractions(np.zeros(50_000), 0, cohort, np.random.default_rng(0))
    assert fractions.mean() == pytest.approx(0.5, abs=5 * 0.05 / math.sqrt(50_000))
    assert fractions.std() == pytest.approx(0.05, rel=5 / math.sqrt(100_000))


def test_one_more_user_moves_the_fraction_by_half_a_share():
    adaptive = AdaptiveClip()
    before, after = (adaptive.fractions(np.array([t]), 0, 10.0, np.random.default_rng(0)) for t in (4.0, 5.0))
    assert after - before == pytest.approx(0.5 / 10)


def test_a_failed_user_says_no_bit_and_wrong_bits_are_a_failure():
    adapted = method(ClipPerLayer(1.0))
    plan: Plan = begin(adapted, ServerState.initial(torch.zeros(11), adapted, LAYOUT), LAYOUT, "seed:1", "test")
    payload = adapted.codec.encode(_dense(torch.ones(11) * 1e-3), LAYOUT)
    collector = Collector(plan.spec, LAYOUT)
    collector.take(0, Contribution(1, None, 0.0, {"failed_users": 1.0}, "raised"))
    assert collector.partial().clip_bits == (0, 0)
    for bits in (b"", b"\xff\xff"):
        collector.take(0, Contribution(2, payload, 1.0, {"users": 1.0}, clip_bits=bits))
    assert collector.partial().clip_bits == (0, 0)
    assert collector.partial().users == 0
    assert collector.partial().tallies[0]["failed_users"] == 3.0
    collector.take(0, Contribution(3, payload, 1.0, {"users": 1.0}, clip_bits=pack_bits((True, False))))
    assert collector.partial().clip_bits == (1, -1)


@given(st.lists(st.booleans(), max_size=40))
def test_bits_travel_whole(bits):
    assert unpack_bits(pack_bits(bits), len(bits)).tolist() == [1 if b else -1 for b in bits]


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6))
def test_bounds_stay_where_the_clip_takes_them(fractions):
    thresholds = tuple(10.0**i for i in range(len(fractions)))
    for _ in range(200):
        thresholds = AdaptiveClip(lr=2.0).step(thresholds, fractions)
    assert max(thresholds) <= LARGEST_SPREAD * min(thresholds)
    names = tuple("abcdef"[: len(fractions)])
    ClipPerLayer(1.0).with_thresholds(thresholds, Layout(names, ((2,),) * len(names), names))


def test_what_cannot_adapt_is_refused():
    with pytest.raises(ValueError, match="mode clip, as the last clip"):
        method(ClipPerLayer(1.0, mode="normalize"))
    for wrong in ({"quantile": 0.0}, {"quantile": 1.0}, {"lr": 0.0}, {"bits_noise": 0.0}, {"eta": 1.0}):
        with pytest.raises(ValidationError):
            AdaptiveClip(**wrong)
