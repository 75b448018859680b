"""One user measured: a real local step, a real update through the chain and the codec, and what the server does with it."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fedclip.client import Client
from fedclip.collector import Collector, Contribution
from fedclip.fold import Fold, Grid
from fedclip.forecast import breaks
from fedclip.layout import Layout
from fedclip.method import Method, ServerState
from fedclip.replica import Replica
from fedclip.round import begin
from fedclip.shapes import shrunk, tensor_bytes
from fedclip.site import Site
from fedclip.spec import RoundSpec
from fedclip.tasks.base import Task
from fedclip.transform import Ctx
from fedclip.update import Dense, Sparse, values_of
from fedclip.user_states import StatesInMemory
from fedclip.wire import Wire

REPEATS = 5
"""A step is timed so often, and the median counts, unless the first one took over `LONG_SECONDS`."""

LONG_SECONDS = 5.0

SERVER_SIZE = 1 << 21
"""Parameters that the server's part is timed on; its time grows as the model does."""


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]  # torch gives it no types


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]  # nor it


# The counter of torch knows attention on GPUs only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class TrialError(ValueError):
    """The user that was to be measured cannot be trained. The message says which and why."""


@dataclass(frozen=True)
class Trial:
    """What one user took.

    Attributes:
        user: its id.
        examples: how many it has.
        steps: local steps of a round.
        work: these steps in units of the measured one, the first: by the bytes of their batches, where these tell.
        flops_per_step: floating-point operations of the measured step, forward and backward (a multiply-add is two).
        activations: bytes kept for the backward pass.
        load_seconds: to read its data, waiting included. All other times are of the processor, where that is what trains: those in which
            other programs have the core do not count.
        step_seconds: of the measured step.
        send_seconds: through the chain and the codec, with the copies around the steps.
        take_seconds: to decode, guard and add the update.
        uplink_bytes: by the round from which on it counts, clip bits included.
        stored: values in the update.
        sparse: whether it says which.
        download: bytes of the encoded model; `told`: of what the server says beside it.
        difference: bytes of a difference of the model, where those go down; 0 otherwise.
    """

    user: int
    examples: int
    steps: int
    work: float
    flops_per_step: int
    activations: int
    load_seconds: float
    step_seconds: float
    send_seconds: float
    take_seconds: float
    uplink_bytes: dict[int, int]
    stored: int
    sparse: bool
    download: int
    told: int
    difference: int

    @property
    def user_seconds(self) -> float:
        """The time of a whole user on one worker."""
        return self.load_seconds + self.work * self.step_seconds + self.send_seconds + self.take_seconds

    @property
    def user_flops(self) -> float:
        """The operations of a whole user."""
        return self.work * self.flops_per_step


def measure(method: Method, task: Task, user: int, rounds: int, secret: str, run: str, device: str = "cpu") -> Trial:
    """Measure one step of one user, in the first round of a run.

    Memory: a round in this process, without the server's part.

    Args:
        method: the method.
        task: the task.
        user: who.
        rounds: of the run, for what changes over them.
        secret: the master secret of the random streams.
        run: the name of the run in them.
        device: where to train.

    Raises:
        TrialError: the user has no data, or its data or the task raised.
    """
    one_step = dataclasses.replace(method, local=dataclasses.replace(method.local, steps=1, epochs=None))
    site = Site(task, Replica.of(task, device, low_rank=False))  # what is saved is not the same for one step as for many
    layout, params = site.replica.layout, site.replica.taken().cpu()  # no copy on a CPU: it is encoded before anything is trained
    plan = begin(one_step, ServerState(params, None, thresholds=method.thresholds(layout)), layout, secret, run)
    sent = _send(site, plan.spec, method, user, rounds)
    del site, params  # as much again as the server's part
    take_seconds, stored, sparse = _take(plan.spec, layout, sent.contribution, sent.again)
    facts = {f.name: getattr(sent, f.name) for f in dataclasses.fields(sent) if f.name not in ("contribution", "again", "control")}
    return Trial(
        user=user,
        take_seconds=take_seconds,
        stored=stored,
        sparse=sparse,
        download=len(plan.spec.params),
        told=len(plan.spec.support) + sent.control,
        **facts,
    )


@dataclass(frozen=True, eq=False)
class _Sent:
    """The first half of a `Trial`: what happens at the user.

    `again`: how often it was timed after the first time; `control`: bytes of the control variate on its way down.
    """

    contribution: Contribution
    again: int
    control: int
    examples: int
    steps: int
    work: float
    flops_per_step: int
    activations: int
    load_seconds: float
    step_seconds: float
    send_seconds: float
    uplink_bytes: dict[int, int]
    difference: int


def _send(site: Site, spec: RoundSpec, method: Method, user: int, rounds: int) -> _Sent:
    task, streams, client = site.task, spec.streams, Client(site, spec, StatesInMemory())
    with contextlib.suppress(Exception):  # the first one waits for what starts then, such as a synthesiser
        task.load_user((user + 1) % task.users, streams.generator("data", user))
    try:
        load_seconds, examples = _timed(lambda: task.load_user(user, streams.generator("data", user)), time.perf_counter)
        batches = method.local.batches(task, examples, streams.generator("batches", user)) if len(examples) else iter(())
        sizes = [tensor_bytes(batch) for batch in batches]
        every = method.local.accumulate
        steps = [sum(sizes[n : n + every]) for n in range(0, len(sizes), every)]
    except Exception as error:
        raise TrialError(f"user {user}: {type(error).__name__}: {error}") from error
    clock = time.perf_counter if site.replica.params.is_cuda else time.thread_time
    kept, hooks = _kept(site.replica)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flops, hooks:
        first, contribution = _timed(lambda: _trained(client, user), clock)
    again = 0 if first > LONG_SECONDS else REPEATS
    times = [_timed(lambda: _trained(client, user), clock)[0] for _ in range(again)] or [first]
    reloading, _ = _timed(lambda: task.load_user(user, streams.generator("data", user)), clock)
    update = site.replica.params.clone()  # a client leaves what it sent where it trained
    uplink, sending = _uplink(client, spec, method, Dense(update), user, rounds, len(contribution.clip_bits))
    uplink[1] = len(contribution.payload or b"") + len(contribution.clip_bits)
    return _Sent(
        contribution=contribution,
        again=again,
        # In the first round it is all zeros; the user's update stands for what it is later.
        control=len(method.codec.encode(Dense(update), client.layout)) if client.control is not None else 0,
        examples=len(examples),
        steps=len(steps),
        work=sum(steps) / steps[0] if steps and steps[0] else float(len(steps)),
        flops_per_step=flops.get_total_flops(),
        activations=sum(kept.values()),
        load_seconds=load_seconds,
        # Loading once more, from a cache where there is one, is part of what was timed.
        step_seconds=max(0.0, statistics.median(times) - sending - reloading),
        send_seconds=sending,
        uplink_bytes=uplink,
        # The user's update stands for the change of the model in a round.
        difference=_difference(method, update, client.layout, spec) if method.downlink.differences else 0,
    )


def server_seconds(method: Method, layout: Layout) -> float:
    """Return the time that the server takes for a round, on a model of the same tensors made small, in proportion to the size."""
    small = shrunk(layout, SERVER_SIZE)
    now = method.for_round(method.thresholds(layout), layout)
    fold, rng = Fold(small.size, Grid.for_bound(1.0, 1)), np.random.Generator(np.random.Philox(0))
    ctx = Ctx(small, rng, 1, torch.zeros(small.size))

    def once() -> None:
        total = fold.result().numpy()
        mean = now.release.apply(total, 1.0, now.bound(small), small, rng)
        method.server.apply(Dense(torch.from_numpy(mean).float()), method.server.init(small), ctx)

    return statistics.median(_timed(once)[0] for _ in range(3)) * layout.size / max(1, small.size)


def _trained(client: Client, user: int) -> Contribution:
    contribution = client.train_user(user)
    if contribution.payload is None:
        raise TrialError(contribution.error or f"user {user} has nothing to train on")
    return contribution


def _kept(replica: Replica) -> tuple[dict[int, int], torch.autograd.graph.saved_tensors_hooks]:
    """Return a table of the storages kept for a backward pass, bytes by address, and the hooks that fill it."""
    own = {t.untyped_storage().data_ptr() for t in (replica.params, replica.grads, *replica.model.parameters(), *replica.model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    return kept, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _uplink(
    client: Client, spec: RoundSpec, method: Method, update: Dense, user: int, rounds: int, clip_bits: int
) -> tuple[dict[int, int], float]:
    """Return the bytes of an update from each round on where the chain changes, and the time of the chain and the codec."""
    sizes, seconds, fresh = dict[int, int](), 0.0, client.fresh if client.control is None else client.fresh[0]
    for round in reversed(breaks(method, rounds)):
        streams = dataclasses.replace(spec.streams, round=round)
        wire = Wire.of(dataclasses.replace(spec, streams=streams), client.chain, client.layout)
        ctx = Ctx(client.layout, streams.generator("chain", user), round, client.params, 1.0, wire.support)
        seconds, payload = _timed(lambda wire=wire, ctx=ctx: wire.encode(client.chain.apply(update, fresh, ctx).update))  # type: ignore[misc]
        sizes[round] = len(payload) + clip_bits
    return sizes, seconds


def _difference(method: Method, change: torch.Tensor, layout: Layout, spec: RoundSpec) -> int:
    """Return the bytes of a change of the model on its way down."""
    down = dataclasses.replace(method.downlink, differences=False)
    return down.send(change, None, (0,), 1, layout, spec.streams.generator("downlink"), method.codec).total_bytes


def _take(spec: RoundSpec, layout: Layout, contribution: Contribution, again: int) -> tuple[float, int, bool]:
    """Return the time to take an update, how many values it stores, and whether it says which."""
    collector = Collector(spec, layout)
    update = collector.wire.decode(contribution.payload or b"")
    stored, sparse = int(values_of(update).numel()), isinstance(update, Sparse)
    del update
    times = [_timed(lambda: collector.take(0, contribution))[0] for _ in range(1 + again)]
    if collector.errors:
        raise TrialError(collector.errors[0])
    return statistics.median(times), stored, sparse


def _timed(call: Callable[[], Any], clock: Callable[[], float] = time.thread_time) -> tuple[float, Any]:
    start = clock()
    result = call()
    return clock() - start, result
