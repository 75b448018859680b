"""The client side of a round: users are trained one after another, and their updates decoded, guarded and folded.

Decoding and guarding happen wherever the raw sum is formed: on the worker that trained the users, or on the server.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from fedclip.codec import Codec, WireError
from fedclip.control import fresh_state, gradients_moved, next_of_user
from fedclip.fold import Addend, Fold
from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.method import user_weight
from fedclip.process import settle_thread
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.spec import Block, RoundSpec
from fedclip.stages import build_stage
from fedclip.tally import MOST_SAID, Tally, add_up, number, shortened
from fedclip.tasks.base import Counts, Task
from fedclip.transform import UNBOUNDED, Chain, Ctx, State, Transform, has_content
from fedclip.update import Dense, Sparse, Update, difference, finite_or_zero, layer_sparsity, scale, to_dense
from fedclip.user_states import UserStates, apart, halved, restored
from fedclip.wire import Wire

log = logging.getLogger(__name__)

WORTH_A_THREAD = 1e-3
"""Seconds that reading the user before took, from which on the next one is read by a thread."""


GROUP_BYTES, GROUP_USERS = 16 << 20, 8
"""So many users of a small model are trained, each in a model of its own, before their updates are clipped and added: that code and the
sum then come to a core's caches once for all of them. Together their models, frozen weights too, have at most so many bytes."""


@dataclass(eq=False)
class Site:
    """Where users train: one task and one resident model, used for one user after another; of a small model, up to `group` of them.

    Attributes:
        task: the task.
        replica: the model.
        group: users whose updates may lie here before they are clipped and added, at least 1.
        load_seconds: what reading the data of the last user took.
    """

    task: Task
    replica: Replica
    group: int = GROUP_USERS
    _ahead: "tuple[tuple[int, Streams], Future[Sequence[Any]]] | None" = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._replicas = [self.replica]
        self.load_seconds = 0.0

    def load(self, user: int, streams: Streams) -> Sequence[Any]:
        """Return a user's examples."""
        start = time.perf_counter()
        examples = self.task.load_user(user, streams.generator("data", user))
        self.load_seconds = time.perf_counter() - start
        return examples

    def read_ahead(self, user: int, streams: Streams) -> None:
        """Begin to read, on a thread, the data of the user who is to be the first here in the round after that of `streams`."""
        following, thread = replace(streams, round=streams.round + 1, attempt=0), ThreadPoolExecutor(1, "fedclip-reader", settle_thread)
        self._ahead = (user, following), thread.submit(self.load, user, following)
        thread.shutdown(wait=False)  # it ends with what it was given

    def was_read(self, user: int, streams: Streams) -> "Future[Sequence[Any]] | None":
        """Return the data of a user that are read ahead; None where they are not. Others that were are done with: one reads at a time."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] == (user, streams):
            return ahead and ahead[1]
        ahead[1].exception()
        return None

    def settle(self) -> None:
        """Wait until nothing is being read: a task is asked for one thing at a time."""
        if self._ahead is not None:
            self._ahead[1].exception()

    def replicas(self, users: int) -> list[Replica]:
        """Return the models that a group of users trains in: as many as there are users, at most, and always `replica` first."""
        wanted = max(1, min(users, self.group, GROUP_BYTES // self.replica.bytes))
        if len(self._replicas) < wanted:
            self.settle()
        while len(self._replicas) < wanted:
            twin = self.replica.twin(self.task)
            if twin is None:
                self.group = len(self._replicas)
                break
            self._replicas.append(twin)
        return self._replicas[:wanted]


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one user gives: the encoded update, its weight, its packed clip bits and what was measured.

    A user that failed gives no payload. `error` says why, or what of the data of a user could not be read. Where the sum is formed in
    the process that trained, `update` is what would arrive, and there is no payload; `guarded` says that the guard itself made it.
    """

    user: int
    payload: bytes | None
    weight: float
    tally: Tally
    error: str | None = None
    clip_bits: bytes = b""
    update: Update | None = None
    guarded: bool = False


@dataclass(frozen=True, eq=False)
class Partial:
    """The exact sum over the users of some blocks: int64 grid numbers of shape (d,), how many users, and a tally for each block.

    `clip_bits` is the sum of each bit as +1 or -1; `errors` is what the first failed users said, at most `MOST_SAID` lines.
    """

    total: np.ndarray
    users: int
    tallies: dict[int, Tally]
    errors: tuple[str, ...] = ()
    clip_bits: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class _Trained:
    """A user after its training: the update in the place of the model's parameters, and what the rest needs to know.

    `state` is what the chain kept of the user, `own` its control variate; `seconds` of training.
    """

    user: int
    delta: Dense
    state: State
    own: torch.Tensor | None
    loss: float
    weight: float
    tally: Tally
    said: str | None
    seconds: float


@dataclass(frozen=True, eq=False)
class _Loaded:
    """A user's examples, or the contribution of one whose data cannot be loaded, and how long reading them took, and training waited."""

    examples: Sequence[Any]
    failed: Contribution | None
    read: float
    waited: float


class Client:
    """The client side of one round at one site: the stages rebuilt from the specification, the model as it was sent.

    Args:
        site: where users train.
        spec: what the server said.
        states: where the states of users are; None where the chain has none.
        encodes: whether updates travel as payloads. Otherwise those of a group are to be taken before the next one is
            trained, which overwrites them.

    Raises:
        ValueError: the chain has a state, and there is no place for it.
    """

    def __init__(self, site: Site, spec: RoundSpec, states: UserStates | None = None, *, encodes: bool = True) -> None:
        self.site, self.layout, self._encodes = site, site.replica.layout, encodes
        self.spec = spec.without_vectors()  # decoded below, and not needed again
        self.local: LocalSGD = build_stage(spec.local)
        self.chain = Chain(tuple(build_stage(s) for s in spec.client))
        self._ends_in_guard = bool(self.chain.stages) and self.chain.stages[-1].guard is self.chain.stages[-1]
        self.wire = Wire.of(spec, self.chain, self.layout)
        self.codec: Codec = self.wire.codec
        self.fresh = fresh_state(self.chain, self.layout, bool(spec.control))
        self.states = states if has_content(self.fresh) else None
        if states is None and has_content(self.fresh):
            keeper = "a control variate" if spec.control else self.chain.name
            raise ValueError(f"{keeper} keeps a state for each user, and there is no place to keep it; give a folder for it.")
        self.params = self._vector(spec.params)
        self.control = self._vector(spec.control) if spec.control else None

    def _vector(self, payload: bytes) -> torch.Tensor:
        """Return a vector that the server sent, where users train."""
        return to_dense(self.codec.decode(payload, self.layout), self.layout).to(self.site.replica.params.device)

    def contributions(self, blocks: Iterable[Block]) -> Iterator[tuple[int, Contribution]]:
        """Train the users of some blocks one after another, and yield each one's block and contribution."""
        for group in self.groups(blocks):
            yield from group

    def groups(self, blocks: Iterable[Block]) -> Iterator[list[tuple[int, Contribution]]]:
        """Train the users of some blocks one after another, and yield their blocks and contributions, those of a few users at a time.

        While one user trains, a thread reads the data of the next, so that training waits for the first alone where reading is faster.
        Data that are there sooner than a thread would be woken are read at once.
        """
        users = [(block, user) for block, members in blocks for user in members]
        replicas, group = self.site.replicas(len(users)), list[tuple[int, _Trained | Contribution]]()
        with ThreadPoolExecutor(1, "fedclip-reader", settle_thread) as reader:
            ahead = self.site.was_read(users[0][1], self.spec.streams) if users else None
            for n, (block, user) in enumerate(users):
                loaded = self._loaded(user, ahead)
                follows = n + 1 < len(users) and self.site.load_seconds > WORTH_A_THREAD
                ahead = reader.submit(self.site.load, users[n + 1][1], self.spec.streams) if follows else None
                group.append((block, self._trained(user, loaded, replicas[len(group)])))
                if len(group) == len(replicas) or n + 1 == len(users):
                    yield [(of, self._given(trained)) for of, trained in group]
                    group.clear()

    def train_user(self, user: int) -> Contribution:
        """Load a user's data, train, pass the update through the chain and encode it.

        Whatever the user's data or the task raises makes the user a failed one, never the round.
        """
        return self._given(self._trained(user, self._loaded(user), self.site.replica))

    def _loaded(self, user: int, ahead: "Future[Sequence[Any]] | None" = None) -> "_Loaded":
        start, failed = time.perf_counter(), None
        examples: Sequence[Any] = ()
        try:
            examples = self.site.load(user, self.spec.streams) if ahead is None else ahead.result()
        except Exception as error:  # noqa: BLE001  of the user alone; the exception itself would keep its frames
            failed = _failed(user, error)
        return _Loaded(examples, failed, self.site.load_seconds, time.perf_counter() - start)

    def _trained(self, user: int, loaded: "_Loaded", replica: Replica) -> "_Trained | Contribution":
        if loaded.failed is not None:
            return loaded.failed
        try:
            return self._train(user, loaded, replica)
        except Exception as error:  # noqa: BLE001  a task may raise anything
            return _failed(user, error)

    def _given(self, trained: "_Trained | Contribution") -> Contribution:
        if isinstance(trained, Contribution):
            return trained
        try:
            return self._contribution(trained)
        except Exception as error:  # noqa: BLE001  so may a stage of one's own
            return _failed(trained.user, error)

    def sync(self) -> None:
        """Wait until the states of the users that were trained are durable."""
        if self.states is not None:
            self.states.sync()

    def _train(self, user: int, loaded: _Loaded, replica: Replica) -> "_Trained | Contribution":
        streams, examples = self.spec.streams, loaded.examples
        tally: Tally = {"examples_left_out": float(int(getattr(examples, "left_out", 0)))}
        tally |= {"load_seconds": loaded.waited, "read_seconds": loaded.read}
        if not len(examples):
            return Contribution(user, None, 0.0, {"users_without_data": 1.0, **tally}, _said_of(examples))
        start = time.perf_counter()
        state, own = self._remembered(user), None
        if self.control is not None:
            state, own = state[0], state[1].to(self.control.device)
        correction = None if self.control is None or own is None else replica.arranged(self.control - own)
        replica.load(self.params)
        with streams.torch_seeded("training", user, str(replica.params.device)):
            loss = self.local.train(replica, self.site.task, examples, streams.generator("batches", user), correction)
        # In the place of the parameters, which the next user's training sets anew: of a large model a vector is gigabytes.
        delta = difference(self.params, replica.taken())
        weight = user_weight(len(examples), self.spec.weighting, self.spec.max_examples)
        return _Trained(user, delta, state, own, loss, weight, tally, _said_of(examples), time.perf_counter() - start)

    def _contribution(self, trained: "_Trained") -> Contribution:
        start, user, streams, weight = time.perf_counter(), trained.user, self.spec.streams, trained.weight
        update, finite = finite_or_zero(trained.delta)
        if self.spec.private:
            update = scale(update, weight)
        stream = cache(partial(streams.generator, "chain", user))
        ctx = Ctx(self.layout, stream, streams.round, self.params, weight, self.wire.support)
        step = self.chain.apply(update, trained.state, ctx)
        if self.chain.guard is None:
            self.spec.grid.check(step.update, weight)  # what the sum would refuse must not count as sent
        payload, arriving, size = self._sent(step.update)
        if self.states is not None:
            after, own = step.state, trained.own
            if self.control is not None and own is not None:
                sent = to_dense(step.update, self.layout).to(own.device)
                after = (after, next_of_user(own, self.control, sent, gradients_moved(self.local)).cpu())
            after = halved(after) if self.spec.half_states else apart(after, trained.delta.vector)
            self.states.stage(user, streams.round, streams.attempt, after)
        bits = pack_bits(step.clip_bits) if self.spec.clip_bits else b""
        tally = trained.tally | {"users": 1.0, "uplink_bytes": float(size + len(bits)), "not_finite": float(not finite)}
        if math.isfinite(trained.loss):
            tally |= {"train_loss": trained.loss, "losses": 1.0}
        tally |= {f"chain.{k}": list(v) if isinstance(v, tuple) else v for k, v in step.measurements.items()}
        if isinstance(step.update, Sparse) or step.update.grid is not None:  # of others no value is left out
            tally["chain.layer_sparsity"] = layer_sparsity(step.update, self.layout)
        tally |= {"train_seconds": trained.seconds, "chain_seconds": time.perf_counter() - start}
        # The guard is the identity on what it has just let out here, unless something before it overflowed.
        before = step.measurements.get("update_norm")
        guarded = arriving is step.update and self._ends_in_guard and isinstance(before, float) and math.isfinite(before)
        return Contribution(user, payload, 1.0 if self.spec.private else weight, tally, trained.said, bits, arriving, guarded)

    def _sent(self, update: Update) -> tuple[bytes | None, Update | None, int]:
        """Return the payload of an update, or what would arrive of it, and the bytes that it takes."""
        if self._encodes:
            payload = self.wire.encode(update)
            return payload, None, len(payload)
        arriving, size = self.wire.carried(update)
        return None, arriving, size

    def _remembered(self, user: int) -> State:
        """Return what the chain keeps of a user: the fresh state where it was never seen."""
        if self.states is None:
            return self.fresh
        if not self.spec.half_states:
            return self.states.load(user, self.spec.streams.round, self.fresh)
        return restored(self.states.load(user, self.spec.streams.round, halved(self.fresh)), self.fresh)


@dataclass(eq=False)
class _Opened:
    """What a contribution adds to the sum, its clip bits and whether it was finite; or why it was refused."""

    addend: Addend | None = None
    bits: np.ndarray | None = None
    finite: bool = True
    refused: Exception | None = None
    seconds: float = 0.0


class Collector:
    """Decodes, guards and folds contributions: wherever the raw sum is formed, on a worker or on the server."""

    def __init__(self, spec: RoundSpec, layout: Layout, device: str = "cpu") -> None:
        self.spec, self.layout = spec, layout
        chain = Chain(tuple(build_stage(s) for s in spec.client))
        self.wire = Wire.of(spec, chain, layout)
        self.guard: Transform | None = chain.guard
        # A stage after the last clip may enlarge without limit; the grid is then no longer the clip's.
        self._fits = self.guard is not None and chain.bound(UNBOUNDED, layout).total <= spec.grid.largest
        self.ctx = Ctx(layout, spec.streams.generator("chain"), spec.streams.round, torch.empty(0))
        self.fold = Fold(layout.size, spec.grid, device)
        self.clip_bits = np.zeros(spec.clip_bits, dtype=np.int64)
        self.tallies: dict[int, Tally] = {}
        self.errors: list[str] = []

    def take(self, block: int, contribution: Contribution) -> Exception | None:
        """Add one user's contribution to the sum; what cannot be taken counts as a failed user, adds nothing, and is returned."""
        return self.take_all([(block, contribution)])[0]

    def take_all(self, group: Sequence[tuple[int, Contribution]]) -> list[Exception | None]:
        """Add the contributions of some users, each with its block, in one pass over the sum; see `take`."""
        opened = list[_Opened]()
        for _, contribution in group:
            start = time.perf_counter()
            opened.append(self._opened(contribution))
            opened[-1].seconds = time.perf_counter() - start
        start, there = time.perf_counter(), [o for o in opened if o.addend is not None]
        for one, overflow in zip(there, self.fold.add_all([o.addend for o in there if o.addend is not None]), strict=True):
            one.refused = overflow
        each = (time.perf_counter() - start) / max(1, len(there))
        for (block, contribution), one in zip(group, opened, strict=True):
            self._count(block, contribution, one, one.seconds + (each if one.addend is not None else 0.0))
        return [one.refused for one in opened]

    def _opened(self, contribution: Contribution) -> "_Opened":
        """Decode and guard a contribution, where it has an update."""
        if contribution.payload is None and contribution.update is None:
            return _Opened()
        try:
            # Under noise a weight that a client states would multiply what the guard has bounded: it went in before the clip.
            weight = 1.0 if self.spec.private else contribution.weight
            bits = unpack_bits(contribution.clip_bits, self.spec.clip_bits)
            update, finite = self._open(contribution)
            within = self.guard is not None and self._fits and weight == 1.0
            return _Opened(Addend(update, weight, within), bits, finite)
        except (WireError, ArithmeticError) as fault:
            return _Opened(refused=fault)

    def _count(self, block: int, contribution: Contribution, opened: "_Opened", seconds: float) -> None:
        tally, error, refused = contribution.tally, contribution.error, opened.refused
        if refused is not None:
            sent = float(len(contribution.payload or b"") + len(contribution.clip_bits))
            tally = {"failed_users": 1.0, "uplink_bytes": sent if contribution.update is None else number(tally, "uplink_bytes")}
            error = f"user {contribution.user}: {type(refused).__name__}: {refused}"
        elif opened.addend is not None:
            if opened.bits is not None:
                self.clip_bits += opened.bits
            tally = tally | {"weight": opened.addend.weight}
            if not opened.finite:
                tally["not_finite"] = 1.0
        if error is not None and len(self.errors) < MOST_SAID:
            self.errors.append(shortened(error))
        self.tallies[block] = add_up([self.tallies.get(block, {}), tally, {"fold_seconds": seconds}])

    def _open(self, contribution: Contribution) -> tuple[Update, bool]:
        """Decode and guard."""
        arrived = contribution.update
        if arrived is not None and contribution.guarded:
            return arrived, True
        return self.guarded(self.wire.decode(contribution.payload or b"") if arrived is None else arrived)

    def guarded(self, update: Update) -> tuple[Update, bool]:
        """Return an update of this layout finite (and whether it was), and within the bound of the chain."""
        update, finite = finite_or_zero(update)
        if self.guard is None:
            return update, finite
        return self.guard.apply(update, None, self.ctx).update, finite

    def partial(self) -> Partial:
        """Return the sum so far."""
        return Partial(self.fold.total.cpu().numpy(), self.fold.users, self.tallies, tuple(self.errors), tuple(self.clip_bits.tolist()))


def train_blocks(site: Site, spec: RoundSpec, blocks: Iterable[Block], states: UserStates | None = None) -> Partial:
    """Train the users of some blocks one after another and return their exact sum; what the chain keeps of users is durable by then."""
    client = Client(site, spec, states, encodes=False)
    del spec  # with the model as it was sent
    collector = Collector(client.spec, site.replica.layout, str(site.replica.params.device))
    for group in client.groups(blocks):
        collector.take_all(group)
    client.sync()
    return collector.partial()


def _failed(user: int, error: Exception) -> Contribution:
    log.debug("user %d failed", user, exc_info=error)
    return Contribution(user, None, 0.0, {"failed_users": 1.0}, shortened(f"user {user}: {type(error).__name__}: {error}"))


def _said_of(examples: Sequence[object]) -> str | None:
    """Return the first of what the examples of a user say of data that could not be read; None where they say nothing."""
    faults: Sequence[str] = getattr(examples, "faults", ())
    return f"left out: {faults[0]}{f' And {len(faults) - 1} more of this user.' if len(faults) > 1 else ''}" if faults else None


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
    if not count:
        return np.zeros(0, dtype=np.int64)
    return 2 * np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count).astype(np.int64) - 1


def evaluate_units(site: Site, params: torch.Tensor, units: Iterable[int]) -> list[tuple[int, Counts]]:
    """Return what each held-out unit adds to the metrics of a model with parameters `params`, shape (d,)."""
    site.settle()
    site.replica.load(params.to(site.replica.params.device))
    site.replica.model.eval()
    with torch.inference_mode():
        return [(unit, site.task.evaluate(site.replica.model, unit)) for unit in units]
