"""Weights of linear layers as products: the steps of plain SGD, and nothing left of one user for the next."""

from contextlib import suppress

import numpy as np
import pytest
import torch

from experiments.contestants.task import experiment_of
from experiments.prepare import prepare
from fedclip import low_rank
from fedclip import replica as module
from fedclip.client import train_blocks
from fedclip.layout import ROW, Layout
from fedclip.local import LocalSGD
from fedclip.low_rank import Products
from fedclip.method import ServerState
from fedclip.replica import Replica
from fedclip.round import begin
from fedclip.simulation import initial_params
from fedclip.site import Site
from fedclip.update import layer_norms, quick_layer_norms
from tests.fedclip.few_rows import ENTERING, MOST, Net, Rows, examples, same, trained


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


def test_nothing_is_left_of_one_user_for_the_next(monkeypatch):
    """Whether the one before ended as products, in the middle of a step, or was loaded to be measured."""
    first, _, replica = trained(Rows(), monkeypatch, products=True)
    first, start = first.vector.clone(), Replica(Rows().make_model()).params

    def broken(model, batch):
        model(batch).sum().backward()
        raise OSError

    local = LocalSGD(0.3, epochs=1, batch_size=2)
    penalised = Rows(loss=lambda model, batch: model(batch).square().mean() + model.large.weight.square().sum())
    for task, count in ((Rows(loss=broken), 4), (penalised, 4), (Rows(), 3 * MOST)):
        replica.begin(start)
        with suppress(OSError):
            local.train(replica, task, examples(count), np.random.default_rng(0))
        replica.begin(start)
        local.train(replica, Rows(), examples(6), np.random.default_rng(0))
        assert torch.equal(replica.moved(start).vector, first)
    replica.begin(start)
    replica.load(start + 1)
    assert torch.equal(replica.values(), start + 1)
    replica.begin(start)
    replica.load(start)
    local.train(replica, Rows(), examples(6), np.random.default_rng(0))
    torch.testing.assert_close(start - replica.values(), first, atol=2e-7, rtol=2e-5)


def test_a_gradient_without_its_step_is_forgotten(monkeypatch):
    monkeypatch.setattr(module, "WORTH", 1000)
    moved = []
    for before in (1.0, 2.0):
        replica = Replica(Net(), low_rank=True)
        replica.flat_gradients = False
        start = torch.linspace(-0.1, 0.1, replica.layout.size)
        replica.begin(start)
        for x in (before, 3.0):
            replica.clear_gradients()
            replica.backward(replica.model(torch.full((2, 5), x)).square().mean())
        replica.descend(0.1)
        assert [products.kept for _, products in replica._products] == [True]
        moved.append(replica.moved(start).vector)
    assert moved[0].any()
    assert torch.equal(*moved)


@pytest.mark.parametrize("local", [{"clip_norm": 1.0}, {"momentum": 0.5}, {"optimizer": "adamw"}, {"weight_decay": 0.1}, {"accumulate": 2}])
def test_other_steps_than_plain_ones_have_the_bits_of_a_load(local, monkeypatch):
    local = LocalSGD(0.05, epochs=1, batch_size=2, **local)
    update, kept, _ = trained(Rows(), monkeypatch, products=True, local=local)
    expected, _, _ = trained(Rows(), monkeypatch, products=False, local=local)
    assert kept == 0
    assert torch.equal(update.vector, expected.vector)


@pytest.mark.parametrize("chunk", [1 << 18, 7 * ENTERING, 1])
def test_what_moved_is_measured(chunk, monkeypatch):
    monkeypatch.setattr(low_rank, "CHUNK", chunk)
    update, kept, replica = trained(Rows(), monkeypatch, products=True)
    assert kept == 1
    rows = update.vector[: len(update.vector) // ROW * ROW].view(-1, ROW).double().square().sum(1)
    torch.testing.assert_close(torch.from_numpy(update.energies).double(), rows, rtol=1e-5, atol=0)
    assert quick_layer_norms(update, replica.layout) == pytest.approx(layer_norms(update, replica.layout), rel=8e-6)


def test_a_users_bits_are_the_same_in_any_company(monkeypatch):
    """Whoever comes before it, and in which of the models of a group it is trained."""
    monkeypatch.setattr(module, "WORTH", 1000)
    prepared = prepare(experiment_of("mlp", 6, 100, 1, "cpu", "process", "sums"))
    state = ServerState.initial(initial_params(prepared.task), prepared.method, Layout.of(prepared.task.make_model()))
    plan = begin(prepared.method, state, Layout.of(prepared.task.make_model()), "secret", "run")
    kept, moved = [], Products.moved
    monkeypatch.setattr(Products, "moved", lambda self: kept.append(self) or moved(self))

    def sums(group, blocks):
        site = Site(prepared.task, Replica.of(prepared.task), group)
        return train_blocks(site, plan.spec, blocks).total

    alone = sum(sums(1, [block]) for block in plan.blocks)
    assert len(kept) == 2 * 6, "both layers of each"
    assert np.array_equal(sums(1, plan.blocks), alone)
    assert np.array_equal(sums(4, plan.blocks[::-1]), alone)
