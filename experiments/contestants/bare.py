"""No framework at all: a bare PyTorch loop in each process, written without care for speed, and the sums added at the end of a round."""

from typing import Any

from experiments.contestants.turns import Turns, arguments

if __name__ == "__main__":
    turns = Turns()

import numpy as np
import torch

from experiments.contestants import workload
from experiments.contestants.pool import Pool


def worker(inbox: Any, outbox: Any, name: str, device: str) -> None:
    """Train users one after another and send the sum of their updates."""
    torch.set_num_threads(1)
    model = workload.make_model(name).to(device)
    start = [p.detach().clone() for p in model.parameters()]
    while (users := inbox.get()) is not None:
        total = [torch.zeros_like(p) for p in start]
        for user in users:
            torch._foreach_add_(total, workload.train_user(model, start, int(user)))
        outbox.put([t.cpu().numpy() for t in total])


def main() -> None:
    """Do rounds as they are asked for."""
    args, rng = arguments(), np.random.default_rng(0)
    pool = Pool(args.workers, worker, args.model, args.device)
    turns.ready(sum(p.numel() for p in workload.make_model(args.model).parameters()), torch.__version__)
    turns.serve(lambda: pool.round(np.array_split(rng.choice(args.population, args.cohort, replace=False), args.workers), args.cohort))
    pool.close()


if __name__ == "__main__":
    main()
