"""One user taken out moves each round's sum by the bound at most: every chain that ships, every recipe, real tasks and hostile users."""

import dataclasses

import numpy as np
import pytest
import torch

from fedclip import sparsify
from fedclip.adaptive import AdaptiveClip
from fedclip.audit.bench import Bench, System
from fedclip.audit.chains import audit_chain
from fedclip.audit.hostile import HostileTask
from fedclip.audit.replay import audit_contributions, audit_hostile, audit_replay, ratio_to_bound
from fedclip.audit.suite import narrow
from fedclip.client import Client
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.dgc import DGC
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import ServerState
from fedclip.quantize import Entropy, Fp16, Quantize, Sign
from fedclip.release import Gaussian
from fedclip.replica import Replica
from fedclip.round import begin
from fedclip.sampling import FixedSize, Poisson
from fedclip.site import Site
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions
from fedclip.transform import Bound, chain, with_error_feedback
from strategies.recipes import RECIPES
from tests.fedclip import audit_mutants as mutants
from tests.stages_of_tests import Round, TopK

LAYERS = mutants.LAYERS
BLOCKS = Layout(("h.0.a", "h.0.b", "h.1.a", "out"), ((3, 2), (2,), (0, 3), ()), ("h.0.a", "h.0.b", "h.1.a", "out"))
CLIPS = [ClipByGlobalNorm(0.5), ClipByGlobalNorm(1e-20), ClipByGlobalNorm(1e20)] + [
    ClipPerLayer(0.5, split, mode, layers)
    for split in ("uniform", "dim")
    for mode in ("clip", "normalize")
    for layers in ("tensor", "block")
]
CHAINS = [
    *CLIPS,
    *(with_error_feedback(c) for c in CLIPS),
    chain(ClipPerLayer(2.0), ClipByGlobalNorm(1.0)),
    chain(ClipByGlobalNorm(9.0), with_error_feedback(ClipPerLayer(0.1, "uniform"))),
    with_error_feedback(chain(ClipByGlobalNorm(2.0), ClipPerLayer(1.0))),
    chain(with_error_feedback(TopK(3)), ClipByGlobalNorm(1.0)),
    chain(ClipByGlobalNorm(1.0), TopK(3)),
    chain(with_error_feedback(Entropy(1.0)), ClipByGlobalNorm(0.5)),
    chain(with_error_feedback(Sign()), ClipByGlobalNorm(0.5)),
    chain(sparsify.RandomK(0.3), ClipByGlobalNorm(0.5)),
    chain(with_error_feedback(sparsify.CommonMask(0.3)), ClipPerLayer(0.5)),
    chain(DGC(0.3, clip_norm=1.0), ClipPerLayer(0.5)),
    chain(DGC(0.3, nesterov=True, warmup=(), small="sparse", grid="int8"), ClipPerLayer(0.5, mode="normalize")),
]
ROUNDED = [
    chain(sparsify.TopK(0.3), ClipPerLayer(0.5), Quantize(8, 32)),
    chain(with_error_feedback(sparsify.TopK(0.3, "model")), ClipPerLayer(0.5), Fp16()),
    chain(with_error_feedback(sparsify.CommonMask(0.3)), ClipPerLayer(0.5), Quantize(4, 3)),
    chain(DGC(0.3, clip_norm=1.0), ClipPerLayer(0.5), Quantize(8, 256)),
    chain(ClipByGlobalNorm(1.0), Sign()),
    chain(ClipPerLayer(1.0), Entropy(1.0)),
]
"""Chains that round after the clip: what is sent may exceed the bound a little, and the guard takes it back."""
SAMPLER, LOCAL = Poisson(100, 20.0), LocalSGD(0.1, steps=1)
NEEDED = {"pfl4asr": {"max_norm": 0.5}, "stages": {"client": [{"clip_per_layer": {"max_norm": 1.0}}], "server": [{"sgd": {"lr": 1.0}}]}}


def failed(findings):
    return {f.name for f in findings if not f.passed}


def recipe(name, **more):
    """A recipe under noise, with a clip."""
    return RECIPES[name](**{"sampler": SAMPLER, "local": LOCAL, "mechanism": Gaussian(1.0), **NEEDED.get(name, {"max_norm": 0.5}), **more})


@pytest.mark.parametrize("layout", [LAYERS, BLOCKS], ids=["tensors", "blocks"])
@pytest.mark.parametrize("stage", CHAINS, ids=lambda s: repr(s)[:80])
def test_one_user_moves_the_sum_of_any_chain_by_its_bound_at_most(stage, layout):
    """Twenty rounds, state kept by user id, vectors up to 3e38 with NaNs, infinities, zeros of both signs and empty tensors."""
    assert failed(audit_chain(stage, layout)) == set()


@pytest.mark.parametrize("layout", [LAYERS, BLOCKS], ids=["tensors", "blocks"])
@pytest.mark.parametrize("stage", ROUNDED, ids=lambda s: repr(s)[:80])
def test_what_rounding_adds_after_the_clip_the_guard_takes_back(stage, layout):
    assert failed(audit_chain(stage, layout)) <= {"chain: what is sent"}


def test_weights_of_layers_and_rounding_stages_are_within_the_bound_too():
    weighted = ClipPerLayer(0.5, "weights", weights=(1.0, 2.0, 1.0, 3.0, 0.1))
    assert failed(audit_chain(weighted, LAYERS)) == set()
    assert failed(audit_chain(with_error_feedback(weighted), LAYERS)) == set()
    # Rounding may enlarge what is sent a little, and leaves that to the guard.
    assert failed(audit_chain(chain(ClipByGlobalNorm(1.0), Round(0.25)), LAYERS)) <= {"chain: what is sent"}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_chain_of_every_recipe(name):
    method = recipe(name)
    assert failed(audit_chain(method.client, LAYERS)) == set()
    assert failed(audit_hostile(method, LAYERS, rounds=4, users=6, removed=2)) == set()


@pytest.mark.parametrize(
    "more", [{"adaptive": AdaptiveClip(bits_noise=0.2)}, {"weighting": "examples", "max_examples": 3}], ids=["adaptive", "weights"]
)
def test_hostile_users_under_adaptive_bounds_and_weights(more):
    findings = audit_hostile(recipe("fedavg", **more), LAYERS, rounds=6, users=6, removed=3)
    assert failed(findings) == set()
    effect = {f.name: f.found for f in findings}
    assert effect["hostile users: one user's effect"] > 0.99, "hostile users use all of the bound"
    assert effect["hostile users: one user's clip bits"] == (1.0 if "adaptive" in more else 0.0)


def test_a_task_is_replayed_with_its_own_users():
    task = build_vision(VisionOptions(name="vision", channels=2), population=30, seed=0)
    method = recipe("pfl4asr", sampler=Poisson(30, 6.0), local=LocalSGD(0.1, steps=2))
    findings = audit_replay(method, task, rounds=3, users=4, removed=2)
    assert failed(findings) == set()
    assert {f.name: f.found for f in findings}["replay: one user's effect"] > 0.1


MASKED = mutants.MaskedClip()
WRONG_CHAINS = {
    "error feedback after the clip": (mutants.FeedbackAfterClip(), {}, {"chain: what is sent"}),
    "and no guard": (mutants.FeedbackAfterClipUnguarded(), {}, {"chain: one user's effect", "chain: what is sent"}),
    "state keyed by worker": (
        with_error_feedback(ClipByGlobalNorm(0.5)),
        {"key": lambda user, worker: worker},
        {"chain: one user's effect", "chain: effect when away"},
    ),
    "state of DGC keyed by worker": (
        chain(DGC(0.3, warmup=()), ClipByGlobalNorm(0.5)),
        {"key": lambda user, worker: worker},
        {"chain: one user's effect", "chain: effect when away"},
    ),
    "state kept in the stage": (mutants.Remembering(), {}, {"chain: one user's effect", "chain: effect when away"}),
    "per-layer bounds in normalize mode": (mutants.BoundsOfNormalize(0.5), {}, {"chain: one user's effect", "chain: what is sent"}),
    "a wide guard": (chain(ClipByGlobalNorm(0.5), mutants.WideGuard(0.5)), {"honest": False}, {"chain: one user's effect"}),
    "sent outside the mask": (ClipByGlobalNorm(0.5), {"support": mutants.support(LAYERS, 0)}, {"chain: support"}),
    "not finite": (ClipByGlobalNorm(0.5), {"collector": mutants.NotFinite, "honest": False}, {"chain: one user's effect"}),
}
RIGHT_CHAINS = {
    "error feedback around the clip": (with_error_feedback(ClipByGlobalNorm(0.5)), {}),
    "a public mask": (MASKED, {"support": mutants.support(LAYERS, 0)}),
    "a public mask with a residual for each user": (with_error_feedback(MASKED), {"support": mutants.support(LAYERS, 0)}),
    "clients who skip the chain": (ClipByGlobalNorm(0.5), {"honest": False}),
}


@pytest.mark.parametrize("wrong", WRONG_CHAINS)
def test_a_wrong_chain_is_caught(wrong):
    stage, arguments, caught = WRONG_CHAINS[wrong]
    assert caught <= failed(audit_chain(stage, LAYERS, **arguments))


@pytest.mark.parametrize("right", RIGHT_CHAINS)
def test_a_right_chain_is_not(right):
    stage, arguments = RIGHT_CHAINS[right]
    assert failed(audit_chain(stage, LAYERS, **arguments)) <= ({"chain: what is sent"} if "honest" in arguments else set())


def test_a_chain_without_a_bound_is_refused():
    with pytest.raises(ValueError, match="Expected a chain with a bound"):
        audit_chain(chain(TopK(2)), LAYERS)


def bench(method, system=None, layout=None):
    return Bench(method, layout or narrow(method, LAYERS), system or System())


@pytest.mark.parametrize("wrong", ["no guard", "not finite", "stated weights"])
def test_a_sum_that_trusts_its_clients_is_caught(wrong):
    finding = audit_contributions(bench(mutants.method(), mutants.systems()[wrong]), count=300)
    assert not finding.passed
    assert finding.found > 1.5
    assert audit_contributions(bench(mutants.method()), count=300).passed


def test_bounds_of_layers_that_do_not_hold_are_caught():
    """In normalize mode noise in proportion to the layers' bounds would cover less than a user can send."""
    method = mutants.method(mutants.BoundsOfNormalize(0.5), Gaussian(1.0, "bounds"))
    assert not audit_contributions(bench(method), count=300).passed
    assert "hostile users: one user's effect" in failed(audit_hostile(method, LAYERS, rounds=10, users=9, removed=6))
    right = mutants.method(ClipPerLayer(0.5), Gaussian(1.0, "bounds"))
    assert audit_contributions(bench(right), count=300).passed


def test_a_guard_that_does_not_mask_is_caught():
    """Noise on a public mask alone is right where nothing else can be sent."""
    right = mutants.method(MASKED, mutants.MaskedGaussian(1.0))
    wrong = mutants.method(mutants.MaskWithOpenGuard(), mutants.MaskedGaussian(1.0))

    def masked(round):
        return mutants.support(LAYERS, 0)

    assert audit_contributions(bench(right, layout=LAYERS), count=300, support=masked).passed
    assert not audit_contributions(bench(wrong, layout=LAYERS), count=300, support=masked).passed


def one_in_ten_thousand(count):
    mutants.OneInTenThousand.taken = 0
    return audit_contributions(bench(mutants.method(ClipByGlobalNorm(0.5)), mutants.systems()["one in 10,000 unclipped"]), count=count)


def test_one_update_in_ten_thousand_that_is_not_clipped_is_caught():
    assert not one_in_ten_thousand(20_500).passed, "two of them"
    assert one_in_ten_thousand(9_999).passed, "none of them"


@pytest.mark.slow
def test_sixty_thousand_updates_are_all_clipped():
    assert not one_in_ten_thousand(60_000).passed
    assert audit_contributions(bench(mutants.method()), count=60_000).passed


@pytest.mark.parametrize("task", ["hostile", "vision"])
def test_state_keyed_by_worker_is_caught_in_a_method(task):
    system, method = mutants.systems()["state keyed by worker"], mutants.method(ClipByGlobalNorm(0.5), sampler=Poisson(30, 6.0))
    if task == "hostile":
        findings = audit_hostile(method, LAYERS, rounds=6, users=6, removed=3, system=system)
    else:
        vision = build_vision(VisionOptions(name="vision", channels=2), population=30, seed=0)
        findings = audit_replay(method, vision, rounds=3, users=4, removed=2, system=system)
    assert any(name.endswith("effect when away") for name in failed(findings))


def test_a_ratio_is_the_worst_of_the_whole_and_of_each_layer():
    layout, vector = Layout(("a", "b"), ((2,), (1,)), ("a", "b")), np.array([3.0, 4.0, 1.0])
    assert ratio_to_bound(vector, Bound(13.0), layout) == pytest.approx(np.sqrt(26) / 13)
    assert ratio_to_bound(vector, Bound(13.0, (10.0, 0.5)), layout) == 2.0
    assert ratio_to_bound(vector, Bound(13.0, (10.0, 0.0)), layout) == np.inf
    assert ratio_to_bound(vector * np.nan, Bound(13.0), layout) == np.inf


def test_a_chain_that_remembers_is_replayed_with_a_task_and_with_hostile_users():
    task = build_vision(VisionOptions(name="vision"), population=20, seed=1)
    method = mutants.method(chain(DGC(0.3, warmup=()), ClipPerLayer(0.5)))
    assert method.stateful
    assert failed(audit_replay(method, task, rounds=4)) == set()
    assert failed(audit_hostile(method, LAYERS, rounds=10)) == set()


def test_fixed_cohorts_are_replayed_too():
    method = dataclasses.replace(recipe("fedavg"), sampler=FixedSize(100, 20))
    assert failed(audit_hostile(method, LAYERS, rounds=2, users=3, removed=1)) == set()


class Failing:
    """A task of whose users none can be loaded."""

    def __init__(self, task):
        self._task = task

    def __getattr__(self, name):
        return getattr(self._task, name)

    def load_user(self, user, rng):
        raise OSError("no such recording")


def test_a_replay_of_nobody_is_no_pass():
    task = build_vision(VisionOptions(name="vision", channels=2), population=30, seed=0)
    method = recipe("pfl4asr", sampler=Poisson(30, 6.0))
    (effect, *_) = audit_replay(method, Failing(task), rounds=1, users=2, removed=1)
    assert not effect.passed
    assert "nothing was seen" in effect.detail


def test_hostile_users_have_the_layout_whatever_its_order():
    assert Layout.of(HostileTask(mutants.LAYOUT, 1.0, 3).make_model()) == mutants.LAYOUT


def test_a_hostile_user_sends_what_it_means_to():
    """The loss is linear, so that one step of rate 1 from zero parameters is the vector, bit for bit, infinities and all.

    Of numbers that are too small for all of their digits training makes zeros; hostile contributions bring them along another way.
    """
    method = mutants.method(ClipByGlobalNorm(1e30), sampler=Poisson(9, 9.0))
    method = dataclasses.replace(method, local=LocalSGD(1.0, steps=1, batch_size=1))
    task = HostileTask(LAYERS, 1.0, 9)
    layout = Layout.of(task.make_model())
    plan = begin(method, ServerState.initial(torch.zeros(layout.size), method, layout), layout, "s", "r")
    client, kinds = Client(Site(task, Replica(task.make_model())), plan.spec), set()
    for user in range(9):
        vector = task.load_user(user, plan.spec.streams.generator("data", user))[0]
        finite = bool(torch.isfinite(vector).all())
        sent = client.codec.decode(client.train_user(user).payload, layout).vector
        if finite and vector.abs().max() < 1e29:
            assert torch.equal(sent, torch.where(vector.abs() < 2.0**-126, 0.0, vector))
        assert finite or not sent.any()
        kinds.add(finite)
    assert kinds == {True, False}
