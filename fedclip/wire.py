"""`Wire`: a round's updates as bytes. Where all users send the same coordinates, known beforehand, only their values travel."""

from dataclasses import dataclass
from functools import cached_property

import torch

from fedclip.codec import Codec
from fedclip.layout import Layout
from fedclip.packed import PackedCodec
from fedclip.spec import RoundSpec
from fedclip.stages import build_stage
from fedclip.transform import Transform
from fedclip.update import Dense, Half, Sparse, Update, to_dense


@dataclass(frozen=True, eq=False)
class Wire:
    """A codec, and the coordinates that are sent.

    Attributes:
        codec: the wire format.
        layout: of the vectors.
        support: the only coordinates that are sent, int64, ascending, shape (k,); None: the codec says which.
        stored: how many values a sparse update stores at most; None: updates are dense, or nobody has said.
    """

    codec: Codec
    layout: Layout
    support: torch.Tensor | None = None
    stored: int | None = None

    @classmethod
    def of(cls, spec: RoundSpec, chain: Transform, layout: Layout) -> "Wire":
        """Return the wire of a round."""
        support = support_of(spec, chain, layout)
        return cls(build_stage(spec.codec), layout, support, chain.stored(spec.streams.round, layout))

    @cached_property
    def sent(self) -> Layout:
        """The layout of what travels: of the whole vector, or of the values on the support."""
        return self.layout if self.support is None else self.layout.restricted(self.support)

    @property
    def largest(self) -> int:
        """How many bytes the payload of an update of this round has at most."""
        return self.codec.largest(self.sent, self.stored if self.support is None else self.sent.size)

    def encode(self, update: Update) -> bytes:
        """Return the payload of an update. What lies outside the support is not sent."""
        if self.support is None:
            return self.codec.encode(update, self.layout)
        if isinstance(update, Sparse):
            places = torch.searchsorted(self.support, update.indices.cpu())
            if torch.equal(self.support[places.clamp(max=self.support.numel() - 1)], update.indices.cpu()):
                # On its grid still: blocks are counted in stored values of a tensor.
                return self.codec.encode(Sparse(places, update.values, update.grid), self.sent)
        return self.codec.encode(Dense(to_dense(update, self.layout).cpu()[self.support]), self.sent)

    def decode(self, payload: bytes) -> Update:
        """Return the update of a payload, nowhere but on the support.

        Raises:
            WireError: the payload is not a whole, undamaged update of this round.
        """
        update = self.codec.decode(payload, self.sent)
        if self.support is None:
            return update
        if isinstance(update, Dense):
            return Sparse(self.support, update.vector, update.grid)
        return Sparse(self.support[update.indices], update.values, update.grid)

    def carried(self, update: Update) -> tuple[Update, int]:
        """Return what arrives of an update, and how many bytes carry it."""
        if self.support is None:
            return self.codec.carried(update, self.layout)
        payload = self.encode(update)
        return self.decode(payload), len(payload)


def support_of(spec: RoundSpec, chain: Transform, layout: Layout) -> torch.Tensor | None:
    """Return the only coordinates that are sent in a round: as the server says, or as the chain itself knows; None: any."""
    if not spec.support:
        return chain.support(spec.streams.round, layout)
    update = PackedCodec().decode(spec.support, layout)
    return update.vector.nonzero().flatten() if isinstance(update, Dense) else update.indices


def pack_support(support: torch.Tensor, layout: Layout) -> bytes:
    """Return coordinates as the server tells them to clients."""
    return PackedCodec().encode(Sparse(support, torch.ones(support.numel()), Half()), layout)
