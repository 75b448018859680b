"""The client side of a round: users are trained one after another, and their updates pass the chain and are encoded."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from fedclip.codec import Codec
from fedclip.collector import Collector, Contribution, Partial, pack_bits
from fedclip.control import fresh_state, gradients_moved, next_of_user
from fedclip.local import LocalSGD
from fedclip.method import user_weight
from fedclip.process import flushed
from fedclip.replica import Replica
from fedclip.site import WORTH_A_THREAD, Read, Site
from fedclip.spec import Block, RoundSpec
from fedclip.stages import build_stage
from fedclip.tally import Tally, shortened
from fedclip.transform import Chain, Ctx, State, has_content
from fedclip.update import Dense, Sparse, Update, finite_or_zero, layer_sparsity, scale, to_dense
from fedclip.user_states import UserStates, apart, halved, restored
from fedclip.wire import Wire

log = logging.getLogger(__name__)


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
    """A user's examples, or the contribution of one whose data cannot be loaded, and how long reading them took, and training waited.

    `order` is the user's stream for the order of batches.
    """

    examples: Sequence[Any]
    order: np.random.Generator
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
        self._arranged = site.replica.arranged(self.params)
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
        ahead, there = self.site.were_read([user for _, user in users], self.spec.streams), deque[_Loaded]()
        for n, (block, user) in enumerate(users):
            there = there or self._some_loaded([user for _, user in users[n : n + len(replicas) - len(group)]], ahead)
            loaded, following = there.popleft(), users[n + 1][1] if n + 1 < len(users) else None
            if following is not None and not there and following not in ahead and loaded.read > WORTH_A_THREAD:
                ahead[following] = self.site.read(following, self.spec.streams)
            group.append((block, self._trained(user, loaded, replicas[len(group)])))
            if len(group) == len(replicas) or following is None:
                yield [(of, self._given(trained)) for of, trained in group]
                group.clear()

    def train_user(self, user: int) -> Contribution:
        """Load a user's data, train, pass the update through the chain and encode it.

        Whatever the user's data or the task raises makes the user a failed one, never the round.
        """
        return self._given(self._trained(user, self._loaded(user), self.site.replica))

    def _some_loaded(self, users: Sequence[int], ahead: "dict[int, Future[Read]]") -> "deque[_Loaded]":
        """Load the data of the first of some users, and of those after it as long as that takes next to nothing: code for it is at hand."""
        loaded = deque([self._loaded(users[0], ahead.pop(users[0], None))])
        for user in users[1:]:
            if loaded[-1].failed is not None or loaded[-1].read > WORTH_A_THREAD or (user in ahead and not ahead[user].done()):
                break
            loaded.append(self._loaded(user, ahead.pop(user, None)))
        return loaded

    def _loaded(self, user: int, ahead: "Future[Read] | None" = None) -> "_Loaded":
        start, failed, read = time.perf_counter(), None, Read((), 0.0)
        try:
            read = self.site.load(user, self.spec.streams) if ahead is None else ahead.result()
        except Exception as error:  # noqa: BLE001  of the user alone; the exception itself would keep its frames
            failed = _failed(user, error)
        return _Loaded(read.examples, self.spec.streams.generator("batches", user), failed, read.seconds, time.perf_counter() - start)

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
        replica.begin(self._arranged)
        with flushed(), streams.torch_seeded("training", user, str(replica.params.device)):
            loss = self.local.train(replica, self.site.task, examples, loaded.order, correction)
        # In the place of the parameters, which the next user's training sets anew: of a large model a vector is gigabytes.
        delta = replica.moved(self.params)
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
