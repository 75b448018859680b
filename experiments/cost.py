"""What a run costs before it is run: memory, operations, bytes both ways, time and room on the disk."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.engines import secret_of
from experiments.live import size
from experiments.prepare import Prepared, prepare
from fedclip.codec import HEADER, DenseCodec
from fedclip.config import Experiment
from fedclip.forecast import Disk, Process, Sizes, breaks, mean_download, memory, over_rounds
from fedclip.layout import Layout
from fedclip.options import ConfigError
from fedclip.population import each, sample
from fedclip.shapes import fixed_bytes, shapes_only, shrunk
from fedclip.transform import Ctx
from fedclip.trial import Trial, TrialError, measure, server_seconds
from fedclip.update import Dense, Sparse, Update, values_of
from fedclip.wire import Wire
from strategies.naming import run_digest

CANDIDATES = 101
"""The measured user has the median cost of so many, drawn by the seed."""

STAND_IN_SIZE = 1 << 20
"""Values of the random update that stands for a user's where nothing is measured."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a user in a round, on average over the run: `up` with clip bits, `down`; `steady` once every warm-up is over.

    `exact`: whether they depend on nothing but the size of the model.
    """

    up: float
    steady: float
    down: float
    exact: bool


@dataclass(frozen=True, eq=False)
class Cost:
    """What a run costs.

    Attributes:
        prepared: the experiment.
        layout: of its model.
        workers: Ray workers; 0: one process does everything.
        trial: the measured user; None without measuring.
        traffic: bytes of a user in a round.
        server_seconds: of a round; None without measuring.
        start_up: bytes of a process before it has a model.
        processes: memory of each kind of process.
        disk: room on the disk.
    """

    prepared: Prepared
    layout: Layout
    workers: int
    trial: Trial | None
    traffic: Traffic
    server_seconds: float | None
    start_up: int
    processes: tuple[Process, ...]
    disk: Disk

    @property
    def cohort(self) -> float:
        """Users of a round, as expected."""
        return self.prepared.method.sampler.expected_cohort

    @property
    def round_seconds(self) -> float | None:
        """The time of a round."""
        if self.trial is None or self.server_seconds is None:
            return None
        return max(1.0, self.cohort / max(1, self.workers)) * self.trial.user_seconds + self.server_seconds

    @property
    def memory(self) -> int:
        """The memory of all processes together, bytes."""
        return sum(process.count * (process.peak + self.start_up) for process in self.processes)

    def plain(self) -> dict[str, Any]:
        """Return the figures as plain data; null is what was not measured."""
        experiment, traffic, trial, seconds = self.prepared.experiment, self.traffic, self.trial, self.round_seconds
        rounds, cohort = experiment.run.rounds, self.cohort
        flops = trial.user_flops if trial is not None else None
        return {
            "name": experiment.run.name,
            "rounds": rounds,
            "population": experiment.population.size,
            "cohort": cohort,
            "workers": self.workers or 1,
            "parameters": self.layout.size,
            "tensors": len(self.layout.names),
            "memory_bytes_total": self.memory,
            "start_up_bytes": self.start_up,
            "memory": {process.name: _plain(process) for process in self.processes},
            "flops_per_user": flops,
            "flops_per_round": None if flops is None else flops * cohort,
            "flops_total": None if flops is None else flops * cohort * rounds,
            "uplink_bytes_per_user": traffic.up,
            "uplink_bytes_per_user_steady": traffic.steady,
            "uplink_bytes_per_round": traffic.up * cohort,
            "uplink_bytes_total": traffic.up * cohort * rounds,
            "downlink_bytes_per_user": traffic.down,
            "downlink_bytes_per_round": traffic.down * cohort,
            "downlink_bytes_total": traffic.down * cohort * rounds,
            "bytes_are_exact": traffic.exact,
            "user_seconds": trial.user_seconds if trial is not None else None,
            "server_seconds": self.server_seconds,
            "round_seconds": seconds,
            "total_seconds": None if seconds is None else seconds * rounds,
            "disk_bytes": dataclasses.asdict(self.disk) | {"total": self.disk.total},
            "measured": dataclasses.asdict(trial) if trial is not None else None,
            "assumptions": self.assumptions(),
        }

    def assumptions(self) -> list[str]:
        """Return what the figures take for granted, a line each."""
        trial, lines = self.trial, list[str]()
        if trial is not None:
            lines += [
                f"every user is like user {trial.user} ({trial.examples} examples, {trial.steps} steps), whose first step stands "
                "for all of them in proportion to the bytes of their batches",
                "workers share the users out evenly and do not slow each other down; the server works when they are done",
                "time is of processors that nothing else uses, and leaves out evaluation, checkpoints, start-up and Ray's messages",
            ]
        else:
            lines.append("nothing was measured: memory is without activations, and there is no time")
        if not self.traffic.exact:
            lines.append(
                "bytes depend on values: "
                + ("every update packs like the measured one" if trial is not None else "a random update stands for all of them")
            )
        lines.append(f"memory has {size(self.start_up)} a process for the interpreter and its libraries, and leaves out the data of users")
        if self.workers:
            lines.append("memory leaves out what Ray keeps of messages for itself")
        return lines


def _plain(process: Process) -> dict[str, Any]:
    return dataclasses.asdict(process) | {"peak_phase": process.largest, "peak_bytes": process.peak}


def cost_of(experiment: Experiment, workers: int, trial_wanted: bool = True) -> Cost:
    """Return what a run costs.

    Args:
        experiment: resolved.
        workers: Ray workers; 0: one process does everything.
        trial_wanted: measure one user.

    Raises:
        ConfigError: the experiment is refused, or the user that was to be measured cannot be trained.
    """
    prepared = prepare(_with_cold_cache(experiment), resume=True, weights=False)
    start_up = prepared.startup_memory
    method, task, device = prepared.method, prepared.task, prepared.experiment.run.device
    model = shapes_only(task.make_model)
    layout, fixed, rounds = Layout.of(model), fixed_bytes(model), prepared.experiment.run.rounds
    del model
    trial, seconds = None, None
    if trial_wanted:
        try:
            trial = measure(method, task, typical_user(prepared), rounds, secret_of(prepared), run_digest(prepared.experiment), device)
        except TrialError as error:
            raise ConfigError(f"No user could be measured: {error}; mend its data, or plan with --no-measure.") from error
        seconds = server_seconds(method, layout)
        traffic = measured_traffic(prepared, trial, layout)
        stored, sparse = trial.stored, trial.sparse
    else:
        traffic, stored, sparse = guessed_traffic(prepared, layout)
    sizes = Sizes.of(
        method,
        layout,
        fixed=fixed,
        download=trial.download if trial is not None else round(traffic.down),
        upload=round(traffic.up),
        stored=4 * stored,
        places=8 * stored if sparse else 0,
        activations=trial.activations if trial is not None else None,
    )
    updates = method.sampler.expected_cohort if prepared.experiment.run.reply == "updates" else 0.0
    processes, disk = memory(method, sizes, workers, updates), Disk.of(method, layout, sizes, rounds)
    return Cost(prepared, layout, workers, trial, traffic, seconds, start_up, processes, disk)


def _with_cold_cache(experiment: Experiment) -> Experiment:
    """Return the experiment without a cache of features, where a user takes part once at most: what it then loads is new."""
    size, task = experiment.population.size, experiment.task
    if size is None or experiment.sampler.cohort * experiment.run.rounds > size or not hasattr(task, "cache_mb"):
        return experiment
    return experiment.model_copy(update={"task": task.model_copy(update={"cache_mb": 0.0})})


def typical_user(prepared: Prepared) -> int:
    """Return a user of median cost among some that are drawn by the seed."""
    rng = np.random.default_rng(prepared.experiment.run.seed)
    candidates = sample(prepared.experiment.population.size or prepared.task.users, CANDIDATES, rng)
    costs = each(candidates, prepared.task.cost)
    order = np.argsort(costs, kind="stable")
    some = order[costs[order] > 0] if (costs > 0).any() else order
    return int(candidates[some[len(some) // 2]])


def measured_traffic(prepared: Prepared, trial: Trial, layout: Layout) -> Traffic:
    """Return the bytes of a user in a round, as the measured one had them."""
    method, rounds = prepared.method, prepared.experiment.run.rounds
    down = float(trial.download)
    if method.downlink.differences:
        down = mean_download(method, down, trial.difference, rounds)
    steady = trial.uplink_bytes[max(trial.uplink_bytes)]
    return Traffic(over_rounds(trial.uplink_bytes, rounds), steady, down + trial.told, _is_exact(prepared, layout))


def guessed_traffic(prepared: Prepared, layout: Layout) -> tuple[Traffic, int, bool]:
    """Return the same without a measured user, the values of an update, and whether it says which they are.

    Exact where every update is a dense float32 vector; else a random one stands for it, on a model of the same tensors made small.
    """
    method, rounds, bits = prepared.method, prepared.experiment.run.rounds, -(-len(prepared.method.thresholds(layout)) // 8)
    dense = float(HEADER.size + 4 * layout.size)
    if _is_exact(prepared, layout):
        return Traffic(dense + bits, dense + bits, dense * (2 if method.control else 1), exact=True), layout.size, False
    small = shrunk(layout, STAND_IN_SIZE)
    chain, growth = method.for_round(method.thresholds(layout), layout).client, layout.size / small.size
    noise = torch.from_numpy(np.random.default_rng(0).normal(scale=1e-3, size=small.size).astype(np.float32))
    up: dict[int, float] = {}
    sent: Update = Dense(noise)
    for number in breaks(method, rounds):
        ctx = Ctx(small, np.random.default_rng(0), number, torch.zeros(small.size), 1.0, chain.support(number, small, noise.abs()))
        sent = chain.apply(Dense(noise), chain.init(small), ctx).update
        up[number] = growth * _length(prepared, sent, small, ctx.support) + bits
    model = method.downlink.stages.apply(Dense(noise), method.downlink.stages.init(small), ctx).update
    down = growth * len(method.codec.encode(model, small))
    if method.downlink.differences:
        down = mean_download(method, growth * len(method.codec.encode(Dense(noise), small)), down, rounds)
    if method.control:
        down += growth * len(method.codec.encode(Dense(noise), small))
    traffic = Traffic(over_rounds(up, rounds), up[max(up)], down, exact=False)
    return traffic, round(growth * values_of(sent).numel()), isinstance(sent, Sparse)


def _length(prepared: Prepared, update: Update, layout: Layout, support: torch.Tensor | None) -> int:
    return len(Wire(prepared.method.codec, layout, support).encode(update))


def _is_exact(prepared: Prepared, layout: Layout) -> bool:
    method = prepared.method
    masked = method.client.needs_average or method.client.support(1, layout) is not None
    return isinstance(method.codec, DenseCodec) and not masked
