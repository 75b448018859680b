"""The CTC transformer of federated speech recognition (arXiv 2310.00098), at any size.

Any `Module(features, lengths) -> (logits, frames)` can take its place.
"""

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedclip.asr.model_options import ModelOptions
from fedclip.asr.text import BLANK

FREQUENCY_SCALE: Final = 30.0
"""Radians a second of the fastest position wave: positions count in seconds, a frame is about 1/30 of one (CAPE)."""

NEIGHBOURS: Final = 3
"""Frames under the kernel of a further convolution of the front end."""


class CtcTransformer(nn.Module):
    """Scalar scale and bias, strided convolution with GLU, CAPE positions, attention blocks, LayerNorm, linear.

    Where asked for, further convolutions follow the first.
    With 80 mels, 30 symbols, dim 768, 36 layers, MLP 3072 and kernel 7 it has 255,800,864 parameters in 296 tensors,
    as published: a bias on the convolution and on the output, none in the blocks.
    """

    def __init__(self, options: ModelOptions, *, n_mels: int, symbols: int, hop_seconds: float) -> None:
        """Draw the initial weights from torch's global generator.

        Args:
            options: Sizes and rates.
            n_mels: Features of a frame.
            symbols: Outputs of a frame, the blank among them.
            hop_seconds: Time between two feature frames.
        """
        super().__init__()
        self._options = options
        self._frame_seconds = hop_seconds * options.stride
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.front = nn.Conv1d(n_mels, 2 * options.dim, options.kernel, options.stride, padding=options.kernel // 2)
        self.convolutions = nn.ModuleList(Convolution(options) for _ in range(options.convolutions))
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.dim)
        self.output = nn.Linear(options.dim, symbols)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the output frames, shape (batch,), of inputs of `lengths` frames: the quotient by the stride, rounded up."""
        return torch.div(lengths + self._options.stride - 1, self._options.stride, rounding_mode="floor")

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, shape (batch, frames, symbols), and how many frames of each are its own, shape (batch,).

        Padding never reaches an utterance: it is set to 0, which is what the convolution sees past the end of an
        utterance alone, and attention doesn't look at it.

        Args:
            features: Shape (batch, time, mel); what lies past the length of an utterance is ignored.
            lengths: Frames of each utterance, at least 1, shape (batch,), on the features' device.
        """
        time = features.shape[1]
        x = features * self.scale + self.bias
        padded = int(lengths.min()) < time
        if padded:
            x = x * (torch.arange(time, device=x.device) < lengths[:, None])[..., None]
        x = functional.glu(self.front(x.transpose(1, 2)), dim=1).transpose(1, 2)
        x = functional.dropout(x, self._options.dropout, self.training)
        frames = self.output_lengths(lengths)
        own = torch.arange(x.shape[1], device=x.device) < frames[:, None] if padded else None
        for convolution in self.convolutions:
            x = convolution(x, own)
        x = x + self._positions(x)
        mask = own[:, None, None, :] if own is not None else None
        for block in self.blocks:
            x = block(x, mask)
        return self.output(self.norm(x)), frames

    def _positions(self, x: Tensor) -> Tensor:
        """Return sinusoids of the frames' times, shape (batch or 1, frames, dim); each utterance shifted in training."""
        half = x.shape[2] // 2
        rates = FREQUENCY_SCALE * torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000) / half))
        seconds = torch.arange(x.shape[1], device=x.device)[None, :] * self._frame_seconds
        if self.training and self._options.shift_seconds > 0:
            shift = torch.rand(x.shape[0], 1, device=x.device) * 2 - 1
            seconds = seconds + shift * self._options.shift_seconds
        angles = seconds[..., None] * rates
        return torch.cat((angles.sin(), angles.cos()), dim=-1).to(x.dtype)


class Convolution(nn.Module):
    """A gated convolution over neighbouring frames, beside a residual path, on normalised input."""

    def __init__(self, options: ModelOptions) -> None:
        """Draw the initial weights from torch's global generator."""
        super().__init__()
        self.norm = nn.LayerNorm(options.dim)
        self.conv = nn.Conv1d(options.dim, 2 * options.dim, NEIGHBOURS, padding=NEIGHBOURS // 2)

    def forward(self, x: Tensor, own: Tensor | None) -> Tensor:
        """Return the convolution's output, shape (batch, frames, dim).

        Args:
            x: Shape (batch, frames, dim).
            own: Which frames are an utterance's own, shape (batch, frames); None for all. The others are set to 0.
        """
        normal = self.norm(x)
        if own is not None:
            normal = normal * own[..., None]
        added: Tensor = functional.glu(self.conv(normal.transpose(1, 2)), dim=1).transpose(1, 2)
        return x + added


class Block(nn.Module):
    """Self-attention and a ReLU perceptron, each beside a residual path; in training the block is left out at times."""

    def __init__(self, options: ModelOptions) -> None:
        """Draw the initial weights, uniform within 1/sqrt(inputs), from torch's global generator."""
        super().__init__()
        self._options = options
        self.norm1 = nn.LayerNorm(options.dim)
        self.qkv = nn.Linear(options.dim, 3 * options.dim, bias=False)
        self.project = nn.Linear(options.dim, options.dim, bias=False)
        self.norm2 = nn.LayerNorm(options.dim)
        self.widen = nn.Linear(options.dim, options.mlp_dim, bias=False)
        self.narrow = nn.Linear(options.mlp_dim, options.dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the block's output, shape (batch, frames, dim).

        Args:
            x: Shape (batch, frames, dim).
            mask: Which frames may be looked at, shape (batch, 1, 1, frames); None for all.
        """
        dropped = self.training and self._options.layer_drop > 0 and bool(torch.rand(()) < self._options.layer_drop)
        if self._options.norm == "post":
            attended: Tensor = self.norm1(x if dropped else x + self._attend(x, mask))
            perceived: Tensor = self.norm2(attended if dropped else attended + self._perceive(attended))
            return perceived
        if dropped:
            return x
        attended = x + self._attend(self.norm1(x), mask)
        return attended + self._perceive(self.norm2(attended))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, frames, dim = x.shape
        q, k, v = self.qkv(x).view(batch, frames, 3, self._options.heads, -1).permute(2, 0, 3, 1, 4)
        rate = self._options.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        projected: Tensor = self.project(attended.transpose(1, 2).reshape(batch, frames, dim))
        return projected

    def _perceive(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.widen(x))
        narrowed: Tensor = self.narrow(functional.dropout(hidden, self._options.dropout, self.training))
        return narrowed


def make_transformer(options: ModelOptions, *, n_mels: int, symbols: int, hop_seconds: float, seed: int) -> CtcTransformer:
    """Return a transformer whose initial weights depend on the arguments alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        return CtcTransformer(options, n_mels=n_mels, symbols=symbols, hop_seconds=hop_seconds)


def ctc_losses(logits: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Return the CTC loss of each utterance for each character of its target (0 where no path exists), shape (batch,).

    Dividing by the characters makes long and short utterances weigh the same and keeps the gradient near the clip
    bound of 1, so that plain SGD slows down as it converges rather than stepping at full length for ever.

    Args:
        logits: Shape (batch, frames, symbols).
        frames: How many frames of each utterance count, shape (batch,).
        targets: The symbols of all utterances one after another, shape (sum of target_lengths,).
        target_lengths: Shape (batch,).
    """
    log_probs = functional.log_softmax(logits.float(), dim=-1).transpose(0, 1)
    losses = functional.ctc_loss(log_probs, targets, frames, target_lengths, blank=BLANK, reduction="none", zero_infinity=True)
    return losses / target_lengths.clamp(min=1)
