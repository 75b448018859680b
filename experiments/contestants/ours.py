"""fedclip's own engine: the rounds of `fedclip run` under noise, with the epsilon of each, and without evaluation or checkpoints."""

from experiments.contestants.turns import Answer, Turns, arguments

if __name__ == "__main__":
    turns = Turns()

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from experiments.contestants.task import experiment_of
from experiments.engines import Engine, open_engine
from experiments.prepare import prepare
from fedclip.account import Account
from fedclip.tally import number

STAGES = ("load_seconds", "train_seconds", "chain_seconds", "fold_seconds", "release_seconds", "server_seconds")

T = TypeVar("T")


class Clock:
    """Adds up the time that an account takes."""

    def __init__(self, account: Account) -> None:
        self.seconds = 0.0
        for name in ("check", "charge", "spent"):
            setattr(account, name, self._timed(getattr(account, name)))

    def _timed(self, function: Callable[..., T]) -> Callable[..., T]:
        def timed(*values: object) -> T:
            begin = time.perf_counter()
            try:
                return function(*values)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def round_of(engine: Engine, account: Account, clock: Clock) -> Answer:
    """Do a round and say how long it took, and its stages."""
    begin, before = time.perf_counter(), clock.seconds
    account.foresee()
    tally = engine.round().tally
    in_round = clock.seconds - before  # of it `charge` is a part of the release
    account.spent()
    seconds = time.perf_counter() - begin
    if failed := number(tally, "failed_users"):
        raise RuntimeError(f"{failed:g} users failed in a round that is timed.")
    stages = {name: number(tally, name) for name in STAGES} | {"account_seconds": clock.seconds - before}
    stages["release_seconds"] -= in_round
    return {"seconds": seconds, "users": number(tally, "users"), "stages": stages}


def main() -> None:
    """Do rounds as they are asked for."""
    args = arguments()
    engine_name = "process" if args.workers == 1 and args.reply == "sums" else "ray"
    experiment = experiment_of(args.model, args.cohort, args.population, args.workers, args.device, engine_name, args.reply)
    with open_engine(prepare(experiment)) as engine:
        account = engine.account
        if account is None:
            raise RuntimeError("Expected an account, as there is noise.")
        clock = Clock(account)
        turns.ready(engine.layout.size, torch.__version__)
        turns.serve(lambda: round_of(engine, account, clock))


if __name__ == "__main__":
    main()
