"""Speech recognition as a task: speakers are users, the loss is CTC over characters, the metrics are WER and CER."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self, overload

import numpy as np
import torch
from torch import Tensor, nn

from fedclip.asr.cache import Recording, open_cache
from fedclip.asr.decoding import open_decoder
from fedclip.asr.features import spec_augment
from fedclip.asr.inputs import open_inputs
from fedclip.asr.languages import LANGUAGES, code_of
from fedclip.asr.metrics import bootstrap_interval, count_errors_by_group, error_rate, rates_by_group, rates_over_speakers
from fedclip.asr.model import ctc_losses
from fedclip.asr.models import make_model, make_skeleton, skeleton_of
from fedclip.asr.options import AsrOptions
from fedclip.asr.text import Alphabet, frames_needed
from fedclip.speech.build import build_corpus
from fedclip.speech.corpus import SAMPLE_RATE, Corpus, Utterance
from fedclip.speech.errors import CorpusError

if TYPE_CHECKING:
    from fedclip.speech.index_file import Watch

log = logging.getLogger(__name__)

EVALUATION_BATCH: Final = 16
"""Utterances a batch in evaluation. It alters no result: padding doesn't reach an utterance."""

LENGTH_JITTER: Final = 0.2
"""How far an utterance may move when a user's utterances are sorted by length, as a share of its length."""


@dataclass(frozen=True, eq=False)
class Example:
    """What an utterance is to training: float16 features, shape (time, width), its symbols, its normalised text, its language."""

    features: Tensor
    target: tuple[int, ...]
    text: str
    language: str = ""


@dataclass(frozen=True)
class LeftOut:
    """How many utterances of a user can't be trained on, and why."""

    over_long: int = 0
    """Longer than `max_seconds`."""
    untranscribable: int = 0
    """Nothing said, or characters that have no symbol (digits, other alphabets)."""
    too_short: int = 0
    """Fewer output frames than its text needs."""
    unreadable: int = 0
    """Damaged recordings."""

    def __int__(self) -> int:
        """Return how many they are in all."""
        return self.over_long + self.untranscribable + self.too_short + self.unreadable


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """The examples of a user, with the count of those left out. Empty where nothing of a user can be used."""

    items: tuple[Example, ...]
    left_out: LeftOut
    faults: tuple[str, ...] = ()
    """What is wrong with damaged recordings, a line each."""

    def __len__(self) -> int:
        """Return how many examples there are."""
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        """Return one example, or those of a slice."""
        return self.items[index]


@dataclass(frozen=True, eq=False)
class Batch:
    """Padded utterances: what a model and the CTC loss take."""

    features: Tensor
    """float32, 0 past the end of an utterance, shape (batch, time, width)."""
    lengths: Tensor
    """Frames of each utterance, shape (batch,)."""
    targets: Tensor
    """The symbols of all utterances one after another, shape (sum of target_lengths,)."""
    target_lengths: Tensor
    """Shape (batch,)."""

    def to(self, device: torch.device) -> Self:
        """Return the batch on a device: itself if it is there."""
        if self.features.device == device:
            return self
        return type(self)(*(t.to(device) for t in (self.features, self.lengths, self.targets, self.target_lengths)))


class AsrTask:
    """Speech recognition by characters (see `fedclip.tasks.base.Task` for what each method promises)."""

    def __init__(self, options: AsrOptions, corpus: Corpus, seed: int, make_model: Callable[[], nn.Module] | None = None) -> None:
        """Join a corpus and a model.

        Args:
            options: Features, augmentation, model and cache; the corpus section was used to build `corpus`.
            corpus: Who speaks.
            seed: Fixes the initial weights.
            make_model: Any `Module(features, lengths) -> (logits, frames)` instead of that of `options.model`, with the same
                weights at each call. Without a method `output_lengths`, utterances that need more frames than it has add nothing
                to the loss.

        Raises:
            ConfigError: a pretrained model or an n-gram model is not there, or does not go with the other options.
        """
        self._options = options
        self._corpus = corpus
        self._seed = seed
        self._make_model = make_model
        self._alphabet = Alphabet(options.languages)
        self._inputs = open_inputs(options)
        self._decode = open_decoder(options.decoder, self._alphabet)
        self._cache = open_cache(options.cache_dir, options.cache_mb)
        self._fault_named = False

    @property
    def users(self) -> int:
        """Return how many training speakers there are."""
        return self._corpus.train_speakers

    @property
    def held_out_units(self) -> int:
        """Return how many held-out speakers there are."""
        return self._corpus.held_out_speakers

    @property
    def index(self) -> str:
        """Return the digest of the corpus's index, empty where it has none: workers find it by that."""
        return getattr(self._corpus, "content", "")

    @property
    def skipped(self) -> dict[str, tuple[int, str]]:
        """Return how many utterances the corpus has no use for, by cause, each with the first of them."""
        return getattr(self._corpus, "skipped", {})

    @property
    def note(self) -> str:
        """Return what every report on this data must say, empty for most."""
        return str(getattr(self._corpus, "note", ""))

    def make_model(self) -> nn.Module:
        """Return a new model with the initial weights that the seed fixes."""
        if self._make_model is not None:
            return self._make_model()
        return make_model(self._options, width=self._inputs.width, symbols=self._alphabet.symbols, seed=self._seed)

    def load_user(self, user: int, rng: np.random.Generator) -> Examples:
        """Return what of a speaker can be trained on, and the count of what can't."""
        usable, over_long, untranscribable, too_short = [], 0, 0, 0
        examples, faults = self._examples("train", user, lambda: self._corpus.train(user, rng), keep=self._corpus.cacheable)
        for example in examples:
            if len(example.features) == 0:
                over_long += 1
            elif not example.target:
                untranscribable += 1
            elif not self._alignable(example):
                too_short += 1
            else:
                usable.append(example)
        return Examples(tuple(usable), LeftOut(over_long, untranscribable, too_short, len(faults)), faults)

    def cost(self, user: int) -> float:
        """Return the seconds of audio of a speaker."""
        return self._corpus.train_seconds(user)

    def batches(self, examples: Sequence[Example], batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield batches of utterances of about one length, so that little is padding, in random order.

        Sorted by length times a random factor: neighbours differ from epoch to epoch.
        """
        if batch_size < 1:
            raise ValueError(f"Expected batch_size >= 1, got {batch_size}.")
        lengths = np.array([len(e.features) for e in examples])
        order = np.argsort(lengths * rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, size=len(lengths)))
        starts = np.arange(0, len(order), batch_size)
        for start in rng.permutation(starts):
            yield collate([examples[i] for i in order[start : start + batch_size]])

    def split(self, batch: Batch, most: int) -> list[tuple[Batch, int]]:
        """Return a batch in pieces of at most `most` utterances, each with its number of utterances."""
        columns = (batch.features, batch.lengths, batch.target_lengths)
        targets = iter(torch.split(batch.targets, batch.target_lengths.tolist()))
        rows = zip(*(torch.split(column, most) for column in columns), strict=True)
        return [(Batch(x[:, : int(n.max())], n, torch.cat(list(islice(targets, len(n)))), m), len(n)) for x, n, m in rows]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean over utterances of the CTC loss a character; with SpecAugment when the model is in training."""
        batch = batch.to(_device(model))
        features = spec_augment(batch.features, batch.lengths, self._options.augment) if model.training else batch.features
        logits, frames = model(features, batch.lengths)
        return ctc_losses(logits, frames, batch.targets, batch.target_lengths).mean()

    def evaluate(self, model: nn.Module, unit: int) -> dict[str, float]:
        """Return the error counts of a held-out speaker, the sum of its losses, and what they are over.

        The errors are counted for each language that the corpus names, too.
        What no model could spell still counts as errors; only over-long and unreadable audio is left out, and counted;
        the first unreadable recording is logged.
        """
        examples, faults = self._examples("held_out", unit, lambda: self._corpus.held_out(unit), keep=True)
        if faults and not self._fault_named:
            log.warning("left out of the evaluation: %s", faults[0])
            self._fault_named = True
        heard = sorted((e for e in examples if len(e.features) > 0), key=lambda e: len(e.features))
        hypotheses: list[str] = []
        loss_sum = 0.0
        for start in range(0, len(heard), EVALUATION_BATCH):
            texts, losses = self._transcribe(model, heard[start : start + EVALUATION_BATCH])
            hypotheses += texts
            loss_sum += losses
        return count_errors_by_group([e.text for e in heard], hypotheses, [code_of(e.language) for e in heard]) | {
            "loss_sum": loss_sum,
            "loss_utterances": float(sum(self._alignable(e) for e in heard)),
            "utterances": float(len(heard)),
            "left_out": float(len(examples) - len(heard) + len(faults)),
        }

    def summarise(self, counts: Sequence[Mapping[str, float]], seed: int) -> dict[str, float]:
        """Return `eval_loss`, `wer` and `cer` with 95% intervals over speakers, their spread, and how much they are over.

        Where there are several languages, `wer.fr` and so on are the rates of each.
        A rate over no words is NaN.
        """
        totals = {key: sum(c[key] for c in counts) for key in ("loss_sum", "loss_utterances", "utterances", "words", "left_out")}
        summary = {"eval_loss": totals["loss_sum"] / totals["loss_utterances"] if totals["loss_utterances"] else float("nan")}
        for name, unit in (("wer", "word"), ("cer", "character")):
            low, high = bootstrap_interval(counts, unit, seed)
            summary |= {name: error_rate(counts, unit), f"{name}_low": low, f"{name}_high": high}
        summary |= {f"eval_{key}": totals[key] for key in ("utterances", "words", "left_out")}
        return summary | rates_over_speakers(counts) | rates_by_group(counts)

    def _examples(
        self, split: str, speaker: int, read: Callable[[], list[Utterance]], *, keep: bool
    ) -> tuple[list[Example], tuple[str, ...]]:
        """Return all utterances of a speaker that can be read, and what is wrong with the others.

        Over-long ones have no frames, those that can't be spelt no target. A speaker with a fault is not kept: it may be mended.
        """
        key = json.dumps([self._inputs.recipe, self._corpus.recipe, self._options.max_seconds, split, speaker])
        recordings, faults = self._cache.get(key) if keep else None, tuple[str, ...]()
        if recordings is None:
            utterances = read()
            faults = tuple(utterance.fault for utterance in utterances if utterance.fault)
            recordings = tuple(self._record(utterance) for utterance in utterances if not utterance.fault)
            if keep and not faults:
                self._cache.put(key, recordings)
        return [self._example(recording) for recording in recordings], faults

    def _record(self, utterance: Utterance) -> Recording:
        if len(utterance.audio) > self._options.max_seconds * SAMPLE_RATE:
            return Recording(torch.empty(0, self._inputs.width, dtype=torch.float16), utterance.text, utterance.language)
        return Recording(self._inputs(utterance.audio), utterance.text, utterance.language)

    def _example(self, recording: Recording) -> Example:
        text = self._alphabet.normalise(recording.text, recording.language)
        try:
            target = self._alphabet.encode(text)
        except ValueError:
            target = ()
        return Example(recording.features, target, text, recording.language)

    def _alignable(self, example: Example) -> bool:
        return 0 < frames_needed(example.target) <= self._frames(len(example.features))

    def _frames(self, features: int) -> int:
        """Return how many output frames so many feature frames give; as many, where a model does not say."""
        return int(self._output_lengths(torch.tensor(features))) if self._output_lengths is not None else features

    @cached_property
    def _output_lengths(self) -> Callable[[Tensor], Tensor] | None:
        given = self._make_model
        sizes = {"width": self._inputs.width, "symbols": self._alphabet.symbols}
        model = skeleton_of(given) if given is not None else make_skeleton(self._options, **sizes)
        return getattr(model, "output_lengths", None)

    def _transcribe(self, model: nn.Module, examples: Sequence[Example]) -> tuple[list[str], float]:
        """Return the transcripts of a batch and the sum of the losses of those that have one."""
        batch = collate(examples).to(_device(model))
        with torch.no_grad():
            logits, frames = model(batch.features, batch.lengths)
            losses = ctc_losses(logits, frames, batch.targets, batch.target_lengths)
        alignable = torch.tensor([self._alignable(e) for e in examples], device=losses.device)
        return self._decode(logits, frames), float(losses[alignable].sum())


def collate(examples: Sequence[Example]) -> Batch:
    """Return one padded batch of examples."""
    lengths = torch.tensor([len(e.features) for e in examples])
    features = torch.zeros(len(examples), int(lengths.max()), examples[0].features.shape[1])
    for row, example in zip(features, examples, strict=True):
        row[: len(example.features)] = example.features
    targets = torch.tensor([symbol for e in examples for symbol in e.target], dtype=torch.long)
    return Batch(features, lengths, targets, torch.tensor([len(e.target) for e in examples]))


def build_asr(
    options: AsrOptions, *, population: int | None, data_dir: Path | None, seed: int, index: str = "", watch: "Watch | None" = None
) -> AsrTask:
    """Return the task that a configuration describes: its corpus of so many speakers, its model with this seed.

    `index` and `watch`: see `fedclip.speech.build.build_corpus`.

    Raises:
        CorpusError: see there; or utterances are told to be in a language that the model does not spell.
        ConfigError: see `AsrTask`.
    """
    corpus = build_corpus(
        options.corpus, population=population, data_dir=data_dir, seed=seed, cache_dir=options.cache_dir, index=index, watch=watch
    )
    _check_languages(getattr(corpus, "languages", ()), options)
    return AsrTask(options, corpus, seed)


def _check_languages(told: Sequence[str], options: AsrOptions) -> None:
    """Refuse languages of the data that the model does not spell, before a user or a held-out speaker fails of them."""
    foreign = [tag for tag in told if code_of(tag) not in options.languages]
    if not foreign:
        return
    known = sorted({code_of(tag) for tag in foreign} & {*LANGUAGES})
    unknown = [tag for tag in foreign if code_of(tag) not in LANGUAGES]
    how = ", by task.corpus.languages" if "languages" in type(options.corpus).model_fields else ""
    remedies = [f"add {', '.join(known)} to task.languages"] if known else []
    remedies += [f"leave out {', '.join(unknown)}, whose letters aren't known{how}"] if unknown else []
    raise CorpusError(
        f"task.languages: the data have utterances in {', '.join(foreign)}, and the model spells {', '.join(options.languages)} only; "
        f"{', and '.join(remedies)}."
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
