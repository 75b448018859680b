"""The best plain loop for speech: the users, batches and loss of fedclip's own rounds, flat buffers, one clip of the update, a sum.

It has no streams for dropout, no encoding, no guard, no exact sum, no noise, no accounting and no server step.
"""

from experiments.contestants.turns import Answer, Turns, arguments

if __name__ == "__main__":
    turns = Turns()

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from experiments.contestants.pool import Pool
from experiments.contestants.task import experiment_of
from experiments.engines import secret_of
from experiments.prepare import Prepared, prepare
from fedclip.layout import Layout
from fedclip.process import settle_process, settle_thread
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.round import deal, in_blocks
from fedclip.tasks.base import Task
from fedclip.tasks.build import TaskRecipe
from strategies.naming import run_digest


def worker(inbox: Any, outbox: Any, recipe: str, local: dict[str, Any], max_norm: float, device: str) -> None:
    """Train users one after another, while a thread reads the next one's data, and send the sum of their updates."""
    settle_process()
    task = TaskRecipe.from_json(recipe).build()
    replica = Replica(task.make_model(), device)
    replica.model.train()
    start, total = replica.params.clone(), torch.empty_like(replica.params)
    reader = ThreadPoolExecutor(1, initializer=settle_thread)
    while (share := inbox.get()) is not None:
        streams, users = share
        total.zero_()
        ahead = [reader.submit(task.load_user, user, streams.generator("data", user)) for user in users[:1]]
        for user, after in zip(users, [*users[1:], None], strict=True):
            examples = ahead.pop().result()
            if after is not None:
                ahead.append(reader.submit(task.load_user, after, streams.generator("data", after)))
            replica.params.copy_(start)
            train(replica, task, examples, local, streams.generator("batches", user))
            update = replica.params.sub_(start)
            total.add_(update.mul_(torch.clamp(max_norm / update.norm(), max=1.0)))
        outbox.put([total.cpu().numpy()])
    reader.shutdown()


def train(replica: Replica, task: Task, examples: Sequence[Any], local: dict[str, Any], rng: np.random.Generator) -> None:
    """Take a user's steps of SGD, each gradient clipped by its norm, in place."""
    left = local["steps"]
    while left and len(examples):
        for batch in itertools.islice(task.batches(examples, local["batch_size"], rng), left):
            replica.grads.zero_()
            task.loss(replica.model, batch).backward()  # type: ignore[no-untyped-call]
            replica.grads.mul_(torch.clamp(local["clip_norm"] / replica.grads.norm(), max=1.0))
            replica.params.add_(replica.grads, alpha=-local["lr"])
            left -= 1


class Rounds:
    """The same cohorts as fedclip draws, one after another, shared out over the workers as it does."""

    def __init__(self, prepared: Prepared, workers: int, device: str) -> None:
        experiment = prepared.experiment
        self._prepared, self._workers, self._number = prepared, workers, 0
        self._names = (secret_of(prepared), run_digest(experiment))
        max_norm = float((experiment.strategy.model_extra or {})["max_norm"])
        self.pool = Pool(workers, worker, prepared.recipe.to_json(), experiment.local, max_norm, device)

    def round(self) -> Answer:
        """Do the next round."""
        self._number += 1
        streams, sampler = Streams(*self._names, self._number), self._prepared.method.sampler
        cohort = sampler.draw(streams.generator("cohort"))
        shares = deal(in_blocks(self._prepared.method, cohort), self._workers, self._prepared.task)
        return self.pool.round([(streams, [user for _, users in share for user in users]) for share in shares], len(cohort))


def main() -> None:
    """Do rounds as they are asked for."""
    args = arguments()
    prepared = prepare(experiment_of(args.model, args.cohort, args.population, args.workers, args.device, "process", "sums"))
    rounds = Rounds(prepared, args.workers, args.device)
    turns.ready(Layout.of(prepared.task.make_model()).size, torch.__version__)
    turns.serve(rounds.round)
    rounds.pool.close()


if __name__ == "__main__":
    main()
