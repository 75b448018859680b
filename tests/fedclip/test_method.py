"""What a method refuses as a whole, by name; and the weights of users."""

import math
import re

import pytest
import torch

from fedclip import sparsify
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.dgc import DGC
from fedclip.local import LocalSGD
from fedclip.method import Method, ServerState, noise_to_bound, user_weight
from fedclip.optimizers import LAMB, SGD, Adam
from fedclip.quantize import Entropy, Fp16, Quantize, Sign
from fedclip.release import Gaussian, Release
from fedclip.sampling import Available, FixedSize, Poisson
from fedclip.schedules import Schedule
from fedclip.sparsify import CommonMask, RandomK
from fedclip.transform import Bound, chain, with_error_feedback
from tests.stages_of_tests import Amplify, Momentum, Round, TopK
from tests.strategies_of_data import flat

NOISE = Release(Gaussian(1.0), 5.0)
CLIP = ClipPerLayer(0.5)


PLAIN = SGD(Schedule.of(1.0))


def method(client=(CLIP,), server=(PLAIN,), momentum=0.0, **more):
    local = LocalSGD(lr=0.1, steps=1, momentum=momentum)
    given = {"sampler": Poisson(10, 5.0)} | more
    return Method(local=local, client=chain(*client), server=chain(*server), **given)


@pytest.mark.parametrize(
    ("client", "named"),
    [
        ((), "chain()"),
        ((Amplify(),), "chain(amplify)"),
        ((CLIP, Amplify()), "amplify can without limit"),
        ((CLIP, Amplify(said=Bound(math.nan))), "amplify can without limit"),
        ((chain(CLIP, Amplify()), TopK(1)), "amplify can without limit"),
        ((CLIP, with_error_feedback(TopK(1))), "with_error_feedback(top_k) can without limit"),
    ],
)
def test_under_noise_a_chain_that_bounds_nothing_is_refused_by_name(client, named):
    with pytest.raises(ValueError, match=f"Under noise.*{re.escape(named)}"):
        method(client, release=NOISE)


@pytest.mark.parametrize("client", [(CLIP,), (Amplify(), CLIP), (CLIP, TopK(1), Round(0.1)), (CLIP, Amplify(), ClipByGlobalNorm(0.2))])
def test_under_noise_a_chain_that_is_bounded_is_taken(client):
    made = method(client, release=NOISE)
    assert made.private
    assert made.bound(flat(3, 2)).total == pytest.approx(0.2 if len(client) == 3 and isinstance(client[2], ClipByGlobalNorm) else 0.5)


@pytest.mark.parametrize(
    ("most", "over"),
    [
        (Poisson(10**9, 1_038_000.0), Poisson(10**9, 1_039_000.0)),
        (Poisson(10**9, 500_000.0, max_cohort=2**20), Poisson(10**9, 500_000.0, max_cohort=2**20 + 1)),
        (Poisson(2**20, 2.0**20), Poisson(2**20 + 1, 2.0**20)),
        (FixedSize(10**9, 2**20), FixedSize(10**9, 2**20 + 1)),
        (Available(10**9, 100_000.0, 10.0), Available(10**9, 100_000.0, 11.0)),
    ],
    ids=lambda sampler: sampler.name,
)
def test_under_noise_a_cohort_that_the_sum_has_no_room_for_is_refused(most, over):
    """Who finds no room would be a zero because others came, which no accountant knows of."""
    assert method(release=NOISE, sampler=most).private
    assert not method(sampler=over).private
    with pytest.raises(ValueError, match=r"room for 1,048,576 users; got a cohort of"):
        method(release=NOISE, sampler=over)


def test_without_noise_nothing_must_be_bounded():
    assert not method((Amplify(),)).private
    assert math.isinf(method(()).bound(flat(1)).total)


def test_under_noise_weights_need_a_limit():
    with pytest.raises(ValueError, match="max_examples"):
        method(release=NOISE, weighting="examples")
    assert method(release=NOISE, weighting="examples", max_examples=10).max_examples == 10
    assert method(weighting="examples").max_examples is None


def test_under_noise_the_sum_of_weights_is_no_denominator():
    with pytest.raises(ValueError, match="public denominator under noise, got 'weights'"):
        method(release=Release(Gaussian(1.0)))


@pytest.mark.parametrize(
    ("server", "named"), [(SGD(Schedule.of(1.0), 0.9), "sgd"), (Adam(Schedule.of(1.0)), "adam"), (LAMB(Schedule.of(1.0)), "lamb")]
)
def test_momentum_on_both_sides_is_refused_unless_it_is_asked_for_twice(server, named):
    for extra in ({"momentum": 0.5}, {"client": (Momentum(), CLIP)}):
        with pytest.raises(ValueError, match=rf"Momentum on both sides.*{named}.*double_momentum = true"):
            method(server=(server,), **extra)
        assert method(server=(server,), double_momentum=True, **extra).double_momentum
    assert method(server=(server,))


def test_momentum_on_one_side_is_taken():
    assert method(momentum=0.9)
    assert method((Momentum(), CLIP))
    assert method(server=(Adam(Schedule.of(1.0), (0.0, 0.9)),), momentum=0.9)


def test_under_noise_a_chain_with_state_needs_users_that_come_by_themselves():
    """State keeps the amplification of Poisson sampling only: a cap or a fixed size ties one user's coming to the others."""
    stateful = (with_error_feedback(CLIP),)
    assert method(stateful, release=NOISE).stateful
    for sampler in (FixedSize(20, 5), Poisson(20, 5.0, max_cohort=7)):
        with pytest.raises(ValueError, match=r"with_error_feedback.*a coin of its own"):
            method(stateful, release=NOISE, sampler=sampler)
        assert method(stateful, sampler=sampler).stateful
        assert not method((CLIP,), release=NOISE, sampler=sampler).stateful


@pytest.mark.parametrize(
    "first",
    [
        DGC(),
        DGC(small="sparse", grid="int8"),
        *(with_error_feedback(s) for s in (sparsify.TopK(0.1), RandomK(0.1), CommonMask(0.1), Quantize(4), Sign(), Entropy(), Fp16())),
    ],
    ids=lambda s: s.name,
)
def test_shipped_stages_that_remember_are_refused_exactly_there(first):
    stages = (first, CLIP)
    for sampler in (FixedSize(20, 5), FixedSize(20, 19), Poisson(20, 5.0, max_cohort=7)):
        with pytest.raises(ValueError, match="a coin of its own"):
            method(stages, release=NOISE, sampler=sampler)
        assert method(stages, sampler=sampler).stateful
    for sampler in (Poisson(20, 5.0), Poisson(20, 20.0), Poisson(20, 5.0, devices_per_user=2), FixedSize(20, 20)):
        assert method(stages, release=NOISE, sampler=sampler).stateful
    with pytest.raises(ValueError, match=r"must clip|enlarge"):
        method((first,), release=NOISE)
    with pytest.raises(ValueError, match=r"must clip|enlarge"):
        method((CLIP, first), release=NOISE)


@pytest.mark.parametrize(
    "stage", [DGC(state="none"), sparsify.TopK(0.1), RandomK(0.1), CommonMask(0.1), Quantize(4), Sign(), Entropy(), Fp16()]
)
def test_shipped_stages_that_remember_nothing_go_with_any_sampler(stage):
    for sampler in (FixedSize(20, 5), Poisson(20, 5.0, max_cohort=7), Poisson(20, 5.0)):
        assert not method((stage, CLIP), release=NOISE, sampler=sampler).stateful


def test_a_server_chain_without_an_optimizer_is_refused():
    with pytest.raises(ValueError, match="optimizer"):
        method(server=())


def test_the_bound_splits_as_the_clip_says():
    assert method((ClipPerLayer(0.5, "uniform"),)).bound(flat(3, 2)).per_layer == pytest.approx((0.5 / math.sqrt(2),) * 2)


@pytest.mark.parametrize(
    ("arguments", "weight"),
    [
        ((7, "uniform", None), 1.0),
        ((7, "examples", None), 7.0),
        ((7, "examples", 10), 0.7),
        ((70, "examples", 10), 1.0),
        ((7, "uniform", 10), 1.0),
    ],
)
def test_user_weights(arguments, weight):
    assert user_weight(*arguments) == weight


def test_the_first_state_has_its_own_copy_of_the_parameters():
    params = torch.ones(5)
    state = ServerState.initial(params, method(server=(Adam(Schedule.of(1.0)),)), flat(5))
    params.zero_()
    assert state.params.tolist() == [1] * 5
    assert (state.round, state.attempt, state.server[0].steps) == (0, 0, 0)


def test_noise_over_bound_is_z_root_d_over_s():
    assert noise_to_bound(method(release=NOISE), flat(100)) == pytest.approx(1.0 * 10 / 5)
    assert noise_to_bound(method(), flat(100)) == 0.0
