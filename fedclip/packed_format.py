"""The packed wire format: what its writer and its reader share. Byte by byte: docs/wire.md."""

import json
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch

from fedclip.layout import Layout

Array = npt.NDArray[Any]

HEADER = struct.Struct("<4sBBBBQI")
"""Magic, version, form, grid, bits of a code (0: no codes), d, CRC-32 over the layout's shapes, this header and the body; 20 bytes."""

MAGIC, VERSION = b"FCP1", 1
DENSE, SPARSE = 0, 1
FLOATS, HALVES, CODES, CODES_HALF_SCALES = 0, 1, 2, 3
ESCAPE = 0xFFFF
"""A 16-bit word of a gap that goes on: 65,535 places, and no coordinate yet."""

RAW, ZSTD = 0, 1
LARGEST_BLOCK = 2**62


def checksum(layout: Layout, *parts: bytes | memoryview) -> int:
    """Return the CRC-32 of the shapes, then the header without its checksum and the body: another layout's payload does not pass."""
    found = zlib.crc32(json.dumps(layout.shapes).encode())
    for part in parts:
        found = zlib.crc32(part, found)
    return found


def symbol_count(bits: int) -> int:
    """Return how many different codes there are: 2 for one bit, else 2^bits - 1."""
    return 2 if bits == 1 else (1 << bits) - 1


def counts_of(indices: torch.Tensor | None, layout: Layout) -> Sequence[int]:
    """Return how many values of each tensor are stored: all, or those at some indices."""
    return layout.sizes if indices is None else layout.counts(indices)
