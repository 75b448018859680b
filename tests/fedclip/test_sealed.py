"""Sealed files: read back bit for bit, or refused with the cause."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.layout import Layout
from fedclip.optimizers import Moments
from fedclip.sealed import SealedFileError, pack_state, read_sealed, unpack_state, write_sealed
from fedclip.storage import Storage

DISK = Storage()
LAYOUT = Layout(("w",), ((3,),), ("w",))
TENSORS = {
    "a": torch.randn(5, 3),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "whole": torch.arange(4),
    "half": torch.ones(2, dtype=torch.float16),
    "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
}
DATA = {"round": 3, "text": "é", "list": [1, None, 0.1]}


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "file"
    write_sealed(DISK, path, "thing", DATA, TENSORS)
    data, tensors = read_sealed(DISK, path, "thing")
    assert data == DATA
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert tensors[name].numpy().tobytes() == tensor.numpy().tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@given(at=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
def test_every_flipped_bit_and_every_cut_is_refused(tmp_path_factory, at, bit, cut):
    path = tmp_path_factory.mktemp("damaged") / "file"
    write_sealed(DISK, path, "thing", DATA, TENSORS)
    content = bytearray(path.read_bytes())
    at %= len(content)
    if cut:
        content = content[:at]
    else:
        content[at] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(SealedFileError, match=r"damaged|no file of this project"):
        read_sealed(DISK, path, "thing")


def test_another_kind_and_no_file_are_refused(tmp_path):
    write_sealed(DISK, tmp_path / "file", "thing", {}, {})
    with pytest.raises(SealedFileError, match="is 'fedclip thing 1', expected 'fedclip other 1'"):
        read_sealed(DISK, tmp_path / "file", "other")
    with pytest.raises(SealedFileError, match="cannot be read"):
        read_sealed(DISK, tmp_path / "none", "thing")


def test_a_state_is_taken_apart_and_put_together():
    moments = Moments(7, torch.randn(3), torch.rand(3))
    state = (None, (moments, torch.randn(2)), 0.5)
    numbers, tensors = pack_state(state)
    fresh = (None, (Moments.zero(LAYOUT), torch.zeros(2)), 0.0)
    again = unpack_state(fresh, numbers, tensors)
    assert again[1][0].steps == 7
    assert torch.equal(again[1][0].second, moments.second)
    assert torch.equal(again[1][1], state[1][1])
    assert again[2] == 0.5
    with pytest.raises(ValueError, match=r"shape \(4,\), got a tensor of shape \(3,\)"):
        unpack_state((None, (dataclasses.replace(moments, first=torch.zeros(4)), torch.zeros(2)), 0.0), numbers, tensors)
    with pytest.raises(ValueError, match="fewer parts"):
        unpack_state((None, (Moments.zero(LAYOUT), torch.zeros(2))), numbers, tensors)
    with pytest.raises(TypeError, match="dict"):
        pack_state(({"a": 1},))
