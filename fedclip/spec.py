"""`RoundSpec`: all that the server tells clients for a round, as plain data."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedclip.choices import Weighting
from fedclip.fold import Grid
from fedclip.rng import Streams

Block = tuple[int, tuple[int, ...]]
"""A block's number in the cohort and the ids of its users."""


@dataclass(frozen=True, eq=False)
class RoundSpec:
    """All that the server tells clients for a round: data only, from which each client rebuilds the stages by name.

    Attributes:
        streams: the randomness of this attempt.
        local: local training, as a stage description.
        client: the stages of the client chain, as descriptions.
        codec: the wire format, as a description.
        weighting: see `Method`.
        max_examples: see `Method`.
        private: whether the sum will be noised: weights then go in before the clip.
        clip_bits: how many bits each user says of the bounds of its last clip; 0 where they do not adapt.
        grid: the fixed-point grid of the sum.
        params: the encoded model that everyone starts from.
        half_states: whether what the chain keeps of users is kept as float16.
        support: the coordinates that everyone sends, packed, where the chain needs to be told; empty otherwise.
        control: the encoded control variate of the server, where users have control variates; empty otherwise.
    """

    streams: Streams
    local: Mapping[str, Any]
    client: tuple[Mapping[str, Any], ...]
    codec: Mapping[str, Any]
    weighting: Weighting
    max_examples: int | None
    private: bool
    clip_bits: int
    grid: Grid
    params: bytes
    half_states: bool = False
    support: bytes = b""
    control: bytes = b""

    def shared(self) -> dict[str, Any]:
        """Return everything but the vectors (parameters and control variate) as plain data."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("params", "control")}
        plain = {"streams": dataclasses.asdict(self.streams), "grid": dataclasses.asdict(self.grid), "client": list(self.client)}
        return data | plain | {"support": base64.b64encode(self.support).decode("ascii")}

    @classmethod
    def from_shared(cls, data: Mapping[str, Any], params: bytes, control: bytes = b"") -> "RoundSpec":
        """Return the specification that `shared` described, with its vectors."""
        rest = {"streams": Streams(**data["streams"]), "grid": Grid(**data["grid"]), "client": tuple(data["client"])}
        return cls(**{**data, **rest, "support": base64.b64decode(data["support"])}, params=params, control=control)

    def without_vectors(self) -> "RoundSpec":
        """Return the same without parameters and control variate, for who has decoded them: of a large model they are gigabytes."""
        return dataclasses.replace(self, params=b"", control=b"")

    @property
    def digest(self) -> str:
        """A hash of all that is shared, the vectors included."""
        text = json.dumps(self.shared(), sort_keys=True).encode()
        vectors = b"".join(hashlib.blake2b(v).digest() for v in (self.params, self.control))
        return hashlib.blake2b(text + vectors, digest_size=16).hexdigest()
