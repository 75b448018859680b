"""`PackedCodec`: updates of few coordinates or few bits in few bytes, without loss. The format byte by byte: docs/wire.md."""

import struct
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import zstandard

from fedclip.codec import Codec
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
    RAW,
    SPARSE,
    VERSION,
    ZSTD,
    Array,
    checksum,
    counts_of,
    symbol_count,
)
from fedclip.packed_reader import Reader, open_payload, read_positions, read_values
from fedclip.update import BLOCK, LARGE, Codes, Dense, Grid, Half, Sparse, Update, decoded, lengths_of_blocks, values_of

Compressors = tuple[zstandard.ZstdCompressor, ...]

LEVELS = range(1, 20)

LONGEST_VARINT = 10
"""Bytes of the largest number under 2^63 and of the length of the largest section."""


@dataclass(frozen=True)
class PackedCodec(Codec):
    """Positions as sorted gaps, values in as few bits as their grid has; the bytes of a place together, zstd where it helps.

    Lossless: `decode(encode(x))` has the bits of x, NaN payloads and signed zeros among them, at the same indices on the same
    grid. Two things may change, and no value with them: a dense update with over half of its coordinates +0.0 comes back as a
    sparse one of the others where that is smaller (and the other way round), and a grid that does not hold its values bit for
    bit is not written.

    Damage is found by a CRC-32 over everything, which is no defence against an adversary: there is nothing to defend, as any
    client may send any update, and what bounds it is the guard.

    Attributes:
        level: zstd's, 1 to 19. Higher ones gain a percent and cost tens of times the time.
    """

    stage_name: ClassVar[str] = "packed"
    level: int = 3

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"Expected a zstd level from {LEVELS[0]} to {LEVELS[-1]}, got {self.level}.")

    def encode(self, update: Update, layout: Layout) -> bytes:
        """Return the payload: the smaller of the dense and the sparse form, where both are exact.

        Raises:
            ValueError: the update is no float32 update of this layout, or its indices do not ascend.
        """
        _check_fits(update, layout)
        grid = update.grid if _holds(update, layout) else None
        update = _without_gradient(update, grid)
        compressors = zstandard.ZstdCompressor(self.level), zstandard.ZstdCompressor(compression_params=_letters_alone())
        return min((_payload(form, layout, compressors) for form in _forms(update, layout)), key=len)

    def largest(self, layout: Layout, stored: int | None = None) -> int:
        """Return 5 bytes a value of a dense update, or 7 a stored one of a sparse update, and what stands around them.

        A section is never longer than what it holds. The most that a value takes is an 8-bit code with a float32 scale of its own, and
        its position 16 bits, with one word more for 65,535 places without a coordinate.
        """
        if type(self).encode is not PackedCodec.encode:
            return super().largest(layout, stored)  # of a codec that writes bytes of its own nothing is known
        kept = layout.size if stored is None else min(stored, layout.size)
        values = 5 * kept + LONGEST_VARINT + 5 * LONGEST_VARINT
        if stored is None:
            return HEADER.size + values
        return HEADER.size + values + 2 * (kept + layout.size // ESCAPE) + 4 * LONGEST_VARINT

    def decode(self, payload: bytes, layout: Layout) -> Update:
        """Return the update of a payload; what is allocated is a small multiple of the layout's size, whatever the payload says."""
        form, kind, bits = open_payload(payload, layout)
        body = Reader(memoryview(payload)[HEADER.size :])
        indices = read_positions(body, layout.size) if form == SPARSE else None
        values, grid = read_values(body, kind, bits, counts_of(indices, layout))
        body.end()
        return Dense(values, grid) if indices is None else Sparse(indices, values, grid)


def _check_fits(update: Update, layout: Layout) -> None:
    values = values_of(update)
    if values.dtype != torch.float32:
        raise ValueError(f"Expected float32 values, got {values.dtype}; convert the update first.")
    if isinstance(update, Dense):
        layout.split(update.vector)
        return
    indices = update.indices
    if indices.shape != values.shape or indices.ndim != 1 or indices.dtype != torch.int64:
        found = f"{indices.dtype} {tuple(indices.shape)} for values {tuple(values.shape)}"
        raise ValueError(f"Expected one int64 index a value, got {found}.")
    if not indices.numel():
        return
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= layout.size or not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(f"Expected ascending, distinct indices from 0 to {layout.size - 1}, got {first} … {last}; sort them first.")


def _without_gradient(update: Update, grid: Grid | None) -> Update:
    """Return the same update on the CPU, detached and contiguous, on a grid."""
    values = values_of(update).detach().cpu().contiguous()
    return Dense(values, grid) if isinstance(update, Dense) else Sparse(update.indices.cpu().contiguous(), values, grid)


def _holds(update: Update, layout: Layout) -> bool:
    """Return whether the update's grid says its values bit for bit, on any machine."""
    grid, values = update.grid, values_of(update).detach()
    if grid is None or isinstance(grid, Half):
        return grid is not None and _are_halves(values)
    if not (1 <= grid.bits <= 8 and 1 <= grid.block <= LARGEST_BLOCK) or grid.codes.dtype != torch.int8 or grid.codes.shape != values.shape:
        return False
    lengths = lengths_of_blocks(counts_of(None if isinstance(update, Dense) else update.indices, layout), grid.block)
    if grid.scales.shape != (len(lengths),) or grid.scales.dtype != torch.float32 or not bool(grid.scales.isfinite().all()):
        return False
    symbols = _symbols(grid.codes.cpu().numpy(), grid.bits)
    valid = not symbols.size or int(symbols.max()) < symbol_count(grid.bits)
    if grid.bits == 1:
        valid = valid and bool((grid.codes != 0).all())
    return valid and _same_bits(decoded(grid.codes, grid.scales, lengths), values)


def _are_halves(values: torch.Tensor) -> bool:
    """Return whether float16 holds the values bit for bit, as NumPy converts them: PyTorch keeps a NaN's payload or not, by its place."""
    floats = values.detach().cpu().numpy()
    with np.errstate(all="ignore"):
        return np.array_equal(floats.astype(np.float16).astype(np.float32).view(np.uint32), floats.view(np.uint32))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def _forms(update: Update, layout: Layout) -> list[Update]:
    """Return the forms that an update can travel in without loss, dense first.

    All coordinates are a dense update. Codes keep their form, since blocks are counted in stored values. Others may lose their
    zeros (+0.0, by their bits) or gain them, but a sparse update that stores zeros keeps them: so both forms of an update make
    the same choice. Where half of the coordinates or fewer are not zero, the sparse form alone is tried.
    """
    values, size = values_of(update), layout.size
    if isinstance(update, Sparse) and values.numel() == size:
        update = Dense(values, update.grid)
    if isinstance(update.grid, Codes):
        return [update]
    stored = values.view(torch.int32) != 0
    kept = int(stored.count_nonzero())
    if isinstance(update, Sparse):
        if kept < values.numel() or 2 * kept <= size:
            return [update]
        return [Dense(torch.zeros(size).index_copy_(0, update.indices, values), update.grid), update]
    if kept == size or (size > LARGE and 8 * kept > 7 * size):  # zeros are few, and positions of a large model are gigabytes
        return [update]
    indices = stored.nonzero().flatten()
    sparse = Sparse(indices, values[indices], update.grid)
    return [sparse] if 2 * kept <= size else [update, sparse]


def _payload(update: Update, layout: Layout, zstd: Compressors) -> bytes:
    grid, parts = update.grid, []
    if isinstance(update, Sparse):
        parts += _positions(update.indices.numpy(), zstd)
    bits, kind = 0, FLOATS
    if isinstance(grid, Codes):
        bits, scales = grid.bits, grid.scales.detach().cpu()
        exact = _are_halves(scales)
        kind = CODES_HALF_SCALES if exact else CODES
        parts += [_varint(grid.block), *_sections(_words(scales.numpy(), exact), zstd)]
        symbols = _symbols(grid.codes.cpu().numpy(), bits)
        parts.append(_section(symbols.tobytes(), zstd, _packed_bits(symbols, bits)))
    else:
        kind = HALVES if grid is not None else FLOATS
        parts += _sections(_words(values_of(update).numpy(), grid is not None), zstd)
    form = SPARSE if isinstance(update, Sparse) else DENSE
    head = HEADER.pack(MAGIC, VERSION, form, kind, bits, layout.size, 0)[:-4]
    return b"".join([head, struct.pack("<I", checksum(layout, head, *parts)), *parts])


def _letters_alone() -> zstandard.ZstdCompressionParameters:
    """Return settings that look for hardly any repetition: where bytes are independent, what the levels find costs more than it saves.

    Of the high bytes of gaps at uniform positions they make 3.5 bits each, where level 3 makes 4.0 and their entropy is 3.4.
    """
    return zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, min_match=7, window_log=17, hash_log=6, chain_log=6)


def _positions(indices: Array, zstd: Compressors) -> list[bytes]:
    """Return how many coordinates there are, how many words go on, and the gaps between the coordinates in 16-bit words."""
    gaps = np.diff(indices, prepend=-1) - 1
    escapes = gaps // ESCAPE
    if escapes.any():
        words = np.full(gaps.size + int(escapes.sum()), ESCAPE, dtype=np.uint16)
        words[np.cumsum(escapes + 1) - 1] = gaps % ESCAPE
    else:
        words = gaps.astype(np.uint16)
    return [_varint(indices.size), _varint(words.size - indices.size), *_sections(words, zstd)]


def _words(values: Array, half: bool) -> Array:
    """Return floating-point numbers as unsigned ones with the sign as the lowest bit, so that the highest byte is all exponent."""
    words = np.empty(values.shape, np.uint16 if half else np.uint32)
    for start in range(0, len(values), BLOCK):  # in blocks, so that what they need on the way takes no room
        part = values[start : start + BLOCK]
        turned = part.astype(np.float16).view(np.uint16) if half else part.view(np.uint32)
        words[start : start + BLOCK] = (turned << 1) | (turned >> (8 * turned.itemsize - 1))
    return words


def _sections(words: Array, zstd: Compressors) -> list[bytes]:
    """Return a section for each byte of the words, the lowest first."""
    planes = words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1, words.itemsize)
    return [_section(planes[:, i].tobytes(), zstd) for i in range(words.itemsize)]


def _section(raw: bytes, zstd: Compressors, also: bytes | None = None) -> bytes:
    """Return bytes as they are (or as `also` says them, in a known length) or compressed, whatever is shorter, behind their length."""
    plain = raw if also is None else also
    packed = min((z.compress(raw) for z in zstd), key=len) if raw else raw
    stored, how = (packed, ZSTD) if len(packed) < len(plain) else (plain, RAW)
    return _varint(2 * len(stored) + how) + stored


def _varint(number: int) -> bytes:
    """Return 7 bits a byte, the lowest first, each but the last with the highest bit set."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _symbols(codes: Array, bits: int) -> Array:
    """Return codes as unsigned bytes from 0 on; a code out of range gives a symbol of `symbol_count` or more (0 for one bit)."""
    if bits == 1:
        return (codes.view(np.uint8) + np.uint8(1)) >> np.uint8(1)
    return codes.view(np.uint8) + np.uint8((1 << (bits - 1)) - 1)


def _packed_bits(symbols: Array, bits: int) -> bytes:
    """Return the `bits` low bits of each symbol one after another, the highest first, in ceil(bits k / 8) bytes."""
    if bits == 8:
        return symbols.tobytes()
    return np.packbits(np.unpackbits(symbols[:, None], axis=1)[:, 8 - bits :]).tobytes()
