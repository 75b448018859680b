"""Streams: the key is all that matters, and torch's own generator is left as it was."""

import dataclasses

import numpy as np
import pytest
import torch

from fedclip.rng import Streams

BASE = Streams("secret", "run", 3, 0)


def numbers(streams, purpose="noise", user=None):
    return tuple(streams.generator(purpose, user).integers(0, 2**63, 4))


def test_the_same_key_gives_the_same_numbers_from_the_start():
    assert numbers(BASE) == numbers(dataclasses.replace(BASE))


def test_every_part_of_the_key_makes_another_stream():
    keys = [
        (dataclasses.replace(BASE, **change), "noise", None) for change in ({}, {"secret": "s"}, {"run": "r"}, {"round": 4}, {"attempt": 1})
    ]
    keys += [(BASE, purpose, None) for purpose in ("cohort", "data", "batches", "training", "chain", "server")]
    keys += [(BASE, "chain", user) for user in (0, 1, 10, 10**12)]
    assert len({numbers(*key) for key in keys}) == len(keys)


def test_a_stream_is_that_of_philox_under_its_key():
    for user in range(20):  # NumPy's own way to a key, state and all
        philox = np.random.Philox(key=int.from_bytes(BASE._key("data", user), "big"))
        mine = BASE.generator("data", user)
        assert str(mine.bit_generator.state) == str(philox.state)
        assert mine.standard_normal(7).tobytes() == np.random.Generator(philox).standard_normal(7).tobytes()


def test_streams_of_neighbours_are_not_correlated():
    a, b = (BASE.generator("noise", user).standard_normal(20_000) for user in (1, 2))
    # Four standard errors of a correlation of independent numbers.
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(20_000)


def test_torch_is_seeded_inside_and_restored_outside():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with BASE.torch_seeded("training", 7):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with BASE.torch_seeded("training", 7):
        assert torch.equal(torch.rand(3), inside)
    with BASE.torch_seeded("training", 8):
        assert not torch.equal(torch.rand(3), inside)


def test_torch_is_restored_when_the_block_raises():
    torch.manual_seed(5)
    before = torch.get_rng_state()

    def draw_and_fail():
        with BASE.torch_seeded("training", 7):
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_leaves_nothing_behind():
    streams, queued = Streams("s", "r", 1), len(torch.cuda._queued_calls)
    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with streams.torch_seeded("training", 3):
            drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(torch.cuda._queued_calls) == queued  # torch keeps a call with its traceback for each manual_seed
