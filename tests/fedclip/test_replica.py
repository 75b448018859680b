"""`Replica`: parameters and gradients are views of two flat buffers, and a reset forgets a user."""

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedclip import replica as module
from fedclip.replica import WORTH_TURNING, Replica


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_flat_vector_is_the_parameters_in_order():
    reference, replica = model(), Replica(model())
    assert torch.equal(replica.params, torch.cat([p.detach().flatten() for p in reference.parameters()]))
    replica.params.zero_()
    assert not any(p.any() for p in replica.model.parameters())


def test_gradients_arrive_in_the_flat_buffer():
    reference, replica, x = model(), Replica(model()), torch.randn(5, 3)
    for m in (reference, replica.model):
        m(x).square().sum().backward()
    assert torch.equal(replica.grads, torch.cat([p.grad.flatten() for p in reference.parameters()]))
    replica.model(x).square().sum().backward()
    assert torch.allclose(replica.grads, 2 * torch.cat([p.grad.flatten() for p in reference.parameters()]), rtol=1e-3, atol=1e-5)


def test_a_load_forgets_parameters_and_batch_statistics():
    replica, start = Replica(model()), Replica(model()).params.clone()
    before = {k: v.clone() for k, v in replica.model.state_dict().items()}
    replica.model.train()
    replica.model(torch.randn(5, 3) * 9)
    replica.params.add_(1)
    assert replica.model[1].num_batches_tracked == 1
    replica.load(start)
    assert all(torch.equal(v, before[k]) for k, v in replica.model.state_dict().items())
    assert replica.params is not start
    replica.params.add_(1)
    assert torch.equal(start, Replica(model()).params), "a load must copy"


def test_frozen_parameters_stay_out_and_all_is_float32():
    half = model().to(torch.float64)
    half[0].weight.requires_grad_(False)
    replica = Replica(half)
    assert replica.layout.names[0] == "0.bias"
    assert {p.dtype for p in replica.model.parameters()} == {torch.float32}


def test_scratch_is_made_once():
    replica = Replica(model())
    assert replica.scratch("a") is replica.scratch("a")
    assert replica.scratch("a") is not replica.scratch("b")
    assert replica.scratch("a").shape == replica.params.shape


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.pointwise, self.out = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 2, 1, bias=False), nn.Linear(2 * 36, 4)

    def forward(self, x):
        return self.out(self.pointwise(self.convolution(x).relu()).flatten(1))


def images():
    torch.manual_seed(0)
    return Images()


def test_channels_last_is_another_order_inside_and_none_outside():
    plain, turned = Replica(images()), Replica(images(), channels_last=True)
    start, x = torch.randn(plain.layout.size), torch.randn(4, 3, 8, 8)
    for replica in (plain, turned):
        replica.load(start)
        replica.model(x).square().sum().backward()
    assert turned.model.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(turned.values(), start)
    assert torch.equal(plain.params, start)
    assert not torch.equal(turned.params, start)
    assert torch.equal(turned.arranged(start), turned.params)
    assert plain.arranged(start) is start
    assert torch.allclose(turned.grads, turned.arranged(plain.grads), rtol=1e-3, atol=1e-5)
    turned.params.add_(1)
    assert torch.equal(turned.values(), start + 1)
    assert torch.equal(turned.taken(), start + 1)


POOLINGS = [nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 2), nn.AdaptiveMaxPool2d(5)]


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda pooling: type(pooling).__name__)
@pytest.mark.parametrize("batch", [4, 1])
def test_gradients_that_come_to_the_last_pooling_are_turned_and_keep_their_bits(pooling, batch, monkeypatch):
    def gradients(size: int) -> torch.Tensor:
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), pooling, nn.Flatten(), nn.LazyLinear(3)
        model, x = nn.Sequential(*layers), torch.rand(batch, 1, size, size)
        model(x)
        replica = Replica(model, channels_last=True)
        for _ in range(2):
            replica.backward(replica.model(x).square().sum())
        return replica.ordered(replica.grads)

    turned, turn = list[torch.Size](), module._channels_last
    monkeypatch.setattr(module, "_channels_last", lambda gradients: turned.append(gradients[0].shape) or turn(gradients))
    for size in (14, 2 * math.isqrt(WORTH_TURNING // (8 * batch)) + 8):
        turned.clear()
        of = gradients(size)
        assert len(turned) == (0 if size == 14 else 2)  # in each step, of the last pooling alone, where it is worth it
        with monkeypatch.context() as without:
            without.setattr(module, "POOLINGS", ())
            assert torch.equal(gradients(size), of)


def test_a_model_without_poolings_is_looked_through_once(monkeypatch):
    replica, looks, look = Replica(Images(), channels_last=True), [], module._keep_channels_last
    monkeypatch.setattr(module, "_keep_channels_last", lambda loss: looks.append(look(loss)) or looks[-1])
    for _ in range(3):
        replica.backward(replica.params.sum() + sum(p.sum() for p in replica.model.parameters()))
    assert looks == [False]


def test_activations_that_are_made_again_when_needed_are_not_asked_for():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.calls = nn.Conv2d(1, 8, 3), nn.Linear(8 * 47 * 47, 2), 0

        def features(self, x):
            self.calls += 1
            return nn.functional.max_pool2d(self.conv(x), 2)

        def forward(self, x):
            return self.head(checkpoint(self.features, x, use_reentrant=False).flatten(1))

    replica, x = Replica(Again(), channels_last=True), torch.rand(4, 1, 96, 96)
    for _ in range(2):
        replica.backward(replica.model(x).sum())
    assert replica.model.calls == 4  # once ahead and once back, in each of two steps
