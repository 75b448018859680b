"""Uploads of two trained models of 11 million parameters, by Deep Gradient Compression at a thousandth: how many bytes they are.

The data is synthetic and the models have learnt it for 300 steps; run with `-s` to see the figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedclip.asr.model import ctc_losses, make_transformer
from fedclip.asr.options import ModelOptions
from fedclip.dgc import DGC
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.packed import PackedCodec
from fedclip.replica import Replica
from fedclip.sparsify import kept_count
from fedclip.tasks.resnet import ResNet18
from fedclip.update import Dense, to_dense
from tests.strategies_of_data import context

DENSITY, TRAINING_STEPS, ROUNDS, LOCAL_STEPS = 0.001, 300, 6, 3
SYMBOLS, MELS, CHARACTERS, FRAMES_OF_A_CHARACTER = 30, 80, 8, 12
CLASSES, SIDE = 10, 28

STAGES = {
    "int8": DGC(DENSITY, warmup=(), small="sparse", grid="int8"),
    "float16": DGC(DENSITY, warmup=(), small="sparse", grid="float16"),
    "exact (small tensors whole, float32)": DGC(DENSITY, warmup=()),
}
GOALS = {"int8": 1000, "float16": 700}


@dataclass
class Speech:
    """Each character sounds like a spectrum of its own, as long as it likes, in noise."""

    lr: float = 0.05
    batch: int = 4

    def make_model(self) -> nn.Module:
        options = ModelOptions(dim=384, layers=6, heads=4, mlp_dim=1536, kernel=7)
        return make_transformer(options, n_mels=MELS, symbols=SYMBOLS, hop_seconds=0.01, seed=1)

    def batches(self, examples: object, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        spectra = np.random.default_rng(7).standard_normal((SYMBOLS, MELS))
        while True:
            texts = rng.integers(1, SYMBOLS, (batch_size, CHARACTERS))
            ends = np.linspace(0, CHARACTERS * FRAMES_OF_A_CHARACTER, CHARACTERS + 1)[1:-1]
            cuts = np.rint(ends + rng.uniform(-3, 3, (batch_size, CHARACTERS - 1))).astype(int)
            spoken = (np.arange(CHARACTERS * FRAMES_OF_A_CHARACTER)[None, :, None] >= cuts[:, None, :]).sum(2)
            features = spectra[np.take_along_axis(texts, spoken, axis=1)] + 0.5 * rng.standard_normal((*spoken.shape, MELS))
            yield torch.from_numpy(features.astype(np.float32)), torch.from_numpy(texts)

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        features, texts = batch
        logits, frames = model(features, torch.full((len(features),), features.shape[1]))
        return ctc_losses(logits, frames, texts.flatten(), torch.full((len(texts),), CHARACTERS)).mean()


@dataclass
class Images:
    """Each class is a blurred pattern, moved about, in noise."""

    lr: float = 0.02
    batch: int = 4

    def make_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(1)
            return ResNet18(1, CLASSES)

    def batches(self, examples: object, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        coarse = torch.from_numpy(np.random.default_rng(7).standard_normal((CLASSES, 1, 7, 7)).astype(np.float32))
        patterns = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear").numpy()
        while True:
            labels = rng.integers(0, CLASSES, batch_size)
            moved = [np.roll(patterns[label], tuple(rng.integers(-3, 4, 2)), (1, 2)) for label in labels]
            noise = rng.standard_normal((batch_size, 1, SIDE, SIDE))
            yield torch.from_numpy((np.stack(moved) + noise).astype(np.float32)), torch.from_numpy(labels)

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", [Speech(), Images()], ids=["transformer", "resnet18"])
def test_uploads_of_trained_models_are_a_thousand_times_smaller(task: Speech | Images) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        replica, trained = train(task)
        sizes = {name: len(last_upload(task, replica, trained, stage)) for name, stage in STAGES.items()}
    finally:
        torch.set_num_threads(threads)
    layout = replica.layout
    print(f"\n{type(replica.model).__name__}, {layout.size:,} parameters in {len(layout.sizes)} tensors, times smaller than dense float32:")
    for name, size in sizes.items():
        ratio, paper = 4 * layout.size / size, by_paper(layout, STAGES[name])
        print(f"  {name}: {size:,} bytes, {ratio:.0f}; in the paper's accounting {paper:.0f}")
    assert layout.size >= 10**7
    for name, goal in GOALS.items():
        assert 4 * layout.size / sizes[name] >= goal


def train(task: Speech | Images) -> tuple[Replica, torch.Tensor]:
    """Return a replica, and its parameters after the training; it has learnt something."""
    replica = Replica(task.make_model())
    local, rng = LocalSGD(task.lr, steps=TRAINING_STEPS // 4, batch_size=task.batch, clip_norm=1.0, momentum=0.9), np.random.default_rng(3)
    losses = [local.train(replica, task, [0], rng) for _ in range(4)]
    print(f"\nmean training losses: {', '.join(f'{loss:.3f}' for loss in losses)}")
    assert losses[-1] < 0.8 * losses[0]
    return replica, replica.params.clone()


def last_upload(task: Speech | Images, replica: Replica, trained: torch.Tensor, stage: DGC) -> bytes:
    """Return the payload of the last of some rounds of one user; the model goes on by what was sent."""
    layout, codec, params, rng = replica.layout, PackedCodec(), trained.clone(), np.random.default_rng(4)
    local, state = LocalSGD(task.lr, steps=LOCAL_STEPS, batch_size=task.batch, clip_norm=1.0), stage.init(replica.layout)
    for round in range(1, ROUNDS + 1):
        replica.load(params)
        local.train(replica, task, [0], rng)
        step = stage.apply(Dense(params - replica.params), state, context(layout, round, params, seed=round))
        payload, state = codec.encode(step.update, layout), step.state
        params = params - to_dense(codec.decode(payload, layout), layout)
    return payload


def by_paper(layout: Layout, stage: DGC) -> float:
    """Return the ratio in the paper's accounting: 4 bytes for each value of a tensor that goes whole, 6 for each other one."""
    whole = [stage.small == "dense" and len(shape) <= 1 for shape in layout.shapes]
    sent = [4 * size if all_of_it else 6 * kept_count(DENSITY, size) for size, all_of_it in zip(layout.sizes, whole, strict=True)]
    return 4 * layout.size / sum(sent)
