"""Sealed files: tensors and plain data in one file, with a checksum over all of it, that is read back bit for bit or refused.

In a row: magic, one line; the header's length, 8 bytes; the header, JSON; the tensors, raw little-endian; BLAKE2b of all that, 32 bytes.
"""

import dataclasses
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fedclip.storage import Chunk, Storage, replace
from fedclip.transform import State

VERSION = 1
_DIGEST = 32
_TYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "int64": torch.int64}


class SealedFileError(Exception):
    """A file that cannot be taken for what it should be: damaged, cut, of another kind or version. The message says which and why."""


def write_sealed(storage: Storage, path: Path, kind: str, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a sealed file so that after any crash it is there whole, or as it was before.

    Args:
        storage: where to.
        path: the file.
        kind: a word for what it is; a reader asks for it.
        data: what JSON can hold.
        tensors: named tensors of float16, float32, float64 or int64; written from where they are, without a copy on the CPU.
    """
    replace(storage, path, sealed(kind, data, tensors))


def sealed(kind: str, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[Chunk]:
    """Return the content of a sealed file, piece by piece."""
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    header = json.dumps({"data": data, "tensors": [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()]}).encode()
    digest = hashlib.blake2b(digest_size=_DIGEST)
    raw: list[Chunk] = [a.reshape(-1).view(np.uint8).data for a in arrays.values() if a.size]
    for chunk in [_magic(kind), struct.pack("<Q", len(header)), header, *raw]:
        digest.update(chunk)
        yield chunk
    yield digest.digest()


class Reader(Protocol):
    """Reads files: a `Storage`, or whoever has them."""

    def read(self, path: Path) -> bytes:
        """Return a file's content."""


def digest_of(storage: Storage, path: Path) -> bytes:
    """Return the checksum that a sealed file ends in: 32 bytes, that nobody has checked.

    Raises:
        SealedFileError: no such file.
    """
    try:
        return storage.read_end(path, _DIGEST)
    except OSError as error:
        raise SealedFileError(f"{path} cannot be read: {error}.") from error


def read_sealed(storage: Reader, path: Path, kind: str, asked: bytes | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the data and the tensors of a sealed file; where it is asked for by its checksum, of that one and no other.

    Raises:
        SealedFileError: no such file, or not one byte for byte as it was written, or of another kind or version.
    """
    try:
        content = memoryview(storage.read(path))
    except OSError as error:
        raise SealedFileError(f"{path} cannot be read: {error}.") from error
    magic, body, digest = _magic(kind), content[:-_DIGEST], content[-_DIGEST:]
    if bytes(content[:8]) != magic[:8]:
        raise SealedFileError(f"{path} is no file of this project, or its beginning is damaged.")
    if hashlib.blake2b(body, digest_size=_DIGEST).digest() != bytes(digest):
        raise SealedFileError(f"{path} is damaged: its checksum does not fit its {len(content)} bytes.")
    if asked is not None and bytes(digest) != asked:
        raise SealedFileError(f"{path} has the checksum {digest.hex()}, expected {asked.hex()}; it was written another time.")
    if bytes(body[: len(magic)]) != magic:
        line = bytes(body[:64]).split(b"\n")[0].decode("ascii", "replace")
        raise SealedFileError(f"{path} is '{line}', expected '{magic.decode().strip()}'; was it written by another version?")
    (length,) = struct.unpack("<Q", body[len(magic) : len(magic) + 8])
    start = len(magic) + 8
    header = json.loads(bytes(body[start : start + length]))
    start += length
    tensors = {}
    for name, dtype, shape in header["tensors"]:
        size = math.prod(shape) * _TYPES[dtype].itemsize
        values = np.frombuffer(body, dtype=dtype, count=math.prod(shape), offset=start).copy() if size else np.zeros(0, dtype)
        tensors[name] = torch.from_numpy(values).view(shape)
        start += size
    return header["data"], tensors


def pack_state(state: State) -> tuple[list[int | float | None], dict[str, torch.Tensor]]:
    """Return the numbers and the tensors of a state: None, a tensor, a number, or a tuple or dataclass of states.

    Where the list has None, the tensor of that place stands in the dictionary.

    Raises:
        TypeError: anything else is in it.
    """
    parts = list(_leaves(state))
    tensors = {str(n): part for n, part in enumerate(parts) if isinstance(part, torch.Tensor)}
    return [None if isinstance(part, torch.Tensor) else part for part in parts], tensors


def unpack_state(template: State, numbers: list[int | float | None], tensors: Mapping[str, torch.Tensor]) -> State:
    """Return the state that `pack_state` took apart, in the structure and on the devices of a template.

    Raises:
        ValueError: it is not of that structure: another chain's, or another model's.
    """
    parts = iter([tensors.get(str(n)) if number is None else number for n, number in enumerate(numbers)])
    state = _with_leaves(template, parts)
    if next(parts, None) is not None:
        raise ValueError("Expected a state of fewer parts; it is another chain's.")
    return state


def _leaves(state: State) -> Iterator[Any]:
    if isinstance(state, tuple):
        for part in state:
            yield from _leaves(part)
    elif dataclasses.is_dataclass(state):
        for field in dataclasses.fields(state):
            yield from _leaves(getattr(state, field.name))
    elif isinstance(state, torch.Tensor | int | float):
        yield state
    elif state is not None:
        raise TypeError(f"Expected a state of tensors, numbers, tuples and dataclasses, got {type(state).__name__}; it cannot be kept.")


def _with_leaves(template: State, parts: Iterator[Any]) -> State:
    if template is None:
        return None
    if isinstance(template, tuple):
        return tuple(_with_leaves(part, parts) for part in template)
    if dataclasses.is_dataclass(template) and not isinstance(template, type):
        return dataclasses.replace(
            template, **{f.name: _with_leaves(getattr(template, f.name), parts) for f in dataclasses.fields(template)}
        )
    leaf = next(parts, None)
    if isinstance(template, torch.Tensor):
        if not isinstance(leaf, torch.Tensor) or (leaf.shape, leaf.dtype) != (template.shape, template.dtype):
            raise ValueError(f"Expected {_describe(template)}, got {_describe(leaf)}; the state is another chain's, or another model's.")
        return leaf.to(template.device)
    if type(leaf) is not type(template):
        raise ValueError(f"Expected a number like {template}, got {_describe(leaf)}; the state is another chain's.")
    return leaf


def _describe(leaf: Any) -> str:
    return f"a tensor of shape {tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else f"{type(leaf).__name__} {leaf}"


def _magic(kind: str) -> bytes:
    return f"fedclip {kind} {VERSION}\n".encode("ascii")
