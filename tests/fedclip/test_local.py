"""Local training against torch's own SGD and gradient clipping."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from fedclip.local import LocalSGD
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
