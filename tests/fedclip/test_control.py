"""SCAFFOLD against the paper's Algorithm 1 in NumPy, which sends both vectors; what it is for; and what stays true under clip and noise."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedclip.client import train_blocks
from fedclip.local import LocalSGD
from fedclip.method import ServerState
from fedclip.release import Gaussian
from fedclip.replica import Replica
from fedclip.round import begin, finish
from fedclip.sampling import FixedSize, Poisson
from fedclip.simulation import initial_params
from fedclip.site import Site
from fedclip.user_states import Forecast, StatesInMemory
from strategies.recipes import fedavg, scaffold, stages

USERS, SIZE = 6, 4
RNG = np.random.default_rng(5)
CURVATURE = RNG.uniform(0.2, 2.0, size=(USERS, SIZE))
CENTRE = RNG.normal(size=(USERS, SIZE)) * 2
BEST = (CURVATURE * CENTRE).sum(0) / CURVATURE.sum(0)
"""Where the mean of the users' losses `sum a (w - b)^2 / 2` is least."""


class Quadratics:
    """User i has the loss `sum_j a_ij (w_j - b_ij)^2 / 2`, which differs from user to user in centre and curvature."""

    users, held_out_units = USERS, 1

    def make_model(self):
        model = nn.Linear(SIZE, 1, bias=False)
        nn.init.constant_(model.weight, 0.5)
        return model

    def load_user(self, user, rng):
        return [user]

    def cost(self, user):
        return 1.0

    def batches(self, examples, batch_size, rng):
        yield examples[0]

    def loss(self, model, batch):
        a, b = torch.from_numpy(CURVATURE[batch]).float(), torch.from_numpy(CENTRE[batch]).float()
        return (a * (model.weight[0] - b).square()).sum() / 2


def local(steps=10, lr=0.1):
    return LocalSGD(lr=lr, steps=steps)


def rounds_of(method, rounds):
    """The state, the cohort and the users' control variates after each round."""
    task, states = Quadratics(), StatesInMemory()
    site = Site(task, Replica(task.make_model()))
    layout, seen = site.replica.layout, []
    state = ServerState.initial(initial_params(task), method, layout)
    for round in range(1, rounds + 1):
        plan = begin(method, state, layout, "s", "run")
        outcome = finish(method, state, layout, plan, [train_blocks(site, plan.spec, plan.blocks, states)])
        state = outcome.state
        kept = [states.load(user, round + 1, method.user_state(layout)) for user in range(USERS)]
        seen.append((state, [u for _, users in plan.blocks for u in users], kept, outcome.tally))
    return seen


def algorithm_1(cohorts, steps, lr, server_lr):
    """arXiv 1910.06378, Algorithm 1 with option II, in float64: each user sends what it moved and what its control variate moved."""
    x, c, own = np.full(SIZE, 0.5), np.zeros(SIZE), np.zeros((USERS, SIZE))
    for cohort in cohorts:
        moves, controls = [], []
        for i in cohort:
            y = x.copy()
            for _ in range(steps):
                y = y - lr * (CURVATURE[i] * (y - CENTRE[i]) - own[i] + c)
            after = own[i] - c + (x - y) / (steps * lr)
            moves.append(y - x)
            controls.append(after - own[i])
            own[i] = after
        if cohort:
            x = x + server_lr * np.mean(moves, axis=0)
            c = c + len(cohort) / USERS * np.mean(controls, axis=0)
        yield x, c, own.copy()


@pytest.mark.parametrize("sampler", [FixedSize(USERS, 3), FixedSize(USERS, USERS), Poisson(USERS, 2.0)], ids=["three", "all", "coins"])
def test_it_is_the_papers_algorithm(sampler):
    seen = rounds_of(scaffold(sampler=sampler, local=local(), server_lr=0.7), 12)
    cohorts = [cohort for _, cohort, _, _ in seen]
    if isinstance(sampler, Poisson):
        assert {len(c) for c in cohorts} > {1, 3}, "cohorts of many sizes"
    for (state, _, kept, _), (x, c, own) in zip(seen, algorithm_1(cohorts, 10, 0.1, 0.7), strict=True):
        np.testing.assert_allclose(state.params, x, atol=2e-5)
        np.testing.assert_allclose(state.control, c, atol=2e-5)
        np.testing.assert_allclose(torch.stack([k[1] for k in kept]), own, atol=2e-5)


def test_it_finds_the_optimum_that_many_local_steps_of_fedavg_miss():
    everyone = FixedSize(USERS, USERS)
    far = {}
    for recipe in (fedavg, scaffold):
        state = rounds_of(recipe(sampler=everyone, local=local(steps=20)), 30)[-1][0]
        far[recipe] = float(np.linalg.norm(state.params.numpy() - BEST))
    assert far[fedavg] > 0.3, "users of unlike curvature pull the mean of their own optima away from the optimum of the mean"
    assert far[scaffold] < 2e-3


@pytest.mark.parametrize("client", [[{"clip_by_global_norm": {"max_norm": 0.3}}], [{"clip_per_layer": {"max_norm": 0.3}}, {"sign": {}}]])
def test_where_less_is_sent_both_sides_go_by_what_was_sent(client):
    """The server's control variate stays the mean of those of all users, whatever a clip or rounding takes off."""
    method = stages(sampler=Poisson(USERS, 3.0), local=local(), client=client, server=[{"sgd": {"lr": 1.0}}], control=True)
    clipped = 0.0
    for state, cohort, kept, tally in rounds_of(dataclasses.replace(method, release=fedavg_release()), 15):
        own = torch.stack([k[1] for k in kept])
        torch.testing.assert_close(state.control, own.mean(0), atol=1e-5, rtol=1e-5)
        clipped += tally.get("chain.clipped", 0.0)
        assert clipped or not cohort
    assert clipped > 10
    assert own.abs().max() > 0.01


def fedavg_release():
    return fedavg(sampler=Poisson(USERS, 3.0), local=local()).release


def test_under_noise_the_server_sees_what_was_released_and_no_more():
    """The next c follows from the released mean, the expected cohort and the c before; nothing else of the users is in it."""
    method = scaffold(sampler=Poisson(USERS, 3.0), local=local(steps=10, lr=0.1), mechanism=Gaussian(1.0), max_norm=0.3)
    task, states = Quadratics(), StatesInMemory()
    site = Site(task, Replica(task.make_model()))
    layout = site.replica.layout
    state = dataclasses.replace(ServerState.initial(initial_params(task), method, layout), control=torch.arange(4.0))
    plan = begin(method, state, layout, "s", "run")
    after = finish(method, state, layout, plan, [train_blocks(site, plan.spec, plan.blocks, states)]).state
    released = state.params - after.params  # of a server step of one
    torch.testing.assert_close(after.control, 0.5 * torch.arange(4.0) + 0.5 * released, atol=1e-6, rtol=1e-5)  # S/N is 3/6, K lr is 1
    assert method.bound(layout).total == 0.3, "one user moves the sum by the clip alone"


def test_bytes_go_up_once_and_down_twice():
    ways = []
    for recipe in (fedavg, scaffold):
        _, cohort, _, tally = rounds_of(recipe(sampler=FixedSize(USERS, 3), local=local()), 1)[0]
        ways.append((tally["uplink_bytes"] / len(cohort), tally["downlink_bytes"] / len(cohort)))
    assert ways[1] == (ways[0][0], 2 * ways[0][1])


def test_what_is_kept_of_users_is_forecast_and_refused_where_users_depend_on_each_other():
    given = {"local": local(), "mechanism": Gaussian(1.0), "max_norm": 0.3}
    method = scaffold(sampler=Poisson(USERS, 3.0), **given)
    assert Forecast.of(method, Replica(Quadratics().make_model()).layout, 10).each == 4 * SIZE
    assert not dataclasses.replace(method, control=False).stateful
    for sampler in (FixedSize(USERS, 3), Poisson(USERS, 3.0, max_cohort=4)):
        with pytest.raises(ValueError, match=r"control variates keeps a state.*a coin of its own"):
            scaffold(sampler=sampler, **given)
    site = Site(Quadratics(), Replica(Quadratics().make_model()))
    state = ServerState.initial(initial_params(site.task), method, site.replica.layout)
    with pytest.raises(ValueError, match="control variate keeps a state"):
        train_blocks(site, begin(method, state, site.replica.layout, "s", "run").spec, [])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"momentum": 0.5}, "plain SGD"),
        ({"optimizer": "adamw"}, "plain SGD"),
        ({"optimizer": "lamb", "betas": (0.0, 0.9)}, "plain SGD"),
        ({"steps": None, "epochs": 2}, "same number of local steps"),
        ({"precision": "float16"}, "every local step"),
    ],
)
def test_local_training_that_does_not_fit_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        scaffold(sampler=Poisson(USERS, 3.0), local=dataclasses.replace(local(), **wrong))


def test_weights_by_examples_are_refused():
    with pytest.raises(ValueError, match="uniform weights"):
        dataclasses.replace(scaffold(sampler=Poisson(USERS, 3.0), local=local()), weighting="examples")
    assert math.isinf(scaffold(sampler=Poisson(USERS, 3.0), local=local()).bound(Replica(Quadratics().make_model()).layout).total)
