"""A folder of small idx files for tests, in the layout of MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np


def idx_bytes(values: np.ndarray) -> bytes:
    """Return an idx file of unsigned bytes."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()


def write_idx_folder(
    folder: Path, *, train: int = 60, test: int = 20, side: int = 8, classes: int = 10, zipped: bool = False, dotted: bool = False
) -> Path:
    """Write random images with a bright row that tells the class, and return the folder."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % classes
        images = rng.integers(0, 100, (count, side, side))
        images[np.arange(count), labels % side] += 155
        for name, values in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            name = name.replace("-idx", ".idx") if dotted else name
            data = idx_bytes(values)
            (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)
    return folder
