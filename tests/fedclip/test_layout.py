"""`Layout`: which tensors, in which order, in which layers."""

import pickle

import pytest
import torch
from hypothesis import given
from torch import nn

from fedclip.layout import Layout
from tests.strategies_of_data import layouts


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 3), nn.Linear(3, 2)])
        self.norm = nn.BatchNorm1d(2)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.head = nn.Linear(2, 3)
        self.head.weight = self.blocks[0].weight


def test_only_trainable_parameters_enter_once_and_buffers_never():
    layout = Layout.of(Model())
    assert layout.names == (
        "temperature",
        "blocks.0.weight",
        "blocks.0.bias",
        "blocks.1.weight",
        "blocks.1.bias",
        "norm.weight",
        "norm.bias",
        "head.bias",
    )
    assert layout.shapes == ((), (3, 2), (3,), (2, 3), (2,), (2,), (2,), (3,))
    assert layout.sizes == (1, 6, 3, 6, 2, 2, 2, 3)
    assert layout.size == 25
    assert layout.layers == layout.names


def test_blocks_are_layers():
    layout = Layout.of(Model(), "block")
    assert layout.layer_names == ("temperature", "blocks.0", "blocks.1", "norm", "head")
    assert layout.layer_of == (0, 1, 1, 2, 2, 3, 3, 4)
    assert layout.layer_sizes == (1, 9, 8, 4, 3)
    assert layout.grouped("tensor") == Layout.of(Model())


@given(layouts())
def test_sizes_layers_and_views_agree(layout):
    assert sum(layout.sizes) == sum(layout.layer_sizes) == layout.size
    blocks = layout.grouped("block")
    assert blocks.grouped("tensor") == layout
    assert sum(blocks.layer_sizes) == layout.size
    vector = torch.arange(layout.size, dtype=torch.float32)
    views = layout.split(vector)
    assert torch.equal(torch.cat(views), vector)
    assert all(v.numel() == s for v, s in zip(views, layout.sizes, strict=True))
    assert all(v.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for v in views)
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_the_digest_names_names_shapes_and_layers():
    base = Layout(("a.0.x", "a.0.y"), ((2,), (3,)), ("a.0.x", "a.0.y"))
    others = [
        base.grouped("block"),
        Layout(("a.0.x", "a.0.z"), base.shapes, base.layers),
        Layout(base.names, ((3,), (2,)), base.layers),
    ]
    assert len({base.digest, *(o.digest for o in others)}) == 4
    assert base.digest == Layout(base.names, base.shapes, base.layers).digest


def test_refusals_name_what_is_wrong():
    with pytest.raises(ValueError, match="trainable"):
        Layout.of(nn.ReLU())
    with pytest.raises(ValueError, match="unique"):
        Layout(("a", "a"), ((), ()), ("a", "a"))
    with pytest.raises(ValueError, match="2, 1 and 2"):
        Layout(("a", "b"), ((),), ("a", "b"))
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(4,\)"):
        Layout(("a",), ((3,),), ("a",)).split(torch.zeros(4))
