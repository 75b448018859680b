"""A contestant's side of the talk with `fedclip bench engine`: a line comes in, a round is done, a line of JSON goes out.

Imports nothing of this project, nor PyTorch: interpreters that lack the project run it too.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]
"""What a contestant says of a round: `seconds` and `users`, and `stages` (seconds by name) where it has them."""


class Turns:
    """Standard input and output of a contestant. What the libraries it uses print goes to standard error from then on."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def ready(self, parameters: int, torch_version: str) -> None:
        """Say that the first round may come."""
        self.say({"parameters": parameters, "torch": torch_version})

    def asked(self) -> bool:
        """Wait until a round is asked for; False when there are no more."""
        return bool(sys.stdin.readline())

    def say(self, answer: Answer) -> None:
        """Answer."""
        print(json.dumps(answer), file=self._out, flush=True)

    def serve(self, round: Callable[[], Answer]) -> None:
        """Do a round whenever one is asked for."""
        while self.asked():
            self.say(round())


def arguments() -> argparse.Namespace:
    """Return what the command says to each contestant."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--cohort", type=int, required=True)
    parser.add_argument("--population", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--reply", default="sums")
    return parser.parse_args()


def start_ranks(workers: int, module: str) -> None:
    """Run a module in all ranks of `torch.distributed` but the first, which is this process, with the environment that torchrun gives.

    Torchrun would give each a session of its own, and Linux a busy machine's time to sessions: others here have one each.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": 0}
    os.environ |= {name: str(value) for name, value in common.items()}
    for rank in range(1, workers):
        subprocess.Popen([sys.executable, "-m", module, *sys.argv[1:]], env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
