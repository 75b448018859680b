"""Stands in for flwr-datasets where Flower's PyTorch quickstart is run without a network: generated images in place of CIFAR-10.

Put the folder that holds this package first on PYTHONPATH, and the quickstart runs as it is, without a change to its files.
"""

import numpy as np

IMAGES = 100  # of each node


class Examples:
    """Labelled images, with the few methods of a Hugging Face `Dataset` that the quickstart calls."""

    def __init__(self, images, labels, transform=None):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        batch = self.transform({"img": [self.images[index]], "label": [int(self.labels[index])]})
        return {name: values[0] for name, values in batch.items()}

    def with_transform(self, transform):
        return Examples(self.images, self.labels, transform)

    def train_test_split(self, test_size, seed):
        order = np.random.default_rng(seed).permutation(len(self))
        held_out = round(test_size * len(self))
        parts = {"train": order[held_out:], "test": order[:held_out]}
        return Split({name: Examples(self.images[rows], self.labels[rows]) for name, rows in parts.items()})


class Split(dict):
    """Examples by the name of their part."""

    def with_transform(self, transform):
        return Split({name: part.with_transform(transform) for name, part in self.items()})


class FederatedDataset:
    """Ten classes, each a pattern of its own under noise; the images of a partition follow from its number."""

    def __init__(self, *, dataset, partitioners):
        self.patterns = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3))

    def load_partition(self, partition_id):
        rng = np.random.default_rng([1, partition_id])
        labels = rng.integers(0, 10, IMAGES)
        noise = rng.integers(-64, 65, (IMAGES, 32, 32, 3))
        return Examples(np.clip(self.patterns[labels] + noise, 0, 255).astype(np.uint8), labels)
