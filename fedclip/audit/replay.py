"""Remove one user and run again: the same released sums, the same coins for everyone else, and the sum moves by no more than the bound.

Without the same released sums the two models would drift apart, and a right mechanism would fail.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedclip.audit.bench import Bench, System, users_of
from fedclip.audit.claims import Support
from fedclip.audit.findings import Finding
from fedclip.audit.hostile import HostileTask, hostile_vector
from fedclip.collector import Partial
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method, ServerState
from fedclip.replica import Replica
from fedclip.round import Plan
from fedclip.simulation import initial_params
from fedclip.site import Site
from fedclip.tasks.base import Task
from fedclip.transform import Bound
from fedclip.user_states import StatesInMemory

CLOSE = 1e-9
"""What the rounding of float64 may add to a norm, relatively."""


@dataclass
class Moved:
    """The most that taking one user out of a sum moved it, over rounds and users.

    Attributes:
        present: in units of the bound, where the user was in the cohort: of the whole, or of a layer with a bound of its own.
        absent: the same where the user was not in the cohort of that round, but in others.
        bits: of the sum of any clip bit, as +1 and -1.
        users: of the count of users.
        compared: how many sums were compared.
        took_part: how many users those sums are over.
    """

    present: float = 0.0
    absent: float = 0.0
    bits: float = 0.0
    users: int = 0
    compared: int = 0
    took_part: int = 0

    def take(self, whole: Partial, without: Partial, bound: Bound, layout: Layout, exponent: int, was_there: bool) -> None:
        """Compare the sums of one round."""
        ratio = ratio_to_bound((whole.total - without.total) * 2.0**-exponent, bound, layout)
        moved = np.abs(np.asarray(whole.clip_bits, dtype=np.int64) - np.asarray(without.clip_bits, dtype=np.int64))
        self.present, self.absent = (max(self.present, ratio), self.absent) if was_there else (self.present, max(self.absent, ratio))
        self.bits = max(self.bits, float(np.max(moved, initial=0)))
        self.users = max(self.users, abs(whole.users - without.users))
        self.compared += 1
        self.took_part += whole.users

    def findings(self, name: str, detail: str) -> tuple[Finding, ...]:
        """Return what was found; `name` says of whom."""
        detail = (
            f"{detail}, {self.compared:,} sums compared" if self.took_part else "nobody's update came through, so that nothing was seen"
        )
        within = self.present <= 1 + CLOSE and self.took_part > 0
        return (
            Finding(f"{name}: one user's effect", 1.0, self.present, within, f"in units of the bound; {detail}"),
            Finding(f"{name}: effect when away", 0.0, self.absent, self.absent == 0, "of a user who takes part in other rounds only"),
            Finding(f"{name}: one user's clip bits", 1.0, self.bits, self.bits <= 1, "on the sum of any bit, as +1 or -1"),
            Finding(f"{name}: one user's count", 1.0, float(self.users), self.users <= 1, "users that one user stands for"),
        )


def ratio_to_bound(vector: np.ndarray, bound: Bound, layout: Layout) -> float:
    """Return the norm of a vector in units of the bound: the largest, of the whole and of the layers that have their own."""
    if not np.all(np.isfinite(vector)):
        return math.inf
    ratios = [float(np.linalg.norm(vector)) / bound.total]
    if bound.per_layer is not None:
        grouped = layout.grouped(bound.layers)
        squares = np.zeros(len(grouped.layer_names))
        edges = np.cumsum([0, *grouped.sizes])
        for t, h in enumerate(grouped.layer_of):
            squares[h] += float(np.square(vector[edges[t] : edges[t + 1]]).sum())
        ratios += [math.sqrt(s) / c if c else (math.inf if s else 0.0) for s, c in zip(squares, bound.per_layer, strict=True)]
    return max(ratios)


def audit_replay(
    method: Method,
    task: Task,
    *,
    name: str = "replay",
    rounds: int = 20,
    users: int = 6,
    removed: int = 2,
    system: System | None = None,
    secret: str = "audit",
) -> tuple[Finding, ...]:
    """Return how much a user's removal moves the sums of a real task's rounds.

    Each world has a worker and states of its own, which keep whatever the code keeps from round to round. The cohorts are a few users of
    the first cohort, two out of three of them a round, so that each comes back.

    Args:
        method: the method.
        task: its task.
        name: what the findings are called.
        rounds: how many rounds.
        users: how many users take part.
        removed: how many of them are removed, each in a world of its own.
        system: the functions of a round.
        secret: the master secret of the random streams.
    """
    system = system or System()
    removed = min(removed, users)
    worlds = [(Site(task, Replica.of(task)), StatesInMemory()) for _ in range(removed + 1)]
    layout = worlds[0][0].replica.layout
    state, moved = ServerState.initial(initial_params(task), method, layout), Moved()
    crowd = users_of(system.begin(method, state, layout, secret, "audit"))
    crowd = [*crowd, *(u for u in range(min(task.users, users)) if u not in set(crowd))][:users]
    for round in range(rounds):
        plan = system.begin(method, state, layout, secret, "audit")
        cohort = [u for n, u in enumerate(crowd) if (n + round) % 3 < 2 or len(crowd) < 3]
        bound = method.for_round(state.thresholds, layout).bound(layout)
        site, states = worlds[0]
        whole = system.train(site, plan.spec, _one_block(cohort), states)
        for out, (site, states) in zip(crowd, worlds[1:], strict=False):
            without = system.train(site, plan.spec, _one_block([u for u in cohort if u != out]), states)
            moved.take(whole, without, bound, layout, plan.spec.grid.exponent, out in cohort)
        state = system.finish(method, state, layout, Plan(plan.spec, tuple(_one_block(cohort))), [whole]).state
    return moved.findings(name, f"{min(removed, len(crowd))} of {len(crowd)} users taken out, {rounds} rounds")


def audit_hostile(
    method: Method, layout: Layout, *, rounds: int = 20, users: int = 9, removed: int = 3, system: System | None = None
) -> tuple[Finding, ...]:
    """Return how much a user's removal moves the sums when users train to hostile vectors. The layout should be small."""
    task = HostileTask(layout, method.bound(layout).total, users)
    local = LocalSGD(1.0, steps=1, batch_size=1)
    hostile = dataclasses.replace(method, local=local, double_momentum=True)
    return audit_replay(hostile, task, name="hostile users", rounds=rounds, users=users, removed=removed, system=system)


def audit_contributions(bench: Bench, *, count: int = 60_000, seed: int = 0, support: Support | None = None) -> Finding:
    """Return the most that one of very many hostile contributions moved the sum: none may slip through unclipped.

    Args:
        bench: the method on a small layout.
        count: how many contributions are made, one after another.
        seed: which ones.
        support: the coordinates that may be sent; None: all.
    """
    rng, plan, layout = np.random.default_rng(seed), bench.plan(1), bench.layout
    bound = bench.method.for_round(bench.method.thresholds(layout), layout).bound(layout)
    kinds = ("corner", "layer", "edge", "corner", "normal", "missing", "infinite", "huge")
    vectors = [hostile_vector(layout, bound.total, kinds[n % len(kinds)], rng) for n in range(64)]
    collector = bench.system.collector(plan.spec, layout)
    totals, contributions = np.zeros((count + 1, layout.size), dtype=np.int64), bench.contributions(plan, vectors)
    for n, which in enumerate(rng.integers(len(vectors), size=count), 1):
        collector.take(0, contributions[which])
        totals[n] = collector.fold.total.numpy()
    moved = np.diff(totals, axis=0)
    # The sum may wrap around where a mutant lets anything in; the difference of two sums does not.
    effects = moved * 2.0**-plan.spec.grid.exponent
    there = None if support is None else support(1)
    outside = 0.0 if there is None else float(np.max(np.abs(effects[:, ~there]), initial=0.0))
    largest = max((ratio_to_bound(v, bound, layout) for v in np.unique(effects, axis=0)), default=0.0)
    found = math.inf if outside else largest
    return Finding("contributions", 1.0, found, found <= 1 + CLOSE, f"the largest effect of one in {count:,}, in units of the bound")


def _one_block(users: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    return [(0, tuple(users))] if users else []
