"""The Conformer of torchaudio as a CTC model, behind a strided convolution; padding reaches no utterance."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.models import Conformer

from fedclip.asr.model_options import ConformerOptions


class CtcConformer(nn.Module):
    """Strided convolution with GLU, Conformer blocks (arXiv 2005.08100), linear.

    torchaudio's blocks normalise their convolutions over the batch, or over the whole padded time, and let the convolution see
    what blocks before it made of padding. Here each frame is normalised by itself, which needs no statistics that users would
    have to share, and padding is 0 where a convolution sees it.
    """

    def __init__(self, options: ConformerOptions, *, n_mels: int, symbols: int) -> None:
        """Draw the initial weights from torch's global generator.

        Args:
            options: Sizes and rates.
            n_mels: Features of a frame.
            symbols: Outputs of a frame, the blank among them.
        """
        super().__init__()
        self._stride, self._dropout = options.stride, options.dropout
        self.front = nn.Conv1d(n_mels, 2 * options.dim, options.kernel, options.stride, padding=options.kernel // 2)
        self.conformer = Conformer(
            options.dim, options.heads, options.mlp_dim, options.layers, options.depthwise_kernel, options.dropout, use_group_norm=True
        )
        for layer in self.conformer.conformer_layers:
            layer.conv_module.sequential[_NORM] = FrameNorm(options.dim)
        self.output = nn.Linear(options.dim, symbols)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the output frames, shape (batch,), of inputs of `lengths` frames: the quotient by the stride, rounded up."""
        return torch.div(lengths + self._stride - 1, self._stride, rounding_mode="floor")

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, shape (batch, frames, symbols), and how many frames of each are its own, shape (batch,).

        Args:
            features: Shape (batch, time, mel); what lies past the length of an utterance is ignored.
            lengths: Frames of each utterance, at least 1, shape (batch,), on the features' device.
        """
        inside = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        x = (features * inside[..., None]).transpose(1, 2)
        x = functional.dropout(functional.glu(self.front(x), dim=1), self._dropout, self.training).transpose(1, 2)
        frames = self.output_lengths(lengths)
        own = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[:, None, :]

        def silence(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
            return (inputs[0] * own,)

        with ExitStack() as hooks:
            for layer in self.conformer.conformer_layers:
                hooks.callback(layer.conv_module.sequential[_DEPTHWISE].register_forward_pre_hook(silence).remove)
            x, _ = self.conformer(x, frames)
        return self.output(x), frames


class FrameNorm(nn.LayerNorm):
    """LayerNorm over the channels of each frame by itself, of inputs of shape (batch, channels, frames)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, in its shape."""
        normal: Tensor = super().forward(x.transpose(1, 2)).transpose(1, 2)
        return normal


_DEPTHWISE, _NORM = 2, 3
"""Where torchaudio's convolution module has its depthwise convolution and its normalisation."""
