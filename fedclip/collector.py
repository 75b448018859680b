"""What users give, and the sum of it: contributions are decoded, guarded and folded wherever the raw sum is formed.

That is on the worker that trained the users, or on the server.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedclip.codec import WireError
from fedclip.fold import Addend, Fold
from fedclip.layout import Layout
from fedclip.spec import RoundSpec
from fedclip.stages import build_stage
from fedclip.tally import MOST_SAID, Tally, add_up, number, shortened
from fedclip.transform import UNBOUNDED, Chain, Ctx, Transform
from fedclip.update import Update, finite_or_zero
from fedclip.wire import Wire


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one user gives: the encoded update, its weight, its packed clip bits and what was measured.

    A user that failed gives no payload. `error` says why, or what of the data of a user could not be read. Where the sum is formed in
    the process that trained, `update` is what would arrive, and there is no payload; `guarded` says that the guard itself made it.
    """

    user: int
    payload: bytes | None
    weight: float
    tally: Tally
    error: str | None = None
    clip_bits: bytes = b""
    update: Update | None = None
    guarded: bool = False


@dataclass(frozen=True, eq=False)
class Partial:
    """The exact sum over the users of some blocks: int64 grid numbers of shape (d,), how many users, and a tally for each block.

    `clip_bits` is the sum of each bit as +1 or -1; `errors` is what the first failed users said, at most `MOST_SAID` lines.
    """

    total: np.ndarray
    users: int
    tallies: dict[int, Tally]
    errors: tuple[str, ...] = ()
    clip_bits: tuple[int, ...] = ()


@dataclass(eq=False)
class _Opened:
    """What a contribution adds to the sum, its clip bits and whether it was finite; or why it was refused."""

    addend: Addend | None = None
    bits: np.ndarray | None = None
    finite: bool = True
    refused: Exception | None = None
    seconds: float = 0.0


class Collector:
    """Decodes, guards and folds contributions: wherever the raw sum is formed, on a worker or on the server."""

    def __init__(self, spec: RoundSpec, layout: Layout, device: str = "cpu") -> None:
        self.spec, self.layout = spec, layout
        chain = Chain(tuple(build_stage(s) for s in spec.client))
        self.wire = Wire.of(spec, chain, layout)
        self.guard: Transform | None = chain.guard
        # A stage after the last clip may enlarge without limit; the grid is then no longer the clip's.
        self._fits = self.guard is not None and chain.bound(UNBOUNDED, layout).total <= spec.grid.largest
        self.ctx = Ctx(layout, spec.streams.generator("chain"), spec.streams.round, torch.empty(0))
        self.fold = Fold(layout.size, spec.grid, device)
        self.clip_bits = np.zeros(spec.clip_bits, dtype=np.int64)
        self.tallies: dict[int, Tally] = {}
        self.errors: list[str] = []

    def take(self, block: int, contribution: Contribution) -> Exception | None:
        """Add one user's contribution to the sum; what cannot be taken counts as a failed user, adds nothing, and is returned."""
        return self.take_all([(block, contribution)])[0]

    def take_all(self, group: Sequence[tuple[int, Contribution]]) -> list[Exception | None]:
        """Add the contributions of some users, each with its block, in one pass over the sum; see `take`."""
        opened = list[_Opened]()
        for _, contribution in group:
            start = time.perf_counter()
            opened.append(self._opened(contribution))
            opened[-1].seconds = time.perf_counter() - start
        start, there = time.perf_counter(), [o for o in opened if o.addend is not None]
        for one, overflow in zip(there, self.fold.add_all([o.addend for o in there if o.addend is not None]), strict=True):
            one.refused = overflow
        each = (time.perf_counter() - start) / max(1, len(there))
        for (block, contribution), one in zip(group, opened, strict=True):
            self._count(block, contribution, one, one.seconds + (each if one.addend is not None else 0.0))
        return [one.refused for one in opened]

    def _opened(self, contribution: Contribution) -> "_Opened":
        """Decode and guard a contribution, where it has an update."""
        if contribution.payload is None and contribution.update is None:
            return _Opened()
        try:
            # Under noise a weight that a client states would multiply what the guard has bounded: it went in before the clip.
            weight = 1.0 if self.spec.private else contribution.weight
            bits = unpack_bits(contribution.clip_bits, self.spec.clip_bits)
            update, finite = self._open(contribution)
            within = self.guard is not None and self._fits and weight == 1.0
            return _Opened(Addend(update, weight, within), bits, finite)
        except (WireError, ArithmeticError) as fault:
            return _Opened(refused=fault)

    def _count(self, block: int, contribution: Contribution, opened: "_Opened", seconds: float) -> None:
        tally, error, refused = contribution.tally, contribution.error, opened.refused
        if refused is not None:
            sent = float(len(contribution.payload or b"") + len(contribution.clip_bits))
            tally = {"failed_users": 1.0, "uplink_bytes": sent if contribution.update is None else number(tally, "uplink_bytes")}
            error = f"user {contribution.user}: {type(refused).__name__}: {refused}"
        elif opened.addend is not None:
            if opened.bits is not None:
                self.clip_bits += opened.bits
            tally = tally | {"weight": opened.addend.weight}
            if not opened.finite:
                tally["not_finite"] = 1.0
        if error is not None and len(self.errors) < MOST_SAID:
            self.errors.append(shortened(error))
        self.tallies[block] = add_up([self.tallies.get(block, {}), tally, {"fold_seconds": seconds}])

    def _open(self, contribution: Contribution) -> tuple[Update, bool]:
        """Decode and guard."""
        arrived = contribution.update
        if arrived is not None and contribution.guarded:
            return arrived, True
        return self.guarded(self.wire.decode(contribution.payload or b"") if arrived is None else arrived)

    def guarded(self, update: Update) -> tuple[Update, bool]:
        """Return an update of this layout finite (and whether it was), and within the bound of the chain."""
        update, finite = finite_or_zero(update)
        if self.guard is None:
            return update, finite
        return self.guard.apply(update, None, self.ctx).update, finite

    def partial(self) -> Partial:
        """Return the sum so far."""
        return Partial(self.fold.total.cpu().numpy(), self.fold.users, self.tallies, tuple(self.errors), tuple(self.clip_bits.tolist()))


def pack_bits(bits: Sequence[bool]) -> bytes:
    """Return clip bits as they travel, eight a byte."""
    return np.packbits(np.asarray(bits, dtype=bool)).tobytes()


def unpack_bits(packed: bytes, count: int) -> np.ndarray:
    """Return `count` packed bits as +1 and -1, int64, shape (count,).

    Raises:
        WireError: they are not so many.
    """
    if len(packed) != -(-count // 8):
        raise WireError(f"Expected {count} clip bits in {-(-count // 8)} bytes, got {len(packed)} bytes.")
    if not count:
        return np.zeros(0, dtype=np.int64)
    return 2 * np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(np.int64) - 1
