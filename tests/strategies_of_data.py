"""Hypothesis strategies for layouts, vectors and updates, and small things that many tests need."""

import numpy as np
import torch
from hypothesis import strategies as st

from fedclip.layout import Layout
from fedclip.transform import Ctx
from fedclip.update import Dense, Sparse

EXTREMES = (0.0, -0.0, 1e-45, -1e-40, 1.17549435e-38, 1e-20, 1.0, -3.5, 1e20, 1e38, -3e38)
"""Zeros, subnormals (the smallest is 1.4e-45), the smallest normal number, and numbers whose square is no float32."""

SHAPES = st.sampled_from([(), (0,), (1,), (3,), (7,), (2, 3), (4, 0, 2), (2, 2, 2), (5, 4)])


@st.composite
def layouts(draw, most=6):
    """Layouts of a few tensors, scalars and empty ones among them, some in numbered blocks; never all empty."""
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=most).filter(lambda s: any(np.prod(x) > 0 for x in s)))
    blocks = draw(st.lists(st.integers(0, 2), min_size=len(shapes), max_size=len(shapes)))
    names = tuple(f"blocks.{b}.t{i}" if b < 2 else f"head.t{i}" for i, b in enumerate(blocks))
    return Layout(names, tuple(shapes), names)


@st.composite
def vectors(draw, size):
    """Finite float32 vectors: of one scale from 1e-44 to 1e38, of extremes, or of both with zeros between."""
    kind = draw(st.sampled_from(["normal", "extremes", "mixed", "zero"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-44, 38))
    normal = np.clip(rng.standard_normal(size) * scale, -3e38, 3e38)
    extremes = rng.choice(EXTREMES, size=size)
    values = {"normal": normal, "extremes": extremes, "zero": np.zeros(size), "mixed": np.where(rng.random(size) < 0.4, extremes, normal)}
    return torch.from_numpy(values[kind].astype(np.float32))


@st.composite
def updates(draw, layout):
    """Dense and sparse updates of a layout."""
    vector = draw(vectors(layout.size))
    if draw(st.booleans()):
        return Dense(vector)
    kept = torch.from_numpy(np.flatnonzero(np.random.default_rng(draw(st.integers(0, 99))).random(layout.size) < 0.5))
    return Sparse(kept, vector[kept])


@st.composite
def updates_with_layouts(draw):
    """A layout and an update of it."""
    layout = draw(layouts())
    return layout, draw(updates(layout))


def context(layout, round=1, params=None, seed=0):
    """A context of a stage."""
    params = torch.zeros(layout.size) if params is None else params
    return Ctx(layout, np.random.default_rng(seed), round, params)


def flat(*sizes):
    """A layout of vectors t0, t1, … of these sizes."""
    names = tuple(f"t{i}" for i in range(len(sizes)))
    return Layout(names, tuple((s,) for s in sizes), names)


def float64_norm(values):
    """The norm by NumPy in float64, scaled first so that nothing under- or overflows: an oracle of its own."""
    values = np.asarray(values, dtype=np.float64).ravel()
    largest = np.abs(values).max(initial=0.0)
    return float(largest * np.sqrt(np.sum((values / largest) ** 2))) if largest else 0.0


def bits(tensor):
    """The bits of a float32 tensor, so that -0.0 and 0.0 differ and NaNs compare."""
    return tensor.contiguous().view(torch.int32).tolist()
