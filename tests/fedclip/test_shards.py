"""Shards: users keep theirs, machines have some by their workers, and few move where a machine comes or goes."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fedclip.shards import SHARDS, homes, shard_of

MACHINES = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=24)


def test_a_user_has_one_shard_for_ever():
    assert [shard_of(user) for user in (0, 255, 256, 10**12 + 7)] == [0, 255, 0, (10**12 + 7) % 256]


@given(MACHINES, st.randoms())
def test_where_a_machine_goes_or_comes_only_its_shards_move(machines, random):
    whole, gone = homes(machines), random.choice(machines)
    shuffled = random.sample(machines, len(machines))
    assert homes([*shuffled, ""]) == whole, "neither their order counts, nor workers that are on their way"
    left = homes([machine for machine in machines if machine != gone])
    assert all(before in (after, gone) for before, after in zip(whole, left, strict=True))
    one_less = homes(shuffled[1:])
    assert all(before in (after, shuffled[0]) for before, after in zip(whole, one_less, strict=True))


def test_machines_have_shards_by_their_workers():
    shards = Counter(homes(["a"] * 4 + ["b"] * 4 + ["c"] * 8))
    assert sum(shards.values()) == SHARDS
    assert abs(shards["a"] - 64) < 28
    assert abs(shards["b"] - 64) < 28
    assert abs(shards["c"] - 128) < 32
    assert set(homes([])) == {""}
