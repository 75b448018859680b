"""Server optimizers against torch's and against a slow NumPy form written from the equations."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedclip.layout import Layout
from fedclip.optimizers import LAMB, LARS, SGD, Adagrad, Adam, Yogi
from fedclip.schedules import Schedule
from fedclip.transform import UNBOUNDED, Bound
from fedclip.update import Dense, Sparse, to_dense
from tests.strategies_of_data import context, flat

LAYOUT = flat(3, 0, 1, 4)


def gradients(steps=20, scale=1.0):
    return torch.randn(steps, LAYOUT.size, generator=torch.Generator().manual_seed(1)) * scale


def start():
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(2))


def ours(optimizer, grads, params=None):
    """Parameters after each step."""
    params, state, path = start() if params is None else params, optimizer.init(LAYOUT), []
    for n, g in enumerate(grads, 1):
        step = optimizer.apply(Dense(g), state, context(LAYOUT, n, params))
        params, state = params - to_dense(step.update, LAYOUT), step.state
        path.append(params)
    return torch.stack(path)


def torchs(make, grads):
    params, path = torch.nn.Parameter(start()), []
    optimizer = make([params])
    for g in grads:
        params.grad = g.clone()
        optimizer.step()
        path.append(params.detach().clone())
    return torch.stack(path)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum, nesterov):
    expected = torchs(lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum, nesterov=nesterov), gradients())
    torch.testing.assert_close(ours(SGD(Schedule.of(0.1), momentum, nesterov), gradients()), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_small_tensors_have_their_own_momentum(nesterov):
    """Tensors of one dimension or none as with one momentum, the others as with the other, each as torch has it."""
    layout = Layout(("w", "b", "s", "x"), ((2, 2), (3,), (), (1, 2, 2)), ("w", "b", "s", "x"))
    grads = torch.randn(10, layout.size, generator=torch.Generator().manual_seed(1))
    params = {m: torch.zeros(layout.size) for m in (0.0, 0.9, None)}
    for momentum in params:
        optimizer = (
            SGD(Schedule.of(0.1), 0.0, nesterov, 0.9) if momentum is None else SGD(Schedule.of(0.1), momentum, nesterov and momentum > 0)
        )
        state = optimizer.init(layout)
        for n, g in enumerate(grads, 1):
            step = optimizer.apply(Dense(g), state, context(layout, n, params[momentum]))
            params[momentum], state = params[momentum] - to_dense(step.update, layout), step.state
    small = torch.tensor([False] * 4 + [True] * 4 + [False] * 4)
    torch.testing.assert_close(params[None], torch.where(small, params[0.9], params[0.0]))
    both = SGD(Schedule.of(0.1), 0.0, nesterov, 0.9)
    assert [both.has_momentum(n) for n in (0, 1, 2, 4)] == [True, True, False, False]


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adam_is_torchs(eps):
    expected = torchs(lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.8, 0.95), eps=eps), gradients())
    torch.testing.assert_close(ours(Adam(Schedule.of(0.05), (0.8, 0.95), eps), gradients()), expected, atol=1e-6, rtol=1e-6)


def test_adam_with_decay_is_torchs_adamw():
    expected = torchs(lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), weight_decay=0.1), gradients())
    torch.testing.assert_close(ours(Adam(Schedule.of(0.05), (0.8, 0.95), weight_decay=0.1), gradients()), expected, atol=1e-6, rtol=1e-6)


def slow_lamb(grads, params, lr, b1, b2, eps, decay, least=0.0, greatest=np.inf):
    """arXiv 1904.00962, Algorithm 2, in float64, a layer and a coordinate at a time."""
    theta, m, v, path = params.double().tolist(), [0.0] * LAYOUT.size, [0.0] * LAYOUT.size, []
    starts = np.cumsum([0, *LAYOUT.sizes])
    for t, g in enumerate(grads.double().tolist(), 1):
        u = []
        for i in range(LAYOUT.size):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            u.append(m[i] / (1 - b1**t) / ((v[i] / (1 - b2**t)) ** 0.5 + eps) + decay * theta[i])
        new = list(theta)
        for a, b in pairwise(starts):
            size, length = sum(x * x for x in theta[a:b]) ** 0.5, sum(x * x for x in u[a:b]) ** 0.5
            ratio = size / length if size and length else 1.0
            for i in range(a, b):
                new[i] = theta[i] - lr * min(max(ratio, least), greatest) * u[i]
        theta = new
        path.append(theta)
    return torch.tensor(path, dtype=torch.float64)


@pytest.mark.parametrize(("decay", "bounds"), [(0.0, (0.0, np.inf)), (0.1, (0.0, np.inf)), (0.01, (0.5, 0.8))])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_lamb_is_the_slow_one(decay, bounds, scale):
    grads = gradients(scale=scale)
    fast = ours(LAMB(Schedule.of(0.02), (0.9, 0.999), 1e-6, decay, bounds), grads)
    slow = slow_lamb(grads, start(), 0.02, 0.9, 0.999, 1e-6, decay, *bounds)
    torch.testing.assert_close(fast.double(), slow, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.9, 0.05), (0.0, 0.05)])
def test_lars_is_the_slow_one(momentum, decay):
    """arXiv 1708.03888, Algorithm 1, in float64, a layer at a time: v <- m v + gamma lambda (g + beta w), w <- w - v."""
    grads, w, eta = gradients(), start().double().numpy(), 0.02
    v, path, edges = np.zeros(LAYOUT.size), [], np.cumsum([0, *LAYOUT.sizes])
    for n, g in enumerate(grads.double().numpy(), 1):
        gamma = 0.5 if n < 10 else 0.25
        for a, b in pairwise(edges):
            size, length = np.linalg.norm(w[a:b]), np.linalg.norm(g[a:b])
            rate = eta * size / (length + decay * size) if size else eta
            v[a:b] = momentum * v[a:b] + gamma * rate * (g[a:b] + decay * w[a:b])
        w = w - v
        path.append(w)
    falling = Schedule(value=0.5, decay="step", factor=0.5, start=0, every=10)
    assert [falling(n) for n in (1, 9, 10, 20)] == [0.5, 0.5, 0.25, 0.125]
    fast = ours(LARS(falling, momentum, eta, decay), grads[:19])
    torch.testing.assert_close(fast.double(), torch.from_numpy(np.stack(path))[:19], atol=5e-6, rtol=5e-6)


def test_a_step_of_lars_is_a_share_of_the_layer_whatever_the_gradient():
    """Without momentum and decay the step's norm is lr times trust times that of the layer; for a layer of zeros the ratio is 1."""
    params, g = torch.tensor([3.0, 0, 4.0, 2.0, 0, 0, 0, 0]), torch.tensor([1e-6, 0, 0, -1e3, 3.0, 0, 4.0, 0])
    optimizer = LARS(Schedule.of(2.0), 0.0, trust=0.01)
    step = optimizer.apply(Dense(g), optimizer.init(LAYOUT), context(LAYOUT, params=params))
    assert step.update.vector.tolist() == pytest.approx([0.1, 0, 0, -0.04, 0.06, 0, 0.08, 0])
    assert step.measurements["trust_ratio"] == pytest.approx((5e6, 1.0, 2e-3, 1.0))


@pytest.mark.parametrize("initial", [None, 0.04])
@pytest.mark.parametrize("name", ["yogi", "adagrad"])
def test_yogi_and_adagrad_are_the_papers(name, initial):
    """arXiv 2003.00295, Algorithm 2, in float64, a coordinate at a time; v_{-1} = tau^2 unless it is given."""
    b1, b2, tau, lr = (0.9, 0.99, 1e-2, 0.05) if name == "yogi" else (0.0, None, 1e-2, 0.05)
    x, path = start().double().numpy(), []
    m, v = np.zeros(LAYOUT.size), np.full(LAYOUT.size, tau**2 if initial is None else initial)
    for g in gradients().double().numpy():
        for i in range(LAYOUT.size):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            if name == "yogi":
                v[i] = v[i] - (1 - b2) * g[i] ** 2 * np.sign(v[i] - g[i] ** 2)
            else:
                v[i] = v[i] + g[i] ** 2
        x = x - lr * m / (np.sqrt(v) + tau)
        path.append(x)
    optimizer = Yogi(Schedule.of(lr), (b1, b2), tau, initial) if name == "yogi" else Adagrad(Schedule.of(lr), tau, initial)
    torch.testing.assert_close(ours(optimizer, gradients()).double(), torch.from_numpy(np.stack(path)), atol=5e-6, rtol=5e-6)


def test_adagrad_without_an_initial_sum_is_torchs():
    expected = torchs(lambda p: torch.optim.Adagrad(p, lr=0.05, eps=1e-3), gradients())
    torch.testing.assert_close(ours(Adagrad(Schedule.of(0.05), 1e-3, 0.0), gradients()), expected, atol=1e-6, rtol=1e-6)


def test_lamb_takes_ratio_one_where_a_norm_is_zero():
    params = torch.tensor([0.0, 0, 0, 2.0, 3.0, 0, 0, 0])
    g = torch.tensor([1.0, 1, 1, 0.0, 1, 0, 0, 0])
    step = LAMB(Schedule.of(0.5)).apply(Dense(g), LAMB(Schedule.of(0.5)).init(LAYOUT), context(LAYOUT, params=params))
    # Layers: zero parameters; empty; zero gradient; both over 0: u = g / |g| = (1, 0, 0, 0), so that r = ||theta|| / 1 = 3.
    assert step.measurements["trust_ratio"] == pytest.approx((1.0, 1.0, 1.0, 3.0), rel=1e-5)
    assert step.update.vector.tolist() == pytest.approx([0.5, 0.5, 0.5, 0, 1.5, 0, 0, 0], rel=1e-5)


def test_trust_bounds_hold_also_where_the_ratio_would_be_one():
    optimizer = LAMB(Schedule.of(1.0), trust_bounds=(2.0, 2.5))
    params = torch.tensor([0.0, 0, 0, 9.0, 0.1, 0, 0, 0])
    step = optimizer.apply(Dense(torch.ones(8)), optimizer.init(LAYOUT), context(LAYOUT, params=params))
    assert step.measurements["trust_ratio"] == (2.0, 2.0, 2.5, 2.0)


def test_lamb_by_blocks_has_a_ratio_a_block():
    from fedclip.layout import Layout

    names = ("blocks.0.a", "blocks.0.b", "head.a")
    layout = Layout(names, ((2,), (1,), (1,)), names)
    optimizer = LAMB(Schedule.of(1.0), layers="block")
    params = torch.tensor([3.0, 0.0, 4.0, 7.0])
    step = optimizer.apply(Dense(torch.ones(4)), optimizer.init(layout), context(layout, params=params))
    assert step.measurements["trust_ratio"] == pytest.approx((5 / 3**0.5, 7.0), rel=1e-5)


ALL = [SGD(Schedule.of(0.1), 0.9), *(made(Schedule.of(0.1)) for made in (Adam, LAMB, LARS, Yogi, Adagrad))]


@pytest.mark.parametrize("optimizer", ALL, ids=lambda o: o.name)
def test_the_rate_follows_the_round_and_nothing_bounds_a_step(optimizer):
    from dataclasses import replace

    falling = replace(optimizer, lr=Schedule(value=0.1, decay="step", factor=0.5, start=0, every=2))
    g, state = Dense(gradients(1)[0]), optimizer.init(LAYOUT)
    first, second = (falling.apply(g, state, context(LAYOUT, n, start())).update.vector for n in (1, 2))
    torch.testing.assert_close(second, first * 0.5)
    assert optimizer.bound(Bound(1.0), LAYOUT) == UNBOUNDED
    assert optimizer.has_momentum(1) == (optimizer.name != "adagrad")


def test_sgd_takes_sparse_means():
    step = SGD(Schedule.of(2.0)).apply(Sparse(torch.tensor([1]), torch.tensor([3.0])), None, context(LAYOUT))
    assert step.update.vector.tolist() == [0, 6, 0, 0, 0, 0, 0, 0]
    assert not SGD(Schedule.of(2.0)).has_momentum(2)
    assert not Adam(Schedule.of(2.0), (0.0, 0.9)).has_momentum(2)


def test_impossible_optimizers_are_refused():
    with pytest.raises(ValueError, match="nesterov"):
        SGD(Schedule.of(0.1), nesterov=True)
    with pytest.raises(ValueError, match="trust_bounds"):
        LAMB(Schedule.of(0.1), trust_bounds=(2.0, 1.0))
