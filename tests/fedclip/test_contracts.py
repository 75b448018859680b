"""The contracts that anyone may check: every piece that ships keeps them, and each kind of mistake is found."""

from dataclasses import dataclass

import pytest
import torch

from fedclip.clipping import ClipByGlobalNorm
from fedclip.codec import Codec, DenseCodec, WireError
from fedclip.contracts import ContractError, check_codec, check_transform
from fedclip.sparsify import TopK
from fedclip.transform import Bound, Chain, Step, Transform
from fedclip.update import Dense, scale, to_dense
from tests.contracts.test_codecs import CODECS
from tests.contracts.test_transforms import BOUNDED, LOSSY, name


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_every_codec_keeps_its_contract(codec):
    check_codec(codec)


SINGLE = [s for s in (*BOUNDED, *LOSSY) if not isinstance(getattr(s, "inner", s), Chain)]


@pytest.mark.parametrize("stage", SINGLE, ids=name)
def test_every_stage_keeps_its_contract(stage):
    check_transform(stage)


@dataclass(frozen=True)
class Plain(Codec):
    """Float32 numbers and nothing else: no checksum, no layout."""

    stage_name = "plain"

    def encode(self, update, layout):
        return to_dense(update, layout).numpy().tobytes()

    def decode(self, payload, layout):
        if len(payload) != 4 * layout.size:
            raise WireError("length")
        return Dense(torch.frombuffer(bytearray(payload), dtype=torch.float32) if payload else torch.zeros(0))


@dataclass(frozen=True)
class Lossy(DenseCodec):
    stage_name = "lossy"

    def encode(self, update, layout):
        return super().encode(Dense(to_dense(update, layout).half().float()), layout)


@dataclass(frozen=True)
class Unsealed(DenseCodec):
    stage_name = "unsealed"

    def decode(self, payload, layout):
        if not payload:
            raise KeyError("empty")
        return super().decode(payload, layout)


@dataclass(frozen=True)
class Longer(DenseCodec):
    stage_name = "longer"

    def largest(self, layout, stored=None):
        return 4 * layout.size


@pytest.mark.parametrize(
    ("codec", "said"),
    [
        (Plain(), "decode took it"),
        (Lossy(), "other bits come back"),
        (Unsealed(), "raised KeyError, expected WireError"),
        (Longer(), "at most 12 are said by `largest`"),
    ],
)
def test_mistakes_of_codecs_are_found(codec, said):
    with pytest.raises(ContractError, match=said):
        check_codec(codec)


@dataclass(frozen=True)
class Liar(ClipByGlobalNorm):
    def apply(self, update, state, ctx):
        return Step(scale(super().apply(update, state, ctx).update, 1.001))


@dataclass(frozen=True)
class Doubling(ClipByGlobalNorm):
    """Lets twice its bound out, and its guard agrees."""

    def apply(self, update, state, ctx):
        return Step(scale(super().apply(update, state, ctx).update, 2.0))

    @property
    def guard(self):
        return ClipByGlobalNorm(2.0 * self.max_norm)


@dataclass(frozen=True)
class Dice(Transform):
    def apply(self, update, state, ctx):
        return Step(scale(update, float(torch.rand(()))))

    def bound(self, incoming, layout):
        return incoming


@dataclass(frozen=True)
class InPlace(Transform):
    def apply(self, update, state, ctx):
        to_dense(update, ctx.layout).mul_(0.5)
        return Step(update)

    def bound(self, incoming, layout):
        return incoming


@dataclass(frozen=True)
class OpenGuard(Transform):
    """Says a bound that its guard does not enforce."""

    def apply(self, update, state, ctx):
        return Step(Dense(torch.zeros(ctx.layout.size)))

    def bound(self, incoming, layout):
        return Bound(1.0)

    @property
    def guard(self):
        return ClipByGlobalNorm(2.0)


@dataclass(frozen=True)
class Few(TopK):
    """Says that it stores half of what it does."""

    def stored(self, round, layout, incoming=None):
        return super().stored(round, layout, incoming) // 2


class NoData(Transform):
    def apply(self, update, state, ctx):
        return Step(update)

    def bound(self, incoming, layout):
        return incoming


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (Liar(0.5), "the guard changes"),
        (Doubling(0.5), "a norm of .* leaves"),
        (Dice(), "global random generator"),
        (InPlace(), "an input was changed"),
        (OpenGuard(), "the guard lets a norm"),
        (Few(0.5), "values are stored"),
        (NoData(), "plain data"),
    ],
)
def test_mistakes_of_stages_are_found(stage, said):
    with pytest.raises(ContractError, match=said):
        check_transform(stage)
