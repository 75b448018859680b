"""Image classification: a small CNN on scikit-learn's digits, images dealt to users by a Dirichlet distribution (arXiv 1909.06335)."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedclip.options import ConfigError
from fedclip.tasks.base import Counts
from fedclip.tasks.vision_options import VisionOptions

UNIT_SIZE = 36
"""Images in one held-out unit."""

Example = tuple[torch.Tensor, int]
Batch = tuple[torch.Tensor, torch.Tensor]


class SmallCNN(nn.Module):
    """Two 3 x 3 convolutions with pooling and a linear layer: images (batch, 1, 8, 8) to scores (batch, classes)."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.out = nn.Linear(2 * channels * 4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return unnormalised scores."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        scores: torch.Tensor = self.out(x.flatten(1))
        return scores


class VisionTask:
    """Classification of images that are dealt to a fixed number of users.

    Args:
        images: float32, shape (examples, channels, height, width).
        labels: int64, shape (examples,).
        users: how many users share the training images; some may get none.
        options: see `VisionOptions`.
        seed: seed of the split, the dealing and the initial weights.

    Raises:
        ConfigError: more users than training images.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, users: int, options: VisionOptions, seed: int) -> None:
        rng = np.random.Generator(np.random.Philox(seed))
        order = rng.permutation(len(labels))
        cut = round(len(labels) * options.held_out)
        self._test, train = order[:cut], order[cut:]
        if users > len(train):
            raise ConfigError(f"population.size: expected at most {len(train)} users, one for each training image, got {users}.")
        self._images, self._labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
        self._shares = deal_by_dirichlet(labels[train], users, options.alpha, rng)
        self._train, self._options, self._seed = train, options, seed
        self._classes = int(labels.max()) + 1

    @property
    def users(self) -> int:
        """Training users."""
        return len(self._shares)

    @property
    def held_out_units(self) -> int:
        """Shards of the held-out images."""
        return -(-len(self._test) // UNIT_SIZE)

    def make_model(self) -> nn.Module:
        """Return the CNN with its initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(self._seed)
            return SmallCNN(self._options.channels, self._classes)

    def load_user(self, user: int, rng: np.random.Generator) -> Sequence[Example]:
        """Return the images of a user, the same in each round."""
        return [(self._images[i], int(self._labels[i])) for i in self._train[self._shares[user]]]

    def cost(self, user: int) -> float:
        """Return the number of the user's images."""
        return float(len(self._shares[user]))

    def batches(self, examples: Sequence[Example], batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield shuffled batches, the last one smaller."""
        order = rng.permutation(len(examples))
        for start in range(0, len(order), batch_size):
            chosen = [examples[i] for i in order[start : start + batch_size]]
            yield torch.stack([x for x, _ in chosen]), torch.tensor([y for _, y in chosen])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        device = next(model.parameters()).device
        return F.cross_entropy(model(batch[0].to(device)), batch[1].to(device))

    def evaluate(self, model: nn.Module, unit: int) -> Counts:
        """Return loss, hits and images of one shard."""
        chosen = torch.from_numpy(self._test[unit * UNIT_SIZE : (unit + 1) * UNIT_SIZE])
        device = next(model.parameters()).device
        labels = self._labels[chosen].to(device)
        scores = model(self._images[chosen].to(device))
        loss = F.cross_entropy(scores, labels, reduction="sum")
        return {"loss": float(loss), "hits": float((scores.argmax(1) == labels).sum()), "images": float(len(chosen))}

    def summarise(self, counts: Sequence[Counts], seed: int) -> dict[str, float]:
        """Return `eval_loss`, `accuracy` and its 95% interval (Wilson's, by images)."""
        images, hits = sum(c["images"] for c in counts), sum(c["hits"] for c in counts)
        share, z2 = hits / images, 1.959964**2
        centre, root = share + z2 / (2 * images), float(np.sqrt(z2 * share * (1 - share) / images + (z2 / (2 * images)) ** 2))
        low, high = ((centre + sign * root) / (1 + z2 / images) for sign in (-1, 1))
        loss = sum(c["loss"] for c in counts) / images
        return {"eval_loss": loss, "accuracy": share, "accuracy_low": low, "accuracy_high": high}


def deal_by_dirichlet(labels: np.ndarray, users: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Return for each user the positions of its examples: each class is cut by proportions from Dirichlet(alpha) over users."""
    shares: list[list[np.ndarray]] = [[] for _ in range(users)]
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        cuts = np.floor(np.cumsum(rng.dirichlet(np.full(users, alpha)))[:-1] * len(places) + 0.5).astype(int)
        for share, part in zip(shares, np.split(places, cuts), strict=True):
            share.append(part)
    return [np.sort(np.concatenate(share)) for share in shares]


def build_vision(options: VisionOptions, *, population: int | None, seed: int) -> VisionTask:
    """Return the digits task for a population.

    Raises:
        ConfigError: no population: the digits have no users of their own.
    """
    if population is None:
        raise ConfigError("population.size: missing; the digits are dealt to as many users as you say, 100 for example.")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return VisionTask((images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8), labels, population, options, seed)
