"""The way down: everybody trains from one reconstruction, what a difference loses comes later, and each client pays for what it needs."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.clipping import ClipByGlobalNorm
from fedclip.codec import DenseCodec
from fedclip.downlink import Downlink
from fedclip.local import LocalSGD
from fedclip.method import Method, ServerState
from fedclip.optimizers import SGD
from fedclip.packed import PackedCodec
from fedclip.quantize import Quantize
from fedclip.round import begin
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.simulation import InProcess
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions
from fedclip.transform import chain, with_error_feedback
from fedclip.update import Sparse
from tests.stages_of_tests import Round, TopK
from tests.strategies_of_data import flat

LAYOUT = flat(6, 4)
CODEC = DenseCodec()
WHOLE = 20 + 4 * LAYOUT.size


class Pairs(DenseCodec):
    """Eight bytes a stored value: a codec whose sparse messages are short."""

    def encode(self, update, layout):
        return bytes(8 * update.values.numel()) if isinstance(update, Sparse) else super().encode(update, layout)


def rng():
    return np.random.default_rng(0)


def params(seed=0):
    return torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed))


def test_without_stages_the_model_goes_down_as_it_is():
    download = Downlink().send(params(), None, (1, 5, 7), 1, LAYOUT, rng(), CODEC)
    assert torch.equal(CODEC.decode(download.payload, LAYOUT).vector, params())
    assert (download.total_bytes, download.sent) == (3 * WHOLE, None)


def test_lossy_stages_apply_to_the_whole_model():
    download = Downlink(chain(Round(0.5))).send(params(), None, (1,), 1, LAYOUT, rng(), CODEC)
    assert torch.equal(CODEC.decode(download.payload, LAYOUT).vector, (params() * 2).round() / 2)


def test_differences_bring_the_model_closer_and_lose_nothing_for_good():
    downlink, sent = Downlink(chain(TopK(3)), differences=True), None
    first = downlink.send(params(0), sent, (0,), 1, LAYOUT, rng(), Pairs())
    assert torch.equal(first.sent.params, params(0)), "who comes first gets the whole"
    sent, target, far = first.sent, params(1), []
    for round in range(2, 7):
        download = downlink.send(target, sent, (0,), round, LAYOUT, rng(), Pairs())
        sent = download.sent
        assert torch.equal(CODEC.decode(download.payload, LAYOUT).vector, sent.params), "what clients train from is what is kept"
        far.append(float((target - sent.params).norm()))
    assert far == sorted(far, reverse=True)
    torch.testing.assert_close(sent.params, target)


@given(st.lists(st.sets(st.integers(0, 8)), min_size=1, max_size=12), st.integers(1, 10))
def test_a_client_pays_for_what_it_missed_or_for_the_whole(cohorts, k):
    downlink, sent, last, sizes = Downlink(chain(TopK(k)), differences=True), None, {}, []
    for round, cohort in enumerate(cohorts, 1):
        download = downlink.send(params(round), sent, sorted(cohort), round, LAYOUT, rng(), Pairs())
        sizes.append(8 * k)
        expected = sum(min(sum(sizes[last[u] : round]), WHOLE) if u in last else WHOLE for u in cohort)
        assert download.total_bytes == expected
        last |= dict.fromkeys(cohort, round)
        sent = download.sent
    assert dict(zip(sent.users.tolist(), sent.last.tolist(), strict=True)) == last


def method(downlink, codec=CODEC):
    stages = chain(ClipByGlobalNorm(1.0)), chain(SGD(Schedule.of(1.0)))
    return Method(Poisson(20, 8.0), LocalSGD(0.1, steps=1), *stages, codec=codec, downlink=downlink)


def test_a_round_sends_one_reconstruction_to_all_and_counts_its_cohort():
    lossy = method(Downlink(chain(Round(0.5))))
    plan = begin(lossy, ServerState.initial(params(), lossy, LAYOUT), LAYOUT, "s", "r")
    cohort = [user for _, users in plan.blocks for user in users]
    assert torch.equal(CODEC.decode(plan.spec.params, LAYOUT).vector, (params() * 2).round() / 2)
    assert plan.downlink_bytes == len(cohort) * WHOLE > 0


def test_the_model_goes_down_in_the_format_of_the_updates():
    task = build_vision(VisionOptions(name="vision"), population=20, seed=1)
    packed = method(Downlink(chain(Quantize(8, 256))), PackedCodec())
    engine = InProcess(packed, task, "s", "r")
    tally = engine.round().tally
    assert tally["users"] > 0
    assert "failed_users" not in tally or not tally["failed_users"]
    assert 0 < tally["downlink_bytes"] / tally["users"] < 1.2 * engine.layout.size


def test_what_is_kept_goes_on_from_round_to_round():
    lossy = method(Downlink(chain(TopK(2)), differences=True), Pairs())
    state = ServerState.initial(params(), lossy, LAYOUT)
    plan = begin(lossy, state, LAYOUT, "s", "r")
    assert plan.sent.sizes.tolist() == [16]
    again = begin(lossy, dataclasses.replace(state, sent=plan.sent, round=1), LAYOUT, "s", "r")
    assert again.sent.sizes.tolist() == [16, 16]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="without a state"):
        Downlink(chain(with_error_feedback(TopK(1))))
    with pytest.raises(ValueError, match="Expected stages with differences"):
        Downlink(differences=True)
