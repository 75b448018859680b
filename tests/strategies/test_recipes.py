"""Recipes: each is the published method's stages, and what does not fit together is refused."""

import dataclasses
import inspect

import pytest

from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.config import make_experiment
from fedclip.dgc import DGC
from fedclip.optimizers import LAMB, LARS, SGD, Adagrad, Adam, Yogi
from fedclip.options import ConfigError
from fedclip.quantize import Quantize
from fedclip.release import Gaussian, Release
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.stages import gaussian, local_sgd, poisson
from fedclip.transform import chain
from strategies.recipes import RECIPES, build_method, deep_gradient_compression, fedavg, fedopt, pfl4asr, resolve, scaffold, stages

SAMPLER, LOCAL, NOISE = poisson(100, 20.0), local_sgd(lr=0.1, steps=2), gaussian(0.7)
ONE = Schedule.of(1.0)


def experiment(strategy, **sections):
    base = {"run": {"rounds": 1}, "task": {"name": "vision"}, "sampler": {"cohort": 20}, "local": {"lr": 0.1, "steps": 2}}
    return make_experiment(base | {"strategy": strategy} | sections)


ABSENT = ("epochs", "clip_norm", "micro_batch")
"""What local training has no value for unless it is given one."""


def test_fedavg_is_the_weighted_mean_and_a_step_of_one():
    method = fedavg(sampler=SAMPLER, local=LOCAL)
    assert (method.client, method.server, method.release) == (chain(), chain(SGD(ONE)), Release())
    assert method.weighting == "examples"


def test_fedavg_with_clip_and_noise_is_dp_fedavg():
    method = fedavg(sampler=SAMPLER, local=LOCAL, mechanism=NOISE, max_norm=0.5, server_momentum=0.9)
    assert method.client == chain(ClipByGlobalNorm(0.5))
    assert method.server == chain(SGD(ONE, 0.9))
    assert method.release == Release(Gaussian(0.7), 20.0)
    assert method.weighting == "uniform"


def test_scaffold_is_fedavg_of_uniform_weights_with_control_variates():
    method = scaffold(sampler=SAMPLER, local=LOCAL, mechanism=NOISE, max_norm=0.5)
    assert method.stateful
    plain = fedavg(sampler=SAMPLER, local=LOCAL, mechanism=NOISE, max_norm=0.5)
    assert dataclasses.replace(method, control=False) == plain
    listed = {"client": [{"clip_by_global_norm": {"max_norm": 0.5}}], "server": [{"sgd": {"lr": 1.0}}]}
    assert stages(sampler=SAMPLER, local=LOCAL, mechanism=NOISE, control=True, **listed) == method
    assert scaffold(sampler=SAMPLER, local=LOCAL).client == chain()


@pytest.mark.parametrize("name", ["fedavg", "fedopt", "deep_gradient_compression", "scaffold"])
def test_noise_without_a_clip_is_refused(name):
    with pytest.raises(ValueError, match="must clip"):
        RECIPES[name](sampler=SAMPLER, local=LOCAL, mechanism=NOISE)


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    [
        ("adam", Adam(Schedule.of(0.01), (0.9, 0.99), 1e-3)),
        ("sgd", SGD(Schedule.of(0.01), 0.9)),
        ("lamb", LAMB(Schedule.of(0.01), (0.9, 0.99), 1e-3)),
        ("lars", LARS(Schedule.of(0.01), 0.9, 1.0)),
        ("yogi", Yogi(Schedule.of(0.01), (0.9, 0.99), 1e-3)),
        ("adagrad", Adagrad(Schedule.of(0.01), 1e-3)),
    ],
)
def test_fedopt_has_the_constants_of_its_paper(optimizer, stage):
    # arXiv 2003.00295, section 4: beta1 0.9, beta2 0.99, tau 1e-3.
    assert fedopt(sampler=SAMPLER, local=LOCAL, optimizer=optimizer).server == chain(stage)


def test_pfl4asr_is_clip_per_layer_noise_and_lamb():
    method = pfl4asr(sampler=SAMPLER, local=LOCAL, mechanism=NOISE, max_norm=0.01)
    assert method.client == chain(ClipPerLayer(0.01, "dim", "clip", "tensor"))
    # arXiv 2310.00098: betas 0.9 and 0.999, the ratio bounded nowhere, each tensor a layer.
    assert method.server == chain(LAMB(Schedule.of(4e-3), (0.9, 0.999), 1e-6, 0.0, (0.0, float("inf")), "tensor"))
    assert method.release == Release(Gaussian(0.7), 20.0)


def test_dgc_has_its_momentum_where_the_paper_has_it():
    method = deep_gradient_compression(sampler=SAMPLER, local=LOCAL, clip_norm=2.0, nesterov=True)
    assert method.client == chain(DGC(0.001, 0.9, True, 2.0, nodes=20))
    assert method.server == chain(SGD(ONE, 0.0, True, 0.9)), "small tensors look ahead too"
    plain = deep_gradient_compression(sampler=SAMPLER, local=LOCAL)
    assert plain.server == chain(SGD(ONE, 0.0, False, 0.9))
    private = deep_gradient_compression(sampler=SAMPLER, local=LOCAL, mechanism=NOISE, max_norm=0.5, grid="int8")
    assert private.client == chain(DGC(nodes=20), ClipPerLayer(0.5), Quantize(8, 256)), "a clip after rounding would take it off its grid"
    sparse = deep_gradient_compression(sampler=SAMPLER, local=LOCAL, small="sparse", grid="int8")
    assert (sparse.client, sparse.server) == (chain(DGC(nodes=20, small="sparse", grid="int8")), chain(SGD(ONE)))
    stateless = deep_gradient_compression(sampler=SAMPLER, local=LOCAL, state="none", max_norm=0.5, mechanism=NOISE)
    assert stateless.client == chain(DGC(nodes=20, state="none"), ClipPerLayer(0.5))
    assert stateless.server == chain(SGD(ONE, 0.9))
    assert not stateless.stateful


def test_stages_are_built_from_plain_data():
    method = stages(
        sampler=SAMPLER,
        local=LOCAL,
        client=[{"clip_by_global_norm": {"max_norm": 2}}, {"tests.stages_of_tests:TopK": {"k": 3}}],
        server=[{"sgd": {"lr": 1}}],
    )
    assert method.client.name == "chain(clip_by_global_norm, top_k)"
    assert method.server == chain(SGD(ONE))


def test_a_published_method_is_its_stages():
    sections = {"privacy": {"noise_multiplier": 0.7}, "population": {"size": 100}}
    published = build_method(experiment({"method": "pfl4asr", "max_norm": 0.5}, **sections), 100)
    listed = {"client": [{"clip_per_layer": {"max_norm": 0.5}}], "server": [{"lamb": {"lr": 4e-3}}]}
    assert build_method(experiment(listed, **sections), 100) == published
    assert published == pfl4asr(sampler=Poisson(100, 20.0), local=LOCAL, mechanism=Gaussian(0.7), max_norm=0.5)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_resolving_writes_every_argument_out_and_is_idempotent(name):
    needed = {"pfl4asr": {"max_norm": 1.0}, "stages": {"server": [{"sgd": {"lr": 1.0}}]}}
    resolved = resolve(experiment({"method": name} | needed.get(name, {})))
    assert resolve(resolved) == resolved
    assert set(resolved.local) == {name for name in inspect.signature(local_sgd).parameters if name not in ABSENT}
    assert {"lr": 0.1, "steps": 2, "batch_size": 8, "momentum": 0.0}.items() <= resolved.local.items()
    assert set(needed.get(name, {})) < set(resolved.strategy.model_extra)
    assert build_method(resolved, 100) == build_method(experiment({"method": name} | needed.get(name, {})), 100)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"method": "pfl4as"}, ["strategy.method", "'pfl4as'", "Did you mean 'pfl4asr'?"]),
        ({"method": "pfl4asr"}, ["strategy.max_norm", "missing"]),
        ({"method": "pfl4asr", "max_norm": 1, "sever_lr": 1}, ["strategy.sever_lr", "Did you mean 'server_lr'?"]),
        ({"method": "pfl4asr", "max_norm": 1, "mode": "normalise"}, ["strategy.mode", "'clip' or 'normalize'", "'normalise'"]),
        ({"method": "fedopt", "optimizer": "yogy"}, ["strategy.optimizer", "'yogi' or 'adagrad'", "'yogy'"]),
        ({"method": "fedavg", "mechanism": 1}, ["strategy.mechanism", "[privacy]"]),
        ({"method": "fedavg", "local": 1}, ["strategy.local", "[local]"]),
    ],
)
def test_mistakes_are_named(strategy, said):
    with pytest.raises(ConfigError) as caught:
        resolve(experiment(strategy))
    assert all(part in str(caught.value) for part in said), caught.value


def test_a_cohort_larger_than_the_users_is_refused():
    with pytest.raises(ConfigError, match=r"sampler\.cohort.*at most 10"):
        build_method(experiment({"method": "fedavg"}), 10)


def test_a_stage_of_another_section_is_refused():
    with pytest.raises(ValueError, match="DenseCodec"):
        build_method(experiment({"client": [{"dense": {}}], "server": [{"sgd": {"lr": 1}}]}), 100)


def test_momentum_on_both_sides_is_asked_for_twice():
    both = {"sampler": SAMPLER, "local": local_sgd(lr=0.1, steps=2, momentum=0.5)}
    with pytest.raises(ValueError, match="double_momentum"):
        fedopt(**both)
    assert fedopt(**both, double_momentum=True)
    assert fedavg(**both)
    with pytest.raises(ValueError, match="double_momentum"):
        fedavg(**both, server_momentum=0.1)
