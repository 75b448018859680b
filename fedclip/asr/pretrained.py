"""Encoders of pretrained models as CTC models: read from a folder by the library transformers, never from the network."""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedclip.options import ConfigError

RAW: Final = ("wav2vec2", "hubert", "wavlm")
"""Model types that hear samples."""

KNOWN: Final = (*RAW, "whisper")


class SamplesEncoder(nn.Module):
    """A wav2vec 2.0, HuBERT or WavLM encoder (arXiv 2006.11477, 2106.07447, 2110.13900).

    The convolutions hear one utterance at a time: some models normalise them over time, and would hear padding.

    Args:
        model: the library's model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.width = int(model.config.hidden_size)
        self._steps = list(zip(model.config.conv_kernel, model.config.conv_stride, strict=True))
        self.feature_extractor, self.feature_projection = model.feature_extractor, model.feature_projection
        self.encoder = model.encoder

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the output frames, shape (batch,), of so many samples."""
        for kernel, stride in self._steps:
            lengths = torch.div(lengths - kernel, stride, rounding_mode="floor") + 1
        return lengths.clamp(min=1)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states, shape (batch, frames, width), and how many of each are its own, of samples (batch, time, 1)."""
        frames = self.output_lengths(lengths)
        heard = [self._convolve(wave[:n, 0]) for wave, n in zip(features, lengths.tolist(), strict=True)]
        projected = self.feature_projection(nn.utils.rnn.pad_sequence(heard, batch_first=True))
        hidden = projected[0] if isinstance(projected, tuple) else projected
        own = torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]
        states: Tensor = self.encoder(hidden, attention_mask=own).last_hidden_state
        return states, frames

    def _convolve(self, wave: Tensor) -> Tensor:
        """Return what the convolutions hear, shape (frames, channels), of samples of shape (time,)."""
        reach = 1
        for kernel, stride in reversed(self._steps):
            reach = (reach - 1) * stride + kernel
        wave = functional.pad(wave, (0, max(0, reach - len(wave))))
        trained = any(p.requires_grad for p in self.feature_extractor.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            heard: Tensor = self.feature_extractor(wave[None])[0].T
        return heard


class WhisperEncoder(nn.Module):
    """The encoder of Whisper (arXiv 2212.04356), which hears audio padded with silence to its full length, 30 s.

    Args:
        model: the library's encoder.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.width = int(model.config.d_model)
        self._time = 2 * int(model.config.max_source_positions)
        self.encoder = model

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the output frames, shape (batch,), of so many feature frames: half of them, rounded up."""
        return torch.div(lengths + 1, 2, rounding_mode="floor")

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden states, shape (batch, frames, width), and how many of each are its own, of features (batch, time, mel)."""
        frames = self.output_lengths(lengths)
        padded = whisper_padding(features, lengths, self._time)
        states: Tensor = self.encoder(padded.transpose(1, 2)).last_hidden_state
        return states[:, : int(frames.max())], frames


class PretrainedCtc(nn.Module):
    """A pretrained encoder and a linear layer to the symbols.

    Args:
        encoder: gives hidden states of so many `width`, and counts them.
        symbols: outputs of a frame, the blank among them.
    """

    def __init__(self, encoder: SamplesEncoder | WhisperEncoder, symbols: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.output = nn.Linear(encoder.width, symbols)

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the output frames, shape (batch,), of inputs of `lengths` frames."""
        return self.encoder.output_lengths(lengths)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, shape (batch, frames, symbols), and how many frames of each are its own, shape (batch,)."""
        hidden, frames = self.encoder(features, lengths)
        return self.output(hidden), frames


def whisper_padding(features: Tensor, lengths: Tensor, time: int) -> Tensor:
    """Return Whisper's features, shape (batch, time, mel), with silence past the end of each utterance.

    Silence is what the features make of samples of 0: the logarithm's floor, but no less than 8 decades under the utterance's peak.
    """
    inside = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
    peak = features.masked_fill(~inside[..., None], -torch.inf).amax(dim=(1, 2))
    silence = (peak - 2.0).clamp(min=-1.5)[:, None, None]
    own = torch.where(inside[..., None], features, silence)[:, :time]
    return torch.cat((own, silence.expand(-1, time - own.shape[1], features.shape[2])), dim=1)


def read_config(folder: Path) -> Any:
    """Return the library's configuration of the model in a folder.

    Raises:
        ConfigError: no such folder, or no model of a kind that is known.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"task.model.path: no pretrained model in {folder}; give a folder with config.json and *.safetensors.")
    try:
        config = library().AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"task.model.path: {folder / 'config.json'} cannot be read: {error}") from error
    if config.model_type not in KNOWN:
        raise ConfigError(f"task.model.path: {folder} holds a '{config.model_type}'; expected one of {', '.join(KNOWN)}.")
    return config


def make_pretrained(config: Any, symbols: int, folder: Path | None) -> PretrainedCtc:
    """Return a CTC model with a pretrained encoder; what is drawn (the output) is drawn from torch's global generator.

    Args:
        config: the library's configuration, of `read_config`.
        symbols: outputs of a frame, the blank among them.
        folder: where the weights are; None: all weights are drawn.

    Raises:
        ConfigError: no weights in safetensors, or some are missing.
    """
    model = library().AutoModel.from_config(config) if folder is None else _load(config, folder)
    encoder = WhisperEncoder(model.get_encoder()) if config.model_type == "whisper" else SamplesEncoder(model)
    return PretrainedCtc(encoder, symbols)


def library() -> Any:
    """Return the library transformers, told to be quiet.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("Pretrained models need the library transformers: pip install 'fedclip[pretrained]'.") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _load(config: Any, folder: Path) -> Any:
    try:
        model, found = library().AutoModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:
        raise ConfigError(
            f"task.model.path: no weights could be read from {folder} ({error}). Expected safetensors; convert others by "
            "model.save_pretrained of the library transformers."
        ) from error
    missing = sorted(n for n in found["missing_keys"] if "masked_spec_embed" not in n and not n.startswith("decoder."))
    if missing or found["mismatched_keys"]:
        raise ConfigError(f"task.model.path: {folder} lacks weights that fit, among them {missing[:3] or found['mismatched_keys'][:3]}.")
    return model
