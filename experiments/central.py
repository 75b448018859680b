"""The central baseline: the same task, users and batches as a federated run, every batch one step of one optimizer."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.curves import draw_curves
from experiments.engines import secret_of
from experiments.folder import RunFolder, read_metrics
from experiments.live import Reporter
from experiments.prepare import Prepared
from experiments.run import DONE, INTERRUPTED
from fedclip.config import CentralOptions
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.round import Site, evaluate_units
from fedclip.schedules import Schedule


def train_central(prepared: Prepared, path: Path, reporter: Reporter) -> int:
    """Train on each round's cohort in turn and leave a run folder behind, whose lines have no bytes.

    Returns:
        The exit status: 0 done, 130 interrupted; what was done by then is kept.
    """
    experiment, task, start = prepared.experiment, prepared.task, time.perf_counter()
    folder = RunFolder(path, experiment)
    site = Site(task, Replica(task.make_model(), experiment.run.device))
    optimizer = _optimizer(site.replica, experiment.central)
    status, row = "done", dict[str, Any]()
    users = 0
    try:
        for round in range(1, experiment.run.rounds + 1):
            row = _round(prepared, site, optimizer, Streams(secret_of(prepared), experiment.digest, round))
            users += row["users"]
            every = experiment.evaluation.every
            if round == experiment.run.rounds or (every and round % every == 0):
                counts = evaluate_units(site, site.replica.params.clone(), range(task.held_out_units))
                row |= task.summarise([c for _, c in counts], round)
            folder.record(row)
            reporter.round(row, time.perf_counter() - start)
    except KeyboardInterrupt:
        status = "interrupted"
    if row:
        folder.save_model(site.replica.params, site.replica.layout, row["round"])
        draw_curves(read_metrics(path), path / "curves.png", f"{experiment.run.name}, trained centrally")
    totals = {"users_total": users, "failed_users_total": 0, "parameters": site.replica.layout.size}
    last = {k: v for k, v in row.items() if k not in ("round", "attempt")}
    summary = {"name": experiment.run.name, "status": status, "rounds": row.get("round", 0), "total_seconds": time.perf_counter() - start}
    folder.finish(summary | totals | last)
    reporter.end(summary | totals | last, path, [])
    return DONE if status == "done" else INTERRUPTED


def _round(prepared: Prepared, site: Site, optimizer: torch.optim.Optimizer, streams: Streams) -> dict[str, Any]:
    start, losses, users = time.perf_counter(), list[float](), 0
    cohort = prepared.method.sampler.draw(streams.generator("cohort"))
    clip_norm = prepared.method.local.clip_norm
    for group in optimizer.param_groups:
        group["lr"] = Schedule.of(prepared.experiment.central.lr)(streams.round)
    site.replica.model.train()
    for user in cohort:
        with streams.torch_seeded("training", user, prepared.experiment.run.device):
            for batch in _batches(prepared, streams, user):
                site.replica.grads.zero_()
                loss = site.task.loss(site.replica.model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_([site.replica.flat], clip_norm)
                optimizer.step()
                losses.append(float(loss.detach()))
        users += 1
    seconds = time.perf_counter() - start
    mean = sum(losses) / len(losses) if losses else None
    rest = {"failed_users": 0, "uplink_bytes": 0, "downlink_bytes": 0, "users_per_second": users / seconds, "round_seconds": seconds}
    return {"round": streams.round, "attempt": 0, "train_loss": mean, "users": users, **rest}


def _batches(prepared: Prepared, streams: Streams, user: int) -> Iterator[Any]:
    examples = prepared.task.load_user(user, streams.generator("data", user))
    return prepared.method.local.batches(prepared.task, examples, streams.generator("batches", user))


def _optimizer(replica: Replica, options: CentralOptions) -> torch.optim.Optimizer:
    """Return the optimizer; its rate is set anew each round."""
    return torch.optim.Adam([replica.flat]) if options.optimizer == "adam" else torch.optim.SGD([replica.flat])
