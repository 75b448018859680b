"""The dense wire format in particular; what every codec must do is in tests/contracts/test_codecs.py."""

import struct
import zlib

import pytest
import torch

from fedclip.codec import HEADER, DenseCodec, WireError
from fedclip.update import Dense, Scaled
from tests.strategies_of_data import flat

LAYOUT = flat(2)


def test_the_bytes_are_as_documented():
    payload = DenseCodec().encode(Dense(torch.tensor([1.0, -2.0])), LAYOUT)
    body = bytes.fromhex("0000803f000000c0")  # 1.0 and -2.0 as little-endian IEEE 754 single precision
    assert payload == b"FCD1\x01\x00\x00\x00" + struct.pack("<QI", 2, zlib.crc32(body)) + body
    assert len(payload) == HEADER.size + 4 * 2 == 28


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p: b"FCD2" + p[4:], "FCD2"),
        (lambda p: p[:4] + b"\x02" + p[5:], "version 2"),
        (lambda p: p[:6] + b"\x01" + p[7:], "damaged"),
        (lambda p: p[:8] + struct.pack("<Q", 3) + p[16:], "got 3"),
        (lambda p: p[:-1] + b"\x00", "damaged"),
        (lambda p: p[:-1], "Expected 28 bytes .* got 27"),
        (lambda p: b"", "got 0"),
    ],
)
def test_refusals_say_what_was_expected(change, match):
    payload = DenseCodec().encode(Dense(torch.tensor([1.0, -2.0])), LAYOUT)
    with pytest.raises(WireError, match=match):
        DenseCodec().decode(change(payload), LAYOUT)


def test_a_decoded_update_is_the_caller_s_own():
    payload = DenseCodec().encode(Dense(torch.tensor([1.0, -2.0])), LAYOUT)
    decoded = DenseCodec().decode(payload, LAYOUT).vector
    decoded += 1
    assert DenseCodec().decode(payload, LAYOUT).vector.tolist() == [1, -2]


def test_factors_travel_to_a_sum_at_hand_as_they_are():
    update = Scaled(torch.tensor([1.0, -2.0]), [(1, 0.5), (1, 1.0)])
    arriving, size = DenseCodec().carried(update, LAYOUT)
    assert arriving is update
    assert size == 28
    assert "vector" not in vars(update), "the products were formed"
    assert DenseCodec().encode(update, LAYOUT) == DenseCodec().encode(Dense(torch.tensor([0.5, -2.0])), LAYOUT)
