"""The command line. This module imports nothing heavy, so that `--help` and mistakes answer at once."""

import json
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer

from experiments.prepare import check_free, read_experiment
from fedclip.config import Experiment
from fedclip.options import ConfigError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")

T = TypeVar("T")

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="the experiment file", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="set a key of the file anew; may be repeated", show_default=False)
]
Rounds = Annotated[int | None, typer.Option(help="rounds to run", show_default=False)]
DataDir = Annotated[Path | None, typer.Option(help="folder of recordings, read in place", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="the run folder; by default runs/NAME-DATE-TIME", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="seed of all randomness", show_default=False)]
Workers = Annotated[int | None, typer.Option(help="worker processes; 0: one a core", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", help="print the end only")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback()
def _fedclip() -> None:
    """Private, bandwidth-thrifty federated learning on Flower and Ray."""


@app.command()
def run(
    experiment: ExperimentFile,
    set_: Set = None,
    rounds: Rounds = None,
    data_dir: DataDir = None,
    out: Out = None,
    seed: Seed = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment by federated learning, on Ray.

    Example: `fedclip run experiments/vision.toml --set local.lr=0.05 --rounds 20`

    Exit status: 0 done, 1 too many users failed, 2 bad input, 130 interrupted.
    """
    checked = _read(experiment, set_, data_dir, rounds=rounds, out=out, seed=seed, workers=workers)
    from experiments.commands import run_command

    raise typer.Exit(_guarded(lambda: run_command(checked, run_folder(checked), quiet)))


@app.command("train-central")
def train_central(
    experiment: ExperimentFile,
    set_: Set = None,
    rounds: Rounds = None,
    data_dir: DataDir = None,
    out: Out = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Train the same model centrally, on the batches that a federated run takes: the baseline.

    The same cohorts are drawn, and each batch of each user is one step of the optimizer in the section `central`.

    Example: `fedclip train-central experiments/vision.toml`
    """
    checked = _read(experiment, set_, data_dir, rounds=rounds, out=out, seed=seed)
    from experiments.commands import central_command

    raise typer.Exit(_guarded(lambda: central_command(checked, run_folder(checked, "-central"), quiet)))


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="a run folder, or a model.safetensors", show_default=False)],
    set_: Set = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Evaluate a model on held-out users: word error rate or accuracy, with its 95% interval.

    Example: `fedclip evaluate runs/digits --data-dir my-recordings`
    """
    from experiments.commands import evaluate_command

    raise typer.Exit(_guarded(lambda: evaluate_command(model, set_ or [], data_dir, json)))


def _read(file: Path, overrides: list[str] | None, data_dir: Path | None, **run_options: object) -> Experiment:
    changed = [f"run.{key}={_toml(value)}" for key, value in run_options.items() if value is not None]

    def read() -> Experiment:
        checked = read_experiment(file, [*(overrides or []), *changed], data_dir)
        if checked.run.out is not None:
            check_free(checked.run.out)
        return checked

    return _guarded(read)


def run_folder(experiment: Experiment, suffix: str = "") -> Path:
    """Return the run folder that an experiment asks for, or a new name under `runs`."""
    return experiment.run.out or Path("runs") / f"{experiment.run.name}{suffix}-{datetime.now():%Y%m%d-%H%M%S}"


def _guarded(call: Callable[[], T]) -> T:
    try:
        return call()
    except ConfigError as error:
        _refuse(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _refuse(message: str) -> NoReturn:
    for line in message.splitlines():
        print(f"fedclip: {line}", file=sys.stderr)
    raise typer.Exit(2)


def _toml(value: object) -> str:
    return json.dumps(str(value)) if isinstance(value, Path) else str(value)


def main() -> None:
    """Run the command line."""
    # Nothing leaves this machine: no telemetry, no look for newer versions.
    for name, value in (("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1"), ("RAY_USAGE_STATS_ENABLED", "0")):
        os.environ.setdefault(name, value)
    app()


if __name__ == "__main__":
    main()
