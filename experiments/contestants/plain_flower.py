"""Flower's own simulation as its users run it: Ray underneath, one message for each virtual user of a round, stock FedAvg."""

from experiments.contestants.turns import Turns, arguments

if __name__ == "__main__":
    turns = Turns()

import logging
import time
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.contestants import workload
from experiments.contestants.flower_client import app as client

LOOK_SECONDS = 2.0


class EnoughError(Exception):
    """Nothing was asked for any more."""


class TakesTurns(FedAvg):
    """Waits before each round until it is asked for, and says how long it took."""

    begin = 0.0

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Wait, and let Flower draw the users."""
        if not turns.asked():
            raise EnoughError
        self.begin = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let Flower average, and say what the round took."""
        arrived = list(replies)
        if failed := [reply for reply in arrived if reply.has_error()]:
            raise RuntimeError(f"{len(failed)} users failed in a round that is timed: {failed[0].error.reason}")
        mean = super().aggregate_train(server_round, arrived)
        turns.say({"seconds": time.perf_counter() - self.begin, "users": len(arrived)})
        return mean


def main() -> None:
    """Do rounds as they are asked for."""
    args, server = arguments(), ServerApp()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    gpus = 0.0 if args.device == "cpu" else 1.0 / args.workers

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < args.population:
            time.sleep(LOOK_SECONDS)
        model = workload.make_model(args.model)
        turns.ready(sum(p.numel() for p in model.parameters()), torch.__version__)
        fraction = args.cohort / args.population + 1e-12  # Flower rounds what comes of it down
        strategy = TakesTurns(fraction_train=fraction, min_train_nodes=args.cohort, min_available_nodes=args.cohort, fraction_evaluate=0.0)
        config = ConfigRecord({"model": args.model, "device": args.device})
        try:
            strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=10**9, train_config=config, timeout=10**6)
        except EnoughError:
            return

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": gpus}, "init_args": {"num_cpus": args.workers}}
    run_simulation(server, client, num_supernodes=args.population, backend_config=backend)


if __name__ == "__main__":
    main()
