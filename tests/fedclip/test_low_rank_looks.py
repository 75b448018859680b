"""Weights of linear layers as products: tasks that look at them, change them or ask for gradients get those of any weight."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedclip import replica as module
from fedclip.local import LocalSGD
from fedclip.replica import Replica
from tests.fedclip.few_rows import ENTERING, LEAVING, MOST, Net, Rows, examples, same, trained

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
    h = torch.tanh(model.first(x))
    with torch.autocast("cpu", torch.bfloat16):
        h = model.large(h)
    assert h.dtype == torch.bfloat16
    return made + h.float().sum() / 10


def decayed(model, x, made):
    with torch.no_grad():
        model.large.weight.mul_(0.9)
    return model.out(torch.tanh(model.large(torch.tanh(model.first(x)))))


def clamped(model, x, made):
    model.large.weight.data.clamp_(-0.1, 0.1)
    return model.out(torch.tanh(model.large(torch.tanh(model.first(x)))))


def loaded(model, x, made):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})
    return model.out(torch.tanh(model.large(torch.tanh(model.first(x)))))


LOOKS = [penalty, reading, data, state, listed, gathered, teacher, mapped, cast, decayed, clamped, loaded]


@pytest.mark.parametrize("first", [1, 2, 4])
@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_whoever_looks_at_the_weight_sees_it(look, first, monkeypatch):
    """From the first step on, or when steps have been taken."""

    def make():
        steps = itertools.count(1)
        return Net(also=lambda model, x, made: made if next(steps) < first else look(model, x, made))

    if look is teacher:  # it copies the model, and what counts with it
        return same(Rows(lambda: Net(also=look)), monkeypatch, kept=0, count=8)
    return same(Rows(make), monkeypatch, kept=0, count=8)


@pytest.mark.parametrize("call", [named, functional])
def test_a_linear_layer_by_any_name_is_one(call, monkeypatch):
    same(Rows(lambda: Net(also=call)), monkeypatch, kept=1, count=4)


class Rectified(Net):
    def forward(self, x):
        h = self.large(torch.tanh(self.first(x)))
        h += 1
        return self.out(F.relu(h, inplace=True))


@pytest.mark.parametrize("shape", [(5,), (2, 5)])
def test_what_the_layer_made_may_be_changed_in_place(shape, monkeypatch):
    same(Rows(Rectified, shape=shape), monkeypatch, kept=1, count=4)


def test_a_layer_may_be_asked_of_no_rows(monkeypatch):
    same(Rows(lambda: Net(also=lambda model, x, made: made + model.large(made.new_empty(0, 3, ENTERING)).sum())), monkeypatch, kept=1)


# Gradients of one's own


def attack(model, batch):
    x = batch.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().mean(), x)
    return model(batch + slope.sign()).square().mean()


def attack_through_inputs(model, batch):
    x = batch.clone().requires_grad_()
    model(x).square().mean().backward(inputs=[x])
    return model(batch + x.grad.sign()).square().mean()


def attack_through_all(model, batch):
    x = batch.clone().requires_grad_()
    model(x).square().mean().backward()
    model.zero_grad()
    return model(batch + x.grad.sign()).square().mean()


def saliency(model, batch):
    loss = model(batch).square().mean()
    (slope,) = torch.autograd.grad(loss, model.large.weight, retain_graph=True)
    return loss * (1 + slope.norm())


def added(model, batch):
    model(batch).square().mean().backward()
    return model(batch).square().mean()


def given(model, batch):
    model.large.weight.grad = torch.full((LEAVING, ENTERING), 0.01)
    return model(batch).square().mean()


@pytest.mark.parametrize("kept", [1, 0])
@pytest.mark.parametrize(
    "loss", [attack, attack_through_inputs, attack_through_all, saliency, added, given], ids=lambda loss: loss.__name__
)
def test_gradients_of_ones_own_are_as_everywhere(loss, kept, monkeypatch):
    """Whether rows last to the end or not."""
    settles = loss in (attack_through_all, saliency, given)
    same(Rows(loss=loss), monkeypatch, kept=int(kept and not settles), count=4 if kept else 3 * MOST)


def hooked(model):
    model.large.weight.register_hook(lambda gradient: 0.5 * gradient)


def hooked_at_the_end(model):
    def halve(parameter):
        parameter.grad.mul_(0.5)

    model.large.weight.register_post_accumulate_grad_hook(halve)


@pytest.mark.parametrize("hook", [hooked, hooked_at_the_end])
def test_a_weight_whose_gradients_somebody_hooks_is_an_ordinary_one(hook, monkeypatch):
    def make():
        model = Net()
        hook(model)
        return model

    same(Rows(make), monkeypatch, kept=0)


def test_a_frozen_weight_stays(monkeypatch):
    task = Rows(loss=lambda model, batch: (model.large.weight.requires_grad_(False), model(batch).square().mean())[1])
    same(task, monkeypatch, kept=0)
    update, _, replica = trained(task, monkeypatch, products=True)
    assert not replica.layout.split(update.vector)[replica.layout.names.index("large.weight")].any()
    start = replica.params.clone()
    replica.begin(start)
    LocalSGD(0.3, epochs=1, batch_size=2).train(replica, Rows(), examples(6), np.random.default_rng(0))
    assert not replica.layout.split(replica.moved(start).vector)[replica.layout.names.index("large.weight")].any()


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
    """What a compiler makes asks no parameter whether its values are there; this one calls what was traced, as such code does."""
    called = []

    def compiler(graph, inputs):
        def run(*given):
            called.append(graph)
            with torch._C.DisableTorchFunctionSubclass():
                return graph(*given)

        return run

    class Compiled(Net):
        def __init__(self):
            super().__init__()
            self.run = torch.compile(super().forward, backend=compiler)

        def forward(self, x):
            return self.run(x)

    expected, _, _ = trained(Rows(Compiled), monkeypatch, products=False)
    assert called
    update, _, _ = trained(Rows(Compiled), monkeypatch, products=True)
    torch.testing.assert_close(update.vector, expected.vector, atol=2e-7, rtol=2e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_model_with_a_part_in_torchscript_is_left(monkeypatch):
    class Scripted(Net):
        def __init__(self):
            super().__init__()
            self.fast = torch.jit.script(self.large)

    monkeypatch.setattr(module, "WORTH", 1)
    assert not Replica(Scripted(), low_rank=True)._products


def test_layers_that_are_more_than_linear_or_not_theirs_alone_are_left(monkeypatch):
    monkeypatch.setattr(module, "WORTH", 1)

    class Own(nn.Linear):
        def forward(self, x):
            return F.linear(x, 2 * self.weight, self.bias)

    frozen = nn.Linear(8, 8)
    frozen.weight.requires_grad_(False)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.Sequential(Own(8, 8), frozen, normed, nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    assert [q.parameter is model[4].weight for _, q in Replica(model, low_rank=True)._products] == [True]
    assert not Replica(nn.Linear(8, 8))._products
