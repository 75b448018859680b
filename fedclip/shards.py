"""Shards of users, and which machine each is at home on, so that what is kept of a user lies where it will be trained again."""

from collections.abc import Sequence
from functools import lru_cache, partial
from hashlib import blake2b

SHARDS = 256


def shard_of(user: int) -> int:
    """Return the shard of a user, which never changes."""
    return user % SHARDS


def homes(machines: Sequence[str]) -> tuple[str, ...]:
    """Return the home of each shard: of a machine that comes or goes no others' shards move but those that it gets or had.

    Args:
        machines: where each worker is, empty where that is not known; a machine has shards by its number of workers.
    """
    return _homes(tuple(sorted(machine for machine in machines if machine)))


@lru_cache(maxsize=8)
def _homes(machines: tuple[str, ...]) -> tuple[str, ...]:
    places = [(machine, n - machines.index(machine)) for n, machine in enumerate(machines)]

    def drawn(shard: int, place: tuple[str, int]) -> bytes:
        return blake2b(f"{shard} {place[1]} {place[0]}".encode()).digest()

    # Each goes to the place for a worker that draws the highest number for it: rendezvous hashing.
    return tuple(max(places, key=partial(drawn, shard), default=("", 0))[0] for shard in range(SHARDS))
