"""One measured user: operations against formulas, bytes against what a run sends."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedclip.dgc import DGC
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method
from fedclip.optimizers import SGD
from fedclip.packed import PackedCodec
from fedclip.sampling import FixedSize
from fedclip.schedules import Schedule
from fedclip.simulation import InProcess
from fedclip.transform import Chain, chain
from fedclip.trial import ATTENTION, TrialError, measure, server_seconds

INPUTS, HIDDEN, OUTPUTS, BATCH = 30, 20, 5, 4


class Perceptron:
    """Users with 10 examples each of a linear model, or of one with a hidden layer."""

    users, held_out_units = 6, 1

    def __init__(self, hidden=False, fails=False):
        self.hidden, self.fails = hidden, fails

    def make_model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if not self.hidden:
                return nn.Linear(INPUTS, OUTPUTS)
            return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUTS))

    def load_user(self, user, rng):
        if self.fails:
            raise OSError("the disk is gone")
        data = np.random.default_rng(user).normal(size=(10, INPUTS + OUTPUTS)).astype(np.float32)
        return list(data) if user else []

    def cost(self, user):
        return 10.0

    def batches(self, examples, batch_size, rng):
        for start in range(0, len(examples), batch_size):
            rows = torch.from_numpy(np.stack(examples[start : start + batch_size]))
            yield rows[:, :INPUTS], rows[:, INPUTS:]

    def loss(self, model, batch):
        return F.mse_loss(model(batch[0]), batch[1])


def method(client=None, codec=None, **local):
    local = {"lr": 0.1, "epochs": 2, "batch_size": BATCH} | local
    parts = {"codec": codec} if codec is not None else {}
    return Method(FixedSize(6, 6), LocalSGD(**local), client or Chain(), chain(SGD(Schedule(value=1.0))), **parts)


def trial(task=None, user=1, rounds=3, **options):
    return measure(method(**options), task or Perceptron(), user, rounds, "secret", "run")


def test_a_linear_model_takes_the_operations_of_the_formula():
    found = trial()
    # y = W x: 2 operations a multiply-add, forward, and as many for the gradient of W; the input needs none.
    assert found.flops_per_step == 2 * 2 * BATCH * INPUTS * OUTPUTS
    # Two epochs of 10 examples in batches of 4, 4 and 2.
    assert (found.steps, found.examples) == (6, 10)
    assert found.user_flops == 2 * 2 * 2 * 10 * INPUTS * OUTPUTS
    assert trial(epochs=None, steps=7).steps == 7
    # A hidden layer's input has a gradient too.
    two = trial(Perceptron(hidden=True))
    assert two.flops_per_step == 4 * BATCH * INPUTS * HIDDEN + 6 * BATCH * HIDDEN * OUTPUTS
    # What the backward pass needs: the batch (all its columns), the hidden values, and the outputs.
    assert 4 * BATCH * (INPUTS + HIDDEN) <= two.activations <= 4 * BATCH * (INPUTS + 2 * HIDDEN + 4 * OUTPUTS)


def test_attention_on_a_processor_is_counted():
    batch, heads, time, width = 2, 3, 16, 8
    q = torch.randn(batch, heads, time, width, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
        out = F.scaled_dot_product_attention(q, q, q)
    product = 2 * batch * heads * time * time * width
    assert flops.get_total_flops() == 2 * product  # scores, and their product with the values
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops:
        out.sum().backward()
    assert flops.get_total_flops() == 5 * product  # scores again; gradients of scores, values, queries, keys


def test_bytes_are_those_of_a_run():
    dense = trial()
    assert dense.uplink_bytes == {1: 20 + 4 * (INPUTS * OUTPUTS + OUTPUTS)}
    assert (dense.download, dense.stored, dense.sparse) == (20 + 4 * 155, 155, False)
    dgc = DGC(density=0.02, momentum=0.0, warmup=((0.5, 2), (0.1, 2)), small="sparse")
    options = {"client": chain(dgc), "codec": PackedCodec(), "epochs": None, "steps": 1}
    task, sent = Perceptron(hidden=True), []
    found = measure(method(**options), task, 3, 8, "secret", "run")
    assert sorted(found.uplink_bytes) == [1, 3, 5]
    engine = InProcess(method(**options), task, "secret", "run")
    sent = [engine.round().tally["uplink_bytes"] / 5 for _ in range(6)]  # of six users one has no data
    for start, size in found.uplink_bytes.items():
        assert size == pytest.approx(sent[start - 1], rel=0.1)
    assert found.sparse
    assert found.stored == pytest.approx(0.5 * Layout.of(task.make_model()).size, rel=0.05)


def test_times_are_of_the_parts():
    found = trial()
    assert found.work == 2 * 10 / BATCH
    made = dataclasses.replace(found, work=5.0, load_seconds=0.5, step_seconds=2.0, send_seconds=0.25, take_seconds=0.125)
    assert made.user_seconds == 0.5 + 5 * 2.0 + 0.25 + 0.125
    assert found.user_seconds > 0
    assert server_seconds(method(), Layout.of(nn.Linear(3, 3))) > 0


@pytest.mark.parametrize(
    ("task", "user", "said"),
    [(Perceptron(), 0, "user 0 has nothing to train on"), (Perceptron(fails=True), 1, "user 1: OSError: the disk is gone")],
)
def test_a_user_that_cannot_be_trained_is_named(task, user, said):
    with pytest.raises(TrialError, match=said):
        trial(task, user)


def test_a_trial_leaves_no_trace():
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial(Perceptron(hidden=True))
    assert torch.equal(torch.get_rng_state(), state)
