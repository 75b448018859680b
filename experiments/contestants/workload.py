"""The work that every contestant is timed on: the same images, batches, local SGD and clip for each virtual user.

A user has 20 random images of 28 x 28 with labels of 62 classes, all drawn from the user's number, and trains one epoch in batches of
10. Imports PyTorch and NumPy alone: interpreters that lack the project run it too.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SAMPLES, BATCH, LR, CLIP, CLASSES = 20, 10, 0.05, 1.0, 62

Batch = tuple[torch.Tensor, torch.Tensor]


class MLP(nn.Module):
    """One hidden layer of 256: 216,894 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(784, 256), nn.Linear(256, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores, shape (batch, classes), of images (batch, 1, 28, 28)."""
        return self.out(F.relu(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]


class CNN200k(nn.Module):
    """Two 5 x 5 convolutions with pooling and a layer of 300: 185,810 parameters, about the CNN of LEAF (arXiv 1812.01097)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 5), nn.Conv2d(16, 32, 5)
        self.hidden, self.out = nn.Linear(512, 300), nn.Linear(300, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores, shape (batch, classes), of images (batch, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.out(F.relu(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]


class CNN1m2(nn.Module):
    """Two 3 x 3 convolutions and a layer of 128: 1,206,590 parameters, the CNN of FEMNIST without dropout (arXiv 2003.00295)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.hidden, self.out = nn.Linear(9216, 128), nn.Linear(128, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores, shape (batch, classes), of images (batch, 1, 28, 28)."""
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return self.out(F.relu(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]


MODELS: dict[str, type[nn.Module]] = {"mlp": MLP, "cnn200k": CNN200k, "cnn1m2": CNN1m2}


def make_model(name: str) -> nn.Module:
    """Return a model with the same initial weights at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        return MODELS[name]()


def user_data(user: int) -> Batch:
    """Return a user's images, float32 in [0, 1), shape (20, 1, 28, 28), and labels, int64, shape (20,)."""
    rng = np.random.default_rng(user)
    images = rng.random((SAMPLES, 1, 28, 28), dtype=np.float32)
    return torch.from_numpy(images), torch.from_numpy(rng.integers(0, CLASSES, SAMPLES))


def batches(images: torch.Tensor, labels: torch.Tensor, user: int) -> Iterator[Batch]:
    """Yield a user's batches, in the same order whoever asks."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(user))
    for chosen in torch.split(order, BATCH):
        yield images[chosen], labels[chosen]


def train_user(model: nn.Module, start: list[torch.Tensor], user: int) -> list[torch.Tensor]:
    """Train a user as plainly as PyTorch lets one, and return the update (local minus global), clipped by its norm, a tensor each.

    Args:
        model: takes the parameters.
        start: the global parameters, a tensor each.
        user: the user's number.
    """
    params: list[torch.Tensor] = [*model.parameters()]
    with torch.no_grad():
        torch._foreach_copy_(params, start)
    for images, labels in batches(*user_data(user), user):
        images, labels = images.to(start[0].device), labels.to(start[0].device)
        grads = torch.autograd.grad(F.cross_entropy(model(images), labels), params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-LR)
    with torch.no_grad():
        update = list(torch._foreach_sub(params, start))
        norm = torch.stack(torch._foreach_norm(update)).norm()
        torch._foreach_mul_(update, torch.clamp(CLIP / norm, max=1.0))
    return update
