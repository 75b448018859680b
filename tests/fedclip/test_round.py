"""A round: the same bits for any deal over workers, failures that cost nobody else anything, and a sum that one user bounds."""

import dataclasses
import json
import math
import random
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from fedclip import client
from fedclip.client import Client, train_blocks
from fedclip.clipping import ClipByGlobalNorm, ClipPerLayer
from fedclip.collector import Collector, Contribution
from fedclip.fold import FoldOverflow
from fedclip.method import Method, ServerState
from fedclip.optimizers import SGD
from fedclip.release import Gaussian, Release
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.round import advance, begin, deal, finish, release
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.simulation import initial_params
from fedclip.site import GROUP_BYTES, GROUP_USERS, Site, evaluate_units
from fedclip.sparsify import CommonMask, RandomK, TopK
from fedclip.spec import RoundSpec
from fedclip.stages import gaussian, local_sgd, poisson
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions
from fedclip.transform import chain
from fedclip.update import Dense
from strategies.recipes import fedavg, pfl4asr
from tests.stages_of_tests import Draws

VISION = build_vision(VisionOptions(name="vision", channels=2), population=30, seed=0)


def private(task=VISION, noise=0.5):
    return pfl4asr(
        sampler=poisson(30, 12.0),
        local=local_sgd(lr=0.1, steps=2, batch_size=8, clip_norm=1.0),
        mechanism=gaussian(noise),
        max_norm=0.5,
        server_lr=0.01,
    )


def run(method, task=VISION, rounds=3, workers=1, secret="s", mix=None):
    """Rounds in this process, dealt to sites that know nothing of each other; the states and outcomes."""
    sites = [Site(task, Replica(task.make_model())) for _ in range(workers)]
    layout = sites[0].replica.layout
    state, outcomes = ServerState.initial(initial_params(task), method, layout), []
    for _ in range(rounds):
        plan = begin(method, state, layout, secret, "run")
        shares = deal(plan.blocks, workers, task)
        if mix is not None:
            for share in shares:
                mix.shuffle(share)
            mix.shuffle(shares)
        partials = [train_blocks(site, plan.spec, share) for site, share in zip(sites, shares, strict=True)]
        outcomes.append(finish(method, state, layout, plan, partials))
        state = outcomes[-1].state
    return state, outcomes


def comparable(tally):
    return {k: v for k, v in tally.items() if not k.endswith("seconds")}


@pytest.fixture(scope="module")
def reference():
    return run(private())


@pytest.mark.parametrize(("workers", "seed"), [(1, 1), (2, 2), (3, 3)])
def test_any_deal_over_workers_has_the_same_bits(reference, workers, seed):
    state, outcomes = run(private(), workers=workers, mix=random.Random(seed))
    assert torch.equal(state.params, reference[0].params)
    assert [comparable(o.tally) for o in outcomes] == [comparable(o.tally) for o in reference[1]], "tallies add up in cohort order"
    assert all(math.isfinite(v) for v in state.params)


def test_the_same_secret_repeats_and_another_does_not(reference):
    assert torch.equal(run(private())[0].params, reference[0].params)
    assert not torch.equal(run(private(), secret="t")[0].params, reference[0].params)


def test_an_attempt_draws_all_anew():
    method, layout = private(), Replica(VISION.make_model()).layout
    state = ServerState.initial(initial_params(VISION), method, layout)
    plans = [begin(method, dataclasses.replace(state, attempt=a), layout, "s", "run") for a in (0, 1)]
    assert plans[0].blocks != plans[1].blocks
    assert not torch.equal(*(finish(method, state, layout, p, []).state.params for p in plans))


def test_a_round_changes_none_of_its_inputs():
    method, site = private(), Site(VISION, Replica(VISION.make_model()))
    layout = site.replica.layout
    state = ServerState.initial(initial_params(VISION), method, layout)
    before = state.params.clone()
    plan = begin(method, state, layout, "s", "run")
    partial = train_blocks(site, plan.spec, plan.blocks)
    total = partial.total.copy()
    first, second = (finish(method, state, layout, plan, [partial]) for _ in range(2))
    assert torch.equal(state.params, before)
    assert np.array_equal(partial.total, total)
    assert (state.round, state.server[0].steps) == (0, 0)
    assert not state.server[0].first.any()
    assert torch.equal(first.state.params, second.state.params)


def test_the_cohort_is_dealt_in_blocks_of_consecutive_users_once_each():
    method = dataclasses.replace(private(), sampler=Poisson(100_000, 5000.0))
    layout = Replica(VISION.make_model()).layout
    blocks = begin(method, ServerState.initial(initial_params(VISION), method, layout), layout, "s", "run").blocks
    users = [u for _, block in blocks for u in block]
    assert users == sorted(set(users))
    assert [n for n, _ in blocks] == list(range(len(blocks)))
    assert 220 <= len(blocks) <= 280


class Line:
    """One parameter vector w of two numbers, starting at (1, 2); a user's loss is the mean of w . x over its examples x."""

    held_out_units, users = 1, 6
    data = (((1.0, 0.0),), ((0.0, 2.0),) * 3, (), ((4.0, 4.0),) * 2, ((0.5, 0.5),), ((1.0, 1.0),))

    def make_model(self):
        layer = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        return layer

    def load_user(self, user, rng):
        return self.data[user]

    def cost(self, user):
        return 1.0

    def batches(self, examples, batch_size, rng):
        yield torch.tensor(examples)

    def loss(self, model, batch):
        return model(batch).mean()

    def evaluate(self, model, unit):
        return {"w": float(model.weight.sum())}

    def summarise(self, counts, seed):
        return {"eval_loss": sum(c["w"] for c in counts)}


class Failing(Line):
    """Users 0 and 1 fail: one when it loads, one when it trains."""

    def load_user(self, user, rng):
        if user == 0:
            raise OSError("no such recording")
        return super().load_user(user, rng)

    def loss(self, model, batch):
        if batch.shape[0] == 3:
            raise RuntimeError("out of memory")
        return super().loss(model, batch)


class NotFinite(Line):
    """User 3 diverges."""

    def loss(self, model, batch):
        return super().loss(model, batch) * (math.nan if batch.shape[0] == 2 else 1.0)


def averaging(weighting="examples", **more):
    return fedavg(sampler=poisson(6, 6.0), local=local_sgd(lr=0.1, steps=1), weighting=weighting, **more)


def everyone(task, method=None):
    """One round with all the users: the step that the server took, and the outcome."""
    state, (outcome,) = run(method or averaging(), task, rounds=1)
    return (initial_params(task) - state.params).numpy(), outcome


def means(task, skipped=()):
    return {u: np.mean(task.data[u], axis=0) * 0.1 for u in range(6) if task.data[u] and u not in skipped}


def test_federated_averaging_by_examples_is_the_weighted_mean():
    step, outcome = everyone(Line())
    # The gradient of user u is the mean of its examples, and delta = lr * gradient; FedAvg weights it by the number of examples.
    deltas = means(Line())
    weights = {u: len(Line.data[u]) for u in deltas}
    expected = sum(weights[u] * deltas[u] for u in deltas) / sum(weights.values())
    assert step == pytest.approx(expected, abs=1e-6)
    assert (outcome.tally["users"], outcome.tally["users_without_data"], outcome.tally["weight"]) == (5.0, 1.0, 8.0)


def test_uniform_weights_are_the_plain_mean_over_users_with_data():
    step, outcome = everyone(Line(), averaging("uniform"))
    assert step == pytest.approx(np.mean(list(means(Line()).values()), axis=0), abs=1e-6)
    assert outcome.tally["weight"] == 5.0


def test_a_user_that_fails_is_counted_and_adds_nothing():
    step, outcome = everyone(Failing(), averaging("uniform"))
    assert step == pytest.approx(np.mean(list(means(Line(), skipped=(0, 1)).values()), axis=0), abs=1e-6)
    assert (outcome.tally["users"], outcome.tally["failed_users"], outcome.tally["users_without_data"]) == (3.0, 2.0, 1.0)
    assert outcome.errors == ("user 0: OSError: no such recording", "user 1: RuntimeError: out of memory")


def test_a_user_that_diverges_is_a_zero_vector_that_counts():
    step, outcome = everyone(NotFinite(), averaging("uniform"))
    deltas = means(Line(), skipped=(3,))
    assert step == pytest.approx(np.sum(list(deltas.values()), axis=0) / 5, abs=1e-6)
    assert (outcome.tally["not_finite"], outcome.tally["weight"], outcome.tally["losses"]) == (1.0, 5.0, 4.0)


def test_a_user_that_diverges_already_sends_zeros():
    spec, layout = spec_of(noised(), NotFinite())
    client = Client(Site(NotFinite(), Replica(NotFinite().make_model())), spec)
    contribution = client.train_user(3)
    assert client.codec.decode(contribution.payload, layout).vector.tolist() == [0.0, 0.0]
    assert (contribution.tally["not_finite"], contribution.weight) == (1.0, 1.0)


def test_downlink_and_uplink_are_the_bytes_of_the_wire():
    outcome = everyone(Line())[1]
    # A header of 20 bytes and two float32 numbers; five users with data send, all six receive.
    assert (outcome.tally["uplink_bytes"], outcome.tally["downlink_bytes"]) == (5 * 28.0, 6 * 28.0)


def noised(weighting="uniform", max_examples=None, max_norm=0.05, sampler=None):
    return Method(
        sampler=sampler or Poisson(6, 6.0),
        local=local_sgd(lr=0.1, steps=1),
        client=chain(ClipByGlobalNorm(max_norm)),
        server=chain(SGD(Schedule.of(1.0))),
        release=Release(Gaussian(1e-9), 6.0),
        weighting=weighting,
        max_examples=max_examples,
    )


def test_under_noise_the_sum_is_divided_by_the_public_cohort():
    step, outcome = everyone(Failing(), noised(max_norm=100.0))
    assert step == pytest.approx(np.sum(list(means(Line(), skipped=(0, 1)).values()), axis=0) / 6, abs=1e-6)
    assert outcome.tally["failed_users"] == 2.0


def test_under_noise_weights_go_in_before_the_clip():
    step, _ = everyone(Line(), noised("examples", 4))
    expected = np.zeros(2)
    for u, delta in means(Line()).items():
        weighted = delta * min(len(Line.data[u]), 4) / 4
        expected += weighted * min(1.0, 0.05 / np.linalg.norm(weighted))
    assert step == pytest.approx(expected / 6, abs=1e-6)


def test_an_empty_cohort_under_noise_is_still_a_released_round():
    method = dataclasses.replace(noised(max_norm=1.0, sampler=Poisson(6, 1e-9)), release=Release(Gaussian(3.0), 1e-3))
    state, (outcome,) = run(method, Line(), rounds=1)
    assert state.round == 1
    assert outcome.tally.get("users", 0.0) == 0.0
    assert (initial_params(Line()) - state.params).abs().min() > 1.0


def snr_of_rounds(method, rounds=1):
    layout = Replica(VISION.make_model()).layout
    state, found = ServerState.initial(initial_params(VISION), method, layout), []
    for _ in range(rounds):
        outcome = finish(method, state, layout, begin(method, state, layout, "s", "run"), [])
        state = outcome.state
        found.append(outcome.tally["server.layer_snr"])
    return np.array(found), layout


@pytest.mark.parametrize("split", ["isotropic", "bounds"])
def test_the_signal_to_noise_of_nothing_but_noise_is_one_in_each_layer(split):
    mechanism = Gaussian(0.7, split)
    found, layout = snr_of_rounds(dataclasses.replace(private(), release=Release(mechanism, 12.0)), rounds=60)
    mean_square = (found**2).mean(axis=0)
    assert mean_square == pytest.approx(1.0, abs=5 * math.sqrt(2 / (60 * min(layout.layer_sizes))))
    masked = chain(CommonMask(density=0.3), ClipPerLayer(0.5))
    found, _ = snr_of_rounds(dataclasses.replace(private(), client=masked, release=Release(mechanism, 12.0)), rounds=60)
    assert (found**2).mean(axis=0)[np.array(layout.layer_sizes) > 50] == pytest.approx(1.0, abs=0.25)


def test_the_signal_to_noise_is_of_what_was_released_and_grows_with_it():
    method = private()
    layout = Replica(VISION.make_model()).layout
    state = ServerState.initial(initial_params(VISION), method, layout)
    plan = begin(method, state, layout, "s", "run")
    partial = train_blocks(Site(VISION, Replica(VISION.make_model())), plan.spec, plan.blocks)
    released = release(method, state, layout, plan, [partial])
    tally = advance(method, state, layout, plan, released).tally
    deviation = 0.5 * method.bound(layout).total / 12.0
    by_hand = [float(p.double().norm()) / (deviation * math.sqrt(p.numel())) for p in layout.split(released.mean)]
    assert tally["server.layer_snr"] == pytest.approx(by_hand)
    louder = dataclasses.replace(released, mean=10 * released.mean)
    assert advance(method, state, layout, plan, louder).tally["server.layer_snr"] == pytest.approx([10 * v for v in by_hand])
    public = dataclasses.replace(method, release=Release())
    assert "server.layer_snr" not in finish(public, state, layout, plan, [partial]).tally


def test_the_sparsity_of_each_layer_is_of_what_was_sent():
    method = dataclasses.replace(private(), client=chain(TopK(0.1), ClipPerLayer(0.5)), release=Release())
    _, outcomes = run(method, rounds=1)
    layout, users = Replica(VISION.make_model()).layout, outcomes[0].tally["users"]
    shares = np.array(outcomes[0].tally["chain.layer_sparsity"]) / users
    most = np.array([1 - max(1, round(0.1 * size)) / size for size in layout.layer_sizes])
    assert shares == pytest.approx(most, abs=1e-9)


def test_an_empty_cohort_without_noise_changes_nothing():
    state, _ = run(dataclasses.replace(averaging(), sampler=Poisson(6, 1e-9)), Line(), rounds=2)
    assert torch.equal(state.params, initial_params(Line()))


def spec_of(method, task=VISION):
    layout = Replica(task.make_model()).layout
    return begin(method, ServerState.initial(initial_params(task), method, layout), layout, "s", "run").spec, layout


@pytest.mark.parametrize("method", [private(), averaging(), noised("examples", 4)], ids=["pfl4asr", "fedavg", "weights"])
def test_a_specification_travels_as_json(method):
    spec, _ = spec_of(method)
    again = RoundSpec.from_shared(json.loads(json.dumps(spec.shared())), spec.params)
    assert again.shared() == spec.shared()
    assert {f.name: getattr(again, f.name) for f in dataclasses.fields(spec)} == {
        f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)
    }
    assert again.digest == spec.digest
    assert Client(Site(VISION, Replica(VISION.make_model())), again).chain == method.client
    assert Client(Site(VISION, Replica(VISION.make_model())), again).local == method.local


def test_the_stages_of_a_user_draw_from_one_stream_which_none_begins_that_does_not_draw(monkeypatch):
    begun, generator = [], Streams.generator
    monkeypatch.setattr(Streams, "generator", lambda self, purpose, user=None: begun.append(purpose) or generator(self, purpose, user))
    clip, site = ClipByGlobalNorm(0.5), Site(VISION, Replica(VISION.make_model()))
    for stages in ((clip,), (clip, Draws()), (Draws(), clip, Draws())):
        spec, _ = spec_of(dataclasses.replace(averaging(), client=chain(*stages)))
        begun.clear()
        tally = Client(site, spec).train_user(7).tally
        assert begun.count("chain") == (Draws() in stages)
        if Draws() in stages:
            expected = generator(spec.streams, "chain", 7).random(2 * (len(stages) - 1)).tolist()
            assert tally["chain.drawn"] == expected[-2:]


def test_the_digest_covers_all_that_is_shared():
    spec, _ = spec_of(private())
    streams, grid = spec.streams, spec.grid
    changes = [
        {"streams": dataclasses.replace(streams, round=9)},
        {"streams": dataclasses.replace(streams, attempt=1)},
        {"local": {}},
        {"client": spec.client[:0]},
        {"codec": {}},
        {"weighting": "examples"},
        {"max_examples": 3},
        {"private": False},
        {"clip_bits": 1},
        {"grid": dataclasses.replace(grid, exponent=1)},
        {"params": spec.params + b"\x00"},
        {"support": b"1"},
        {"half_states": True},
        {"control": b"1"},
    ]
    assert {next(iter(c)) for c in changes} == {f.name for f in dataclasses.fields(spec)}
    assert len({spec.digest, *(dataclasses.replace(spec, **c).digest for c in changes)}) == len(changes) + 1


def collect(method, vector, weight=1.0):
    """The sum after one contribution with these values, from a client that says what it likes."""
    spec, layout = spec_of(method, Line())
    collector = Collector(spec, layout)
    payload = collector.wire.encode(Dense(torch.tensor(vector)))
    collector.take(0, Contribution(0, payload, weight, {"users": 1.0}))
    return collector


@pytest.mark.parametrize("vector", [[3e38, 3e38], [30.0, -40.0], [0.06, 0.0]])
@pytest.mark.parametrize("weight", [1.0, 2.0, 1e9, -5.0])
def test_under_noise_no_client_can_add_more_than_the_bound(vector, weight):
    collector = collect(noised(), vector, weight)
    assert np.linalg.norm(collector.fold.result().numpy()) <= 0.05
    assert collector.fold.users == 1
    assert collector.tallies[0]["weight"] == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_payload_that_is_not_finite_is_a_zero_and_counted(bad):
    collector = collect(noised(), [bad, 1.0])
    assert collector.fold.total.tolist() == [0, 0]
    assert collector.tallies[0]["not_finite"] == 1.0


def test_what_cannot_be_taken_is_a_failed_user():
    collector = collect(averaging(), [1e9, 0.0])
    assert collector.fold.users == 0
    assert collector.tallies[0].pop("fold_seconds") > 0
    assert collector.tallies[0] == {"failed_users": 1.0, "uplink_bytes": 28.0}
    assert collector.errors[0].startswith("user 0: FoldOverflow: ")
    collector.take(0, Contribution(4, b"junk", 1.0, {"users": 1.0}))
    assert collector.tallies[0].pop("fold_seconds") > 0
    assert collector.tallies[0] == {"failed_users": 2.0, "uplink_bytes": 32.0}
    assert collector.errors[1].startswith("user 4: WireError: ")


def test_what_a_hundred_thousand_failed_users_say_takes_no_room():
    class Everyone(Line):
        def load_user(self, user, rng):
            raise OSError(f"{user} " + 20_000 * "x")

    task, method = Everyone(), averaging()
    spec, layout = spec_of(method, task)
    client, said = Client(Site(task, Replica(task.make_model())), spec), []
    for workers in (1, 3):
        collectors = [Collector(spec, layout) for _ in range(workers)]
        tracemalloc.start()
        for user in range(3000):
            collectors[user % 64 % workers].take(user % 64, client.train_user(user))
        parts = [collector.partial() for collector in collectors]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000 * workers  # all that they say is 60 MB
        state = ServerState.initial(initial_params(task), method, layout)
        plan = begin(method, state, layout, "s", "run")
        outcome = finish(method, state, layout, plan, parts)
        assert outcome.tally["failed_users"] == 3000.0
        assert len(outcome.errors) == 100
        assert outcome.errors[0].startswith("user 0: OSError: 0 xxx")
        assert {len(line) for line in outcome.errors} == {1000}
        said.append(outcome.state.params)
    assert torch.equal(*said)


def test_more_users_than_the_grid_holds_stop_the_round():
    method = averaging()
    spec, layout = spec_of(method, Line())
    plan = begin(method, ServerState.initial(initial_params(Line()), method, layout), layout, "s", "run")
    partial = train_blocks(Site(Line(), Replica(Line().make_model())), plan.spec, plan.blocks)
    with pytest.raises(FoldOverflow, match="users in a sum"):
        finish(method, ServerState.initial(initial_params(Line()), method, layout), layout, plan, [dataclasses.replace(partial, users=99)])
    assert spec.grid.capacity == 8


def test_removing_one_user_changes_the_sum_by_a_vector_within_the_bound():
    method, site = private(), Site(VISION, Replica(VISION.make_model()))
    layout = site.replica.layout
    plan = begin(method, ServerState.initial(initial_params(VISION), method, layout), layout, "s", "run")
    whole = train_blocks(site, plan.spec, plan.blocks)
    scale = 2.0**-plan.spec.grid.exponent
    bounds = ClipPerLayer(0.5).bounds(layout)
    for _, gone in plan.blocks[:4]:
        without = train_blocks(site, plan.spec, [b for b in plan.blocks if b[1] != gone])
        alone = train_blocks(site, plan.spec, [(0, gone)])
        difference = whole.total - without.total
        assert np.array_equal(difference, alone.total), "nobody else's part may change"
        assert len(gone) == 1
        for piece, limit in zip(layout.split(torch.from_numpy(difference)), bounds, strict=True):
            assert float(torch.linalg.vector_norm(piece.double() * scale)) <= limit


def test_evaluation_is_by_unit_on_the_given_parameters():
    site = Site(Line(), Replica(Line().make_model()))
    assert evaluate_units(site, torch.tensor([5.0, 6.0]), [0]) == [(0, {"w": 11.0})]
    assert not site.replica.model.training


def test_what_the_last_clip_let_out_is_taken_as_it_is_and_anything_else_is_guarded():
    method = private()
    layout = Replica(VISION.make_model()).layout
    plan = begin(method, ServerState.initial(initial_params(VISION), method, layout), layout, "s", "run")
    user = plan.blocks[0][1][0]
    sums = []
    for encodes in (True, False):
        client, collector = Client(Site(VISION, Replica(VISION.make_model())), plan.spec, encodes=encodes), Collector(plan.spec, layout)
        contribution = client.train_user(user)
        assert contribution.guarded is not encodes
        collector.take(0, contribution)
        sums.append(collector.fold.total)
    assert torch.equal(*sums)
    outside = Dense(torch.full((layout.size,), 9.0))
    for update, refused in ((outside, False), (Dense(torch.full((layout.size,), math.nan)), True)):
        collector = Collector(plan.spec, layout)
        collector.take(0, dataclasses.replace(contribution, update=update, guarded=False))
        norm = float(collector.fold.result().norm())
        assert norm == 0.0 if refused else 0.99 < norm / method.bound(layout).total <= 1.0


def test_a_stage_that_enlarges_after_the_clip_meets_the_limit_of_the_grid_and_never_wraps():
    method = dataclasses.replace(private(), client=chain(ClipByGlobalNorm(1e5), RandomK(0.5, scale=True)), release=Release())
    layout = Replica(VISION.make_model()).layout
    plan = begin(method, ServerState.initial(initial_params(VISION), method, layout), layout, "s", "run")
    collector = Collector(plan.spec, layout)
    collector.take(0, Contribution(1, None, 1.0, {"users": 1.0, "uplink_bytes": 4.0}, update=Dense(torch.full((layout.size,), 500.0))))
    assert collector.tallies[0]["failed_users"] == 1
    assert collector.tallies[0]["uplink_bytes"] == 4
    assert not collector.fold.total.any()


def test_an_empty_payload_is_a_failed_user():
    layout = Replica(VISION.make_model()).layout
    method = private()
    collector = Collector(begin(method, ServerState.initial(initial_params(VISION), method, layout), layout, "s", "run").spec, layout)
    collector.take(0, Contribution(1, b"", 1.0, {"users": 1.0}))
    assert collector.tallies[0] == {"failed_users": 1.0, "uplink_bytes": 0.0, "fold_seconds": collector.tallies[0]["fold_seconds"]}


def test_a_group_has_as_many_models_as_fit_frozen_weights_counted_and_none_where_the_task_gives_the_same_again():
    class Wide(Line):
        frozen, same = 0, None

        def make_model(self):
            if self.same is not None:
                return self.same
            model = super().make_model()
            model.backbone = nn.Parameter(torch.zeros(self.frozen), requires_grad=False)
            return model

    def models(frozen=0, users=20, group=GROUP_USERS):
        task = Wide()
        task.frozen = frozen
        return len(Site(task, Replica(task.make_model()), group).replicas(users))

    assert (models(), models(users=3), models(group=1)) == (GROUP_USERS, 3, 1)
    assert (models(frozen=GROUP_BYTES // 8 - 2), models(frozen=GROUP_BYTES)) == (2, 1)
    task = Wide()
    task.same = Line().make_model()
    site = Site(task, Replica(task.same))
    before = site.replica.params
    assert site.replicas(20) == [site.replica]
    with torch.no_grad():
        task.same.weight.fill_(7.0)
    assert before.tolist() == [7.0, 7.0], "its weights are still those of the replica"


def test_data_that_are_quick_to_read_are_read_for_a_group_of_users_at_once_and_none_beyond_one_that_takes_time(monkeypatch):
    task, events = Line(), list[str]()
    load, loss = task.load_user, task.loss

    def loaded(user, rng):
        here = threading.current_thread() is threading.main_thread()
        events.append(f"{user}" if here else f"{user} by a thread")
        time.sleep(0.2 if user == 0 else 0)
        return load(user, rng)

    def trained(model, batch):
        if events[-1] != "training":
            events.append("training")
        return loss(model, batch)

    monkeypatch.setattr(client, "WORTH_A_THREAD", 0.1)  # more than a busy machine keeps anybody waiting
    monkeypatch.setattr(task, "load_user", loaded)
    monkeypatch.setattr(task, "loss", trained)
    for users, read in (
        ((5, 4, 3, 1), ["5", "4", "3", "1"]),
        ((5, 0, 3, 1), ["5", "0", "3 by a thread", "1"]),
        ((0, 4, 3, 1), ["0", "4 by a thread", "3", "1"]),
    ):
        events.clear()
        assert train_blocks(Site(task, Replica.of(task), group=2), spec_of(averaging(), task)[0], [(0, users)]).users == 4
        assert [event for event in events if event != "training"] == read
        assert 0 in users or events == ["5", "4", "training", "3", "1", "training"]
