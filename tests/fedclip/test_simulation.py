"""A whole run in one process."""

import pytest
import torch

from fedclip.simulation import InProcess, initial_params, simulate
from fedclip.stages import local_sgd, poisson
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions
from strategies.recipes import fedavg


def task(channels=8):
    return build_vision(VisionOptions(name="vision", channels=channels, alpha=1.0), population=40, seed=0)


def method(cohort=10.0, epochs=3):
    return fedavg(sampler=poisson(40, cohort), local=local_sgd(lr=0.2, epochs=epochs, batch_size=10, clip_norm=1.0))


def test_federated_averaging_learns_the_digits():
    described = task()
    engine = InProcess(method(), described, "seed:1", "test")
    before = engine.evaluate()["accuracy"]
    for _ in range(16):
        engine.round()
    after = engine.evaluate()
    # Ten classes: chance is 0.1. Central training of the same network reaches some 0.98.
    assert before < 0.4
    assert after["accuracy"] > 0.85
    assert after["accuracy_low"] < after["accuracy"] < after["accuracy_high"]
    assert engine.state.round == 16


def test_simulate_says_each_round_and_returns_the_last():
    said, described = [], task(2)
    outcome = simulate(method(4.0, 1), described, rounds=3, seed=5, each_round=said.append)
    assert [o.state.round for o in said] == [1, 2, 3]
    assert outcome is said[-1]
    again = simulate(method(4.0, 1), described, rounds=3, seed=5)
    assert torch.equal(again.state.params, outcome.state.params)
    assert not torch.equal(simulate(method(4.0, 1), described, rounds=3, seed=6).state.params, outcome.state.params)


def test_no_rounds_is_refused():
    with pytest.raises(ValueError, match="at least 1 round"):
        simulate(method(), task(2), rounds=0)


def test_the_initial_parameters_are_the_model_s():
    described = task(2)
    expected = torch.cat([p.detach().flatten() for p in described.make_model().parameters()])
    assert torch.equal(initial_params(described), expected)
