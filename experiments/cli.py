"""The command line. This module imports nothing heavy, so that `--help` and mistakes answer at once."""

import json
import os
import sys
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from experiments.exits import guarded as _guarded
from experiments.exits import refuse as _refuse
from experiments.keys import keys
from experiments.prepare import check_free, read_experiment, read_run
from experiments.trackers import check_trackers
from fedclip.config import Experiment
from fedclip.options import ConfigError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Measure what a run costs: `engine`, `flower`, `wire`.")
app.add_typer(bench, name="bench")
app.add_typer(keys, name="keys")

ExperimentFile = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="the experiment file", show_default=False)]
ExperimentOrRun = Annotated[Path | None, typer.Argument(metavar="EXPERIMENT.toml", help="the experiment file", show_default=False)]
Resume = Annotated[Path | None, typer.Option(metavar="RUN", help="go on with the run in this folder", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="set a key of the file anew; may be repeated", show_default=False)
]
Rounds = Annotated[int | None, typer.Option(help="rounds to run", show_default=False)]
DataDir = Annotated[Path | None, typer.Option(help="folder of recordings, read in place", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="the run folder; by default one in runs, of name, date and time", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="seed of all randomness", show_default=False)]
Workers = Annotated[int | None, typer.Option(help="worker processes; 0: one a core, or as many as a cluster holds", show_default=False)]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="a running Ray cluster, as host:port or auto; its workers train", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="print the end only")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


class SamplerName(StrEnum):
    """What `fedclip budget` knows of samplers."""

    poisson = "poisson"
    fixed = "fixed"


class ModelName(StrEnum):
    """What `fedclip bench engine` trains."""

    mlp = "mlp"
    cnn200k = "cnn200k"
    cnn1m2 = "cnn1m2"
    asr = "asr"


class AdjacencyName(StrEnum):
    """Which two populations an epsilon compares."""

    add_or_remove_one = "add-or-remove-one"
    replace_one = "replace-one"


class AccountantName(StrEnum):
    """How an epsilon is computed."""

    pld = "pld"
    rdp = "rdp"
    closed_form = "closed_form"


@app.callback()
def _fedclip() -> None:
    """Private, bandwidth-thrifty federated learning on Flower and Ray."""


@app.command()
def run(
    experiment: ExperimentOrRun = None,
    resume: Resume = None,
    set_: Set = None,
    rounds: Rounds = None,
    data_dir: DataDir = None,
    out: Out = None,
    seed: Seed = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    quiet: Quiet = False,
) -> None:
    """Run an experiment by federated learning, on Ray.

    Examples: `fedclip run experiments/vision.toml --set local.lr=0.05 --rounds 20`, `fedclip run --resume runs/mine --rounds 40`,
    `fedclip run experiments/vision.toml --ray-address 10.0.0.1:6379`

    Exit status: 0 done, 1 a worker failed or too many users did, 2 bad input, 130 interrupted.
    """
    changed = [*(set_ or []), *([] if ray_address is None else [f"ray.address={json.dumps(ray_address)}"])]
    checked, path = _new_or_resumed("run", experiment, resume, changed, data_dir, rounds=rounds, out=out, seed=seed, workers=workers)
    from experiments.commands import run_command

    raise typer.Exit(_guarded(lambda: run_command(checked, path, quiet, resume is not None)))


@app.command("train-central")
def train_central(
    experiment: ExperimentOrRun = None,
    resume: Resume = None,
    set_: Set = None,
    rounds: Rounds = None,
    data_dir: DataDir = None,
    out: Out = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Train the same model centrally, on the batches that a federated run takes: the baseline, or a model to begin with.

    The same cohorts are drawn, and each batch of each user is one step of the optimizer in the section `central`.

    Examples: `fedclip train-central experiments/vision.toml`, `fedclip train-central --resume runs/mine --rounds 400`
    """
    checked, path = _new_or_resumed("train-central", experiment, resume, set_, data_dir, rounds=rounds, out=out, seed=seed)
    from experiments.commands import central_command

    raise typer.Exit(_guarded(lambda: central_command(checked, path, quiet, resume is not None)))


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


@app.command()
def transcribe(
    model: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="a run folder, or a model.safetensors", show_default=False)],
    audio: Annotated[list[Path], typer.Argument(metavar="AUDIO...", help="files of audio, or folders of them", show_default=False)],
    set_: Set = None,
    json: Json = False,
) -> None:
    """Write down what is said in files of audio: path, tab and text, a line a file; with --json an object a line.

    Examples: `fedclip transcribe runs/digits one.wav two.flac`, `fedclip transcribe runs/digits my-recordings --set task.decoder.beam=20`

    Exit status: 0 done, 1 a file could not be transcribed (the others were), 2 bad input.
    """
    from experiments.transcribe import transcribe_command

    raise typer.Exit(_guarded(lambda: transcribe_command(model, audio, set_ or [], json)))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders; the first is the one to match", show_default=False)],
    within: Annotated[float, typer.Option(min=0.0, max=1.0, help="how much worse than the first still matches it")] = 0.01,
    plot: Annotated[Path | None, typer.Option(help="draw error against bytes: a .png, .svg or .pdf", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Say what runs paid in bytes, both ways, until they were as good as the first of them.

    Example: `fedclip compare runs/dense runs/int8 runs/topk --plot bytes.svg`
    """
    from experiments.compare import compare_command

    raise typer.Exit(_guarded(lambda: compare_command(runs, within, plot, json)))


@app.command()
def report(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN|SWEEP...", help="run folders and sweep folders", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="the page; by default report.html in the folder, of several here", show_default=False)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="write it anew until the runs have ended; the page reloads itself")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="seconds between two pages of --watch")] = 10.0,
    export: Annotated[
        Path | None, typer.Option(metavar="DIR", help="also the figures as PNG and SVG, the table as CSV and LaTeX", show_default=False)
    ] = None,
) -> None:
    """Show runs in one HTML page: error against bytes and epsilon, curves, layers, speakers, and a table to sort and pick from.

    Example: `fedclip report runs/mine`, `fedclip report runs/a runs/b --out compared.html --export figures`
    """
    from experiments.report.command import report_command

    raise typer.Exit(_guarded(lambda: report_command(paths, out, watch, every, export)))


@app.command()
def plan(
    experiment: ExperimentFile,
    set_: Set = None,
    data_dir: DataDir = None,
    cohort: Annotated[float | None, typer.Option(help="users a round", show_default=False)] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="worker processes on Ray", show_default=False)] = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="measure one step of one user")] = True,
    json: Json = False,
) -> None:
    """Say what a run costs before it is run: memory, operations, bytes both ways, time, disk; from one step of one user.

    Example: `fedclip plan experiments/quickstart.toml --cohort 1000 --workers 64`
    """
    checked = _read(experiment, [*(set_ or []), *([] if cohort is None else [f"sampler.cohort={cohort}"])], data_dir)
    from experiments.plan import plan_command

    raise typer.Exit(_guarded(lambda: plan_command(checked, workers, measure, json)))


@app.command()
def sweep(
    sweep_file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="the sweep file", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="the sweep folder; by default runs/NAME-DATE-TIME", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the sweep in --out, or in the folder of the file")] = False,
    parallel: Annotated[int | None, typer.Option(min=0, help="trials at a time; 0: one a core", show_default=False)] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="a Ray cluster whose tasks the trials are", show_default=False)
    ] = None,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the trials and what they vary")] = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment over and over with other settings: grids, lists and seeds, the trials side by side.

    Examples: `fedclip sweep experiments/tradeoff.toml --dry-run`, `fedclip sweep runs/mine/sweep.toml --resume`

    Exit status: 0 done, 1 a trial failed, 2 bad input, 130 interrupted.
    """
    from experiments.sweep import SweepArguments, sweep_command

    arguments = SweepArguments(sweep_file, out, resume, tuple(set_ or ()), parallel, ray_address, dry_run, quiet)
    raise typer.Exit(_guarded(lambda: sweep_command(arguments)))


@app.command()
def users(
    experiment: ExperimentFile,
    set_: Set = None,
    data_dir: DataDir = None,
    sample: Annotated[int | None, typer.Option(min=1, help="users to look at; by default up to 5,000", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="draw them: a .png, .svg or .pdf", show_default=False)] = None,
    json: Json = False,
) -> None:
    """Say who the users of an experiment are: examples, seconds of audio and labels of each, before anything is trained.

    Example: `fedclip users experiments/vision.toml --out users.png`
    """
    checked = _read(experiment, set_, data_dir)
    from experiments.users import users_command

    raise typer.Exit(_guarded(lambda: users_command(checked, sample, out, json)))


@app.command()
def flower(
    folder: Annotated[
        Path, typer.Argument(metavar="APP_DIR", help="the folder of a Flower app: where its pyproject.toml is", show_default=False)
    ],
    nodes: Annotated[int, typer.Option(min=1, help="registered nodes, which cost nothing")] = 10,
    workers: Annotated[int | None, typer.Option(min=1, help="worker processes; by default one a core", show_default=False)] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(metavar="'K=V ...'", help="set keys of [tool.flwr.app.config] anew, as for `flwr run`", show_default=False),
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="a Ray cluster; by default this machine", show_default=False)] = None,
) -> None:
    """Run any Flower app, as it is, on workers that millions of registered nodes share.

    Example: `fedclip flower quickstart-pytorch --nodes 1000000 --run-config 'fraction-train=0.00002'`
    """

    def answer() -> int:
        from experiments.flower_app import flower_command

        return flower_command(folder, nodes, workers, run_config or [], ray_address)

    raise typer.Exit(_guarded(answer))


@app.command()
def budget(
    population: Annotated[int | None, typer.Option(min=1, help="users there are", show_default=False)] = None,
    cohort: Annotated[float | None, typer.Option(help="expected users a round", show_default=False)] = None,
    sampling_rate: Annotated[float | None, typer.Option(help="in their place: cohort / population", show_default=False)] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="noise on the sum over the clip bound", show_default=False)] = None,
    target_epsilon: Annotated[float | None, typer.Option(help="epsilon to stay within", show_default=False)] = None,
    rounds: Annotated[int | None, typer.Option(min=0, help="releases", show_default=False)] = None,
    delta: Annotated[float, typer.Option(help="well under one over the population")] = 1e-9,
    sampler: Annotated[SamplerName, typer.Option(help="how a cohort is drawn")] = SamplerName.poisson,
    max_cohort: Annotated[int | None, typer.Option(help="most users a round (poisson)", show_default=False)] = None,
    devices_per_user: Annotated[int, typer.Option(min=1, help="ids that one user may hold (poisson)")] = 1,
    adjacency: Annotated[AdjacencyName | None, typer.Option(help="by default the sampler's own", show_default=False)] = None,
    accountant: Annotated[list[AccountantName] | None, typer.Option(help="may be repeated", show_default=False)] = None,
    extrapolate: Annotated[
        list[str] | None,
        typer.Option(metavar="POPULATION:COHORT", help="the same noise on the mean there; may be repeated", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Say what noise costs before anything is trained, or what noise or how many rounds an epsilon allows.

    Of noise multiplier, target epsilon and rounds give two.

    Example: `fedclip budget --population 1000000 --cohort 1000 --noise-multiplier 1.0 --rounds 2000`
    """
    from experiments.budget import Question, budget_command, make_sampler

    def answer() -> int:
        larger = tuple(_population_and_cohort(text) for text in extrapolate or [])
        drawn = make_sampler(population, cohort, sampling_rate, sampler.value, max_cohort, devices_per_user)
        relation = adjacency.value if adjacency is not None else None
        accountants = tuple(name.value for name in accountant or [])
        question = Question(drawn, delta, noise_multiplier, target_epsilon, rounds, relation, accountants, larger)  # type: ignore[arg-type]
        return budget_command(question, json)

    raise typer.Exit(_guarded(answer))


@app.command()
def audit(
    target: Annotated[Path, typer.Argument(metavar="RUN|EXPERIMENT.toml", help="a run folder, or an experiment file", show_default=False)],
    set_: Set = None,
    data_dir: DataDir = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds to replay on the task")] = 3,
    trials: Annotated[int, typer.Option(min=1000, help="trials to tell a canary by, of each world")] = 50_000,
    json: Json = False,
) -> None:
    """Audit the privacy of an experiment or a run: what it claims against what is found in its own rounds.

    Example: `fedclip audit experiments/quickstart_dp.toml`

    Exit status: 0 all findings are within their claims, 1 one exceeds it, 2 bad input, or no noise to audit.
    """
    from experiments.audit import audit_command

    raise typer.Exit(_guarded(lambda: audit_command(target, set_ or [], data_dir, rounds, trials, json)))


@app.command()
def doctor(data_dir: DataDir = None, json: Json = False) -> None:
    """Look at what a run needs of this machine, each with its remedy: packages, memory, disk, PyTorch, GPUs, Flower, Ray, your data.

    Example: `fedclip doctor --data-dir my-recordings`

    Exit status: 0 done, 1 something fails.
    """
    from experiments.doctor import doctor_command

    raise typer.Exit(_guarded(lambda: doctor_command(data_dir, json)))


@bench.command("wire")
def bench_wire(
    size: Annotated[int, typer.Option(help="parameters of the model")] = 10_000_000,
    density: Annotated[float, typer.Option(help="part of them that is sent")] = 0.001,
    json: Json = False,
) -> None:
    """Time what an upload costs on one core, to make and to take, beside a plain copy of the vector; and count its bytes.

    Example: `fedclip bench wire --density 0.01`
    """
    from experiments.bench import wire_command

    raise typer.Exit(_guarded(lambda: wire_command(size, density, json)))


@bench.command("flower")
def bench_flower(
    folder: Annotated[Path, typer.Argument(metavar="APP_DIR", help="the folder of a Flower app", show_default=False)],
    nodes: Annotated[
        list[int] | None, typer.Option(min=1, help="registered nodes; may be repeated [default: 1000 1000000]", show_default=False)
    ] = None,
    beside: Annotated[
        list[int] | None, typer.Option(min=1, help="registered nodes on Flower's own engine, beside; may be repeated", show_default=False)
    ] = None,
    cohort: Annotated[int, typer.Option(min=1, help="nodes that a round asks")] = 20,
    workers: Annotated[int, typer.Option(min=1, help="worker processes of each")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="rounds to time, at least, of each number of nodes")] = 15,
    beside_rounds: Annotated[int, typer.Option(min=1, help="rounds to time on Flower's engine")] = 2,
    json: Json = False,
) -> None:
    """Time rounds of a Flower app that uses FedAvg, with few and with many registered nodes in turn.

    Example: `fedclip bench flower quickstart-pytorch --nodes 1000 --nodes 1000000 --beside 1000`
    """

    def answer() -> int:
        from experiments.flower_bench import flower_bench

        return flower_bench(folder, nodes or [1000, 1_000_000], beside or [], cohort, workers, rounds, beside_rounds, json)

    raise typer.Exit(_guarded(answer))


@bench.command("engine")
def bench_engine(
    model: Annotated[ModelName, typer.Option(help="what is trained")] = ModelName.cnn200k,
    cohort: Annotated[int | None, typer.Option(help="users a round; by default by the model", show_default=False)] = None,
    population: Annotated[int, typer.Option(min=1, help="users there are")] = 10_000,
    rounds: Annotated[int, typer.Option(min=2, help="timed rounds of each")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="processes that train; with 1 fedclip does without Ray")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    peers: Annotated[str | None, typer.Option(metavar="A,B", help="whom to time beside fedclip", show_default=False)] = None,
    pfl_python: Annotated[str, typer.Option(metavar="PYTHON", help="an interpreter with pfl", show_default="this one")] = sys.executable,
    json: Json = False,
) -> None:
    """Time rounds of the engine beside a bare PyTorch loop and other simulators on the same work, all in turns.

    Example: `fedclip bench engine --model cnn1m2 --rounds 20`
    """
    from experiments.bench_engine import COHORTS, engine_command
    from experiments.contestants.process import Setting

    setting = Setting(model.value, COHORTS[model.value] if cohort is None else cohort, population, workers, device)
    raise typer.Exit(_guarded(lambda: engine_command(setting, rounds, peers, pfl_python, json)))


def _new_or_resumed(
    command: str, experiment: Path | None, resume: Path | None, overrides: list[str] | None, data_dir: Path | None, **run_options: object
) -> tuple[Experiment, Path]:
    """Return what is to be run, and its run folder: a new one, or that of the run to go on with."""
    if (experiment is None) == (resume is None):
        _refuse("Give an experiment file, or --resume with a run folder.")
    if resume is None:
        checked = _read(cast(Path, experiment), overrides, data_dir, **run_options)
        _guarded(lambda: check_trackers(checked.run.trackers))
        return checked, run_folder(checked, "" if command == "run" else "-central")
    if run_options["out"] is not None or run_options["seed"] is not None:
        _refuse("--resume: a run stays in its folder and keeps its seed; leave out --out and --seed.")
    checked = _guarded(lambda: read_run(resume, [*(overrides or []), *_said(**run_options)], data_dir, command))
    _guarded(lambda: check_trackers(checked.run.trackers))
    return checked, resume


def _read(file: Path, overrides: list[str] | None, data_dir: Path | None, **run_options: object) -> Experiment:
    changed = _said(**run_options)

    def read() -> Experiment:
        checked = read_experiment(file, [*(overrides or []), *changed], data_dir)
        if checked.run.out is not None:
            check_free(checked.run.out)
        return checked

    return _guarded(read)


def _population_and_cohort(text: str) -> tuple[int, float]:
    try:
        population, cohort = text.replace("_", "").split(":")
        return int(population), float(cohort)
    except ValueError:
        raise ConfigError(f"--extrapolate: expected POPULATION:COHORT, such as 69506000:204800, got '{text}'.") from None


def _said(**run_options: object) -> list[str]:
    return [f"run.{key}={_toml(value)}" for key, value in run_options.items() if value is not None]


def run_folder(experiment: Experiment, suffix: str = "") -> Path:
    """Return the run folder that an experiment asks for, or a new name under `runs`."""
    return experiment.run.out or Path("runs") / f"{experiment.run.name}{suffix}-{datetime.now():%Y%m%d-%H%M%S}"


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
