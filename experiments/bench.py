"""`fedclip bench`: what parts of a run cost. `wire`: to make an upload and to take it, in times of a plain copy of the vector."""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fedclip.choices import Precision
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.collector import Collector, Contribution
from fedclip.dgc import ROUNDINGS
from fedclip.fold import Grid
from fedclip.layout import Layout
from fedclip.options import ConfigError
from fedclip.packed import PackedCodec
from fedclip.rng import Streams
from fedclip.selection import largest
from fedclip.sparsify import check_density, kept_count
from fedclip.spec import RoundSpec
from fedclip.stages import describe_stage
from fedclip.transform import Ctx, Transform
from fedclip.update import Sparse, Update, norm

WARM_UP, REPETITIONS = 3, 31
TENSORS = 60
"""The vector is cut into so many equal tensors, about as many as models of ten million parameters have: layers to the guard."""

LARGEST_SIZE = 10**9


@dataclass(frozen=True)
class Cost:
    """What one step costs.

    Attributes:
        seconds: of processor time, the median over the repetitions.
        sent: bytes of the payload; 0 where none is made.
    """

    seconds: float
    sent: int = 0


class Wire:
    """One upload of the largest of normally distributed values, made and taken by the functions that a run calls.

    The guard has something to do: its bound is half of the upload's norm.

    Args:
        size: coordinates d.
        density: part of them that is sent.
    """

    def __init__(self, size: int, density: float) -> None:
        self.kept, self.codec = kept_count(density, size), PackedCodec()
        tensors = min(TENSORS, size)
        names = tuple(f"tensor{i}" for i in range(tensors))
        self.layout = Layout(names, tuple((size * (i + 1) // tensors - size * i // tensors,) for i in range(tensors)), names)
        self.vector = torch.from_numpy(np.random.default_rng(1).standard_normal(size, dtype=np.float32))
        self.copy = np.ones(size, dtype=np.float32)
        self.chosen = self.select()
        self.ctx = Ctx(self.layout, np.random.default_rng(2), 1, self.vector)
        self.payloads = {name: self.encode(name, self.chosen) for name in ROUNDINGS}
        bound = norm(self.chosen) / 2
        self.collectors = {stage.name: self._collector(stage, bound) for stage in (ClipByGlobalNorm(bound), ClipPerLayer(bound))}
        # Each taken by a step of its own: a sum finds in no cache what the user before has touched.
        self.cohort = [self.encode(name, self.select(999 * (i + 1))) for i, name in enumerate((*ROUNDINGS, "float16"))]
        self.taken = self.codec.decode(self.payloads["float16"], self.layout)

    def _collector(self, stage: Transform, bound: float) -> Collector:
        spec = RoundSpec(
            streams=Streams("bench", "bench", 1),
            local={},
            client=(describe_stage(stage),),
            codec=describe_stage(self.codec),
            weighting="uniform",
            max_examples=None,
            private=False,
            clip_bits=0,
            grid=Grid.for_bound(bound, 1),
            params=b"",
        )
        collector = Collector(spec, self.layout)
        collector.fold.total.fill_(0)  # which has the memory touched
        return collector

    def select(self, shift: int = 0) -> Sparse:
        """Return the largest coordinates of the vector, or of the vector shifted: another user's."""
        vector = torch.roll(self.vector, shift) if shift else self.vector
        indices = largest(vector, self.kept)
        return Sparse(indices, vector[indices])

    def encode(self, rounding: Precision, chosen: Sparse) -> bytes:
        """Round what was chosen and return the payload."""
        stage = ROUNDINGS[rounding]
        update: Update = chosen if stage is None else stage.apply(chosen, None, self.ctx).update
        return self.codec.encode(update, self.layout)

    def take(self, payload: bytes, guard: str) -> None:
        """Decode, guard and fold."""
        collector = self.collectors[guard]
        collector.take(0, Contribution(0, payload, 1.0, {}))
        if collector.errors:
            raise RuntimeError(collector.errors[0])

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return what is timed, by name."""
        collector = self.collectors["clip_by_global_norm"]
        guarded = collector.guarded(self.taken)[0]
        steps: dict[str, Callable[[], object]] = {
            "copyto": partial(np.copyto, self.copy, self.vector.numpy()),
            "select": self.select,
        }
        steps |= {f"encode {name}": partial(self.encode, name, self.chosen) for name in ROUNDINGS}
        steps |= {f"decode {name}": partial(self.codec.decode, self.payloads[name], self.layout) for name in ROUNDINGS}
        steps |= {f"guard {name}": partial(c.guarded, self.taken) for name, c in self.collectors.items()}
        steps["fold"] = partial(collector.fold.add, guarded)
        for name, payload in zip(ROUNDINGS, self.cohort, strict=False):
            steps[f"decode, guard and fold {name}"] = partial(self.take, payload, "clip_by_global_norm")
        steps["decode, guard by layer and fold float16"] = partial(self.take, self.cohort[-1], "clip_per_layer")
        return steps


def measure(steps: dict[str, Callable[[], object]], repetitions: int = REPETITIONS) -> dict[str, list[float]]:
    """Return the seconds of processor time of each repetition of each step.

    All steps take turns, so that what slows the machine down slows all of them; the time in which other programs have the core does
    not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(-WARM_UP, repetitions):
        for name, step in steps.items():
            begin = time.thread_time()
            step()
            if repetition >= 0:
                seconds[name].append(time.thread_time() - begin)
    return seconds


def wire_costs(size: int, density: float) -> tuple[int, dict[str, Cost]]:
    """Return how many coordinates are sent, and what each step costs on one core.

    Raises:
        ConfigError: a size or a density out of range.
    """
    if not 1 <= size <= LARGEST_SIZE:
        raise ConfigError(f"--size: expected 1 to {LARGEST_SIZE}, got {size}; it is the number of parameters, and takes 30 bytes each.")
    try:
        check_density(density)
    except ValueError as error:
        raise ConfigError(f"--density: {error}") from error
    with _one_thread():
        wire = Wire(size, density)
        seconds = measure(wire.steps())
    for name in ROUNDINGS:
        both = zip(seconds["select"], seconds[f"encode {name}"], strict=True)
        seconds[f"select and encode {name}"] = [a + b for a, b in both]
    sent = {f"encode {name}": len(payload) for name, payload in wire.payloads.items()}
    return wire.kept, {name: Cost(statistics.median(s), sent.get(name, 0)) for name, s in seconds.items()}


def wire_command(size: int, density: float, as_json: bool) -> int:
    """Measure the wire, print what it costs, and return the exit status.

    Raises:
        ConfigError: a size or a density out of range.
    """
    kept, costs = wire_costs(size, density)
    if as_json:
        print(json.dumps({"size": size, "density": density, "kept": kept, "steps": _plain(costs, size)}, indent=2))
        return 0
    print(f"{kept:,} of {size:,} values, medians of {REPETITIONS} on one core")
    Console().print(_table(_plain(costs, size)))
    return 0


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plain(costs: dict[str, Cost], size: int) -> dict[str, dict[str, float]]:
    """Return the figures of each step: `ms`, `times_copyto`, and for a payload `bytes` and `times_smaller` than dense float32."""
    copy, plain = costs["copyto"].seconds, {}
    for name, cost in costs.items():
        plain[name] = {"ms": 1000 * cost.seconds, "times_copyto": cost.seconds / copy}
        if cost.sent:
            plain[name] |= {"bytes": cost.sent, "times_smaller": 4 * size / cost.sent}
    return plain


def _table(plain: dict[str, dict[str, float]]) -> Table:
    table = Table("", box=None, pad_edge=False)
    for head in ("ms", "x copyto", "bytes", "x smaller"):
        table.add_column(head, justify="right")
    for name, row in plain.items():
        sent = (f"{row['bytes']:,}", f"{row['times_smaller']:,.0f}") if "bytes" in row else ("", "")
        table.add_row(name, f"{row['ms']:.3f}", f"{row['times_copyto']:.3f}", *sent)
    return table
