"""One federated round as functions, from left to right: the same in one process, on Ray and on devices.

    begin -> [train_user -> take] a user, in blocks -> release -> advance

`begin` draws the cohort and says all that clients need (`RoundSpec`, plain data); `train_blocks` (in `fedclip.client`) does the users of
some blocks and gives their exact sum; `release` adds the sums and releases the mean; `advance` takes the server step.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from fedclip.account import Account
from fedclip.collector import Partial
from fedclip.control import gradients_moved, next_of_server
from fedclip.downlink import Sent
from fedclip.fold import Fold, Grid
from fedclip.layout import Layout
from fedclip.method import AVERAGE_WEIGHT, Method, ServerState, noise_norms
from fedclip.release import DrawnAhead, Gaussian, Normals, Release
from fedclip.rng import Streams
from fedclip.sampling import Available
from fedclip.shards import homes, shard_of
from fedclip.spec import Block, RoundSpec
from fedclip.stages import describe_stage
from fedclip.tally import MOST_SAID, Tally, add_up, number
from fedclip.tasks.base import Task
from fedclip.transform import Ctx
from fedclip.update import LARGE, Dense, layer_norms, to_dense
from fedclip.wire import pack_support, support_of

BLOCKS_A_COHORT = 256
"""A cohort is dealt in about so many blocks: enough to share them out evenly, few enough to deal quickly."""

LONGER_AT_HOME = 1.1
"""So many times as long a round may be predicted to take where users are trained where their states are."""

ASKED_A_BLOCK = 64
"""The cost of so many users of a block is asked for at most, so that what dealing takes does not grow with the cohort."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What `begin` decided: the specification, the cohort in blocks of users, and what the model costs on its way down.

    `sent` is what clients then have of it, where it goes down as differences.
    """

    spec: RoundSpec
    blocks: tuple[Block, ...]
    downlink_bytes: int = 0
    sent: Sent | None = None


@dataclass(frozen=True, eq=False)
class Released:
    """All that leaves a release, and all that the server step sees of a round.

    Attributes:
        round: round number.
        attempt: how many releases the round had before.
        mean: the mean over users, float32, shape (d,), noised under noise.
        fractions: of users within each adaptive bound, noised under noise; None where bounds stay, or without noise nobody came.
        tally: what was measured of users: not private.
        errors: what the first failed users said, at most `MOST_SAID` lines; the tally counts them all.
        accepted: on real devices, the users whose updates are in it: what their devices keep of this attempt counts.
    """

    round: int
    attempt: int
    mean: torch.Tensor
    fractions: tuple[float, ...] | None
    tally: Tally
    errors: tuple[str, ...]
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round made: the next state, the tally over users in cohort order, and what the first failed users said, a line each.

    `attempt` is how many releases the round had before.
    """

    state: ServerState
    tally: Tally
    errors: tuple[str, ...]
    attempt: int = 0


def begin(
    method: Method,
    state: ServerState,
    layout: Layout,
    secret: str,
    run: str,
    account: Account | None = None,
    present: Sequence[int] | None = None,
) -> Plan:
    """Draw the cohort of the next round and say what its clients are to do.

    `present`: those who are there, for a sampler that asks whoever is (`Available`); None: everybody is.

    Raises:
        BudgetSpent: the round's release would exceed the budget of the account; no cohort was drawn.
    """
    if account is not None:
        account.check()
    attempt = state.attempt if account is None else account.attempts(state.round + 1)
    streams = Streams(secret, run, state.round + 1, attempt)
    coins = streams.generator("cohort")
    cohort = method.sampler.draw(coins, present) if isinstance(method.sampler, Available) else method.sampler.draw(coins)
    now = method.for_round(state.thresholds, layout)
    download = method.downlink.send(state.params, state.sent, cohort, streams.round, layout, streams.generator("downlink"), method.codec)
    support = method.client.support(streams.round, layout, state.average) if state.average is not None else None
    told = pack_support(support, layout) if support is not None else b""
    control = b""
    if method.control:
        at = state.control if state.control is not None else torch.zeros(layout.size)
        control = method.codec.encode(Dense(at), layout)
    largest_weight = 1.0 if method.private or method.weighting == "uniform" else 2.0**16
    spec = RoundSpec(
        streams=streams,
        local=describe_stage(method.local),
        client=tuple(describe_stage(s) for s in now.client.stages),
        codec=describe_stage(method.codec),
        weighting=method.weighting,
        max_examples=method.max_examples,
        private=method.private,
        clip_bits=len(state.thresholds),
        grid=Grid.for_bound(now.bound(layout).total, len(cohort), largest_weight),
        params=download.payload,
        half_states=method.half_states,
        support=told,
        control=control,
    )
    return Plan(spec, in_blocks(method, cohort), download.total_bytes + (len(told) + len(control)) * len(cohort), download.sent)


def in_blocks(method: Method, cohort: Sequence[int]) -> tuple[Block, ...]:
    """Return a cohort in blocks of consecutive users; where a state is kept of each, of consecutive users of a shard."""
    size = max(1, math.ceil(method.sampler.expected_cohort / BLOCKS_A_COHORT))
    shards = [list(users) for _, users in groupby(sorted(cohort, key=shard_of), shard_of)] if method.stateful else [cohort]
    return tuple(enumerate(tuple(users[i : i + size]) for users in shards for i in range(0, len(users), size)))


def foresee(method: Method, secret: str, run: str, round: int) -> tuple[Block, ...]:
    """Return the blocks of a round to come, as `begin` will draw them at the first attempt: to prepare for, never to rely on."""
    return in_blocks(method, method.sampler.draw(Streams(secret, run, round).generator("cohort")))


def deal(
    blocks: Sequence[Block], workers: int, task: Task, speeds: Sequence[float] | None = None, machines: Sequence[str] | None = None
) -> list[list[Block]]:
    """Share blocks out over workers, the longest first to whoever would be done with it first, by the task's predicted costs.

    With `machines`, first of all to those where its shard is at home, where that takes about as long.

    Args:
        blocks: the blocks.
        workers: how many there are.
        task: predicts the cost of a user.
        speeds: cost that each worker does in a second, over 0; None: all do the same. How blocks are dealt changes no bit of their sum.
        machines: where each worker is, where blocks are of one shard each; None: it does not matter.
    """
    costs, pace = cost_of(blocks, task), speeds or [1.0] * workers
    to_the_first, longest = _dealt(blocks, costs, pace)
    if machines is None:
        return to_the_first
    home = homes(machines)
    to_homes, takes = _dealt(blocks, costs, pace, lambda worker, block: machines[worker] != home[shard_of(block[1][0])])
    return to_homes if takes <= LONGER_AT_HOME * longest else to_the_first


def _dealt(
    blocks: Sequence[Block], costs: dict[int, float], pace: Sequence[float], away: Callable[[int, Block], bool] | None = None
) -> tuple[list[list[Block]], float]:
    """Return shares, and how long the longest takes; `away`: who is to have a block only where the others have their fair part."""
    workers = range(len(pace))
    loads, shares = [0.0] * len(pace), [list[Block]() for _ in pace]
    left = sorted(blocks, key=lambda b: (-costs[b[0]], b[0]))

    def done(worker: int, block: Block) -> tuple[float, bool]:
        return (loads[worker] + costs[block[0]]) / pace[worker], away is not None and away(worker, block)

    def give(worker: int, block: Block) -> None:
        shares[worker].append(block)
        loads[worker] += costs[block[0]]

    if away is not None:
        fair, longest_first, left = (1 + 1e-9) * sum(costs.values()) / sum(pace), left, []
        for block in longest_first:
            first = min(workers, key=lambda w: done(w, block)[::-1])
            give(first, block) if done(first, block)[0] <= fair else left.append(block)
    for block in left:
        give(min(workers, key=lambda w: done(w, block)), block)
    takes = max(load / speed for load, speed in zip(loads, pace, strict=True))
    return [sorted(share, key=lambda b: (-costs[b[0]], b[0])) for share in shares], takes


def _predicted_cost(task: Task, users: Sequence[int]) -> float:
    """Return the predicted cost of a block; of a large one, what it would be if all of its users cost what some drawn at random do."""
    if len(users) <= ASKED_A_BLOCK:
        return sum(task.cost(user) for user in users)
    asked = np.random.default_rng(0).choice(len(users), ASKED_A_BLOCK, replace=False)
    return sum(task.cost(users[n]) for n in asked.tolist()) * len(users) / ASKED_A_BLOCK


def cost_of(blocks: Iterable[Block], task: Task) -> dict[int, float]:
    """Return the predicted cost of each block, by its number."""
    return {n: _predicted_cost(task, users) for n, users in blocks}


class WorkerError(RuntimeError):
    """A worker could not do its part of a round; the message says what it said."""


def release(
    method: Method, state: ServerState, layout: Layout, plan: Plan, partials: Iterable[Partial], account: Account | None = None
) -> Released:
    """Add the sums, charge the account, and release the mean and the fractions of users within adaptive bounds.

    Under noise the account is charged before noise is added: a release that is not in the ledger is never made. The numbers that it is
    made of are drawn from when the first sum is there, while others are waited for.

    Raises:
        FoldOverflow: more users than the grid has room for.
    """
    fold, tallies, errors = Fold(layout.size, plan.spec.grid), dict[int, Tally](), list[str]()
    bits = np.zeros(plan.spec.clip_bits, dtype=np.int64)
    streams, support = plan.spec.streams, support_of(plan.spec, method.client, layout)
    noise = streams.generator("noise")
    normals: Normals = noise
    # Somebody's own may draw other numbers.
    ahead = (type(method.release), type(method.release.mechanism)) == (Release, Gaussian) and layout.size < LARGE
    for part in partials:
        if ahead:
            normals, ahead = DrawnAhead(noise, layout.size if support is None else len(support)), False
        fold.merge(part.total, part.users)
        bits += np.asarray(part.clip_bits, dtype=np.int64)
        tallies |= part.tallies
        errors += part.errors[: MOST_SAID - len(errors)]
        del part  # of a large model each sum is gigabytes: it goes before the next vector is made
    start = time.perf_counter()
    tally = add_up(tallies[n] for n in sorted(tallies))
    tally["downlink_bytes"] = float(plan.downlink_bytes)
    now = method.for_round(state.thresholds, layout)
    bound = now.bound(layout)
    if account is not None and method.release.mechanism is not None:
        account.charge(streams.run, streams.round, streams.attempt, method.release.mechanism.noise_multiplier, bound.total)
    total, came = fold.result().numpy(), fold.users
    del fold
    if support is None:
        mean = now.release.apply(total, number(tally, "weight"), bound, layout, normals)
    else:  # a vector of the values on the support, which is public, is all that is summed, noised and divided
        mean = np.zeros_like(total)
        mean[support] = now.release.apply(total[support], number(tally, "weight"), bound, layout.restricted(support), normals)
    fractions = None
    if method.adaptive is not None:
        cohort = method.sampler.expected_cohort if method.private else None
        fractions = method.adaptive.fractions(bits, came, cohort, noise)
    within = None if fractions is None else tuple(fractions.tolist())
    released = torch.from_numpy(mean).float()
    tally["release_seconds"] = time.perf_counter() - start
    return Released(streams.round, streams.attempt, released, within, tally, tuple(errors))


def advance(method: Method, state: ServerState, layout: Layout, plan: Plan, released: Released) -> Outcome:
    """Take the server step on what was released. It sees nothing else, so that it can be taken again after a crash."""
    start, streams = time.perf_counter(), plan.spec.streams
    ctx = Ctx(layout, streams.generator("server"), streams.round, state.params)
    step = method.server.apply(Dense(released.mean), state.server, ctx)
    params = state.params - to_dense(step.update, layout)
    tally = dict(released.tally) | {f"server.{k}": list(v) if isinstance(v, tuple) else v for k, v in step.measurements.items()}
    thresholds, support = state.thresholds, support_of(plan.spec, method.client, layout)
    if method.release.mechanism is not None:
        tally["server.layer_snr"] = _snr(method.for_round(thresholds, layout), layout, released.mean, support)
    if method.adaptive is not None:
        tally["server.max_norm"] = math.hypot(*thresholds)
        if len(thresholds) > 1:
            tally["server.layer_max_norm"] = list(thresholds)
        moved = method.adaptive.step(thresholds, released.fractions)
        sent = _sent_layers(method, layout, support)
        thresholds = tuple(new if there else old for old, new, there in zip(thresholds, moved, sent, strict=True))
    average = _average(state.average, released.mean, support) if method.client.needs_average else None
    control = _control(method, state, released) if method.control else None
    after = ServerState(params, step.state, state.round + 1, thresholds=thresholds, sent=plan.sent, average=average, control=control)
    tally["server_seconds"] = time.perf_counter() - start
    return Outcome(after, tally, released.errors, released.attempt)


def _snr(now: Method, layout: Layout, mean: torch.Tensor, support: torch.Tensor | None) -> list[float]:
    """Return the norm of each layer of a released mean over that of its noise, about 1 where there is nothing but noise.

    It is made of what was released and of public numbers, so that it costs no privacy.
    """
    noise = noise_norms(now, layout, support)
    norms = layer_norms(Dense(mean), layout.grouped(now.bound(layout).layers))
    return [norm / by if by else 0.0 for norm, by in zip(norms, noise, strict=True)]


def _control(method: Method, state: ServerState, released: Released) -> torch.Tensor:
    """Return the server's next control variate; what the mean was divided by stands for the number of users."""
    denominator = method.release.denominator
    users = number(released.tally, "weight") if denominator == "weights" else denominator
    before = torch.zeros_like(released.mean) if state.control is None else state.control
    return next_of_server(before, released.mean, users / method.sampler.population, gradients_moved(method.local))


def _sent_layers(method: Method, layout: Layout, support: torch.Tensor | None) -> list[bool]:
    """Return for each adaptive bound whether anything of what it bounds was sent: else its bits say nothing, and the bound stays."""
    bound = method.bound(layout)
    if support is None or bound.per_layer is None:
        return [True] * len(method.thresholds(layout))
    sizes, sent = (of.grouped(bound.layers).layer_sizes for of in (layout, layout.restricted(support)))
    return [n > 0 for n, d in zip(sent, sizes, strict=True) if d]


def _average(before: torch.Tensor | None, mean: torch.Tensor, support: torch.Tensor | None) -> torch.Tensor:
    """Return the average by coordinate of what was released; a coordinate that was not on the support keeps its own."""
    average = torch.zeros_like(mean) if before is None else before.clone()
    where = slice(None) if support is None else support
    average[where] += AVERAGE_WEIGHT * (mean[where] - average[where])
    return average


def finish(
    method: Method,
    state: ServerState,
    layout: Layout,
    plan: Plan,
    partials: Iterable[Partial],
    account: Account | None = None,
    keep: Callable[[Released], None] | None = None,
) -> Outcome:
    """Release and take the server step; `keep` makes what was released durable between the two.

    Raises:
        FoldOverflow: as `release`.
    """
    released = release(method, state, layout, plan, partials, account)
    if keep is not None:
        keep(released)
    return advance(method, state, layout, plan, released)


def replay(method: Method, state: ServerState, layout: Layout, secret: str, run: str, released: Released) -> Outcome:
    """Take the server step of a round that was released before: with the same bits as then, and at no new cost."""
    plan = begin(method, dataclasses.replace(state, attempt=released.attempt), layout, secret, run)
    return advance(method, state, layout, plan, released)
