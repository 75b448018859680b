"""ResNet-18 with GroupNorm: its size, its shapes, and that examples of a batch do not meet."""

import pytest
import torch
from torch import nn

from fedclip.layout import Layout
from fedclip.tasks.resnet import ResNet18


@pytest.fixture(scope="module")
def model() -> ResNet18:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ResNet18(1, 10).eval()


def test_it_has_the_published_size(model: ResNet18) -> None:
    # The usual ResNet-18 for 32 x 32 images in colour has 11,173,962; one input channel in the place of three is 2 * 64 * 9 less.
    assert sum(p.numel() for p in ResNet18(3, 10).parameters()) == 11_173_962
    assert sum(p.numel() for p in model.parameters()) == 11_172_810
    kinds = [type(m) for m in model.modules()]
    # 1 + 16 convolutions of 3 x 3 and 3 of 1 x 1, each with its norm; with the last layer, 18 in depth.
    assert (kinds.count(nn.Conv2d), kinds.count(nn.GroupNorm), kinds.count(nn.Linear)) == (20, 20, 1)
    assert not list(model.buffers())


def test_its_blocks_are_layers(model: ResNet18) -> None:
    layers = Layout.of(model, "block").layer_names
    assert layers == ("stem", "norm", *(f"blocks.{n}" for n in range(8)), "out")


@pytest.mark.parametrize(("side", "last"), [(8, 1), (28, 4), (32, 4)])
def test_shapes(model: ResNet18, side: int, last: int) -> None:
    with torch.inference_mode():
        images = torch.rand(2, 1, side, side)
        assert model(images).shape == (2, 10)
        assert model.blocks(model.norm(model.stem(images))).shape == (2, 512, last, last)


def test_scores_of_an_image_do_not_depend_on_the_others(model: ResNet18) -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-4)
        assert torch.equal(model.train()(images), model.eval()(images))
