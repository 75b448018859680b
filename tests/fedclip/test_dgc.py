"""Deep Gradient Compression against the equations of the paper, written out coordinate by coordinate in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedclip.clipping import ClipByGlobalNorm
from fedclip.dgc import DGC
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method
from fedclip.optimizers import SGD
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.simulation import simulate
from fedclip.stages import PAPER_WARMUP
from fedclip.transform import UNBOUNDED, Bound, chain
from fedclip.update import Dense, Half, Sparse, norm, to_dense, values_of
from tests.strategies_of_data import bits, context, flat, layouts, updates

LAYOUT = Layout(("w", "bias", "scalar", "none", "conv"), ((4, 5), (5,), (), (0,), (2, 3, 2)), ("w", "bias", "scalar", "none", "conv"))


class Paper:
    """One node of arXiv 1712.01887, Algorithm 4 (Algorithm 3 for Nesterov): tensors are lists of floats, and everything is a loop."""

    def __init__(self, shapes, m, nesterov=False, mask=True, small="dense"):
        self.shapes, self.m, self.nesterov, self.mask, self.small = shapes, m, nesterov, mask, small
        self.u = [[0.0] * int(np.prod(s)) for s in shapes]
        self.v = [[0.0] * int(np.prod(s)) for s in shapes]

    def send(self, g, density):
        """What a node sends of its (clipped) gradient, tensor by tensor."""
        out = []
        for t, shape in enumerate(self.shapes):
            n = len(g[t])
            if len(shape) <= 1 and self.small == "dense":
                out.append(list(g[t]))
                continue
            u, v = self.u[t], self.v[t]
            for i in range(n):
                if self.nesterov:
                    u[i] = self.m * (u[i] + g[t][i])
                    v[i] = v[i] + u[i] + g[t][i]
                else:
                    u[i] = self.m * u[i] + g[t][i]
                    v[i] = v[i] + u[i]
            k = min(n, max(1, round(density * n)))
            largest = sorted(range(n), key=lambda i: -abs(v[i]))[:k]
            sent = [0.0] * n
            for i in largest:
                sent[i], v[i] = v[i], 0.0
                if self.mask:
                    u[i] = 0.0
            out.append(sent)
        return out


def split(vector, layout=LAYOUT):
    return [p.double().tolist() for p in layout.split(vector)]


def join(parts):
    return torch.tensor([x for p in parts for x in p], dtype=torch.float64)


def gradients(count, size=LAYOUT.size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("small", ["dense", "sparse"])
@pytest.mark.parametrize("warmup", [(), ((0.5, 2), (0.3, 3))])
def test_the_equations_of_the_paper(nesterov, mask, small, warmup):
    stage = DGC(0.1, 0.9, nesterov, mask=mask, small=small, warmup=warmup)
    oracle, state = Paper(LAYOUT.shapes, 0.9, nesterov, mask, small), stage.init(LAYOUT)
    densities = [d for d, n in warmup for _ in range(n)] + [0.1] * 20
    for r, g in enumerate(gradients(20), 1):
        expected = join(oracle.send(split(g), densities[r - 1]))
        step = stage.apply(Dense(g), state, context(LAYOUT, r))
        state = step.state
        assert torch.allclose(to_dense(step.update, LAYOUT).double(), expected, rtol=1e-4, atol=1e-5)
        whole = join([x if small == "sparse" or len(s) > 1 else [0.0] * len(x) for x, s in zip(oracle.u, LAYOUT.shapes, strict=True)])
        assert torch.allclose(state[0].double(), whole, rtol=1e-4, atol=1e-5)
        assert torch.allclose(state[1].double(), join(oracle.v), rtol=1e-4, atol=1e-5)


def test_what_is_sent_is_what_was_accumulated_bit_for_bit():
    stage = DGC(0.2, warmup=())
    state = stage.init(LAYOUT)
    for g in gradients(5):
        u, v = 0.9 * state[0] + g, state[1] + (0.9 * state[0] + g)
        step = stage.apply(Dense(g), state, context(LAYOUT))
        state = step.state
        big = torch.cat([torch.full((n,), len(s) > 1) for n, s in zip(LAYOUT.sizes, LAYOUT.shapes, strict=True)])
        sent = torch.zeros(LAYOUT.size, dtype=torch.bool).index_fill(0, step.update.indices, True)
        assert bool(sent[~big].all()), "small tensors go whole"
        assert torch.equal(to_dense(step.update, LAYOUT)[big & sent], v[big & sent])
        assert torch.equal(state[1], torch.where(sent, torch.tensor(0.0), v))
        assert torch.equal(state[0][big], torch.where(sent, torch.tensor(0.0), u)[big])
        assert not state[0][~big].any()


@given(st.data())
def test_density_one_with_masking_is_plain_sgd(data):
    layout = data.draw(layouts())
    stage, (first, second) = DGC(1.0, 0.9, warmup=()), (data.draw(updates(layout)) for _ in range(2))
    state = stage.init(layout)
    for update in (first, second):
        step = stage.apply(update, state, context(layout))
        state = step.state
        assert torch.equal(to_dense(step.update, layout), to_dense(update, layout))
        assert not state[0].any()
        assert not state[1].any()
        assert step.measurements == {"density": 1.0, "compression_error": 0.0}


def test_density_one_without_masking_is_sgd_with_momentum():
    stage = DGC(1.0, 0.9, mask=False, warmup=(), small="sparse")
    w, theirs = torch.zeros(6), torch.zeros(6, requires_grad=True)
    optimizer, layout = torch.optim.SGD([theirs], lr=0.1, momentum=0.9), flat(6)
    state = stage.init(layout)
    for g in gradients(8, 6):
        step = stage.apply(Dense(g), state, context(layout))
        state, w = step.state, w - 0.1 * to_dense(step.update, layout)
        theirs.grad = g
        optimizer.step()
    assert torch.allclose(w, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_nothing_is_lost_without_momentum():
    stage = DGC(0.1, 0.0, warmup=())
    state, sent, numbers = stage.init(LAYOUT), torch.zeros(LAYOUT.size), [g.mul(8).round() for g in gradients(30)]
    for g in numbers:
        step = stage.apply(Dense(g), state, context(LAYOUT))
        state, sent = step.state, sent + to_dense(step.update, LAYOUT)
    assert torch.equal(sent + state[1], sum(numbers))


@pytest.mark.parametrize("by", ["model", "tensor"])
def test_both_normalisations_make_the_same_step(by):
    nodes = 7
    of_mean, of_sum = (DGC(0.1, clip_norm=2.0, clip_by=by, nodes=nodes, normalization=n, warmup=()) for n in ("mean", "sum"))
    states = [[s.init(LAYOUT)] * nodes for s in (of_mean, of_sum)]
    clipped = 0.0
    for r in range(6):
        total = [torch.zeros(LAYOUT.size), torch.zeros(LAYOUT.size)]
        for node, g in enumerate(gradients(nodes, seed=r)):
            for which, (stage, given_g) in enumerate(((of_mean, g * (node + 0.2)), (of_sum, g * (node + 0.2) / nodes))):
                step = stage.apply(Dense(given_g), states[which][node], context(LAYOUT, r + 1))
                states[which] = [*states[which][:node], step.state, *states[which][node + 1 :]]
                total[which] += to_dense(step.update, LAYOUT) / (nodes if which == 0 else 1)
                clipped += step.measurements["local_clipped"]
        assert torch.allclose(total[0], total[1], rtol=1e-4, atol=1e-6)
    assert 0 < clipped < 2 * 6 * nodes, "some gradients are clipped and some are not"


def test_the_thresholds_of_the_paper():
    assert DGC(clip_norm=3.0, nodes=16, normalization="sum").threshold() == 0.75
    assert DGC(clip_norm=3.0, nodes=16).threshold() == 12.0
    assert DGC().threshold() == math.inf


@pytest.mark.parametrize("by", ["model", "tensor"])
def test_the_gradient_is_clipped_before_it_is_accumulated(by):
    clipped, plain = DGC(0.2, clip_norm=0.5, clip_by=by, warmup=()), DGC(0.2, warmup=())
    one, two = clipped.init(LAYOUT), plain.init(LAYOUT)
    for g in gradients(5):
        parts = LAYOUT.split(g) if by == "tensor" else (g,)
        by_hand = torch.cat([p * min(1.0, 0.5 / (float(p.norm()) or 1.0)) for p in parts])
        first, second = clipped.apply(Dense(g), one, context(LAYOUT)), plain.apply(Dense(by_hand), two, context(LAYOUT))
        one, two = first.state, second.state
        assert torch.allclose(to_dense(first.update, LAYOUT), to_dense(second.update, LAYOUT), rtol=1e-4, atol=1e-6)
        assert norm(first.update) > 0


def test_the_warm_up_of_the_paper():
    assert [1 - d for d, _ in PAPER_WARMUP] == [0.75, 0.9375, 0.984375, 0.996]
    stage = DGC(0.001, warmup=tuple((d, 2) for d, _ in PAPER_WARMUP))
    assert [stage.density_of(r) for r in range(1, 11)] == [0.25, 0.25, 0.0625, 0.0625, 0.015625, 0.015625, 0.004, 0.004, 0.001, 0.001]
    assert [DGC(0.1).density_of(r) for r in range(1, 6)] == [0.25, 0.1, 0.1, 0.1, 0.1], "never under the last density"
    assert DGC(0.1, warmup=()).density_of(1) == 0.1


def test_at_least_one_of_each_tensor_and_never_by_position():
    layout = Layout(("a", "b"), ((10, 10), (3, 3)), ("a", "b"))
    g = torch.cat([torch.linspace(0.1, 1, 100), torch.linspace(0.1, 1, 9)])
    out = DGC(0.001, warmup=()).apply(Dense(g), DGC().init(layout), context(layout)).update
    assert out.indices.tolist() == [99, 108]


@pytest.mark.parametrize("grid", ["float16", "int8"])
@pytest.mark.parametrize("mask", [False, True])
def test_what_rounding_takes_off_is_sent_later(grid, mask):
    stage = DGC(0.2, 0.0, mask=mask, warmup=(), grid=grid)
    state, sent, total = stage.init(LAYOUT), torch.zeros(LAYOUT.size, dtype=torch.float64), torch.zeros(LAYOUT.size, dtype=torch.float64)
    lost = 0.0
    for r, g in enumerate(gradients(40), 1):
        before = state[1] + g
        step = stage.apply(Dense(g), state, context(LAYOUT, r, seed=r))
        state = step.state
        sent, total = sent + to_dense(step.update, LAYOUT).double(), total + g.double()
        lost += float((before - to_dense(step.update, LAYOUT))[step.update.indices].abs().sum())
    assert lost > 0
    assert torch.allclose(sent + state[1].double(), total, atol=1e-4)
    if grid == "float16":
        assert isinstance(step.update.grid, Half)
        assert torch.equal(step.update.values.half().float(), step.update.values)
    else:
        assert (step.update.grid.bits, step.update.grid.block) == (8, 256)


def test_a_value_over_the_largest_half_is_sent_in_parts():
    layout, stage = flat(2), DGC(1.0, 0.0, warmup=(), grid="float16")
    first = stage.apply(Dense(torch.tensor([100_000.0, 1.0])), stage.init(layout), context(layout))
    second = stage.apply(Dense(torch.zeros(2)), first.state, context(layout))
    assert first.update.values.tolist() == [65504.0, 1.0]
    assert second.update.values.tolist() == [100_000.0 - 65504.0, 0.0]


@given(st.data())
def test_whatever_comes_for_many_rounds_all_stays_finite_and_no_input_changes(data):
    layout = data.draw(layouts())
    stage = data.draw(
        st.builds(
            DGC,
            st.sampled_from([0.001, 0.3]),
            nesterov=st.booleans(),
            clip_norm=st.sampled_from([None, 1e30]),
            clip_by=st.sampled_from(["model", "tensor"]),
            mask=st.booleans(),
            small=st.sampled_from(["dense", "sparse"]),
            grid=st.sampled_from(["float32", "float16", "int8"]),
        )
    )
    state, update = stage.init(layout), data.draw(updates(layout))
    for r in range(1, 6):
        before = [bits(t) for t in (values_of(update), *state)]
        step = stage.apply(update, state, context(layout, r))
        assert [bits(t) for t in (values_of(update), *state)] == before
        assert isinstance(step.update, Sparse)
        assert bool((step.update.indices.diff() > 0).all())
        assert all(torch.isfinite(t).all() for t in (step.update.values, *step.state))
        assert all(t.shape == (layout.size,) and t.dtype == torch.float32 for t in step.state)
        state = step.state


def test_without_a_state_it_sends_the_largest_of_each_update_alone():
    stage = DGC(0.2, clip_norm=0.5, warmup=(), state="none")
    assert stage.init(LAYOUT) is None
    assert not stage.has_momentum(2)
    for g in gradients(3):
        step = stage.apply(Dense(g), None, context(LAYOUT))
        clipped = g * (0.5 / float(g.norm()))
        assert step.state is None
        assert torch.allclose(step.update.values, clipped[step.update.indices])
        weight = clipped[:20].abs()
        there = step.update.indices[step.update.indices < 20]
        assert set(there.tolist()) == set(weight.topk(4).indices.tolist())


def test_sparse_updates_count_as_dense():
    stage, update = DGC(0.3, clip_norm=0.1), Sparse(torch.tensor([0, 7, 21]), torch.tensor([1.0, 2.0, 3.0]))
    one = stage.apply(update, stage.init(LAYOUT), context(LAYOUT))
    two = stage.apply(Dense(to_dense(update, LAYOUT)), stage.init(LAYOUT), context(LAYOUT))
    assert torch.equal(one.update.values, two.update.values)
    assert torch.equal(one.state[1], two.state[1])


def test_its_momentum_is_that_of_the_large_tensors():
    assert [DGC().has_momentum(n) for n in (0, 1, 2, 4)] == [False, False, True, True]
    assert [DGC(small="sparse").has_momentum(n) for n in (0, 1, 2)] == [True, True, True]
    assert not DGC(momentum=0.0).has_momentum(2)


def test_what_it_measures():
    layout = flat(4)
    stage = DGC(0.25, 0.0, small="sparse", warmup=(), clip_norm=1e3)
    step = stage.apply(Dense(torch.tensor([3.0, 4.0, 0.0, 12.0])), stage.init(layout), context(layout))
    assert step.measurements == {"density": 0.25, "compression_error": pytest.approx(5 / 13), "local_clipped": 0.0}
    step = stage.apply(Dense(torch.tensor([3e3, 4.0, 0.0, 12.0])), stage.init(layout), context(layout))
    assert step.measurements["local_clipped"] == 1.0


def test_it_bounds_nothing_and_must_not_follow_the_last_clip():
    assert DGC().bound(Bound(1.0), LAYOUT) == UNBOUNDED
    assert chain(ClipByGlobalNorm(1.0), DGC()).unbounded_stage() == DGC()
    assert chain(DGC(), ClipByGlobalNorm(1.0)).unbounded_stage() is None


class Points:
    """Two users with some points each, and a linear model with a bias: full batches, so that a gradient has no chance in it."""

    users, held_out_units = 2, 1

    def make_model(self):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model

    def load_user(self, user, rng):
        generator = torch.Generator().manual_seed(user)
        x = torch.randn(8, 3, generator=generator)
        return list(zip(x, torch.randn(8, 2, generator=generator), strict=True))

    def cost(self, user):
        return 8.0

    def batches(self, examples, batch_size, rng):
        yield torch.stack([x for x, _ in examples]), torch.stack([y for _, y in examples])

    def loss(self, model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    def evaluate(self, model, unit):
        return {"loss": 0.0}

    def summarise(self, counts, seed):
        return {}


def train_by_the_paper(rounds, lr, m, density, clip_norm):
    """The paper's loop over all users: sparsified matrix, dense bias with the momentum after the mean, steps on the mean."""
    task, shapes = Points(), ((2, 3), (2,))
    w, b, buffer = np.zeros((2, 3)), np.zeros(2), np.zeros(2)
    nodes = [Paper(shapes, m) for _ in range(task.users)]
    for r in range(1, rounds + 1):
        sums = [np.zeros(6), np.zeros(2)]
        for user, node in enumerate(nodes):
            examples = task.load_user(user, None)
            x, y = (np.array([e[i].tolist() for e in examples]) for i in (0, 1))
            error = x @ w.T + b - y
            g = [(2 * error.T @ x / error.size).ravel(), 2 * error.sum(0) / error.size]
            limit = clip_norm * math.sqrt(len(nodes)) / math.sqrt(sum(float((p**2).sum()) for p in g))
            sent = node.send([(p * min(1.0, limit)).tolist() for p in g], density)
            sums = [total + np.array(s) for total, s in zip(sums, sent, strict=True)]
        mean = [total / len(nodes) for total in sums]
        buffer = m * buffer + mean[1]
        w, b = w - lr(r) * mean[0].reshape(2, 3), b - lr(r) * buffer
    return np.concatenate([w.ravel(), b])


def test_one_local_step_and_full_participation_is_the_paper():
    lr = Schedule(value=0.3, warmup=4, decay="step", factor=0.5, start=10, every=5)
    method = Method(
        sampler=Poisson(2, 2.0),
        local=LocalSGD(1.0, steps=1),
        client=chain(DGC(1 / 6, 0.7, clip_norm=0.3, nodes=2, warmup=())),
        server=chain(SGD(lr, 0.0, False, 0.7)),
    )
    ours = simulate(method, Points(), rounds=20).state.params
    assert ours.tolist() == pytest.approx(train_by_the_paper(20, lr, 0.7, 1 / 6, 0.3).tolist(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"density": 0.0}, "0 < density <= 1"),
        ({"warmup": ((1.5, 1),)}, "0 < density <= 1"),
        ({"warmup": ((0.5, 0),)}, "at least 1 round"),
        ({"momentum": 1.0}, "momentum < 1"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov = true"),
        ({"clip_norm": 0.0}, "clip_norm > 0"),
        ({"clip_norm": math.inf}, "clip_norm > 0"),
        ({"nodes": 0}, "nodes >= 1"),
        ({"clip_by": "row"}, "tensor, model; got 'row'"),
        ({"normalization": "max"}, "mean, sum"),
        ({"small": "int8"}, "dense, sparse"),
        ({"grid": "int4"}, "float32, float16, int8"),
        ({"state": "worker"}, "user, none"),
        ({"state": "none", "nesterov": True}, "nesterov = false"),
    ],
)
def test_impossible_arguments_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        DGC(**changes)
