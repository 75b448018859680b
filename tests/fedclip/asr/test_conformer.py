"""The Conformer: padding, gradients, no statistics to share."""

import math

import pytest
import torch

from fedclip.asr.conformer import CtcConformer
from fedclip.asr.model import ctc_losses
from fedclip.asr.model_options import ConformerOptions
from fedclip.options import ConfigError, validate


def small(**changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = ConformerOptions(dim=16, layers=2, heads=2, mlp_dim=32, depthwise_kernel=7, **changes)
        return CtcConformer(options, n_mels=8, symbols=5)


@pytest.mark.parametrize("stride", [1, 3])
def test_padding_never_reaches_an_utterance(stride):
    model = small(stride=stride).eval()
    features = torch.randn(3, 41, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([41, 23, 1])
    features[1, 23:] = 1e4
    together, frames = model(features, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, own = model(features[row : row + 1, :length], lengths[row : row + 1])
        assert own.item() == frames[row].item() == alone.shape[1] == math.ceil(length / stride)
        torch.testing.assert_close(together[row, : own.item()], alone[0], atol=1e-5, rtol=1e-5)


def test_gradients_reach_all_parameters_and_there_are_no_statistics():
    model = small().train()
    logits, frames = model(torch.randn(2, 40, 8), torch.tensor([40, 9]))
    ctc_losses(logits, frames, torch.tensor([1, 2, 3]), torch.tensor([2, 1])).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert not list(model.buffers())
    assert not any(layer.conv_module.sequential[2]._forward_pre_hooks for layer in model.conformer.conformer_layers)


def test_sizes_that_do_not_go_together_are_refused():
    wrong = {"divisible": {"dim": 10, "heads": 4}, "odd depthwise": {"depthwise_kernel": 8}, "stride <=": {"stride": 9}}
    for message, values in wrong.items():
        with pytest.raises(ConfigError, match=message):
            validate(ConformerOptions, values)
