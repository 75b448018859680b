"""One federated round as functions, from left to right: the same in one process, on Ray and on devices.

    begin -> [train_user -> take] a user, in blocks -> release -> advance

`begin` draws the cohort and says all that clients need (`RoundSpec`, plain data); `train_blocks` does the users of some blocks and
gives their exact sum; `release` adds the sums and releases the mean; `advance` takes the server step.
"""

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedclip.account import Account
from fedclip.choices import Weighting
from fedclip.codec import Codec, WireError
from fedclip.downlink import Sent
from fedclip.fold import Fold, Grid
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import Method, ServerState, user_weight
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.stages import build_stage, describe_stage
from fedclip.tally import Tally, add_up, number
from fedclip.tasks.base import Counts, Task
from fedclip.transform import Chain, Ctx, Transform, has_content
from fedclip.update import Dense, Update, finite_or_zero, scale, to_dense
from fedclip.user_states import UserStates

log = logging.getLogger(__name__)

BLOCKS_A_COHORT = 64
"""A cohort is dealt in about so many blocks: enough to share them out evenly, few enough to deal quickly."""

Block = tuple[int, tuple[int, ...]]
"""A block's number in the cohort and the ids of its users."""


@dataclass(frozen=True, eq=False)
class RoundSpec:
    """All that the server tells clients for a round: data only, from which each client rebuilds the stages by name.

    Attributes:
        streams: the randomness of this attempt.
        local: local training, as a stage description.
        client: the stages of the client chain, as descriptions.
        codec: the wire format, as a description.
        weighting: see `Method`.
        max_examples: see `Method`.
        private: whether the sum will be noised: weights then go in before the clip.
        clip_bits: how many bits each user says of the bounds of its last clip; 0 where they do not adapt.
        grid: the fixed-point grid of the sum.
        params: the encoded model that everyone starts from.
    """

    streams: Streams
    local: Mapping[str, Any]
    client: tuple[Mapping[str, Any], ...]
    codec: Mapping[str, Any]
    weighting: Weighting
    max_examples: int | None
    private: bool
    clip_bits: int
    grid: Grid
    params: bytes

    def shared(self) -> dict[str, Any]:
        """Return everything but the parameters as plain data."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "params"}
        return data | {"streams": dataclasses.asdict(self.streams), "grid": dataclasses.asdict(self.grid), "client": list(self.client)}

    @classmethod
    def from_shared(cls, data: Mapping[str, Any], params: bytes) -> "RoundSpec":
        """Return the specification that `shared` described."""
        rest = {"streams": Streams(**data["streams"]), "grid": Grid(**data["grid"]), "client": tuple(data["client"])}
        return cls(**{**data, **rest}, params=params)

    @property
    def digest(self) -> str:
        """A hash of all that is shared, the parameters included."""
        text = json.dumps(self.shared(), sort_keys=True).encode()
        return hashlib.blake2b(text + hashlib.blake2b(self.params).digest(), digest_size=16).hexdigest()


@dataclass(frozen=True, eq=False)
class Plan:
    """What `begin` decided: the specification, the cohort in blocks of consecutive users, and what the model costs on its way down.

    `sent` is what clients then have of it, where it goes down as differences.
    """

    spec: RoundSpec
    blocks: tuple[Block, ...]
    downlink_bytes: int = 0
    sent: Sent | None = None


@dataclass(eq=False)
class Site:
    """Where users train: one task and one resident model, used for one user after another."""

    task: Task
    replica: Replica


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one user gives: the encoded update, its weight, its packed clip bits and what was measured.

    A user that failed gives no payload.
    """

    user: int
    payload: bytes | None
    weight: float
    tally: Tally
    error: str | None = None
    clip_bits: bytes = b""


@dataclass(frozen=True, eq=False)
class Partial:
    """The exact sum over the users of some blocks: int64 grid numbers, how many users, and a tally for each block.

    `clip_bits` is the sum of each bit as +1 or -1.
    """

    total: torch.Tensor
    users: int
    tallies: dict[int, Tally]
    errors: tuple[str, ...] = ()
    clip_bits: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Released:
    """All that leaves a release, and all that the server step sees of a round.

    Attributes:
        round: round number.
        attempt: how many releases the round had before.
        mean: the mean over users, float32, shape (d,), noised under noise.
        fractions: of users within each adaptive bound, noised under noise; None where bounds stay, or without noise nobody came.
        tally: what was measured of users: not private.
        errors: what failed users said.
    """

    round: int
    attempt: int
    mean: torch.Tensor
    fractions: tuple[float, ...] | None
    tally: Tally
    errors: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round made: the next state, the tally over users in cohort order, and what failed users said, a line each.

    `attempt` is how many releases the round had before.
    """

    state: ServerState
    tally: Tally
    errors: tuple[str, ...]
    attempt: int = 0


def begin(method: Method, state: ServerState, layout: Layout, secret: str, run: str, account: Account | None = None) -> Plan:
    """Draw the cohort of the next round and say what its clients are to do.

    Raises:
        BudgetSpent: the round's release would exceed the budget of the account; no cohort was drawn.
    """
    if account is not None:
        account.check()
    attempt = state.attempt if account is None else account.attempts(state.round + 1)
    streams = Streams(secret, run, state.round + 1, attempt)
    cohort = method.sampler.draw(streams.generator("cohort"))
    now = method.for_round(state.thresholds, layout)
    download = method.downlink.send(state.params, state.sent, cohort, streams.round, layout, streams.generator("downlink"))
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
    )
    size = max(1, math.ceil(method.sampler.expected_cohort / BLOCKS_A_COHORT))
    blocks = tuple((n, cohort[i : i + size]) for n, i in enumerate(range(0, len(cohort), size)))
    return Plan(spec, blocks, download.total_bytes, download.sent)


def deal(blocks: Sequence[Block], workers: int, task: Task) -> list[list[Block]]:
    """Share blocks out over workers, the longest first to whoever has least, by the task's predicted costs."""
    loads, shares = [0.0] * workers, [list[Block]() for _ in range(workers)]
    costs = {n: sum(task.cost(u) for u in users) for n, users in blocks}
    for block in sorted(blocks, key=lambda b: (-costs[b[0]], b[0])):
        least = loads.index(min(loads))
        shares[least].append(block)
        loads[least] += costs[block[0]]
    return shares


class WorkerError(RuntimeError):
    """A worker could not do its part of a round; the message says what it said."""


class Client:
    """The client side of one round at one site: the stages rebuilt from the specification, the model as it was sent.

    Args:
        site: where users train.
        spec: what the server said.
        states: where the states of users are; None where the chain has none.

    Raises:
        ValueError: the chain has a state, and there is no place for it.
    """

    def __init__(self, site: Site, spec: RoundSpec, states: UserStates | None = None) -> None:
        self.site, self.spec, self.layout = site, spec, site.replica.layout
        self.local: LocalSGD = build_stage(spec.local)
        self.chain = Chain(tuple(build_stage(s) for s in spec.client))
        self.codec: Codec = build_stage(spec.codec)
        self.fresh = self.chain.init(self.layout)
        self.states = states if has_content(self.fresh) else None
        if states is None and has_content(self.fresh):
            raise ValueError(f"{self.chain.name} keeps a state for each user, and there is no place to keep it; give a folder for it.")
        self.params = to_dense(self.codec.decode(spec.params, self.layout), self.layout).to(site.replica.params.device)

    def train_user(self, user: int) -> Contribution:
        """Load a user's data, train, pass the update through the chain and encode it.

        Whatever the user's data or the task raises makes the user a failed one, never the round.
        """
        start = time.perf_counter()
        try:
            contribution = self._train(user)
        except Exception as error:
            log.debug("user %d failed", user, exc_info=True)
            return Contribution(user, None, 0.0, {"failed_users": 1.0}, f"user {user}: {type(error).__name__}: {error}")
        contribution.tally["train_seconds"] = time.perf_counter() - start
        return contribution

    def sync(self) -> None:
        """Wait until the states of the users that were trained are durable."""
        if self.states is not None:
            self.states.sync()

    def _train(self, user: int) -> Contribution:
        task, replica, streams = self.site.task, self.site.replica, self.spec.streams
        examples = task.load_user(user, streams.generator("data", user))
        left_out: Tally = {"examples_left_out": float(int(getattr(examples, "left_out", 0)))}
        if not len(examples):
            return Contribution(user, None, 0.0, {"users_without_data": 1.0, **left_out})
        replica.load(self.params)
        with streams.torch_seeded("training", user, str(replica.params.device)):
            loss = self.local.train(replica, task, examples, streams.generator("batches", user))
        update, finite = finite_or_zero(Dense(self.params - replica.params))
        weight = user_weight(len(examples), self.spec.weighting, self.spec.max_examples)
        if self.spec.private:
            update = scale(update, weight)
        ctx = Ctx(self.layout, streams.generator("chain", user), streams.round, self.params, weight)
        state = self.fresh if self.states is None else self.states.load(user, streams.round, self.fresh)
        step = self.chain.apply(update, state, ctx)
        payload = self.codec.encode(step.update, self.layout)
        if self.states is not None:
            self.states.stage(user, streams.round, streams.attempt, step.state)
        bits = pack_bits(step.clip_bits) if self.spec.clip_bits else b""
        tally: Tally = {"users": 1.0, "uplink_bytes": float(len(payload) + len(bits)), "not_finite": float(not finite), **left_out}
        if math.isfinite(loss):
            tally |= {"train_loss": loss, "losses": 1.0}
        tally |= {f"chain.{k}": list(v) if isinstance(v, tuple) else v for k, v in step.measurements.items()}
        return Contribution(user, payload, 1.0 if self.spec.private else weight, tally, clip_bits=bits)


class Collector:
    """Decodes, guards and folds contributions: wherever the raw sum is formed, on a worker or on the server."""

    def __init__(self, spec: RoundSpec, layout: Layout, device: str = "cpu") -> None:
        self.spec, self.layout = spec, layout
        self.codec: Codec = build_stage(spec.codec)
        self.guard: Transform | None = Chain(tuple(build_stage(s) for s in spec.client)).guard
        self.params = torch.empty(0)
        self.fold = Fold(layout.size, spec.grid, device)
        self.clip_bits = np.zeros(spec.clip_bits, dtype=np.int64)
        self.tallies: dict[int, Tally] = {}
        self.errors: list[str] = []

    def take(self, block: int, contribution: Contribution) -> None:
        """Add one user's contribution to the sum; what cannot be taken counts as a failed user and adds nothing."""
        tally, error = contribution.tally, contribution.error
        if contribution.payload is not None:
            try:
                # Under noise a weight that a client states would multiply what the guard has bounded: it went in before the clip.
                weight = 1.0 if self.spec.private else contribution.weight
                bits = unpack_bits(contribution.clip_bits, self.spec.clip_bits)
                update, finite = self._open(contribution.payload)
                self.fold.add(update, weight)
                self.clip_bits += bits
                tally = tally | {"weight": weight}
                if not finite:
                    tally["not_finite"] = 1.0
            except (WireError, ArithmeticError) as fault:
                tally, error = {"failed_users": 1.0}, f"user {contribution.user}: {type(fault).__name__}: {fault}"
        if error is not None:
            self.errors.append(error)
        self.tallies[block] = add_up([self.tallies.get(block, {}), tally])

    def _open(self, payload: bytes) -> tuple[Update, bool]:
        """Decode and guard: finite (and whether it was), of this layout, within the bound of the chain."""
        update, finite = finite_or_zero(self.codec.decode(payload, self.layout))
        if self.guard is None:
            return update, finite
        ctx = Ctx(self.layout, self.spec.streams.generator("chain"), self.spec.streams.round, self.params)
        return self.guard.apply(update, None, ctx).update, finite

    def partial(self) -> Partial:
        """Return the sum so far."""
        return Partial(self.fold.total, self.fold.users, self.tallies, tuple(self.errors), tuple(self.clip_bits.tolist()))


def train_blocks(site: Site, spec: RoundSpec, blocks: Iterable[Block], states: UserStates | None = None) -> Partial:
    """Train the users of some blocks one after another and return their exact sum; what the chain keeps of users is durable by then."""
    client, collector = Client(site, spec, states), Collector(spec, site.replica.layout)
    for block, users in blocks:
        for user in users:
            collector.take(block, client.train_user(user))
    client.sync()
    return collector.partial()


def pack_bits(bits: Sequence[bool]) -> bytes:
    """Return clip bits as they travel, eight a byte."""
    return np.packbits(np.asarray(bits, dtype=bool)).tobytes()


def unpack_bits(packed: bytes, count: int) -> np.ndarray:
    """Return `count` packed bits as +1 and -1, int64, shape (count,).

    Raises:
        WireError: they are not so many.
    """
    if len(packed) != -(-count // 8):
        raise WireError(f"Expected {count} clip bits in {-(-count // 8)} bytes, got {len(packed)} bytes.")
    return 2 * np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(np.int64) - 1


def release(
    method: Method, state: ServerState, layout: Layout, plan: Plan, partials: Iterable[Partial], account: Account | None = None
) -> Released:
    """Add the sums, charge the account, and release the mean and the fractions of users within adaptive bounds.

    Under noise the account is charged before the noise is drawn: a release that is not in the ledger is never made.

    Raises:
        FoldOverflow: more users than the grid has room for.
    """
    fold, tallies, errors = Fold(layout.size, plan.spec.grid), dict[int, Tally](), list[str]()
    bits = np.zeros(plan.spec.clip_bits, dtype=np.int64)
    for part in partials:
        fold.merge(part.total, part.users)
        bits += np.asarray(part.clip_bits, dtype=np.int64)
        tallies |= part.tallies
        errors += part.errors
    tally = add_up(tallies[n] for n in sorted(tallies))
    tally["downlink_bytes"] = float(plan.downlink_bytes)
    streams, now = plan.spec.streams, method.for_round(state.thresholds, layout)
    bound, noise = now.bound(layout), streams.generator("noise")
    if account is not None and method.release.mechanism is not None:
        account.charge(streams.run, streams.round, streams.attempt, method.release.mechanism.noise_multiplier, bound.total)
    mean = now.release.apply(fold.result().numpy(), number(tally, "weight"), bound, layout, noise)
    fractions = None
    if method.adaptive is not None:
        cohort = method.sampler.expected_cohort if method.private else None
        fractions = method.adaptive.fractions(bits, fold.users, cohort, noise)
    within = None if fractions is None else tuple(fractions.tolist())
    return Released(streams.round, streams.attempt, torch.from_numpy(mean).float(), within, tally, tuple(errors))


def advance(method: Method, state: ServerState, layout: Layout, plan: Plan, released: Released) -> Outcome:
    """Take the server step on what was released. It sees nothing else, so that it can be taken again after a crash."""
    streams = plan.spec.streams
    ctx = Ctx(layout, streams.generator("server"), streams.round, state.params)
    step = method.server.apply(Dense(released.mean), state.server, ctx)
    params = state.params - to_dense(step.update, layout)
    tally = dict(released.tally) | {f"server.{k}": list(v) if isinstance(v, tuple) else v for k, v in step.measurements.items()}
    thresholds = state.thresholds
    if method.adaptive is not None:
        tally["server.max_norm"] = math.hypot(*thresholds)
        if len(thresholds) > 1:
            tally["server.layer_max_norm"] = list(thresholds)
        thresholds = method.adaptive.step(thresholds, released.fractions)
    return Outcome(
        ServerState(params, step.state, state.round + 1, thresholds=thresholds, sent=plan.sent), tally, released.errors, released.attempt
    )


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


def evaluate_units(site: Site, params: torch.Tensor, units: Iterable[int]) -> list[tuple[int, Counts]]:
    """Return what each held-out unit adds to the metrics of a model with parameters `params`, shape (d,)."""
    site.replica.load(params.to(site.replica.params.device))
    site.replica.model.eval()
    with torch.inference_mode():
        return [(unit, site.task.evaluate(site.replica.model, unit)) for unit in units]
