"""A net with one linear layer that may be kept as products, and users of few rows who train it with and without."""

import numpy as np
import torch
from torch import nn

from fedclip import replica as module
from fedclip.local import LocalSGD
from fedclip.low_rank import LowRank, Products
from fedclip.replica import Replica

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
    monkeypatch.setattr(module, "WORTH", 1000)
    replica = Replica(task.make_model(), low_rank=products)
    start = replica.params.clone()
    kept = []
    moved = Products.moved
    monkeypatch.setattr(Products, "moved", lambda self: kept.append(self) or moved(self))
    replica.begin(start)
    (local or LocalSGD(0.3, epochs=1, batch_size=2)).train(replica, task, examples(count, task.shape), np.random.default_rng(0))
    update = replica.moved(start)
    assert not any(isinstance(p, LowRank) for p in replica.model.parameters())
    return update, len(kept), replica


def same(task, monkeypatch, kept, count=6, local=None):
    """Train with products and without: the same but for roundings; `kept`: whether the weight stays products to the end."""
    update, products, _ = trained(task, monkeypatch, count, products=True, local=local)
    expected, none, _ = trained(task, monkeypatch, count, products=False, local=local)
    assert (products, none) == (kept, 0)
    assert expected.vector.norm() > 0.05
    torch.testing.assert_close(update.vector, expected.vector, atol=2e-6, rtol=1e-4)
