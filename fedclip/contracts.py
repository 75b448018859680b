"""The contracts of pieces of one's own: what a codec or a stage must keep so that sums stay right and bounds hold.

    check_codec(MyCodec())
    check_transform(MyStage(density=0.01))

Each looks for a counterexample on a few layouts and vectors, and says what is wrong and with what. The stages and codecs that ship pass.
"""

import json
import pickle
from collections.abc import Iterator

import numpy as np
import torch

from fedclip.codec import Codec, WireError
from fedclip.layout import Layout
from fedclip.stages import build_stage, describe_stage
from fedclip.transform import UNBOUNDED, Ctx, State, Transform
from fedclip.update import Dense, Half, Sparse, Update, norm, to_dense

CLOSE = 1e-9
"""What rounding in float64 may add to a norm, relatively."""


class ContractError(ValueError):
    """A piece that does not keep its contract; the message says which part of it, and with what input."""


def sample_layouts() -> tuple[Layout, ...]:
    """Return layouts with what models have: matrices, small tensors, scalars, empty tensors, blocks."""
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = (((3,),), ((4, 5), (5,), (), (0,), (2, 3, 2)), ((30, 40), (0,), (1,)), ((70_000,),))
    names = [tuple(f"blocks.{t // 2}.t{t}" for t in range(len(s))) for s in shapes]
    return tuple(Layout(n, s, n) for n, s in zip(names, shapes, strict=True))


def sample_updates(layout: Layout, rng: np.random.Generator) -> Iterator[tuple[str, Update]]:
    """Yield updates by what they are: dense and sparse, of all sizes, with zeros of both signs."""
    d = layout.size
    normal = torch.from_numpy(rng.standard_normal(d).astype(np.float32))
    yield "normal numbers", Dense(normal)
    yield "zeros of both signs", Dense(torch.where(normal > 0, 0.0, -0.0))
    yield "numbers of 1e-40", Dense(normal * 1e-40)
    yield "numbers of 1e37", Dense(normal * 1e37)
    yield "float16 numbers", Dense(normal.half().float(), Half())
    few = torch.from_numpy(np.sort(rng.choice(d, max(1, d // 9), replace=False)).astype(np.int64))
    yield "few coordinates", Sparse(few, normal[few])
    yield "no coordinate", Sparse(few[:0], normal[:0])
    yield "every coordinate", Sparse(torch.arange(d), normal)


def check_codec(codec: Codec) -> None:
    """Look for a broken promise of a codec.

    Raises:
        ContractError: `decode(encode(x))` has other bits than x; damage is taken for another vector, or a cut payload or another model's
            for any; an error of another kind than `WireError`; the same update encodes differently twice; a payload is longer than
            `largest` says; or it does not travel as plain data.
    """
    _check_description(codec)
    layouts, rng = sample_layouts(), np.random.default_rng(0)
    for layout in layouts:
        for name, update in sample_updates(layout, rng):
            where = f"{name} in {layout.size} coordinates"
            before = to_dense(update, layout).clone()
            payload = codec.encode(update, layout)
            most = codec.largest(layout, _stored(update))
            _expect(len(payload) <= most, f"{where}: {len(payload)} bytes, at most {most} are said by `largest`")
            _expect(codec.encode(update, layout) == payload, f"{where}: encoded twice it gives other bytes")
            _expect(_same(to_dense(update, layout), before), f"{where}: encode changed its input")
            _expect(_same(to_dense(codec.decode(payload, layout), layout), before), f"{where}: other bits come back")
            _check_damage(codec, payload, layout, before, where, rng)
        other = layouts[0] if layout is not layouts[0] else layouts[1]
        _refused(codec, codec.encode(Dense(torch.ones(layout.size)), layout), other, f"{layout.size} coordinates: another model's layout")


def check_transform(stage: Transform, rounds: int = 5) -> None:
    """Look for a broken promise of a stage of a client chain.

    Raises:
        ContractError: it changes an input, draws from a global generator or gives other bits for the same input; what leaves a stage
            with a guard exceeds its bound, or the guard changes it; more values are stored than `stored` says; a guard that lets
            anything else through unbounded, or has a state; or it does not pickle, or does not travel as plain data.
    """
    _check_description(stage)
    for layout in sample_layouts():
        rng = np.random.default_rng(1)
        updates = list(sample_updates(layout, rng))
        state, bound = stage.init(layout), stage.bound(UNBOUNDED, layout)
        for number in range(1, rounds + 1):
            name, update = updates[number % len(updates)]
            where = f"round {number}, {name} in {layout.size} coordinates"
            vector, generator = to_dense(update, layout).clone(), torch.get_rng_state()
            kept = pickle.dumps(state)
            step, again = (stage.apply(update, state, _context(layout, number)) for _ in range(2))
            out = to_dense(step.update, layout)
            _expect(_same(to_dense(update, layout), vector) and pickle.dumps(state) == kept, f"{where}: an input was changed")
            _expect(torch.equal(torch.get_rng_state(), generator), f"{where}: a global random generator was used; draw from ctx.rng")
            stored, kept_values = stage.stored(number, layout, _stored(update)), _stored(step.update)
            few = stored is None if kept_values is None else stored is not None and kept_values <= stored
            # A stage that says nothing of what it stores may give a dense update as well.
            _expect(few or stored == layout.size, f"{where}: {kept_values} values are stored, {stored} are said (None: dense)")
            _expect(_same(out, to_dense(again.update, layout)), f"{where}: the same input gives other bits the second time")
            if stage.guard is not None and bool(torch.isfinite(out).all()):
                _expect(
                    norm(step.update) <= bound.total * (1 + CLOSE),
                    f"{where}: a norm of {norm(step.update):g} leaves, {bound.total:g} is said",
                )
                guarded = stage.guard.apply(step.update, None, _context(layout, number)).update
                _expect(_same(to_dense(guarded, layout), out), f"{where}: the guard changes what the stage let out")
            state = step.state
        if stage.guard is not None:
            _check_guard(stage.guard, stage.guard.init(layout), updates, layout, bound.total)


def _check_guard(guard: Transform, state: State, updates: list[tuple[str, Update]], layout: Layout, total: float) -> None:
    _expect(state is None, f"the guard {guard.name} keeps a state")
    for name, update in updates:
        out = norm(guard.apply(update, None, _context(layout, 1)).update)
        _expect(
            out <= total * (1 + CLOSE), f"{name} in {layout.size} coordinates: the guard lets a norm of {out:g} through, {total:g} is said"
        )


def _stored(update: Update) -> int | None:
    """Return how many values a sparse update stores; None of a dense one."""
    return update.values.numel() if isinstance(update, Sparse) else None


def _check_description(piece: object) -> None:
    try:
        described = json.loads(json.dumps(describe_stage(piece)))
        rebuilt = build_stage(described)
    except Exception as error:
        raise ContractError(f"{piece!r} does not travel as plain data ({error}); make it a frozen dataclass of plain fields.") from error
    _expect(rebuilt == piece, f"{piece!r} is rebuilt from {described} as {rebuilt!r}")
    _expect(pickle.loads(pickle.dumps(piece)) == piece, f"{piece!r} does not survive pickling")


def _check_damage(codec: Codec, payload: bytes, layout: Layout, right: torch.Tensor, where: str, rng: np.random.Generator) -> None:
    for cut in sorted({0, 1, len(payload) // 2, len(payload) - 1}):
        _refused(codec, payload[:cut], layout, f"{where}: {cut} of {len(payload)} bytes")
    for at in rng.integers(len(payload), size=8).tolist():
        flipped = payload[:at] + bytes([payload[at] ^ (1 << int(rng.integers(8)))]) + payload[at + 1 :]
        _refused(codec, flipped, layout, f"{where}: a flipped bit in byte {at}", right)
    _refused(codec, payload + b"\0", layout, f"{where}: a byte too many")


def _refused(codec: Codec, payload: bytes, layout: Layout, where: str, right: torch.Tensor | None = None) -> None:
    """Expect a `WireError`, or what is right: a compressor may have bits that mean nothing."""
    try:
        taken = to_dense(codec.decode(payload, layout), layout)
    except WireError:
        return
    except Exception as error:
        raise ContractError(f"{where}: decode raised {type(error).__name__}, expected WireError: {error}") from error
    _expect(right is not None and _same(taken, right), f"{where}: decode took it")


def _context(layout: Layout, round: int) -> Ctx:
    return Ctx(layout, np.random.default_rng([2, round]), round, torch.linspace(-1, 1, layout.size))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ContractError(otherwise)
