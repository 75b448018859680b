"""Reading packed payloads, which may come from anybody: every length is known before anything is allocated. Format: docs/wire.md."""

from collections.abc import Sequence

import numpy as np
import torch
import zstandard

from fedclip.codec import WireError
from fedclip.layout import Layout
from fedclip.packed_format import (
    CODES,
    CODES_HALF_SCALES,
    DENSE,
    ESCAPE,
    FLOATS,
    HALVES,
    HEADER,
    LARGEST_BLOCK,
    MAGIC,
    SPARSE,
    VERSION,
    ZSTD,
    Array,
    checksum,
    symbol_count,
)
from fedclip.update import BLOCK, Codes, Grid, Half, decoded, lengths_of_blocks


def open_payload(payload: bytes, layout: Layout) -> tuple[int, int, int]:
    """Return form, grid and bits of a payload whose header and checksum are right."""
    if len(payload) < HEADER.size:
        raise WireError(f"Expected at least {HEADER.size} bytes, got {len(payload)}; truncated, or from another program.")
    magic, version, form, kind, bits, size, stated = HEADER.unpack_from(payload)
    if magic != MAGIC or version != VERSION:
        raise WireError(
            f"Expected a packed payload of version {VERSION}, got {magic!r} version {version}; sent by another codec or release?"
        )
    whole = memoryview(payload)
    if size != layout.size or checksum(layout, whole[: HEADER.size - 4], whole[HEADER.size :]) != stated:
        raise WireError(
            f"Expected an undamaged update of {layout.size} values, got one of {size} or a wrong checksum; damaged, or of another model."
        )
    has_codes = kind in (CODES, CODES_HALF_SCALES)
    if form not in (DENSE, SPARSE) or kind > CODES_HALF_SCALES or not (1 <= bits <= 8 if has_codes else bits == 0):
        raise WireError(f"Expected a known form, grid and bits, got {form}, {kind} and {bits}; made by a later release or another program.")
    return form, kind, bits


class Reader:
    """Takes sections from a body, each of a length that is known before."""

    def __init__(self, body: memoryview) -> None:
        self.rest = body
        self.zstd = zstandard.ZstdDecompressor()

    def take(self, size: int) -> memoryview:
        """Return the next bytes."""
        if size > len(self.rest):
            raise WireError(f"Expected {size} more bytes, got {len(self.rest)}; made by another program?")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def varint(self) -> int:
        """Return the next number."""
        number = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number
        raise WireError("Expected a length under 2^63, got more digits; made by another program?")

    def section(self, size: int, plain_size: int | None = None) -> tuple[memoryview | bytes, bool]:
        """Return the bytes of a section and whether they were compressed: `size` of them then, else `plain_size`."""
        length, how = divmod(self.varint(), 2)
        stored = self.take(length)
        if how == ZSTD:
            return _decompressed(stored, size, self.zstd), True
        plain_size = size if plain_size is None else plain_size
        if length != plain_size:
            raise WireError(f"Expected a section of {plain_size} bytes, got {length}; made by another program?")
        return stored, False

    def words(self, count: int, width: int) -> Array:
        """Return `count` unsigned numbers of `width` bytes, from one section a byte."""
        planes = np.empty((count, width), dtype=np.uint8)
        for i in range(width):
            planes[:, i] = np.frombuffer(self.section(count)[0], dtype=np.uint8)
        return planes.view(f"<u{width}").ravel().astype(f"u{width}", copy=False)

    def end(self) -> None:
        """Expect that nothing is left."""
        if len(self.rest):
            raise WireError(f"Expected the end, got {len(self.rest)} more bytes; made by another program?")


def _decompressed(stored: memoryview, size: int, zstd: zstandard.ZstdDecompressor) -> bytes:
    """Return what a single zstd frame holds, if that is `size` bytes: the frame says so before anything is allocated."""
    try:
        frame = zstandard.get_frame_parameters(stored)
        if size and frame.content_size == size and frame.window_size <= max(1024, 2 * size) and not frame.dict_id:
            raw = zstd.decompress(stored, max_output_size=size, allow_extra_data=False)
            if len(raw) == size:
                return raw
    except zstandard.ZstdError as error:
        raise WireError(f"Expected a zstd frame of {size} bytes, got a broken one ({error}); made by another program?") from error
    raise WireError(f"Expected a zstd frame of {size} bytes, got one of {frame.content_size}; made by another program?")


def read_positions(body: Reader, size: int) -> torch.Tensor:
    """Return the indices, which ascend by the way they are written."""
    kept, escapes = body.varint(), body.varint()
    if kept > size or escapes > size // ESCAPE:
        raise WireError(f"Expected at most {size} positions, got {kept} and {escapes} words that go on; made by another program?")
    words = body.words(kept + escapes, 2)
    ends = words != ESCAPE
    if int(np.count_nonzero(ends)) != kept or (escapes and not ends[-1]):
        raise WireError(f"Expected {kept} positions, got {int(np.count_nonzero(ends))} or an open end; made by another program?")
    places = np.cumsum(words, dtype=np.int64)
    indices = (places[ends] if escapes else places) + np.arange(kept, dtype=np.int64)
    if kept and indices[-1] >= size:
        raise WireError(f"Expected indices under {size}, got {indices[-1]}; made by another program?")
    return torch.from_numpy(indices)


def read_values(body: Reader, kind: int, bits: int, counts: Sequence[int]) -> tuple[torch.Tensor, Grid | None]:
    """Return the stored values, so many of each tensor, and their grid."""
    size = sum(counts)
    if kind in (FLOATS, HALVES):
        words = body.words(size, 4 if kind == FLOATS else 2)
        return torch.from_numpy(_floats(words)), None if kind == FLOATS else Half()
    block = body.varint()
    if not 1 <= block <= LARGEST_BLOCK:
        raise WireError(f"Expected blocks of 1 to 2^62 values, got {block}; made by another program?")
    lengths = lengths_of_blocks(counts, block)
    scales = torch.from_numpy(_floats(body.words(len(lengths), 4 if kind == CODES else 2)))
    if not bool(scales.isfinite().all()):
        raise WireError("Expected finite scales, got others; made by another program?")
    raw, unpacked = body.section(size, -(-bits * size // 8))
    symbols = np.frombuffer(raw, dtype=np.uint8) if unpacked else _unpacked_bits(raw, bits, size)
    if symbols.size and int(symbols.max()) >= symbol_count(bits):
        raise WireError(f"Expected codes of {bits} bits, got the symbol {int(symbols.max())}; made by another program?")
    codes = torch.from_numpy(_codes(symbols, bits))
    return decoded(codes, scales, lengths), Codes(codes, scales, block, bits)


def _floats(words: Array) -> Array:
    """Return the float32 numbers of `_words`."""
    values = np.empty(len(words), np.float32)
    for start in range(0, len(words), BLOCK):  # in blocks, so that what they need on the way takes no room
        part = words[start : start + BLOCK]
        turned = (part >> 1) | (part << (8 * part.itemsize - 1))
        values[start : start + BLOCK] = turned.view(np.float32 if part.itemsize == 4 else np.float16)
    return values


def _codes(symbols: Array, bits: int) -> Array:
    """Return the codes of symbols that are in range."""
    if bits == 1:
        return (2 * symbols.astype(np.int8) - 1).astype(np.int8)
    return (symbols - np.uint8((1 << (bits - 1)) - 1)).view(np.int8)


def _unpacked_bits(raw: bytes | memoryview, bits: int, size: int) -> Array:
    if bits == 8:
        return np.frombuffer(raw, dtype=np.uint8)
    flat = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))
    if flat[bits * size :].any():
        raise WireError("Expected zero bits after the last code, got others; made by another program?")
    return np.packbits(flat[: bits * size].reshape(size, bits), axis=1).ravel() >> np.uint8(8 - bits)
