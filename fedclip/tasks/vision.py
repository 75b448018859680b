"""Image classification: scikit-learn's digits or idx files, dealt to users by a Dirichlet distribution (arXiv 1909.06335) or otherwise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedclip.options import ConfigError
from fedclip.tasks.base import Counts
from fedclip.tasks.idx import read_part
from fedclip.tasks.partition import deal
from fedclip.tasks.resnet import ResNet18
from fedclip.tasks.vision_options import VisionOptions

UNIT_SIZE = 36
"""Images in one held-out unit, unless there would be more than `MAX_UNITS` of them."""

MAX_UNITS = 40
"""Held-out units at most."""

Example = tuple[torch.Tensor, int]
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Dealt(Sequence[Example]):
    """The images of a user: positions among all the images, none of which is copied.

    Attributes:
        images: all of them, float32 in [0, 1] or uint8, shape (examples, channels, height, width).
        labels: int64, shape (examples,).
        chosen: int64, shape (images of the user,).
    """

    images: torch.Tensor
    labels: torch.Tensor
    chosen: torch.Tensor

    def __len__(self) -> int:
        """Return how many images the user has."""
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Dealt": ...
    def __getitem__(self, index: int | slice) -> "Example | Dealt":
        """Return one image with its label, or those of a slice."""
        if isinstance(index, slice):
            return Dealt(self.images, self.labels, self.chosen[index])
        place = self.chosen[index]
        return _scaled(self.images[place]), int(self.labels[place])

    def gather(self, places: torch.Tensor) -> Batch:
        """Return the images at some places of this user's, float32, and their labels."""
        chosen = self.chosen[places]
        return _scaled(self.images[chosen]), self.labels[chosen]


class SmallCNN(nn.Module):
    """Two 3 x 3 convolutions with pooling and a linear layer or two: images (batch, *shape) to scores (batch, classes).

    Args:
        channels: of the first convolution; the second has twice as many.
        classes: how many scores.
        shape: channels, height and width of an image; both sides are at least 4.
        hidden: width of a linear layer before the last one; 0: none.
    """

    def __init__(self, channels: int, classes: int, shape: tuple[int, int, int] = (1, 8, 8), hidden: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(shape[0], channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        features = 2 * channels * (shape[1] // 4) * (shape[2] // 4)
        self.hidden = nn.Linear(features, hidden) if hidden else None
        self.out = nn.Linear(hidden or features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return unnormalised scores."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        scores: torch.Tensor = self.out(x)
        return scores


class VisionTask:
    """Classification of images that are dealt to a fixed number of users.

    Args:
        images: float32 in [0, 1], or uint8 from 0 to 255, shape (examples, channels, height, width).
        labels: whole numbers from 0 on, shape (examples,).
        users: how many users share the training images; some may get none.
        options: see `VisionOptions`.
        seed: seed of the split, the dealing and the initial weights.
        held_out: how many images at the end are the held-out ones; None: a fraction, drawn at random, as the options say.

    Raises:
        ConfigError: more users than training images, a partition that cannot be made, or images that are too small for the model.
    """

    channels_last = low_rank = True

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, users: int, options: VisionOptions, seed: int, held_out: int | None = None
    ) -> None:
        rng = np.random.Generator(np.random.Philox(seed))
        if held_out is None:
            order = rng.permutation(len(labels))
            cut = round(len(labels) * options.held_out)
            test, train = order[:cut], order[cut:]
        else:
            cut = len(labels) - held_out
            test, train = np.arange(cut, len(labels)), rng.permutation(cut)
        if users > len(train):
            raise ConfigError(f"population.size: expected at most {len(train)} users, one for each training image, got {users}.")
        if options.model == "cnn" and min(images.shape[2:]) < 4:
            raise ConfigError(
                f"task.model: 'cnn' needs images of at least 4 x 4, got {images.shape[2]} x {images.shape[3]}; use 'resnet18'."
            )
        self._images, self._labels = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
        self._test = test
        self._unit_size = max(UNIT_SIZE, -(-len(test) // MAX_UNITS))
        self._shares = (
            deal_by_dirichlet(labels[train], users, options.alpha, rng)
            if options.partition is None
            else deal(options.partition, labels[train], users, seed)
        )
        self._train, self._options, self._seed = train, options, seed
        self._classes = options.classes if options.data == "idx" else int(labels.max()) + 1

    @property
    def users(self) -> int:
        """Training users."""
        return len(self._shares)

    @property
    def held_out_units(self) -> int:
        """Shards of the held-out images."""
        return -(-len(self._test) // self._unit_size)

    def make_model(self) -> nn.Module:
        """Return the model with its initial weights."""
        channels, height, width = self._images.shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.random.manual_seed(self._seed)
            if self._options.model == "resnet18":
                return ResNet18(channels, self._classes)
            return SmallCNN(self._options.channels, self._classes, (channels, height, width), self._options.hidden)

    def load_user(self, user: int, rng: np.random.Generator) -> Dealt:
        """Return the images of a user, the same in each round."""
        return Dealt(self._images, self._labels, torch.from_numpy(self._train[self._shares[user]]))

    def cost(self, user: int) -> float:
        """Return the number of the user's images."""
        return float(len(self._shares[user]))

    def labels_of(self, user: int) -> np.ndarray:
        """Return the labels of the user's images, int64, shape (images,)."""
        labels: np.ndarray = self._labels.numpy()[self._train[self._shares[user]]]
        return labels

    @property
    def examples(self) -> int:
        """Training images, dealt or not."""
        return len(self._train)

    def batches(self, examples: Sequence[Example], batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
        """Yield shuffled batches, the last one smaller."""
        order = rng.permutation(len(examples))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            if isinstance(examples, Dealt):
                yield examples.gather(torch.from_numpy(places))
            else:
                chosen = [examples[i] for i in places]
                yield torch.stack([x for x, _ in chosen]), torch.tensor([y for _, y in chosen])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy."""
        device = next(model.parameters()).device
        return F.cross_entropy(model(batch[0].to(device)), batch[1].to(device))

    def evaluate(self, model: nn.Module, unit: int) -> Counts:
        """Return loss, hits and images of one shard."""
        chosen = torch.from_numpy(self._test[unit * self._unit_size : (unit + 1) * self._unit_size])
        device = next(model.parameters()).device
        labels = self._labels[chosen].to(device)
        scores = model(_scaled(self._images[chosen]).to(device))
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


def build_vision(options: VisionOptions, *, population: int | None, seed: int, data_dir: Path | None = None) -> VisionTask:
    """Return the task for a population, on the digits or on the idx files of a folder.

    Raises:
        ConfigError: no population, since images have no users of their own; or no folder, or files in it that are refused.
    """
    if population is None:
        named = "digits" if options.data == "digits" else "images"
        raise ConfigError(f"population.size: missing; the {named} are dealt to as many users as you say, 100 for example.")
    if options.data == "idx":
        if data_dir is None:
            raise ConfigError(
                "task.data: 'idx' reads images, but run.data_dir is not set; give their folder by --data-dir or run.data_dir."
            )
        return _build_idx(options, data_dir, population, seed)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return VisionTask((images / 16.0).astype(np.float32).reshape(-1, 1, 8, 8), labels, population, options, seed)


def _build_idx(options: VisionOptions, folder: Path, population: int, seed: int) -> VisionTask:
    images, labels = read_part(folder, "train", options.classes)
    test_images, test_labels = read_part(folder, "t10k", options.classes)
    if images.shape[1:] != test_images.shape[1:]:
        sizes = [f"{height} x {width}" for height, width in (images.shape[1:], test_images.shape[1:])]
        raise ConfigError(f"{folder}: the train images are {sizes[0]}, the t10k images {sizes[1]}; give files of one data set.")
    together = np.concatenate([images, test_images])[:, None]
    return VisionTask(together, np.concatenate([labels, test_labels]), population, options, seed, held_out=len(test_labels))


def _scaled(images: torch.Tensor) -> torch.Tensor:
    """Return float32 pixels in [0, 1]; those that are float32 already, as they are."""
    return images if images.is_floating_point() else images.float() / 255
