"""How the blocks of a round are shared out: evenly by predicted costs, and where states are kept, to the machines that they lie on."""

import dataclasses
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedclip.dgc import DGC
from fedclip.round import BLOCKS_A_COHORT, LONGER_AT_HOME, deal, in_blocks
from fedclip.sampling import Poisson
from fedclip.shards import homes, shard_of
from fedclip.stages import local_sgd
from fedclip.transform import chain
from strategies.recipes import fedavg


def test_dealing_evens_out_predicted_costs_and_loses_nobody():
    class Costs:
        def cost(self, user):
            return float(user)

    blocks = [(n, (n, n + 1)) for n in range(20)]
    shares = deal(blocks, 3, Costs())
    assert sorted(b for share in shares for b in share) == blocks
    loads = [sum(u for _, users in share for u in users) for share in shares]
    assert max(loads) - min(loads) <= 40
    assert deal([], 2, Costs()) == [[], []]
    assert deal(blocks, 3, Costs(), [2.0, 2.0, 2.0]) == shares
    slow, *fast = (sum(u for _, users in share for u in users) for share in deal(blocks, 3, Costs(), [1.0, 3.0, 3.0]))
    assert max(slow, fast[0] / 3, fast[1] / 3) - min(slow, fast[0] / 3, fast[1] / 3) <= 20, "all are done at about the same time"


def test_dealing_a_hundred_thousand_users_asks_for_the_costs_of_few_and_still_evens_out():
    class Costs:
        asked = 0

        def cost(self, user):
            self.asked += 1
            return 1.0 + user % 7 + user // 10_000

    task = Costs()
    blocks = [(n, tuple(range(1563 * n, 1563 * (n + 1)))) for n in range(64)]
    shares = deal(blocks, 2, task)
    assert task.asked <= 64 * 64
    assert sorted(b for share in shares for b in share) == blocks
    loads = [sum(task.cost(u) for _, users in share for u in users) for share in shares]
    assert max(loads) < 1.05 * min(loads)
    assert deal(blocks, 2, Costs()) == shares


def test_blocks_of_a_method_with_states_are_of_one_shard_each_and_of_few_users():
    method = dataclasses.replace(fedavg(sampler=Poisson(100_000, 5000.0), local=local_sgd(lr=0.1, steps=1)), client=chain(DGC()))
    cohort = method.sampler.draw(np.random.default_rng(1))
    blocks = in_blocks(method, cohort)
    assert sorted(u for _, users in blocks for u in users) == sorted(cohort)
    assert [n for n, _ in blocks] == list(range(len(blocks)))
    assert all(len({shard_of(u) for u in users}) == 1 and list(users) == sorted(users) for _, users in blocks)
    assert max(len(users) for _, users in blocks) == 20
    assert len(blocks) <= 2 * BLOCKS_A_COHORT
    assert in_blocks(method, []) == ()


class Given:
    """Users cost what is given."""

    def __init__(self, costs):
        self.costs = costs

    def cost(self, user):
        return self.costs[user]


@given(
    st.lists(st.floats(0.01, 100.0), max_size=60),
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", ""]), st.floats(0.1, 10.0)), min_size=1, max_size=6),
)
def test_dealing_to_machines_loses_nobody_and_is_as_even_as_dealing_to_whoever_is_first_done(costs, workers):
    machines, pace = zip(*workers, strict=True)
    blocks = [(n, (n,)) for n in range(len(costs))]
    shares = deal(blocks, len(machines), Given(costs), pace, machines)
    assert sorted(block for share in shares for block in share) == blocks
    last, plain = (
        max(sum(costs[n] for n, _ in share) / speed for share, speed in zip(dealt, pace, strict=True))
        for dealt in (shares, deal(blocks, len(machines), Given(costs), pace))
    )
    assert last <= LONGER_AT_HOME * plain
    assert last <= (sum(costs) + (len(machines) - 1) * max(costs, default=0.0)) / sum(pace) * (1 + 1e-6)
    assert all([costs[n] for n, _ in share] == sorted((costs[n] for n, _ in share), reverse=True) for share in shares)


def test_a_long_user_away_from_home_is_better_than_a_much_longer_round():
    names = ["a", "b"]
    of = {name: [user for user in range(100) if homes(names)[shard_of(user)] == name] for name in names}
    costs = dict.fromkeys(of["a"][:2], 6.0) | dict.fromkeys(of["b"][:8], 1.0)
    shares = deal([(n, (user,)) for n, user in enumerate(costs)], 2, Given(costs), None, names)
    assert [sum(costs[user] for _, (user,) in share) for share in shares] == [10.0, 10.0]


@given(st.sets(st.integers(0, 2000), max_size=80), st.integers(2, 4))
def test_users_are_dealt_to_the_machine_where_their_shard_is_at_home_unless_it_has_its_share(users, machines):
    names = [f"machine {n}" for n in range(machines)]
    home, cohort = homes(names), sorted(users)
    shares = deal([(n, (user,)) for n, user in enumerate(cohort)], machines, Given(dict.fromkeys(cohort, 0.1)), None, names)
    away = sum(home[shard_of(user)] != name for name, share in zip(names, shares, strict=True) for _, (user,) in share)
    at_home = Counter(home[shard_of(user)] for user in cohort)
    assert away <= sum(max(0, at_home[name] - len(cohort) // machines) for name in names)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
