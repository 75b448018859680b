"""What a run takes before it is run: memory by what lies in it, bytes on the wire over the rounds, and room on the disk.

Memory follows `fedclip.client`, `fedclip.site`, `fedclip.round` and the engines line by line: what stays for a whole round, and what lies
beside it in each phase. P stands for the model's trainable parameters in float32.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fedclip.checkpoints import KEPT
from fedclip.layout import Layout
from fedclip.method import Method
from fedclip.shapes import shapes_only, tensor_bytes
from fedclip.site import GROUP_BYTES, GROUP_USERS
from fedclip.update import LARGE
from fedclip.user_states import Forecast


@dataclass(frozen=True)
class Sizes:
    """The bytes that memory is made of.

    Attributes:
        parameters: P, trainable parameters in float32.
        fixed: frozen parameters and buffers.
        moments: the state of the server chain.
        state: what the client chain keeps of a user, as it lies in memory.
        download: the encoded model.
        upload: an encoded update.
        stored: values that an update stores, in float32: P for a dense one.
        places: the positions of these values; 0 for a dense one.
        activations: what a step keeps for its backward pass; None where nothing was measured.
    """

    parameters: int
    fixed: int
    moments: int
    state: int
    download: int
    upload: int
    stored: int
    places: int
    activations: int | None

    @classmethod
    def of(cls, method: Method, layout: Layout, **measured: int | None) -> "Sizes":
        """Return the sizes of a method on a model; states are asked for without their values."""
        moments = tensor_bytes(shapes_only(partial(method.server.init, layout)))
        state = tensor_bytes(shapes_only(partial(method.user_state, layout)))
        return cls(4 * layout.size, moments=moments, state=state, **measured)  # type: ignore[arg-type]  # by name


@dataclass(frozen=True)
class Process:
    """The memory of one kind of process.

    Attributes:
        name: what it does.
        count: how many of them there are.
        kept: what lies there for a whole round, by name, bytes.
        phases: what lies beside it in each phase of a round, by phase and name, bytes.
    """

    name: str
    count: int
    kept: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def largest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        """The most that a process holds at once, bytes, without the interpreter and its libraries."""
        return sum(self.kept.values()) + sum(self.phases[self.largest].values())


def memory(method: Method, sizes: Sizes, workers: int, updates: float = 0.0) -> tuple[Process, ...]:
    """Return the processes of a run: of `workers` Ray workers and their server; with `workers` = 0 one that does everything.

    Args:
        method: the method.
        sizes: of its parts.
        workers: Ray workers.
        updates: users whose encoded updates the workers return in a round, in the place of their sums; 0: sums.
    """
    p = sizes.parameters
    replica = {"parameters": p + sizes.fixed, "gradients": p}
    if (more := min(GROUP_USERS, GROUP_BYTES // (p + sizes.fixed)) - 1) > 0:
        replica["models of a group of users"] = more * (2 * p + sizes.fixed)
    control = p if method.control else 0
    sent = {"model as it was sent": p, "control variate as it was sent": control}
    folded = {"sum of updates (int64)": 2 * p}
    server = {"model of the server": p, "moments of the server": sizes.moments, "control variate of the server": control}
    training, taking = _training(method, sizes), {"taking": _taking(method, sizes)}
    if not workers:
        during = {phase: {**sent, **folded, **items} for phase, items in (training | taking).items()}
        during["sending down"] = {"message down": sizes.download + control, "its parts": sizes.download}
        return (Process("process", 1, {**replica, **server}, {**during, **_releasing(method, sizes, {"sum of users (int64)": 2 * p})}),)
    kept = {**replica, **sent, "message down": sizes.download + control}
    server |= {"message down": sizes.download + control, "model in the message": p}
    if updates:
        each, whole = (round(sizes.upload * count) for count in (updates / workers, updates))
        held = {"messages of users": whole, **folded}
        phases = {"taking": {**held, **taking["taking"]}, **_releasing(method, sizes, held, held)}
        return Process("worker", workers, {**kept, "messages of users": each}, training), Process("server", 1, server, phases)
    answering = {"answering": {"message with the sum": 2 * p}}
    arrived = {"messages of workers": 2 * p * workers, "sums of workers (int64)": 2 * p * workers}
    worker = Process("worker", workers, {**kept, **folded}, {**training, **taking, **answering})
    return worker, Process("server", 1, server, _releasing(method, sizes, arrived, arrived))


def _training(method: Method, sizes: Sizes) -> dict[str, dict[str, int]]:
    """Return what lies beside the rest while a user trains, and while its update is made into a message."""
    p = sizes.parameters
    weighted = method.private and method.weighting != "uniform"
    return {
        "training": {
            "activations": sizes.activations or 0,
            "buffers of local steps": _buffers(method) * p,
            "correction of gradients": p if method.control else 0,
        },
        "sending": {
            "update times its weight": p if weighted else 0,
            "update through the chain": sizes.stored + sizes.places if method.client.stages else 0,
            "state of a user, old and new": 2 * sizes.state,
            "message up": sizes.upload,
        },
    }


def _buffers(method: Method) -> int:
    """Return how many vectors local steps work with beside parameters and gradients: see `fedclip.inplace` and `fedclip.local`."""
    local = method.local
    return (3 if local.optimizer != "sgd" else int(local.momentum > 0)) + (2 if local.proximal else 0)


def _taking(method: Method, sizes: Sizes) -> dict[str, int]:
    """Return what lies beside the rest while an update is decoded, guarded and added."""
    return {
        "message up": sizes.upload,
        "update decoded": sizes.stored + sizes.places,
        "update guarded": sizes.stored if method.client.guard is not None else 0,
        # Dense ones are added and measured in blocks.
        "update as float64": 2 * sizes.stored if sizes.places else 0,
        "update as int64": 2 * sizes.stored if sizes.places else 0,
    }


def _releasing(
    method: Method, sizes: Sizes, arrived: Mapping[str, int], held: Mapping[str, int] | None = None
) -> dict[str, dict[str, int]]:
    """Return what lies beside the rest while sums are added and released, and while the server takes its step; `held`: to the end."""
    p, held = sizes.parameters, held or {}
    ahead = {"numbers of the noise (float64)": 2 * p} if method.private and p < 4 * LARGE else {}
    return {
        "adding": {**arrived, "sum (int64)": 2 * p, **ahead},
        "releasing": {**held, "sum (float64)": 2 * p, "noise or mean (float64)": 2 * p, "released mean": p},
        "stepping": {**held, "released mean": p, "next moments": sizes.moments, "step": p, "next model": p},
    }


@dataclass(frozen=True)
class Disk:
    """The room that a run folder takes, bytes: checkpoints (the newest, the best and one being written), models, and states of users."""

    checkpoints: int
    models: int
    states: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.checkpoints + self.models + self.states

    @classmethod
    def of(cls, method: Method, layout: Layout, sizes: Sizes, rounds: int) -> "Disk":
        """Return the room for a number of rounds."""
        p = sizes.parameters
        vectors = (method.downlink.differences, method.client.needs_average, method.control)
        each = sizes.moments + p * (1 + sum(map(bool, vectors)))
        released = p if method.private else 0
        states = Forecast.of(method, layout, rounds).total if method.stateful else 0.0
        return cls((KEPT + 2) * each + released, 2 * p, round(states))


def breaks(method: Method, rounds: int) -> tuple[int, ...]:
    """Return the rounds from which on the client chain sends another part of an update: 1, and the ends of each warm-up."""
    starts = {1}
    for stage in method.client.stages:
        last = 1
        for _, length in getattr(stage, "warmup", ()):
            last += int(length)
            starts.add(last)
    return tuple(sorted(start for start in starts if start <= rounds))


def over_rounds(sizes: Mapping[int, float], rounds: int) -> float:
    """Return the mean over rounds 1 .. `rounds` of a number that holds from each key on."""
    starts = [*sorted(sizes), rounds + 1]
    return sum(sizes[a] * (b - a) for a, b in itertools.pairwise(starts)) / rounds


def mean_download(method: Method, whole: float, difference: float, rounds: int) -> float:
    """Return what a user pays on average for the model as differences: those since it last came, or the whole if that is less.

    Who comes for the first time pays for the whole. The gap between two rounds of a user is geometric (Poisson sampling).

    Args:
        method: who takes part.
        whole: bytes of the whole model.
        difference: bytes of one round's difference.
        rounds: of the run.
    """
    rate = method.sampler.rate
    # A user comes for the first time in round r with probability q (1 - q)^(r - 1); q of those who are there in round r last came k ago.
    gaps: Sequence[float] = [rate * (1 - rate) ** (k - 1) for k in range(1, rounds)]
    pays = [min(whole, k * difference) for k in range(1, rounds)]
    paid, known = [0.0], [0.0]
    for gap, pay in zip(gaps, pays, strict=True):
        paid.append(paid[-1] + gap * pay)
        known.append(known[-1] + gap)
    return sum(paid[r] + (1 - known[r]) * whole for r in range(rounds)) / rounds
