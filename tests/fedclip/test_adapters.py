"""Low-rank adapters: where they go, what they begin as, what is trained, and code that reads weights in the place of calling layers."""

import copy

import pytest
import torch
from torch import nn

from fedclip.adapters import Adapted, adapt
from fedclip.layout import Layout
from fedclip.options import ConfigError


class Small(nn.Module):
    """Layers that are called, attention that reads the weight of its output layer, and batch statistics."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.statistics = nn.BatchNorm1d(6)
        self.output = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.output(self.statistics(x.transpose(1, 2)).transpose(1, 2))


def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def adapted(rank=2, alpha=4.0, targets=("blocks.*", "*.out_proj"), trained=("output",), seed=1):
    return adapt(small(), rank=rank, alpha=alpha, targets=targets, trained=trained, seed=seed)


def inputs():
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(3))


def test_a_model_begins_as_it_was_and_only_adapters_and_what_is_named_are_trained():
    model = adapted()
    torch.testing.assert_close(model(inputs()), small()(inputs()))
    layout = Layout.of(model)
    places = ("blocks.0", "blocks.1", "attention.out_proj")
    assert set(layout.names) == {f"{p}.{side}" for p in places for side in ("down", "up")} | {"output.weight", "output.bias"}
    assert layout.size == 3 * 2 * (6 + 6) + 3 * 6 + 3


def test_an_adapted_layer_is_the_frozen_one_plus_a_matrix_of_low_rank():
    layer = Adapted(nn.Linear(5, 4), 2, 3.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 5)
    added = 3.0 / 2 * layer.up @ layer.down
    assert torch.linalg.matrix_rank(added) == 2
    torch.testing.assert_close(layer(x), x @ (layer.frozen.weight + added).T + layer.frozen.bias)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_adapters_act_and_learn_where_weights_are_read_too():
    model = adapted(targets=("*.out_proj",)).train()
    before = copy.deepcopy(model.state_dict())
    model(inputs()).square().sum().backward()
    assert model.attention.out_proj.up.grad.abs().max() > 0
    with torch.no_grad():
        model.attention.out_proj.up += 1.0
    model.eval()
    assert not torch.allclose(model(inputs()), small().eval()(inputs()))
    assert torch.equal(before["attention.out_proj.frozen.weight"], small().attention.out_proj.weight)


def test_matrices_follow_the_seed_alone_and_have_unit_scale():
    state = torch.random.get_rng_state()
    first, second, other = adapted(), adapted(), adapted(seed=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.blocks[0].down, second.blocks[0].down)
    assert not torch.equal(first.blocks[0].down, first.blocks[1].down)
    assert not torch.equal(first.blocks[0].down, other.blocks[0].down)
    wide = Adapted(nn.Linear(400, 4), 50, 1.0, torch.Generator().manual_seed(0))
    assert wide.down.square().sum(dim=1).mean().item() == pytest.approx(1.0, rel=0.05)


def test_what_is_trained_whole_gets_no_adapter():
    assert "output.weight" in Layout.of(adapted(targets=("*",))).names
    everything = adapted(targets=("blocks.0",), trained=("*",))
    assert Layout.of(everything) == Layout.of(small())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"targets": ("blok.*",)}, "'blok.*'; there are blocks.*, attention.out_proj, output"),
        ({"targets": ()}, r"'\*.q_proj'; there are"),
        ({"trained": ("head",)}, "'head'; there are blocks.*.weight"),
    ],
)
def test_patterns_that_match_nothing_are_refused_with_the_names_that_there_are(how, message):
    with pytest.raises(ConfigError, match=message):
        adapted(**how)
