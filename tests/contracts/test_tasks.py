"""One suite for every `Task`: pure, deterministic, and what the engine and the metrics ask of it. A task is a line in `TASKS`."""

import atexit
import copy
import functools
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedclip.asr.model_options import ConformerOptions, PretrainedOptions
from fedclip.asr.options import FeatureOptions
from fedclip.layout import Layout
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions
from tests.fedclip.tasks.test_asr import task as tones_task
from tests.idx_folder import write_idx_folder
from tests.pretrained_folder import write_pretrained


def images(**options):
    """The task on idx files that are gone once they were read."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_idx_folder(Path(folder), train=40, test=8, side=4)
        return build_vision(VisionOptions(name="vision", data="idx", **options), population=6, seed=3, data_dir=written)


@functools.cache
def wav2vec2():
    """The folder of a tiny pretrained model, which goes with this process."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return write_pretrained(Path(folder.name), "wav2vec2")


TASKS = {
    "vision": lambda: build_vision(VisionOptions(name="vision", channels=2), population=12, seed=3),
    "idx": lambda: images(channels=2, hidden=8),
    "resnet": lambda: images(model="resnet18"),
    "asr": lambda: tones_task(seed=3),
    "conformer": lambda: tones_task(seed=3, model=ConformerOptions(dim=8, layers=1, heads=2, mlp_dim=8, depthwise_kernel=3)),
    "pretrained": lambda: tones_task(seed=3, model=PretrainedOptions(path=wav2vec2()), features=FeatureOptions()),
}


@pytest.fixture(params=TASKS, scope="module")
def make(request):
    return TASKS[request.param]


@pytest.fixture(scope="module")
def task(make):
    return make()


def stream(seed=0):
    return np.random.default_rng(seed)


def flat(thing):
    """All the tensors and numbers inside a batch or an example."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, np.ndarray):
        return [torch.from_numpy(thing)]
    if hasattr(thing, "__dataclass_fields__"):
        return [t for name in thing.__dataclass_fields__ for t in flat(getattr(thing, name))]
    if isinstance(thing, list | tuple):
        return [t for part in thing for t in flat(part)]
    return [torch.tensor(thing)] if isinstance(thing, int | float) else []


def same(a, b):
    return len(flat(a)) == len(flat(b)) and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def first_user_with_data(task):
    return next(u for u in range(task.users) if len(task.load_user(u, stream())))


def test_the_model_is_the_same_each_time_and_in_each_copy_of_the_task(make, task):
    first, again, elsewhere = task.make_model(), task.make_model(), make().make_model()
    assert first is not again
    for a, b, c in zip(first.parameters(), again.parameters(), elsewhere.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert Layout.of(first).size > 0


def test_loading_and_batching_are_functions_of_their_arguments(make, task):
    user, other = first_user_with_data(task), make()
    examples = task.load_user(user, stream(1))
    assert same(list(examples), list(task.load_user(user, stream(1))))
    assert same(list(examples), list(other.load_user(user, stream(1))))
    batches = list(task.batches(examples, 2, stream(2)))
    assert same(batches, list(task.batches(examples, 2, stream(2))))
    assert batches


def test_an_epoch_has_another_order_with_another_stream(task):
    examples = task.load_user(first_user_with_data(task), stream())
    orders = [list(task.batches(examples, 1, stream(seed))) for seed in range(6)]
    assert not all(same(orders[0], order) for order in orders[1:])


def test_nothing_touches_a_global_generator(task):
    before = torch.get_rng_state(), pickle.dumps(np.random.get_state())  # noqa: NPY002 - it must not be touched
    task.make_model()
    examples = task.load_user(first_user_with_data(task), stream())
    next(iter(task.batches(examples, 2, stream())))
    model = task.make_model().eval()
    with torch.no_grad():
        task.evaluate(model, 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]  # noqa: NPY002


def test_the_loss_is_a_finite_scalar_that_reaches_the_parameters_and_falls(task):
    model, examples = task.make_model(), task.load_user(first_user_with_data(task), stream())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for step in range(12):
            optimizer.zero_grad()
            batch = list(task.batches(examples, 4, stream(5)))
            loss = sum(task.loss(model, b) for b in batch) / len(batch)
            assert loss.shape == ()
            assert torch.isfinite(loss)
            loss.backward()
            if step == 0:
                assert any(p.grad is not None and p.grad.any() for p in model.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_evaluation_is_deterministic_changes_nothing_and_pools_in_any_order(task):
    model = task.make_model().eval()
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        counts = [task.evaluate(model, unit) for unit in range(task.held_out_units)]
        assert task.evaluate(model, 0) == counts[0]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(type(v) is float for c in counts for v in c.values())
    assert all(type(k) is str for c in counts for k in c)
    forward, backward = task.summarise(counts, 1), task.summarise(counts[::-1], 1)
    points = [k for k in forward if not k.endswith(("_low", "_high"))]
    assert {"eval_loss"} < set(points)
    assert {k: forward[k] for k in points} == pytest.approx({k: backward[k] for k in points})
    assert task.summarise(counts, 1) == forward
    assert all(np.isfinite(v) for v in forward.values())


def test_costs_are_known_without_loading(task):
    costs = [task.cost(u) for u in range(task.users)]
    assert all(type(c) is float and c >= 0 for c in costs)
    assert sum(costs) > 0
