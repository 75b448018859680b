"""The common work as a task of fedclip, and the experiments that the engine is timed on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from experiments.contestants import workload
from fedclip.config import Experiment, load_experiment, make_experiment
from fedclip.tasks.base import Counts
from strategies.recipes import resolve

NOISE_MULTIPLIER = 1.0
"""z of every timed round: how large it is alters no time."""

QUICKSTART = Path(__file__).parents[1] / "quickstart.toml"


class UserImages(Sequence[workload.Batch]):
    """The images of a user, and which user it is: the order of its batches follows from that, as everywhere in the benchmark."""

    def __init__(self, user: int) -> None:
        self.user, (self.images, self.labels) = user, workload.user_data(user)

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        """Return one image with its label, or some."""
        return self.images[index], self.labels[index]


class ImagesTask:
    """Random images, which nothing can be learnt from (see `fedclip.tasks.base.Task` for what each method promises)."""

    held_out_units, channels_last, low_rank = 1, True, True

    def __init__(self, model: str, users: int) -> None:
        self.model, self.users = model, users

    def make_model(self) -> nn.Module:
        """Return the model with its initial weights."""
        return workload.make_model(self.model)

    def load_user(self, user: int, rng: np.random.Generator) -> UserImages:
        """Return a user's images."""
        return UserImages(user)

    def cost(self, user: int) -> float:
        """Return 1: all users are equal."""
        return 1.0

    def batches(self, examples: UserImages, batch_size: int, rng: np.random.Generator) -> Iterator[workload.Batch]:
        """Yield the user's batches."""
        return workload.batches(examples.images, examples.labels, examples.user)

    def loss(self, model: nn.Module, batch: workload.Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        device = cast(nn.Linear, model.out).weight.device
        return F.cross_entropy(model(batch[0].to(device)), batch[1].to(device))

    def evaluate(self, model: nn.Module, unit: int) -> Counts:
        """Return nothing: there is nothing to find out."""
        return {}

    def summarise(self, counts: Sequence[Counts], seed: int) -> dict[str, float]:
        """Return nothing."""
        return {}


def make_task(population: int, data_dir: Path | None, seed: int, model: str) -> ImagesTask:
    """Return the task, as `task.name` of an experiment wants it."""
    return ImagesTask(model, population)


def experiment_of(model: str, cohort: int, population: int, workers: int, device: str, engine: str, reply: str) -> Experiment:
    """Return what the engine is timed on: a clip for each layer, Gaussian noise on the sum, and accounting; no checkpoints."""
    run = {"workers": workers, "device": device, "engine": engine, "reply": reply}
    if model == "asr":
        values = load_experiment(QUICKSTART, ["task.cache_mb=0"]).plain()  # else whoever comes second finds what the first has spoken
    else:
        values = {
            "run": {"name": "bench", "rounds": 1},  # as many as are asked for
            "task": {"name": "experiments.contestants.task:make_task", "arguments": {"model": model}},
            "local": {"lr": workload.LR, "epochs": 1, "batch_size": workload.BATCH},
            "strategy": {"client": [{"clip_per_layer": {"max_norm": workload.CLIP}}], "server": [{"sgd": {"lr": 1.0}}]},
        }
    values["run"] |= run
    values["ray"] = {"gpus_per_worker": 0.0 if device == "cpu" else 1.0 / workers}
    values |= {
        "population": {"size": population},
        "sampler": {"name": "fixed_size", "cohort": cohort},
        "privacy": {"noise_multiplier": NOISE_MULTIPLIER},
    }
    return resolve(make_experiment(values))
