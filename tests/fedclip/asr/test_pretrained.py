"""Pretrained encoders: the library's own pipeline is the oracle, padding reaches nobody, nothing frozen moves, and sizes are as stated."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

from fedclip.adapters import adapt
from fedclip.asr.inputs import Waveform, open_inputs
from fedclip.asr.models import make_model, make_skeleton
from fedclip.asr.options import AsrOptions
from fedclip.asr.pretrained import make_pretrained, whisper_padding
from fedclip.codec import DenseCodec
from fedclip.layout import Layout
from fedclip.options import ConfigError, validate
from fedclip.replica import Replica
from fedclip.simulation import InProcess
from fedclip.stages import local_sgd, poisson
from fedclip.tasks.asr import AsrTask
from fedclip.update import Dense
from strategies.recipes import fedavg
from tests.fedclip.tasks.test_asr import Tones
from tests.pretrained_folder import MODELS, write_pretrained

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask:UserWarning",  # the library's WavLM gives torch masks of two types
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write_pretrained(tmp_path_factory.mktemp("models") / name, name) for name in MODELS}


def options(folder, **changes):
    return AsrOptions(model={"kind": "pretrained", "path": folder}, max_seconds=2.5, cache_mb=0, **changes)


def build(folder, seed=1):
    described = options(folder)
    return open_inputs(described), make_model(described, width=open_inputs(described).width, symbols=30, seed=seed)


def sound(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def batch(inputs, *sizes):
    """Features of recordings, and garbage past their ends."""
    heard = [inputs(sound(size, seed)).float() for seed, size in enumerate(sizes)]
    features = torch.full((len(heard), max(map(len, heard)), inputs.width), 1e4)
    for row, one in zip(features, heard, strict=True):
        row[: len(one)] = one
    return features, torch.tensor([len(one) for one in heard])


@pytest.mark.parametrize("name", MODELS)
def test_padding_never_reaches_an_utterance_and_lengths_are_those_of_the_skeleton(folders, name):
    inputs, model = build(folders[name])
    skeleton = make_skeleton(options(folders[name]), width=inputs.width, symbols=30)
    features, lengths = batch(inputs, 16_000, 9_001, 30)
    model.eval()
    together, frames = model(features, lengths)
    assert frames.tolist() == skeleton.output_lengths(lengths).tolist() == model.output_lengths(lengths).tolist()
    assert together.shape == (3, frames[0], 30)
    for row, length in enumerate(lengths.tolist()):
        alone, own = model(features[row : row + 1, :length], lengths[row : row + 1])
        assert own.item() == frames[row].item() == alone.shape[1] >= 1
        torch.testing.assert_close(together[row, : own.item()], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in MODELS if n != "whisper"])
def test_hidden_states_of_samples_are_the_librarys(folders, name):
    inputs, model = build(folders[name])
    wave = inputs(sound(8_000)).float()
    library = transformers.AutoModel.from_pretrained(folders[name]).eval()
    with torch.no_grad():
        hidden, _ = model.eval().encoder(wave[None], torch.tensor([len(wave)]))
        torch.testing.assert_close(hidden, library(wave[None, :, 0]).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_hidden_states_of_whisper_are_the_librarys(folders):
    inputs, model = build(folders["whisper"])
    audio = sound(20_000)
    heard = inputs(audio)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=3)
    features = extractor(audio, sampling_rate=16_000, return_tensors="pt")["input_features"]
    padded = whisper_padding(heard.float()[None], torch.tensor([len(heard)]), 300)
    assert len(heard) == math.ceil((20_000 + 200) / 160)
    torch.testing.assert_close(padded.transpose(1, 2), features, atol=1e-3, rtol=1e-3)  # float16
    library = transformers.WhisperModel.from_pretrained(folders["whisper"]).eval()
    with torch.no_grad():
        hidden, frames = model.eval().encoder(heard.float()[None], torch.tensor([len(heard)]))
        expected = library.encoder(padded.transpose(1, 2)).last_hidden_state
    assert frames.item() == math.ceil(len(heard) / 2)
    torch.testing.assert_close(hidden, expected[:, : frames.item()], atol=1e-5, rtol=1e-5)


def test_samples_are_normalised_as_the_library_does_unless_the_folder_says_otherwise(folders, tmp_path):
    audio = sound(3_000)
    expected = Wav2Vec2FeatureExtractor(do_normalize=True)(audio, sampling_rate=16_000)["input_values"][0]
    torch.testing.assert_close(open_inputs(options(folders["wav2vec2"]))(audio)[:, 0].float(), torch.from_numpy(expected).half().float())
    folder = write_pretrained(tmp_path, "wav2vec2")
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false, "sampling_rate": 16000}')
    torch.testing.assert_close(open_inputs(options(folder))(audio)[:, 0], torch.from_numpy(audio).half())
    assert len(Waveform(normalise=True)(np.zeros(0, np.float32))) == 400
    with pytest.raises(ValueError, match="finite"):
        Waveform(normalise=True)(np.full(5, np.nan, np.float32))
    (folder / "preprocessor_config.json").write_text('{"sampling_rate": 8000}')
    with pytest.raises(ConfigError, match="sampling_rate of 16000"):
        open_inputs(options(folder))


def test_models_of_ones_own_hear_samples_or_whispers_features_where_they_ask_for_them():
    door = {"name": "nowhere:make"}
    wave = open_inputs(AsrOptions(model=door, features={"kind": "waveform"}))(sound(3_000))
    assert wave.shape == (3_000, 1)
    assert float(wave.float().std()) == pytest.approx(1.0, abs=1e-3)
    whisper = AsrOptions(model=door, features={"kind": "whisper", "n_mels": 16})
    assert open_inputs(whisper)(sound(3_000)).shape == (20, 16)
    recipes = [open_inputs(AsrOptions(model=door, features=f)).recipe for f in ({}, {"n_mels": 16}, {"kind": "waveform"})]
    assert len({json.dumps(r) for r in [*recipes, open_inputs(whisper).recipe]}) == 4


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_every_kind_of_encoder_learn(folders, name):
    inputs, model = build(folders[name])
    features, lengths = batch(inputs, 16_000, 9_000)
    ups = [(n, p) for n, p in model.named_parameters() if n.endswith(".up")]
    assert len(ups) == 4
    model.train()(features, lengths)[0].square().sum().backward()
    for tensor, parameter in ups:
        assert parameter.grad.abs().max() > 0, tensor
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_two_rounds_move_adapters_and_output_alone_and_cost_their_bytes(folders, name):
    task = AsrTask(options(folders[name]), Tones(), 0)
    method = fedavg(sampler=poisson(5, 5), local=local_sgd(0.5, steps=2))
    engine = InProcess(method, task, "secret", name)
    model, params = engine.site.replica.model, engine.state.params.clone()
    trained = set(engine.layout.names)
    frozen = {n: t.clone() for n, t in model.state_dict().items() if n not in trained}
    assert {n.rsplit(".", 1)[-1] for n in trained - {"output.weight", "output.bias"}} == {"up", "down"}
    for _ in range(2):
        outcome = engine.round()
    assert not outcome.errors
    assert outcome.tally["users"] == 4  # the fifth has nothing to train on
    after = model.state_dict()
    assert len(frozen) > 20
    assert all(torch.equal(t, after[n]) for n, t in frozen.items())
    moved = [not torch.equal(a, b) for a, b in zip(engine.layout.split(params), engine.layout.split(engine.state.params), strict=True)]
    assert all(moved)
    header = len(DenseCodec().encode(Dense(params), engine.layout)) - 4 * engine.layout.size
    assert outcome.tally["uplink_bytes"] == 4 * (4 * engine.layout.size + header)
    assert header < 40
    assert engine.layout.size == 2 * 2 * (8 * 16 + 16 * 8) + 16 * 30 + 30


def test_every_build_has_the_same_bits_and_leaves_the_generators(folders):
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  # read only
    first, second, other = (build(folders["wav2vec2"], seed)[1].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch_before, torch.random.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002  # read only
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert {n for n, t in first.items() if not torch.equal(t, other[n])} >= {"output.weight"}
    assert all(torch.equal(t, other[n]) for n, t in first.items() if "frozen" in n)


@pytest.mark.parametrize(
    ("how", "parameters"),
    [
        ({"rank": 8, "targets": ()}, 12 * 2 * 8 * (768 + 768) + 768 * 30 + 30),
        ({"rank": 16, "targets": ("*.q_proj", "*.k_proj", "*.v_proj")}, 12 * 3 * 16 * (768 + 768) + 768 * 30 + 30),
    ],
)
def test_a_user_of_wav2vec2_base_sends_a_million_parameters_or_fewer(how, parameters):
    """The base model has 94.4 M parameters (arXiv 2006.11477 says 95 M, its quantiser among them)."""
    with torch.device("meta"):
        model = make_pretrained(Wav2Vec2Config(), 30, None)
    assert 94e6 < sum(p.numel() for p in model.parameters()) < 95e6
    layout = Layout.of(adapt(model, alpha=16.0, trained=("output",), seed=0, **how))
    assert layout.size == parameters < 1_000_000


def test_a_replica_keeps_frozen_weights_in_float32_and_puts_buffers_back(folders):
    replica = Replica(build(folders["wav2vec2"])[1])
    assert replica.params.shape == (replica.layout.size,)
    assert all(p.dtype == torch.float32 for p in replica.model.parameters())
    replica.load(torch.zeros_like(replica.params))
    assert replica.model.output.weight.abs().max() == 0


def test_what_cannot_be_used_is_refused(folders, tmp_path):
    def refused(message, folder, **changes):
        with pytest.raises(ConfigError, match=message):
            AsrTask(options(folder, **changes), Tones(), 0).make_model()

    refused("no pretrained model in", tmp_path / "none")
    refused("features of its own", folders["hubert"], features={"n_mels": 40})
    refused("turn it off", folders["hubert"], augment={"enabled": True})
    with pytest.raises(ConfigError, match="at most 3, all that it hears"):
        open_inputs(options(folders["whisper"]).model_copy(update={"max_seconds": 4.0}))
    pickled = tmp_path / "pickled"
    write_pretrained(pickled, "wav2vec2")
    weights = pickled / "model.safetensors"
    torch.save(torch.zeros(1), pickled / "pytorch_model.bin")
    content = weights.read_bytes()
    weights.unlink()
    refused("Expected safetensors", pickled)
    weights.write_bytes(content)
    config = (pickled / "config.json").read_text()
    (pickled / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    refused("lacks weights that fit", pickled)
    (pickled / "config.json").write_text('{"model_type": "bert"}')
    refused("holds a 'bert'", pickled)


@pytest.mark.parametrize(
    ("message", "values"),
    [
        ("features.kind 'log_mel' with model.kind 'transformer', got 'waveform'", {"features": {"kind": "waveform"}}),
        ("model.kind 'conformer', got 'waveform'", {"features": {"kind": "waveform"}, "model": {"kind": "conformer"}}),
        ("no hop_ms, n_mels beside kind 'waveform'", {"features": {"kind": "waveform", "n_mels": 40, "hop_ms": 20.0}}),
        ("no preemphasis beside kind 'whisper'", {"features": {"kind": "whisper", "n_mels": 40, "preemphasis": 0.0}}),
        ("expected lm beside lm_weight 2 and unit 'word'", {"decoder": {"beam": 5, "lm_weight": 2.0}}),
        ("expected lm beside lm_weight 1 and unit 'character'", {"decoder": {"beam": 5, "unit": "character"}}),
    ],
)
def test_options_that_nothing_is_made_of_are_refused(message, values):
    with pytest.raises(ConfigError, match=message):
        validate(AsrOptions, values)
    default = AsrOptions(features={"kind": "waveform"}, model={"name": "mine.py:make"})
    assert validate(AsrOptions, default.model_dump()) == default  # what a run folder says of it: all the defaults


def test_tensors_under_their_older_names_beside_a_fine_tuned_head_and_in_float16_are_read(folders, tmp_path):
    """As published checkpoints have them: weight norm by `weight_g`, the encoder under a prefix, a head that is of no use here."""
    expected = build(folders["wav2vec2"])[1].state_dict()
    tensors = {f"wav2vec2.{n}": t for n, t in load_file(folders["wav2vec2"] / "model.safetensors").items()}
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = next(n for n in tensors if n.endswith(f"parametrizations.weight.{new}"))
        tensors[name.replace(f"parametrizations.weight.{new}", old)] = tensors.pop(name)
    tensors |= {"lm_head.weight": torch.zeros(5, 16), "lm_head.bias": torch.zeros(5)}
    folder = write_pretrained(tmp_path, "wav2vec2")
    save_file({n: t.half() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    found = build(folder)[1].state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-3, rtol=1e-3)


def test_no_code_of_a_folder_is_run(tmp_path):
    folder = write_pretrained(tmp_path, "wav2vec2")
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Model: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Model", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    build(folder)
    assert not (tmp_path / "ran").exists()


def test_other_weights_than_were_pinned_are_refused(folders, tmp_path):
    from fedclip.asr.weights import pinned

    model = pinned(options(folders["wav2vec2"]).model)
    assert model.digest == pinned(model).digest != pinned(options(folders["hubert"]).model).digest
    moved = write_pretrained(tmp_path, "wav2vec2")
    assert pinned(model.model_copy(update={"path": moved})).digest == model.digest
    described = options(folders["wav2vec2"]).model_copy(update={"model": model.model_copy(update={"path": folders["hubert"]})})
    with pytest.raises(ConfigError, match="other weights"):
        make_model(described, width=1, symbols=30, seed=0)
