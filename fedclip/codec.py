"""Lossless wire formats: what `encode` makes is what the wire carries, and its length is the only figure of the bandwidth meter."""

import struct
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedclip.layout import Layout
from fedclip.update import Dense, Scaled, Update, to_dense

HEADER = struct.Struct("<4sBxxxQI")
"""Magic, version, three zero bytes, number of values, CRC-32 of the values; 20 bytes, little-endian."""
MAGIC, VERSION = b"FCD1", 1


class WireError(ValueError):
    """A payload that is not what this layout's codec writes: truncated, damaged, foreign or oversized."""


class Codec(ABC):
    """Bytes for an update and back, bit for bit: `decode(encode(x)) == x`."""

    @abstractmethod
    def encode(self, update: Update, layout: Layout) -> bytes:
        """Return the payload of an update."""

    @abstractmethod
    def decode(self, payload: bytes, layout: Layout) -> Update:
        """Return the update of a payload, whatever its source: it trusts nothing and allocates no more than the layout says.

        Raises:
            WireError: the payload is not a whole, undamaged update of this layout.
        """

    def largest(self, layout: Layout, stored: int | None = None) -> int:
        """Return how many bytes the payload of an update has at most, whatever its values are.

        A codec of one's own that says nothing has room for a position, a value and its scale of each coordinate.

        Args:
            layout: of the update.
            stored: the update is sparse and stores at most so many values, where the chain says so; None: it is dense.
        """
        return 12 * layout.size + 4096

    def carried(self, update: Update, layout: Layout) -> tuple[Update, int]:
        """Return `decode(encode(update))` and the length of the payload, for who forms the sum in the process that trained."""
        payload = self.encode(update, layout)
        return self.decode(payload, layout), len(payload)


@dataclass(frozen=True)
class DenseCodec(Codec):
    """Every coordinate as a little-endian float32 behind a 20-byte header. NaN payloads and signed zeros survive."""

    stage_name: ClassVar[str] = "dense"

    def encode(self, update: Update, layout: Layout) -> bytes:
        """Return 20 + 4 d bytes."""
        body = np.ascontiguousarray(to_dense(update, layout).detach().cpu().numpy(), "<f4").data.cast("B")
        return b"".join((HEADER.pack(MAGIC, VERSION, layout.size, zlib.crc32(body)), body))

    def decode(self, payload: bytes, layout: Layout) -> Dense:
        """Return the dense update."""
        expected = HEADER.size + 4 * layout.size
        if len(payload) != expected:
            raise WireError(f"Expected {expected} bytes for {layout.size} values, got {len(payload)}; truncated, or of another model.")
        magic, version, size, checksum = HEADER.unpack_from(payload)
        if magic != MAGIC or version != VERSION:
            raise WireError(
                f"Expected a dense payload of version {VERSION}, got {magic!r} version {version}; sent by another codec or release?"
            )
        body = memoryview(payload)[HEADER.size :]
        if any(payload[5:8]) or size != layout.size or zlib.crc32(body) != checksum:
            raise WireError(f"Expected {layout.size} undamaged values, got {size} with a wrong checksum or header; damaged on the way.")
        return Dense(torch.from_numpy(np.frombuffer(body, dtype="<f4").astype(np.float32)))

    def largest(self, layout: Layout, stored: int | None = None) -> int:
        """Return 20 + 4 d; of a subclass that writes other bytes, what codecs have room for that say nothing."""
        dense = type(self).encode is DenseCodec.encode
        return HEADER.size + 4 * layout.size if dense else super().largest(layout, stored)

    def carried(self, update: Update, layout: Layout) -> tuple[Update, int]:
        """Return the update itself and the 20 + 4 d bytes that nobody needs to make, where it is what `decode` would return."""
        if isinstance(update, Dense) and update.grid is None:
            vector = update.unscaled if isinstance(update, Scaled) else update.vector
            if (vector.shape, vector.dtype, vector.requires_grad) == ((layout.size,), torch.float32, False):
                return update, HEADER.size + 4 * layout.size
        return super().carried(update, layout)
