"""`PackedCodec`: updates of few coordinates or few bits in few bytes, without loss. The format byte by byte: docs/wire.md."""

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from fedclip.codec import Codec, WireError
from fedclip.layout import Layout
from fedclip.update import Codes, Dense, Grid, Half, Sparse, Update, decoded, lengths_of_blocks, values_of

Array = npt.NDArray[Any]
Compressors = tuple[zstandard.ZstdCompressor, ...]

HEADER = struct.Struct("<4sBBBBQI")
"""Magic, version, form, grid, bits of a code (0: no codes), d, CRC-32 over the layout's shapes, this header and the body; 20 bytes."""

MAGIC, VERSION = b"FCP1", 1
DENSE, SPARSE = 0, 1
FLOATS, HALVES, CODES, CODES_HALF_SCALES = 0, 1, 2, 3
ESCAPE = 0xFFFF
"""A 16-bit word of a gap that goes on: 65,535 places, and no coordinate yet."""

RAW, ZSTD = 0, 1
LEVELS = range(1, 20)
LARGEST_BLOCK = 2**62


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

    def decode(self, payload: bytes, layout: Layout) -> Update:
        """Return the update of a payload; what is allocated is a small multiple of the layout's size, whatever the payload says."""
        form, kind, bits = _open(payload, layout)
        body = _Reader(memoryview(payload)[HEADER.size :])
        indices = _read_positions(body, layout.size) if form == SPARSE else None
        values, grid = _read_values(body, kind, bits, _counts(indices, layout))
        body.end()
        return Dense(values, grid) if indices is None else Sparse(indices, values, grid)


# What is sent


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
    lengths = lengths_of_blocks(_counts(None if isinstance(update, Dense) else update.indices, layout), grid.block)
    if grid.scales.shape != (len(lengths),) or grid.scales.dtype != torch.float32 or not bool(grid.scales.isfinite().all()):
        return False
    symbols = _symbols(grid.codes.cpu().numpy(), grid.bits)
    valid = not symbols.size or int(symbols.max()) < _symbol_count(grid.bits)
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
    if kept == size:
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
    body = b"".join(parts)
    form = SPARSE if isinstance(update, Sparse) else DENSE
    head = HEADER.pack(MAGIC, VERSION, form, kind, bits, layout.size, 0)[:-4]
    return head + struct.pack("<I", _checksum(head, body, layout)) + body


def _letters_alone() -> zstandard.ZstdCompressionParameters:
    """Return settings that look for hardly any repetition: where bytes are independent, what the levels find costs more than it saves.

    Of the high bytes of gaps at uniform positions they make 3.5 bits each, where level 3 makes 4.0 and their entropy is 3.4.
    """
    return zstandard.ZstdCompressionParameters(strategy=zstandard.STRATEGY_FAST, min_match=7, window_log=17, hash_log=6, chain_log=6)


def _checksum(head: bytes | memoryview, body: bytes | memoryview, layout: Layout) -> int:
    """Return the CRC-32 of the shapes, the header without its checksum, and the body: another layout's payload does not pass."""
    return zlib.crc32(body, zlib.crc32(head, zlib.crc32(json.dumps(layout.shapes).encode())))


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
    words = values.astype(np.float16).view(np.uint16) if half else values.view(np.uint32)
    return (words << 1) | (words >> (8 * words.itemsize - 1))


def _floats(words: Array) -> Array:
    """Return the float32 numbers of `_words`."""
    turned = (words >> 1) | (words << (8 * words.itemsize - 1))
    return turned.view(np.float32) if words.itemsize == 4 else turned.view(np.float16).astype(np.float32)


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


# Codes


def _symbol_count(bits: int) -> int:
    """Return how many different codes there are: 2 for one bit, else 2^bits - 1."""
    return 2 if bits == 1 else (1 << bits) - 1


def _symbols(codes: Array, bits: int) -> Array:
    """Return codes as unsigned bytes from 0 on; a code out of range gives a symbol of `_symbol_count` or more (0 for one bit)."""
    if bits == 1:
        return (codes.view(np.uint8) + np.uint8(1)) >> np.uint8(1)
    return codes.view(np.uint8) + np.uint8((1 << (bits - 1)) - 1)


def _codes(symbols: Array, bits: int) -> Array:
    """Return the codes of symbols that are in range."""
    if bits == 1:
        return (2 * symbols.astype(np.int8) - 1).astype(np.int8)
    return (symbols - np.uint8((1 << (bits - 1)) - 1)).view(np.int8)


def _packed_bits(symbols: Array, bits: int) -> bytes:
    """Return the `bits` low bits of each symbol one after another, the highest first, in ceil(bits k / 8) bytes."""
    if bits == 8:
        return symbols.tobytes()
    return np.packbits(np.unpackbits(symbols[:, None], axis=1)[:, 8 - bits :]).tobytes()


def _unpacked_bits(raw: bytes | memoryview, bits: int, size: int) -> Array:
    if bits == 8:
        return np.frombuffer(raw, dtype=np.uint8)
    flat = np.unpackbits(np.frombuffer(raw, dtype=np.uint8))
    if flat[bits * size :].any():
        raise WireError("Expected zero bits after the last code, got others; made by another program?")
    return np.packbits(flat[: bits * size].reshape(size, bits), axis=1).ravel() >> np.uint8(8 - bits)


# What comes in


def _open(payload: bytes, layout: Layout) -> tuple[int, int, int]:
    """Return form, grid and bits of a payload whose header and checksum are right."""
    if len(payload) < HEADER.size:
        raise WireError(f"Expected at least {HEADER.size} bytes, got {len(payload)}; truncated, or from another program.")
    magic, version, form, kind, bits, size, checksum = HEADER.unpack_from(payload)
    if magic != MAGIC or version != VERSION:
        raise WireError(
            f"Expected a packed payload of version {VERSION}, got {magic!r} version {version}; sent by another codec or release?"
        )
    whole = memoryview(payload)
    if size != layout.size or _checksum(whole[: HEADER.size - 4], whole[HEADER.size :], layout) != checksum:
        raise WireError(
            f"Expected an undamaged update of {layout.size} values, got one of {size} or a wrong checksum; damaged, or of another model."
        )
    has_codes = kind in (CODES, CODES_HALF_SCALES)
    if form not in (DENSE, SPARSE) or kind > CODES_HALF_SCALES or not (1 <= bits <= 8 if has_codes else bits == 0):
        raise WireError(f"Expected a known form, grid and bits, got {form}, {kind} and {bits}; made by a later release or another program.")
    return form, kind, bits


class _Reader:
    """Takes sections from a body, each of a length that is known before."""

    def __init__(self, body: memoryview) -> None:
        self.rest = body
        self.zstd = zstandard.ZstdDecompressor()

    def take(self, size: int) -> memoryview:
        if size > len(self.rest):
            raise WireError(f"Expected {size} more bytes, got {len(self.rest)}; made by another program?")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def varint(self) -> int:
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


def _read_positions(body: _Reader, size: int) -> torch.Tensor:
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


def _read_values(body: _Reader, kind: int, bits: int, counts: Sequence[int]) -> tuple[torch.Tensor, Grid | None]:
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
    if symbols.size and int(symbols.max()) >= _symbol_count(bits):
        raise WireError(f"Expected codes of {bits} bits, got the symbol {int(symbols.max())}; made by another program?")
    codes = torch.from_numpy(_codes(symbols, bits))
    return decoded(codes, scales, lengths), Codes(codes, scales, block, bits)


def _counts(indices: torch.Tensor | None, layout: Layout) -> Sequence[int]:
    """Return how many values of each tensor are stored: all, or those at some indices."""
    return layout.sizes if indices is None else layout.counts(indices)
