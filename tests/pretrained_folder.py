"""Tiny pretrained models, with random weights, as the library writes them."""

import torch
from transformers import (
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperModel,
)

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 8),
    "conv_stride": (20, 16),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 2,
    "layerdrop": 0.0,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 150,
    "max_target_positions": 8,
    "vocab_size": 60000,
}
MODELS = {
    "wav2vec2": lambda: Wav2Vec2Model(Wav2Vec2Config(**TINY)),
    "wav2vec2-layer": lambda: Wav2Vec2Model(Wav2Vec2Config(**TINY, feat_extract_norm="layer", do_stable_layer_norm=True)),
    "hubert": lambda: HubertModel(HubertConfig(**TINY)),
    "wavlm": lambda: WavLMModel(WavLMConfig(**TINY)),
    "whisper": lambda: WhisperModel(WhisperConfig(**WHISPER | {"vocab_size": 51865})),
}


def write_pretrained(folder, name, **how):
    """Save a tiny model into a folder; `whisper` hears 3 s."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[name]()
    model.save_pretrained(folder, **how)
    return folder
