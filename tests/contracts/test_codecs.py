"""Every codec: lossless bit for bit, and no payload makes it raise anything but `WireError`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.codec import DenseCodec, WireError
from fedclip.packed import PackedCodec
from fedclip.stages import build_stage, describe_stage
from fedclip.update import Codes, Dense, Half, Sparse, decoded, lengths_of_blocks, to_dense
from tests.strategies_of_data import bits, flat, layouts, updates_with_layouts

CODECS = [DenseCodec(), PackedCodec(), PackedCodec(level=19)]
every = pytest.mark.parametrize("codec", CODECS, ids=repr)
LAYOUT = flat(5, 0, 12)


def payload_of(codec, seed=0):
    return codec.encode(Dense(torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))), LAYOUT)


@every
@given(updates_with_layouts())
def test_decode_is_the_inverse(codec, case):
    layout, update = case
    decoded = codec.decode(codec.encode(update, layout), layout)
    assert bits(to_dense(decoded, layout)) == bits(to_dense(update, layout))


@every
@given(layouts(), st.integers(0, 2**32 - 1))
def test_any_bits_survive(codec, layout, seed):
    words = np.random.default_rng(seed).integers(0, 2**32, layout.size, dtype=np.uint32)
    # A quiet and a signalling NaN with payloads, both zeros, both infinities and the smallest subnormal.
    special = [0x7FC12345, 0xFFC00001, 0x7F800001, 0x80000000, 0, 0x7F800000, 0xFF800000, 1]
    words[: len(special)] = special[: len(words)]
    vector = torch.from_numpy(words.view(np.float32).copy())
    assert bits(to_dense(codec.decode(codec.encode(Dense(vector), layout), layout), layout)) == bits(vector)


@every
@given(updates_with_layouts())
def test_no_payload_is_longer_than_is_said(codec, case):
    layout, update = case
    stored = update.values.numel() if isinstance(update, Sparse) else None
    assert len(codec.encode(update, layout)) <= codec.largest(layout, stored)


def incompressible(layout, places, block, rng):
    """An update at some places with random bits as values, or random codes and scales of blocks."""
    words = torch.from_numpy(rng.integers(0, 2**30, 4 * len(places) + 4, dtype=np.uint32).view(np.float32).copy())  # finite
    if block is None:
        return Sparse(places, words[: len(places)])
    lengths = lengths_of_blocks(layout.counts(places), block)
    codes, scales = torch.from_numpy(rng.integers(-127, 128, len(places)).astype(np.int8)), words[: len(lengths)]
    return Sparse(places, decoded(codes, scales, lengths), Codes(codes, scales, block, 8))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 3, 2_000, 9_990, 10_000]), st.sampled_from([None, 1, 2, 40]))
def test_nor_is_one_of_numbers_that_do_not_compress(seed, kept, block):
    rng, layout = np.random.default_rng(seed), flat(7_000, 0, 2_999, 1)
    places = torch.from_numpy(np.sort(rng.choice(layout.size, kept, replace=False)))
    payload = PackedCodec(1).encode(incompressible(layout, places, block, rng), layout)
    assert len(payload) <= PackedCodec(1).largest(layout, kept)
    if kept == layout.size:  # which travels as a dense one
        assert len(payload) <= PackedCodec(1).largest(layout)
        assert block != 1 or len(payload) > 0.95 * PackedCodec(1).largest(layout)


@pytest.mark.parametrize(("gap", "share"), [(30_000, 0.85), (200_000, 0.6)], ids=["gaps of a word", "gaps that go on"])
def test_what_is_said_is_not_far_from_the_worst(gap, share):
    rng, layout = np.random.default_rng(0), flat(2_000 * gap)
    places = torch.from_numpy(np.unique(rng.integers(0, layout.size, 2_000)))
    payload = PackedCodec().encode(incompressible(layout, places, 1, rng), layout)
    most = PackedCodec().largest(layout, len(places))
    assert share * most < len(payload) <= most


def test_what_is_said_is_about_what_is_sent():
    large = flat(100_000_000)
    assert DenseCodec().largest(large, 1000) == 20 + 4 * large.size
    assert PackedCodec().largest(large) < 5 * large.size + 100
    assert PackedCodec().largest(large, 100_000) < 800_000


INDICES = torch.tensor([1, 4, 9])
CODED = torch.tensor([-1, 1, 1], dtype=torch.int8)
GRIDS = {
    "floats": Sparse(INDICES, torch.tensor([2.0, 0.1, -0.0])),
    "nothing": Sparse(INDICES[:0], torch.zeros(0)),
    "everything": Sparse(torch.arange(17), torch.arange(17.0)),
    "halves": Sparse(INDICES, torch.tensor([2.0, 0.5, -0.0]), Half()),
    **{
        f"{bits} bits": Sparse(
            INDICES, decoded(CODED, torch.tensor([0.1, 3.0]), [2, 1]), Codes(CODED, torch.tensor([0.1, 3.0]), block=2, bits=bits)
        )
        for bits in range(1, 9)
    },
}


@every
@pytest.mark.parametrize("kind", GRIDS)
def test_sparse_updates_on_any_grid_travel(codec, kind):
    update = GRIDS[kind]
    assert bits(to_dense(codec.decode(codec.encode(update, LAYOUT), LAYOUT), LAYOUT)) == bits(to_dense(update, LAYOUT))


@every
def test_every_truncation_and_every_tail_is_refused(codec):
    payload = payload_of(codec)
    for length in range(len(payload)):
        with pytest.raises(WireError):
            codec.decode(payload[:length], LAYOUT)
    for tail in (b"\x00", payload):
        with pytest.raises(WireError):
            codec.decode(payload + tail, LAYOUT)


@every
def test_flipped_bits_are_refused(codec):
    payload, rng = payload_of(codec), np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(payload), 200):
        damaged = bytearray(payload)
        damaged[place // 8] ^= 1 << (place % 8)
        with pytest.raises(WireError):
            codec.decode(bytes(damaged), LAYOUT)


@every
@given(st.binary(max_size=200))
def test_noise_is_refused(codec, junk):
    with pytest.raises(WireError):
        codec.decode(junk, LAYOUT)


@every
def test_another_layout_s_payload_is_refused(codec):
    for other in (flat(5, 11), flat(5, 13), flat(0), flat(100_000)):
        with pytest.raises(WireError):
            codec.decode(payload_of(codec), other)


@every
def test_codecs_travel_as_plain_data(codec):
    assert build_stage(describe_stage(codec)) == codec


@every
@given(updates_with_layouts())
def test_what_is_carried_is_what_the_payload_would_bring(codec, case):
    layout, update = case
    payload = codec.encode(update, layout)
    arrives, size = codec.carried(update, layout)
    decoded = codec.decode(payload, layout)
    assert size == len(payload)
    assert (type(arrives), arrives.grid) == (type(decoded), decoded.grid) or isinstance(arrives.grid, Codes)
    assert bits(to_dense(arrives, layout)) == bits(to_dense(decoded, layout))
