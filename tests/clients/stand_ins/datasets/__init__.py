"""Stands in for Hugging Face's datasets, of which the quickstart loads its central test set: more images of the same ten classes."""

from flwr_datasets import FederatedDataset

NO_NODE = 2**40


def load_dataset(path, split):
    return FederatedDataset(dataset=path, partitioners={}).load_partition(NO_NODE)
