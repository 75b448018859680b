"""The speech task on a corpus of tones, a tone a letter: what it loads, drops, batches, learns and counts."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fedclip.asr.options import AsrOptions, AugmentOptions, FeatureOptions, ModelOptions
from fedclip.options import ConfigError
from fedclip.speech.corpus import SAMPLE_RATE, Utterance
from fedclip.tasks.asr import AsrTask, LeftOut
from fedclip.tasks.base import Task

LETTER_SECONDS = 0.12
WORDS = ("ab", "ba", "cab", "a", "bc", "abc")


def sound(text):
    """A tone for each letter, silence for a space."""
    time = np.arange(round(LETTER_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    parts = [np.zeros_like(time) if c == " " else np.sin(2 * np.pi * (300 + 400 * (ord(c) - 97)) * time) for c in text]
    return np.concatenate([np.zeros(800), *parts, np.zeros(800)]).astype(np.float32) * 0.3


class Tones:
    """Speakers 0 .. train_speakers - 1 say a few words; the last one says what can't be trained on."""

    train_speakers = 5
    held_out_speakers = 3
    recipe = "tones"

    def __init__(self, cacheable=True):
        self.cacheable = cacheable
        self.reads = 0

    def train(self, speaker, rng):
        self.reads += 1
        if speaker == self.train_speakers - 1:
            return self.unusable()
        words = np.random.default_rng(speaker) if self.cacheable else rng
        texts = [" ".join(words.choice(WORDS, size=words.integers(1, 4))) for _ in range(6)]
        return [Utterance(sound(text), text) for text in texts]

    def unusable(self):
        long = np.zeros(SAMPLE_RATE * 3, np.float32)
        return [Utterance(sound("a"), "..."), Utterance(sound("a"), "route 66"), Utterance(long, "a"), Utterance(sound("a"), "a" * 60)]

    def train_seconds(self, speaker):
        return 1.5 + speaker

    def held_out(self, speaker):
        self.reads += 1
        if speaker == self.held_out_speakers - 1:
            return self.unusable()
        return [Utterance(sound(text), text.upper()) for text in WORDS[speaker::2]]


def options(**changes):
    values = {
        "features": FeatureOptions(n_mels=20),
        "model": ModelOptions(dim=32, layers=2, heads=2, mlp_dim=64, kernel=5),
        "max_seconds": 2.5,
        "cache_mb": 0,
    }
    return AsrOptions(**(values | changes))


def task(corpus=None, seed=0, **changes):
    return AsrTask(options(**changes), corpus or Tones(), seed)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_task_is_a_task():
    described: Task = task()
    assert (described.users, described.held_out_units, described.cost(2)) == (5, 3, 3.5)


def test_models_of_one_seed_are_bit_equal():
    first, second, other = task().make_model(), task().make_model(), task(seed=1).make_model()
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.front.weight, other.front.weight)


def test_a_user_has_float16_features_and_targets():
    examples = task().load_user(0, rng())
    assert len(examples) == 6
    assert examples.left_out == LeftOut()
    assert len(examples[1:3]) == 2
    assert all(e.features.dtype == torch.float16 and e.features.shape[1] == 20 and e.target for e in examples)


def test_what_cannot_be_trained_on_is_left_out_and_counted():
    examples = task().load_user(4, rng())
    assert len(examples) == 0
    assert examples.left_out == LeftOut(over_long=1, untranscribable=2, too_short=1)
    assert list(task().batches(examples, 4, rng())) == []


def test_batches_hold_each_example_once_in_an_order_of_the_generator():
    described = task()
    examples = described.load_user(0, rng())
    batches = list(described.batches(examples, 4, rng(1)))
    assert sorted(len(b.lengths) for b in batches) == [2, 4]
    assert sorted(n for b in batches for n in b.lengths.tolist()) == sorted(len(e.features) for e in examples)
    for batch in batches:
        assert batch.features.shape == (len(batch.lengths), int(batch.lengths.max()), 20)
        assert batch.features.dtype == torch.float32
        assert len(batch.targets) == int(batch.target_lengths.sum())
        for row, length in zip(batch.features, batch.lengths.tolist(), strict=True):
            assert (row[length:] == 0).all()
    again = list(described.batches(examples, 4, rng(1)))
    assert all(torch.equal(a.features, b.features) for a, b in zip(batches, again, strict=True))
    orders = {tuple(tuple(b.lengths.tolist()) for b in described.batches(examples, 2, rng(seed))) for seed in range(20)}
    assert len(orders) > 1
    with pytest.raises(ValueError, match="batch_size"):
        next(described.batches(examples, 0, rng()))


def test_augmentation_acts_in_training_only():
    described = task(augment=AugmentOptions(enabled=True, frequency_width=10), model=ModelOptions(dim=8, heads=1, shift_seconds=0))
    model = described.make_model()
    (batch,) = described.batches(described.load_user(0, rng()), 6, rng())

    def loss(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return described.loss(model, batch).item()

    model.train()
    assert loss(0) != loss(1)
    assert loss(0) == loss(0)
    model.eval()
    assert loss(0) == loss(1)


def train(described, model, steps):
    """Plain SGD, rate 0.5, clipped to norm 1, over all speakers' utterances."""
    losses = []
    torch.manual_seed(0)
    draw = rng()
    model.train()
    examples = [e for user in range(described.users) for e in described.load_user(user, rng())]
    while len(losses) < steps:
        for batch in described.batches(examples, 8, draw):
            model.zero_grad()
            loss = described.loss(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.5 * parameter.grad
            losses.append(loss.item())
    return losses


def test_plain_sgd_learns_the_tones():
    described = task()
    model = described.make_model()
    with torch.random.fork_rng():
        losses = train(described, model, 240)
    assert np.mean(losses[-10:]) < 0.1
    model.eval()
    summary = described.summarise([described.evaluate(model, unit) for unit in range(2)], seed=0)
    assert summary["wer"] < 0.2
    assert summary["wer_low"] <= summary["wer"] <= summary["wer_high"]
    assert summary["eval_words"] == len(WORDS)


def test_evaluation_counts_what_cannot_be_spelt_and_reports_what_is_too_long():
    described = task()
    counts = described.evaluate(described.make_model().eval(), 2)
    assert counts["utterances"] == 3
    assert counts["left_out"] == 1
    assert counts["loss_utterances"] == 0
    assert counts["loss_sum"] == 0
    assert counts["words"] == 3
    assert math.isnan(described.summarise([counts], seed=0)["eval_loss"])


class SaysNothing(nn.Module):
    """Any module of features and lengths can be the model; this one hears only blanks."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([5.0] + [0.0] * 29))

    def forward(self, features, lengths):
        return self.weight.expand(*features.shape[:2], 30), lengths


def test_any_module_can_be_the_model():
    described = AsrTask(options(), Tones(), 0, make_model=SaysNothing)
    model = described.make_model()
    counts = [described.evaluate(model.eval(), unit) for unit in range(2)]
    summary = described.summarise(counts, seed=0)
    assert summary["wer"] == summary["cer"] == 1.0
    (batch,) = described.batches(described.load_user(0, rng()), 6, rng())
    described.loss(model, batch).backward()
    assert model.weight.grad.abs().sum() > 0


class Halves(SaysNothing):
    """It says how many frames it makes, by a number that it may keep as a tensor."""

    def __init__(self, width=80, symbols=30, seed=0, kept=False):
        super().__init__()
        self.stride = torch.tensor(2) if kept else 2

    def output_lengths(self, lengths):
        return torch.div(lengths + 1, self.stride, rounding_mode="floor")


def by_a_door(**arguments):
    return AsrTask(options(model={"name": f"{__file__}:Halves", "arguments": arguments}), Tones(), 0)


@pytest.mark.parametrize("make", [lambda: AsrTask(options(), Tones(), 0, make_model=Halves), by_a_door])
def test_a_model_of_ones_own_is_not_kept_a_second_time(make):
    described = make()
    assert len(described.load_user(0, rng())) == 6
    model = described._output_lengths.__self__
    assert all(p.is_meta for p in model.parameters())


def test_a_model_of_ones_own_that_needs_its_values_for_lengths_has_them():
    described = by_a_door(kept=True)
    assert len(described.load_user(0, rng())) == 6
    assert described._frames(11) == 6


def test_a_cached_speaker_is_read_once_and_gives_the_same_bits(tmp_path):
    cached, plain = Tones(), Tones()
    first = task(cached, cache_mb=1, cache_dir=tmp_path)
    second = task(cached, cache_mb=1, cache_dir=tmp_path)
    missed, hit, direct = first.load_user(0, rng()), second.load_user(0, rng(1)), task(plain).load_user(0, rng())
    assert cached.reads == 1
    for a, b, c in zip(missed, hit, direct, strict=True):
        assert torch.equal(a.features, b.features)
        assert torch.equal(a.features, c.features)
        assert a.text == b.text == c.text
    unusable = first.load_user(4, rng()), second.load_user(4, rng())
    assert unusable[0].left_out == unusable[1].left_out == task(plain).load_user(4, rng()).left_out
    other = task(cached, cache_mb=1, cache_dir=tmp_path, features=FeatureOptions(n_mels=24))
    assert other.load_user(0, rng())[0].features.shape[1] == 24


class Polyglots(Tones):
    """One word in two languages of which only one has its letter, and one that no language of the task can spell."""

    def train(self, speaker, rng):
        return [
            Utterance(sound("ab"), "\u00c9b", "fr"),
            Utterance(sound("ab"), "\u00c9b", "en-GB"),
            Utterance(sound("ab"), "\u0436b", "fr"),
        ]


def test_each_text_is_spelt_by_its_own_language_from_the_cache_too(tmp_path):
    corpus = Polyglots()
    described = task(corpus, languages=("en", "fr"), cache_mb=1, cache_dir=tmp_path)
    for examples in (described.load_user(0, rng()), described.load_user(0, rng())):
        assert [e.text for e in examples] == ["\u00e9b", "eb"]
        assert examples[0].target[0] > 29 > examples[1].target[0]
        assert examples.left_out == LeftOut(untranscribable=1)
    assert len(described.make_model().output.bias) == 30 + 16
    with pytest.raises(ConfigError, match="add 'fr'"):
        task(corpus).load_user(0, rng())


def test_what_differs_from_round_to_round_is_not_cached_but_held_out_speech_is(tmp_path):
    corpus = Tones(cacheable=False)
    described = task(corpus, cache_mb=1, cache_dir=tmp_path)
    described.load_user(0, rng())
    described.load_user(0, rng())
    assert corpus.reads == 2
    model = described.make_model().eval()
    assert described.evaluate(model, 0) == described.evaluate(model, 0)
    assert corpus.reads == 3


def test_pieces_of_a_batch_have_its_gradient():
    described = task()
    (batch,) = described.batches(described.load_user(0, rng()), 6, rng())
    cut = described.split(batch, 4)
    assert [count for _, count in cut] == [4, 2]
    assert max(piece.features.shape[1] for piece, _ in cut) == batch.features.shape[1] > min(piece.features.shape[1] for piece, _ in cut)
    gradients = []
    for parts in ([(batch, 6)], cut):
        model = described.make_model().eval()  # no masks and no dropout, which each piece would draw for itself
        for piece, count in parts:
            (described.loss(model, piece) * count / 6).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)
    assert gradients[0].norm() > 0


def test_no_method_touches_the_global_generators(tmp_path):
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002  # read only
    described = task(cache_mb=1, cache_dir=tmp_path)
    model = described.make_model().eval()
    examples = described.load_user(0, rng())
    list(described.batches(examples, 2, rng()))
    described.summarise([described.evaluate(model, 0)], seed=0)
    assert torch.equal(torch_before, torch.random.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002  # read only


def test_the_task_and_its_examples_pickle():
    described = pickle.loads(pickle.dumps(task()))
    examples = pickle.loads(pickle.dumps(described.load_user(0, rng())))
    assert len(examples) == 6


def test_options_refuse_what_cannot_be():
    with pytest.raises(ValueError, match="Extra inputs"):
        AsrOptions(modle=ModelOptions())
    with pytest.raises(ValueError, match="frequency_width"):
        options(augment=AugmentOptions(enabled=True, frequency_width=30))
