"""Forecasts: bytes over rounds against simulated cohorts, sizes of states against the states themselves, memory by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from fedclip.clipping import ClipByGlobalNorm
from fedclip.dgc import DGC
from fedclip.downlink import Downlink, Sent
from fedclip.forecast import Disk, Sizes, breaks, mean_download, memory, over_rounds
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method
from fedclip.optimizers import LAMB, SGD
from fedclip.release import Gaussian, Release
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.shapes import fixed_bytes, shapes_only, shrunk, tensor_bytes
from fedclip.transform import chain

LAYOUT = Layout(("a", "b", "c"), ((10, 20), (40,), ()), ("a", "b", "c"))


def method(client=(), server=None, sampler=None, **rest):
    return Method(sampler or Poisson(100, 10), LocalSGD(0.1, steps=1), chain(*client), chain(server or SGD(Schedule(value=1.0))), **rest)


def sizes(of, layout=LAYOUT, **changed):
    d = 4 * layout.size
    measured = {"fixed": 8, "download": d + 20, "upload": d + 20, "stored": d, "places": 0, "activations": 1000} | changed
    return Sizes.of(of, layout, **measured)


@pytest.mark.parametrize(("cohort", "rounds", "difference"), [(10, 30, 25.0), (50, 12, 40.0), (100, 6, 10.0), (2, 40, 90.0)])
def test_the_mean_download_is_that_of_drawn_cohorts(cohort, rounds, difference):
    sampler, whole, rng = Poisson(100, cohort), 100.0, np.random.default_rng(3)
    paid, came = 0, 0
    for _ in range(60):
        none = torch.zeros(0, dtype=torch.int64)
        known = Sent(torch.zeros(1), none, none, none)
        for round in range(1, rounds + 1):
            drawn = np.asarray(sampler.draw(rng), dtype=np.int64)
            lengths = np.full(round, int(difference))
            total, users, last = Downlink._charge(known, lengths, drawn, round, int(whole))
            known = Sent(torch.zeros(1), torch.from_numpy(lengths), torch.from_numpy(users), torch.from_numpy(last))
            paid, came = paid + total, came + len(drawn)
    assert mean_download(method(sampler=sampler), whole, difference, rounds) == pytest.approx(paid / came, rel=0.02)


def test_a_warm_up_counts_for_as_long_as_it_lasts():
    dgc = DGC(0.01, warmup=((0.25, 4), (0.0625, 6)))
    assert breaks(method([dgc]), 100) == (1, 5, 11)
    assert breaks(method([dgc]), 5) == (1, 5)
    assert breaks(method(), 7) == (1,)
    # 4 rounds of 100, 6 of 50 and 10 of 20
    assert over_rounds({1: 100, 5: 50, 11: 20}, 20) == (400 + 300 + 200) / 20


def test_states_have_their_sizes_without_their_values():
    lamb = method(server=LAMB(Schedule(value=0.1)), client=[DGC(momentum=0.5)], double_momentum=True)
    found = sizes(lamb)
    assert found.parameters == 4 * 241
    assert found.moments == tensor_bytes(lamb.server.init(LAYOUT)) == 2 * 4 * 241
    assert found.state == tensor_bytes(lamb.client.init(LAYOUT)) == 2 * 4 * 241
    assert shapes_only(lambda: nn.Linear(4, 5)).weight.device.type == "meta"
    assert shapes_only(lambda: torch.ones(2) * float(torch.ones(1))).device.type == "cpu"  # a value is asked for
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    model[0].weight.requires_grad_(False)
    # 20 frozen weights, a running mean and variance of 5 each, and one int64 counter.
    assert fixed_bytes(model) == 4 * 20 + 4 * 10 + 8


def test_a_shrunk_layout_keeps_tensors_and_layers():
    small = shrunk(LAYOUT, 24)
    assert (small.names, small.layers, small.sizes) == (LAYOUT.names, LAYOUT.layers, (20, 4, 1))
    assert [len(shape) > 1 for shape in small.shapes] == [True, False, False]
    assert shrunk(LAYOUT, 241) is LAYOUT


def test_memory_is_what_lies_in_a_process_by_hand():
    private = method([ClipByGlobalNorm(1.0)], LAMB(Schedule(value=0.1)), release=Release(Gaussian(1.0), 10.0), sampler=Poisson(100, 10))
    p, of = 4 * 241, sizes(private)
    (process,) = memory(private, of, 0)
    # Parameters, gradients, the server's model and two moments all along; seven more models with their gradients.
    kept = 8 + 5 * p + 7 * (2 * p + 8)
    assert sum(process.kept.values()) == kept
    # Two int64 sums and the numbers of the noise; the float64 sum, the noise that it is added to, and the mean.
    assert sum(process.phases["adding"].values()) == (2 + 2 + 2) * p
    assert sum(process.phases["releasing"].values()) == (2 + 2 + 1) * p
    # The model as sent and the int64 sum, the message up, the update decoded and guarded.
    assert sum(process.phases["taking"].values()) == 3 * p + (p + 20) + 2 * p
    assert process.largest == "taking"
    assert process.peak == kept + 6 * p + 20
    worker, server = memory(private, of, 3)
    assert (worker.count, server.count) == (3, 1)
    assert sum(server.phases["adding"].values()) == (3 * (2 + 2) + 2 + 2) * p  # each sum in its message, and out of it
    worker, server = memory(private, of, 3, updates=12)
    assert (worker.kept["messages of users"], server.phases["taking"]["messages of users"]) == (4 * (p + 20), 12 * (p + 20))
    assert sum(memory(private, sizes(private, activations=10**6), 3)[0].phases["training"].values()) == 10**6
    # A sparse update of a tenth of the values.
    sparse = sizes(private, upload=500, stored=p // 10, places=p // 5)
    assert memory(private, sparse, 1)[0].phases["taking"]["update as int64"] == 2 * (p // 10)


def test_disk_has_checkpoints_models_and_states():
    plain = method()
    # Two newest checkpoints, the best, and one being written, each of the model alone; the last and the best model.
    assert Disk.of(plain, LAYOUT, sizes(plain), 5) == Disk(4 * 4 * 241, 2 * 4 * 241, 0)
    dgc = method([DGC(momentum=0.5)])
    assert Disk.of(dgc, LAYOUT, sizes(dgc), 5).states > 0
