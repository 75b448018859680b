"""Local training against torch's own optimizers and gradient clipping, slow oracles, and the whole batch."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedclip.local import LocalSGD, pieces
from fedclip.replica import Replica


class Squares:
    """A task of single numbers; its batches are shuffled by the stream."""

    def make_model(self):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))

    def batches(self, examples, batch_size, rng):
        order = rng.permutation(len(examples))
        for start in range(0, len(order), batch_size):
            yield torch.tensor([[examples[i]] for i in order[start : start + batch_size]])

    def loss(self, model, batch):
        return (model(batch) - 3 * batch).square().mean()


TASK, EXAMPLES = Squares(), [-1.0, 0.5, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_training_is_torchs_sgd(momentum, clip_norm):
    local = LocalSGD(lr=0.05, steps=7, batch_size=2, clip_norm=clip_norm, momentum=momentum)
    replica, reference = Replica(TASK.make_model()), copy.deepcopy(TASK.make_model())
    loss = local.train(replica, TASK, EXAMPLES, np.random.default_rng(3))
    optimizer, losses = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=momentum), []
    for batch in local.batches(TASK, EXAMPLES, np.random.default_rng(3)):
        optimizer.zero_grad()
        value = TASK.loss(reference, batch)
        value.backward()
        if clip_norm:
            nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
        optimizer.step()
        losses.append(value.item())
    expected = torch.cat([p.detach().flatten() for p in reference.parameters()])
    torch.testing.assert_close(replica.params, expected, atol=1e-6, rtol=1e-6)
    assert len(losses) == 7
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize(("steps", "epochs", "sizes"), [(1, None, [2]), (5, None, [2, 2, 1, 2, 2]), (None, 2, [2, 2, 1, 2, 2, 1])])
def test_steps_repeat_epochs_and_epochs_are_whole(steps, epochs, sizes):
    local = LocalSGD(lr=0.1, steps=steps, epochs=epochs, batch_size=2)
    batches = list(local.batches(TASK, EXAMPLES, np.random.default_rng(0)))
    assert [len(b) for b in batches] == sizes
    assert sorted(float(x) for b in batches[:3] for x in b) == sorted(EXAMPLES) or steps == 1


def test_data_without_a_batch_ends_and_changes_nothing():
    replica = Replica(TASK.make_model())
    before = replica.params.clone()
    assert math.isnan(LocalSGD(lr=0.1, steps=3).train(replica, TASK, [], np.random.default_rng(0)))
    assert torch.equal(replica.params, before)


def test_momentum_starts_anew_for_each_user():
    local = LocalSGD(lr=0.05, steps=3, momentum=0.9)
    replica = Replica(TASK.make_model())
    start, ends = replica.params.clone(), []
    for _ in range(2):
        replica.load(start)
        local.train(replica, TASK, EXAMPLES, np.random.default_rng(3))
        ends.append(replica.params.clone())
    assert torch.equal(*ends)


@pytest.mark.parametrize("both", [{}, {"steps": 1, "epochs": 1}])
def test_either_steps_or_epochs(both):
    with pytest.raises(ValueError, match="either steps or epochs"):
        LocalSGD(lr=0.1, **both)


def trained(local, task=TASK, correction=None, replica=None):
    """Parameters after training, and the loss."""
    replica = replica or Replica(task.make_model())
    loss = local.train(replica, task, EXAMPLES, np.random.default_rng(3), correction)
    return replica.params.clone(), loss


def by_hand(local, step):
    """Parameters after `step(model, gradients as tensors)` on each of the batches."""
    reference = TASK.make_model()
    for batch in local.batches(TASK, EXAMPLES, np.random.default_rng(3)):
        reference.zero_grad()
        TASK.loss(reference, batch).backward()
        with torch.no_grad():
            step(list(reference.parameters()))
    return torch.cat([p.detach().flatten() for p in reference.parameters()])


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_adamw_has_the_bits_of_torchs(clip_norm):
    local = LocalSGD(0.05, 7, batch_size=2, clip_norm=clip_norm, optimizer="adamw", betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
    replica = Replica(TASK.make_model())
    expected = torch.nn.Parameter(replica.params.clone())
    torchs, start = torch.optim.AdamW([expected], lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1), replica.params.clone()
    for batch in local.batches(TASK, EXAMPLES, np.random.default_rng(3)):
        replica.load(expected.detach())
        replica.grads.zero_()
        TASK.loss(replica.model, batch).backward()
        expected.grad = replica.grads.clone()
        if clip_norm:
            nn.utils.clip_grad_norm_([expected], clip_norm)
        torchs.step()
    replica.load(start)
    assert torch.equal(trained(local, replica=replica)[0], expected.detach())


def test_lamb_is_the_slow_one():
    """arXiv 1904.00962, Algorithm 2, in float64, a tensor at a time; the last tensor begins at zero, where its ratio is 1."""
    b1, b2, eps, decay, lr = 0.8, 0.95, 1e-3, 0.1, 0.05
    local = LocalSGD(lr, 7, batch_size=2, optimizer="lamb", betas=(b1, b2), eps=eps, weight_decay=decay)
    start = Replica(TASK.make_model())
    start.params[-1] = 0.0
    moments = {}

    def step(parameters):
        for n, p in enumerate(parameters):
            t, m, v = moments.get(n, (0, 0.0, 0.0))
            g, w = p.grad.double().numpy(), p.double().numpy()
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            moments[n] = (t + 1, m, v)
            u = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps) + decay * w
            size, length = np.linalg.norm(w), np.linalg.norm(u)
            p.copy_(torch.from_numpy(w - lr * (size / length if size and length else 1.0) * u))

    reference = Squares()
    reference.make_model = lambda: _with(TASK.make_model(), start.params)
    expected = reference.make_model()
    for batch in local.batches(TASK, EXAMPLES, np.random.default_rng(3)):
        expected.zero_grad()
        TASK.loss(expected, batch).backward()
        with torch.no_grad():
            step(list(expected.parameters()))
    torch.testing.assert_close(trained(local, reference)[0], torch.cat([p.detach().flatten() for p in expected.parameters()]))


def _with(model, params):
    nn.utils.vector_to_parameters(params.clone(), model.parameters())
    return model


def test_fedprox_decay_and_a_correction_are_added_after_the_clip():
    """`w <- w - lr (clip(g) + decay w + mu (w - w_round) + correction)`."""
    local = LocalSGD(0.1, 6, batch_size=2, clip_norm=0.5, weight_decay=0.02, proximal=0.7)
    start = Replica(TASK.make_model()).params
    correction = torch.linspace(-1, 1, start.numel())
    sizes = [p.numel() for p in TASK.make_model().parameters()]

    def step(parameters):
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p, w, c in zip(parameters, start.split(sizes), correction.split(sizes), strict=True):
            g = p.grad * min(1.0, 0.5 / norm.item())
            p.sub_(0.1 * (g + 0.02 * p + 0.7 * (p - w.view_as(p)) + c.view_as(p)))

    torch.testing.assert_close(trained(local, correction=correction)[0], by_hand(local, step), atol=1e-5, rtol=1e-5)


def test_a_strong_proximal_term_holds_the_parameters_near_the_round():
    moved = [(trained(LocalSGD(0.05, 50, proximal=mu))[0] - Replica(TASK.make_model()).params).norm() for mu in (0.0, 1.0, 10.0)]
    assert moved[0] > 1.3 * moved[1] > 2 * moved[2]


class Watched(Squares):
    """Counts the examples that go through the model at once."""

    def __init__(self):
        self.seen = []

    def loss(self, model, batch):
        self.seen.append(len(batch))
        return super().loss(model, batch)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_micro_batches_are_the_batch(optimizer, most):
    whole = LocalSGD(0.05, 6, batch_size=5, clip_norm=0.5, optimizer=optimizer)
    watched = Watched()
    cut = trained(dataclasses.replace(whole, micro_batch=most), watched)
    assert max(watched.seen) == min(most, 5)
    assert sum(watched.seen) == 6 * 5
    torch.testing.assert_close(cut, trained(whole), atol=1e-6, rtol=1e-5)


def test_accumulated_batches_are_one_large_batch():
    """Five batches of one example each, averaged, are the batch of all five; so many batches more are taken."""
    one = trained(LocalSGD(0.05, 4, batch_size=1, clip_norm=0.5, momentum=0.5, accumulate=5))
    torch.testing.assert_close(one, trained(LocalSGD(0.05, 4, batch_size=5, clip_norm=0.5, momentum=0.5)), atol=1e-6, rtol=1e-5)


def test_the_last_step_of_an_epoch_is_the_mean_of_what_is_left():
    """Batches of 2, 2 and 1 examples, two in a step: one step of the mean of two, one step of the last alone."""
    local = LocalSGD(0.05, epochs=1, batch_size=2, accumulate=2)
    gradients = []

    def step(parameters):
        gradients.append([p.grad.clone() for p in parameters])
        if len(gradients) == 1:
            return
        for n, p in enumerate(parameters):
            p.sub_(0.05 * (gradients[-1][n] if len(gradients) == 3 else (gradients[0][n] + gradients[1][n]) / 2))

    torch.testing.assert_close(trained(local)[0], by_hand(local, step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_is_near_and_is_used(precision):
    task, seen = Squares(), []
    task.loss = lambda model, batch: seen.append(model[0](batch).dtype) or (model(batch).float() - 3 * batch).square().mean()
    near, loss = trained(LocalSGD(0.05, 7, precision=precision), task)
    exact, expected = trained(LocalSGD(0.05, 7))
    assert set(seen) == {getattr(torch, precision)}
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, atol=0.05, rtol=0.05)
    assert loss == pytest.approx(expected, rel=0.05)


class Numbered(Squares):
    """One batch after another, each with its number; the gradient of one of them is infinite, or it is not there."""

    def __init__(self, infinite=None, missing=None):
        self.infinite, self.missing, self.passes = infinite, missing, 0

    def batches(self, examples, batch_size, rng):
        yield from ((n, torch.tensor([[x]])) for n, x in enumerate(examples) if n != self.missing)

    def loss(self, model, batch):
        self.passes += 1
        value = (model(batch[1]).float() - 3 * batch[1]).square().mean()
        return value * math.inf if batch[0] == self.infinite else value


def test_a_float16_batch_that_overflows_is_taken_again_and_left_out_if_it_does_unscaled():
    local = LocalSGD(0.01, epochs=1, precision="float16")
    infinite, missing = Numbered(infinite=2), Numbered(missing=2)
    (end, loss), (expected, _) = trained(local, infinite), trained(local, missing)
    assert infinite.passes > 5 + 10, "a batch is tried at smaller and smaller scales"
    assert missing.passes > 4, "the first scale is too large for this loss"
    torch.testing.assert_close(end, expected, atol=2e-4, rtol=2e-3)
    assert loss == math.inf


def test_a_float16_batch_that_is_left_out_costs_the_others_no_scale():
    """Gradients of 1e-7 are under half of float16's least number: unscaled they would be zeros, or off by as much as they are."""

    class Faint(Numbered):
        def loss(self, model, batch):
            return super().loss(model, batch) * 1e-7

    local = LocalSGD(1e4, epochs=1, precision="float16")
    (end, _), (expected, _) = trained(local, Faint(infinite=0)), trained(local, Faint(missing=0))
    torch.testing.assert_close(end, expected, atol=1e-5, rtol=1e-3)


def test_nothing_is_left_of_one_user_for_the_next():
    """The buffers are the same, the state is not: with every option on, the second user trains as if it were the first."""
    local = LocalSGD(0.05, 5, batch_size=2, optimizer="adamw", proximal=0.1, accumulate=2, micro_batch=1, precision="float16")
    replica = Replica(TASK.make_model())
    start, ends = replica.params.clone(), []
    for _ in range(2):
        replica.load(start)
        ends.append(trained(local, replica=replica)[0])
        pointers = {name: replica.scratch(name).data_ptr() for name in ("first", "second", "root", "start", "moved")}
    assert torch.equal(*ends)
    replica.load(start)
    trained(local, replica=replica)
    assert pointers == {name: replica.scratch(name).data_ptr() for name in pointers}


def test_batches_are_cut_by_the_task_or_along_the_first_dimension():
    x, y = torch.arange(5), torch.arange(10).view(5, 2)
    assert [(a.tolist(), len(b), part) for (a, b), part in pieces(TASK, (x, y), 2)] == [([0, 1], 2, 0.4), ([2, 3], 2, 0.4), ([4], 1, 0.2)]
    task = Squares()
    task.split = lambda batch, most: [("first", 3), ("second", 1)]
    assert pieces(task, {"any": "thing"}, 2) == [("first", 0.75), ("second", 0.25)]
    for batch in ({"x": x}, (x, torch.ones(4)), (x, torch.ones(()))):
        with pytest.raises(TypeError, match="split"):
            pieces(TASK, batch, 2)


@pytest.mark.parametrize("wrong", [{"optimizer": "adamw", "momentum": 0.5}, {"betas": (0.5, 0.5)}, {"eps": 1e-3}])
def test_numbers_of_another_optimizer_are_refused(wrong):
    with pytest.raises(ValueError, match="local optimizer"):
        LocalSGD(lr=0.1, steps=1, **wrong)


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_plain_steps_have_the_bits_of_those_with_flat_gradients(micro_batch, monkeypatch):
    local, trained = LocalSGD(lr=0.1, epochs=2, batch_size=2, micro_batch=micro_batch), []
    for plain in (True, False, True):
        if not plain:
            monkeypatch.setattr(LocalSGD, "_is_plain", False)
        replica = Replica(TASK.make_model())
        local.train(replica, TASK, EXAMPLES, np.random.default_rng(3))
        assert replica.flat_gradients is not plain
        monkeypatch.undo()
        # And back: one with a bound on the gradient takes the same replica after it.
        LocalSGD(lr=0.1, epochs=1, batch_size=2, clip_norm=1e9).train(replica, TASK, EXAMPLES, np.random.default_rng(4))
        assert replica.flat_gradients
        trained.append(replica.params.clone())
    assert torch.equal(trained[0], trained[1])
    assert torch.equal(trained[0], trained[2])
