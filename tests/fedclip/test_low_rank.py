"""Weights of linear layers as products: the steps of plain SGD, and nobody who looks at such a weight sees another one."""

import copy
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedclip import replica as module
from fedclip.layout import ROW
from fedclip.local import LocalSGD
from fedclip.low_rank import LowRank, Products
from fedclip.replica import Replica
from fedclip.update import layer_norms, quick_layer_norms

ENTERING, LEAVING = 48, 40
MOST = ENTERING * LEAVING // (2 * (ENTERING + LEAVING))  # 10 rows


class Net(nn.Module):
    """A linear layer between two that are too small; what it does with its weight besides is the case's."""

    def __init__(self, *, bias: bool = True, also=None):
        super().__init__()
        self.first, self.large, self.out = nn.Linear(5, ENTERING), nn.Linear(ENTERING, LEAVING, bias=bias), nn.Linear(LEAVING, 3)
        self.also = also

    def forward(self, x):
        made = self.out(torch.tanh(self.large(torch.tanh(self.first(x)))))
        return made if self.also is None else self.also(self, x, made)


class Rows:
    """A task of a few numbers; `loss` is the case's where it has one."""

    def __init__(self, net=Net, loss=None, shape=(5,)):
        self.net, self.shape = net, shape
        if loss is not None:
            self.loss = loss

    def make_model(self):
        torch.manual_seed(0)
        return self.net()

    def batches(self, examples, batch_size, rng):
        for start in range(0, len(examples), batch_size):
            yield torch.tensor(examples[start : start + batch_size])

    def loss(self, model, batch):
        return model(batch).square().mean()


def examples(count, shape=(5,)):
    return np.random.default_rng(0).standard_normal((count, *shape), dtype=np.float32)


def trained(task, monkeypatch, count=6, *, products, local=None):
    """Return what a user's training moves, and how many weights were still products at its end."""
    with monkeypatch.context() as patched:
        patched.setattr(module, "WORTH", 1000 if products else math.inf)
        replica = Replica(task.make_model())
    start = replica.params.clone()
    kept = []
    moved = Products.moved
    monkeypatch.setattr(Products, "moved", lambda self: kept.append(self) or moved(self))
    replica.begin(start)
    (local or LocalSGD(0.3, epochs=1, batch_size=2)).train(replica, task, examples(count, task.shape), np.random.default_rng(0))
    update = replica.moved(start)
    assert not any(isinstance(p, LowRank) for p in replica.model.parameters()) or len(replica._products) > len(kept)
    return update, len(kept), replica


def same(task, monkeypatch, kept, count=6, local=None):
    """Train with products and without: the same but for roundings; `kept`: whether the weight stays products to the end."""
    update, products, _ = trained(task, monkeypatch, count, products=True, local=local)
    expected, none, _ = trained(task, monkeypatch, count, products=False, local=local)
    assert (products, none) == (kept, 0)
    assert expected.vector.norm() > 0.05
    torch.testing.assert_close(update.vector, expected.vector, atol=2e-7, rtol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_steps_are_those_of_plain_sgd(bias, shape, monkeypatch):
    same(Rows(lambda: Net(bias=bias), shape=shape), monkeypatch, kept=1, count=10 if shape == (5,) else 5)


def test_a_layer_that_is_used_twice_and_a_batch_in_pieces_add_up(monkeypatch):
    twice = Rows(loss=lambda model, batch: model(batch).square().mean() + model(2 * batch).square().mean())
    same(twice, monkeypatch, kept=1, count=4)
    same(Rows(), monkeypatch, kept=1, count=8, local=LocalSGD(0.3, epochs=1, batch_size=4, micro_batch=3))


@pytest.mark.parametrize("count", [MOST + 1, MOST + 2, 3 * MOST])
@pytest.mark.parametrize("calls", [1, 2])
def test_more_rows_than_pay_are_taken_as_ever(count, calls, monkeypatch):
    """Whether the rows of a step or those of the second call in it are too many."""
    task = Rows(loss=lambda model, batch: sum(model(batch + n).square().mean() for n in range(calls)))
    same(task, monkeypatch, kept=0, count=count)
    same(task, monkeypatch, kept=0, count=count, local=LocalSGD(0.3, epochs=1, batch_size=3))


def test_no_rows_and_no_steps_move_nothing(monkeypatch):
    update, kept, _ = trained(Rows(), monkeypatch, 0, products=True)
    assert kept == 1
    assert not update.vector.any()


# Whoever looks


def penalty(model, x, made):
    return made + 0.1 * model.large.weight.square().sum()


def reading(model, x, made):
    with torch.no_grad():
        size = model.large.weight.norm()
    return made * size


def data(model, x, made):
    return made * float(model.large.weight.data.abs().sum()) / 50


def state(model, x, made):
    return made * model.state_dict()["large.weight"].abs().sum() / 50


def listed(model, x, made):
    return made * torch.stack([p.detach().norm() for p in model.parameters()]).sum() / 10


def gathered(model, x, made):
    return made * torch.cat([model.out.weight.flatten(), model.large.weight.flatten()]).square().sum() / 10


def teacher(model, x, made):
    twin = copy.deepcopy(model)
    twin.also = None
    return made - 2 * twin(x).detach()


def named(model, x, made):
    return made + F.linear(input=torch.tanh(model.first(x)), weight=model.large.weight).sum()


def functional(model, x, made):
    plain = copy.copy(model)
    plain.also = None
    return made + torch.func.functional_call(plain, dict(plain.named_parameters()), (2 * x,))


def mapped(model, x, made):
    return made + torch.func.vmap(lambda row: torch.tanh(model.large(torch.tanh(model.first(row)))))(x).sum()


def cast(model, x, made):
    with torch.autocast("cpu", torch.bfloat16):
        return made + model.large(torch.tanh(model.first(x))).float().sum()


LOOKS = [penalty, reading, data, state, listed, gathered, teacher, functional, mapped, cast]


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_whoever_looks_at_the_weight_sees_it(look, monkeypatch):
    same(Rows(lambda: Net(also=look)), monkeypatch, kept=0, count=8)


@pytest.mark.parametrize("look", [named])
def test_a_linear_layer_by_any_name_is_one(look, monkeypatch):
    same(Rows(lambda: Net(also=look)), monkeypatch, kept=1, count=4)


def test_its_form_may_be_asked_for(monkeypatch):
    def form(model, x, made):
        weight = model.large.weight
        assert (weight.shape, weight.ndim, weight.dtype, weight.device.type) == ((LEAVING, ENTERING), 2, torch.float32, "cpu")
        assert isinstance(weight, nn.Parameter)
        assert weight.requires_grad
        assert weight.grad is None
        assert sum(p.numel() for p in model.parameters()) == (5 + 1) * ENTERING + (ENTERING + 1) * LEAVING + (LEAVING + 1) * 3
        return made

    same(Rows(lambda: Net(also=form)), monkeypatch, kept=1)


def test_a_gradient_may_be_differentiated_again(monkeypatch):
    def loss(model, batch):
        x = batch.clone().requires_grad_()
        made = model(x)
        (slope,) = torch.autograd.grad(made.sum(), x, create_graph=True)
        return made.square().mean() + slope.square().mean()

    same(Rows(loss=loss), monkeypatch, kept=0)


@pytest.mark.parametrize("also", [None, penalty])
def test_activations_may_be_made_again(also, monkeypatch):
    """Where the weight is looked at after the layer has run, what runs again for the backward pass must still save the same."""

    class Again(Net):
        def forward(self, x):
            made = self.out(checkpoint(lambda h: torch.tanh(self.large(torch.tanh(self.first(h)))), x, use_reentrant=False))
            return made if also is None else also(self, x, made)

    same(Rows(Again), monkeypatch, kept=int(also is None))


def test_compiled_models_train(monkeypatch):
    """What `torch.compile` traces goes by other ways than eager code; `eager` as its backend needs no compiler."""

    class Compiled(Net):
        def __init__(self):
            super().__init__()
            self.run = torch.compile(super().forward, backend="eager")

        def forward(self, x):
            return self.run(x)

    update, _, _ = trained(Rows(Compiled), monkeypatch, products=True)
    expected, _, _ = trained(Rows(Compiled), monkeypatch, products=False)
    torch.testing.assert_close(update.vector, expected.vector, atol=2e-7, rtol=2e-5)


def test_layers_that_are_more_than_linear_or_not_theirs_alone_are_left(monkeypatch):
    monkeypatch.setattr(module, "WORTH", 1)

    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight, self.bias)

    frozen = nn.Linear(8, 8)
    frozen.weight.requires_grad_(False)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(Own(8, 8), frozen, normed, nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    assert [q.parameter is model[4].weight for _, q in Replica(model)._products] == [True]


def test_nothing_is_left_of_one_user_for_the_next(monkeypatch):
    """Whether the one before ended as products, in the middle of a step, or was loaded to be measured."""
    first, _, replica = trained(Rows(), monkeypatch, products=True)
    first, start = first.vector.clone(), Replica(Rows().make_model()).params

    def broken(model, batch):
        model(batch).sum().backward()
        raise OSError

    local = LocalSGD(0.3, epochs=1, batch_size=2)
    for task, count in ((Rows(loss=broken), 4), (Rows(lambda: Net(also=penalty)), 4), (Rows(), 3 * MOST)):
        replica.begin(start)
        with suppress(OSError):
            local.train(replica, task, examples(count), np.random.default_rng(0))
        replica.begin(start)
        local.train(replica, Rows(), examples(6), np.random.default_rng(0))
        assert torch.equal(replica.moved(start).vector, first)
    replica.begin(start)
    replica.load(start)
    local.train(replica, Rows(), examples(6), np.random.default_rng(0))
    torch.testing.assert_close(start - replica.values(), first, atol=2e-7, rtol=2e-5)


@pytest.mark.parametrize("local", [{"clip_norm": 1.0}, {"momentum": 0.5}, {"optimizer": "adamw"}, {"weight_decay": 0.1}, {"accumulate": 2}])
def test_other_steps_than_plain_ones_have_the_bits_of_a_load(local, monkeypatch):
    local = LocalSGD(0.05, epochs=1, batch_size=2, **local)
    update, kept, _ = trained(Rows(), monkeypatch, products=True, local=local)
    expected, _, _ = trained(Rows(), monkeypatch, products=False, local=local)
    assert kept == 0
    assert torch.equal(update.vector, expected.vector)


def test_what_moved_is_measured(monkeypatch):
    update, kept, replica = trained(Rows(), monkeypatch, products=True)
    assert kept == 1
    rows = update.vector[: len(update.vector) // ROW * ROW].view(-1, ROW).double().square().sum(1)
    torch.testing.assert_close(torch.from_numpy(update.energies).double(), rows, rtol=1e-5, atol=0)
    assert quick_layer_norms(update, replica.layout) == pytest.approx(layer_norms(update, replica.layout), rel=8e-6)
