"""A task of one's own for populations of any size: each user's images are a function of the id, and nothing is kept of anybody."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from fedclip.process import peak_memory

IMAGES, CLASSES, HIDDEN = 20, 62, 256
PARAMETERS = 784 * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES


class RandomImages:
    """Twenty random images of 28 x 28 a user, and a multilayer perceptron of 216,894 parameters (784-256-62).

    Held-out unit n measures no model: it says the most memory that the process it is evaluated in ever had.
    """

    def __init__(self, population: int, processes: int) -> None:
        self.users, self.held_out_units = population, processes

    def make_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))

    def load_user(self, user: int, rng: np.random.Generator) -> TensorDataset:
        own = np.random.default_rng(user)
        images = torch.from_numpy(own.random((IMAGES, 1, 28, 28), dtype=np.float32))
        return TensorDataset(images, torch.from_numpy(own.integers(0, CLASSES, IMAGES)))

    def cost(self, user: int) -> float:
        return float(IMAGES)

    def batches(self, examples: TensorDataset, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[torch.Tensor, ...]]:
        for places in torch.from_numpy(rng.permutation(len(examples))).split(batch_size):
            yield examples[places]

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module, unit: int) -> dict[str, float]:
        return {"peak": float(peak_memory())}

    def summarise(self, counts: Sequence[Mapping[str, float]], seed: int) -> dict[str, float]:
        return {"eval_loss": 0.0, "worker_peak_memory_bytes": max(c["peak"] for c in counts)}


def make(population: int, data_dir: Path | None, seed: int, processes: int = 1) -> RandomImages:
    return RandomImages(population, processes)
