"""Images in idx files, as MNIST and Fashion-MNIST are published. What a header claims is never believed before the data is there."""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from fedclip.options import ConfigError

_UNSIGNED_BYTE: Final = 0x08
_CHUNK: Final = 1 << 20
_AGAIN: Final = "copy or download the file again"


def read_part(folder: Path, part: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of one part of a data set.

    Args:
        folder: has `<part>-images-idx3-ubyte` and `<part>-labels-idx1-ubyte`, also with a dot before `idx`, each plain or as `.gz`.
        part: `train` or `t10k`.
        classes: labels are 0 .. classes - 1.

    Returns:
        Pixels 0 to 255, uint8, shape (images, height, width), and labels, uint8, shape (images,).

    Raises:
        ConfigError: a file is missing, damaged or does not fit the other one; the message has its name.
    """
    images_file, labels_file = (_find(folder, f"{part}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ConfigError(
            f"{labels_file} has {len(labels)} labels, but {images_file} has {len(images)} images; give the two that belong together."
        )
    if labels.max() >= classes:
        raise ConfigError(
            f"{labels_file}: expected labels from 0 to {classes - 1}, found {labels.max()}; set task.classes to how many there are."
        )
    return images, labels


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the bytes of an idx file, plain or gzipped.

    Memory grows with what was read, up to the size that the header says and one chunk.

    Args:
        path: the file.
        dimensions: how many the header must have.

    Returns:
        uint8, writable, in the shape that the header says.

    Raises:
        ConfigError: the file cannot be read, is no idx file of unsigned bytes with so many dimensions, or its data is shorter or longer
            than its header says.
    """
    with _opened(path) as stream:
        shape = _read_header(stream, path, dimensions)
        size, data = math.prod(shape), bytearray()
        while len(data) < size and (chunk := stream.read(min(_CHUNK, size - len(data)))):
            data += chunk
        if len(data) < size:
            raise ConfigError(f"{path} is cut off: its header says {size} bytes of data, it has {len(data)}; {_AGAIN}.")
        if stream.read(1):
            raise ConfigError(f"{path} has more data than the {size} bytes that its header says; {_AGAIN}.")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_header(stream: BinaryIO, path: Path, dimensions: int) -> tuple[int, ...]:
    """Return the shape that the header says."""
    header = stream.read(4 + 4 * dimensions)
    if len(header) < 4 or header[:2] != b"\0\0":
        raise ConfigError(
            f"{path} is no idx file: it begins with {header[:4].hex(' ') or 'nothing'}, not 00 00 08 {dimensions:02x}; {_AGAIN}."
        )
    if header[2] != _UNSIGNED_BYTE:
        raise ConfigError(
            f"{path}: expected unsigned bytes (type 0x08), got type 0x{header[2]:02x}; convert the values to bytes from 0 to 255."
        )
    if header[3] != dimensions:
        raise ConfigError(f"{path}: expected {dimensions} dimensions, got {header[3]}; images have 3 (idx3), labels 1 (idx1).")
    if len(header) < 4 + 4 * dimensions:
        raise ConfigError(f"{path} is cut off: it has {len(header)} bytes of a header of {4 + 4 * dimensions}; {_AGAIN}.")
    shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", header[4:])
    if 0 in shape:
        raise ConfigError(f"{path} holds nothing: its header says {' x '.join(map(str, shape))}; give a file with at least one image.")
    return shape


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, through gzip if it begins as gzip does, and turn what goes wrong while reading into errors that name it."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not zipped:
                yield raw
                return
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield unzipped  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is damaged gzip: {error}; {_AGAIN}.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}; make it a file that you may read.") from error


def _find(folder: Path, name: str) -> Path:
    """Return the file of a name: as it is or with a dot before `idx`, plain or zipped."""
    for known in (name, name.replace("-idx", ".idx")):
        for path in (folder / known, folder / f"{known}.gz"):
            if path.exists():
                return path
    raise ConfigError(f"There is no {name} in {folder}, plain or as .gz; put it there, or correct run.data_dir.")
