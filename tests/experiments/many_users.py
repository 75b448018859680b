"""A task for nodes with any number of users: the folder of the data says how many, and a user's examples follow from its id."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

WIDTH = 1000
"""The model has a million parameters and some."""


class Lines:
    """Linear regression on noise."""

    channels_last, low_rank = False, True

    def __init__(self, users: int) -> None:
        self.users, self.held_out_units = users, 1

    def make_model(self) -> nn.Module:
        model = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model

    def load_user(self, user: int, rng: np.random.Generator) -> Sequence[Any]:
        return torch.from_numpy(np.random.default_rng(user).standard_normal((4, WIDTH), dtype=np.float32)).unbind()

    def cost(self, user: int) -> float:
        return 1.0

    def batches(self, examples: Sequence[Any], batch_size: int, rng: np.random.Generator) -> Iterator[Any]:
        yield torch.stack(list(examples))

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (model(batch) - batch).square().mean()

    def evaluate(self, model: nn.Module, unit: int) -> dict[str, float]:
        return {"loss": float(model(torch.ones(1, WIDTH)).square().mean())}

    def summarise(self, counts: Sequence[dict[str, float]], seed: int) -> dict[str, float]:
        return {"eval_loss": counts[0]["loss"]} | dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), 0.0)


def make(population: int | None, data_dir: Path, seed: int) -> Lines:
    return Lines(int((data_dir / "users").read_text(encoding="utf-8")))
