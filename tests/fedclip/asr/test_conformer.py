"""The Conformer: padding, gradients, no statistics to share."""

import math

import pytest
import torch

from fedclip.asr.conformer import CtcConformer
from fedclip.asr.model import ctc_losses
from fedclip.asr.model_options import ConformerOptions
from fedclip.asr.models import make_model
from fedclip.asr.options import AsrOptions
from fedclip.config import make_experiment
from fedclip.layout import Layout
from fedclip.model_file import save_model
from fedclip.options import ConfigError, validate

SECTIONS = {"population": {"size": 5}, "sampler": {"cohort": 2}, "local": {"lr": 0.1, "steps": 1}}


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


def test_adapters_go_to_the_linear_layers_of_its_blocks_and_learn(tmp_path):
    section = {"kind": "conformer", "dim": 16, "layers": 2, "heads": 2, "mlp_dim": 32, "depthwise_kernel": 7}
    whole = AsrOptions(features={"n_mels": 8}, model=section)
    frozen = make_model(whole, width=8, symbols=30, seed=0)
    experiment = make_experiment({"run": {"rounds": 1}, "task": whole.model_dump(mode="json"), **SECTIONS})
    tensors = torch.cat([p.detach().flatten() for p in frozen.parameters()])
    save_model(tmp_path / "base.safetensors", tensors, Layout.of(frozen), experiment, 1)
    adapters = {"base": tmp_path / "base.safetensors", "rank": 2}
    options = whole.model_copy(update={"model": ConformerOptions(**section, adapters=adapters)})
    model = make_model(options, width=8, symbols=30, seed=1)
    block = 2 * 2 * 2 * (16 + 32) + 2 * (16 + 16)
    assert Layout.of(model).size == 2 * block + 16 * 30 + 30
    features, lengths = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([40, 9])
    torch.testing.assert_close(model.eval()(features, lengths)[0], frozen.eval()(features, lengths)[0])
    logits, frames = model.train()(features, lengths)
    ctc_losses(logits, frames, torch.tensor([1, 2, 3]), torch.tensor([2, 1])).mean().backward()
    ups = {name: p.grad.abs().max() for name, p in model.named_parameters() if name.endswith(".up")}
    assert len(ups) == 2 * 5
    assert min(ups.values()) > 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.1 if name.endswith(".up") else 0.0)
        fast = model.eval()(features, lengths)[0]  # attention of torch reads the layer's weight here
    torch.testing.assert_close(fast, model(features, lengths)[0], atol=1e-5, rtol=1e-5)
    assert (fast - frozen(features, lengths)[0]).abs().max() > 0.01
