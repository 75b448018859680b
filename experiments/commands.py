"""What the commands do, once their input is checked. Imports PyTorch."""

import dataclasses
import shutil
import signal
from pathlib import Path

from experiments.central import Central
from experiments.engines import OnGrid, open_engine
from experiments.folder import to_json
from experiments.live import Reporter, describe_result, describe_speakers, size
from experiments.prepare import Prepared, on_folder, prepare
from experiments.run import DONE, run_rounds
from fedclip.asr.metrics import speaker_rows
from fedclip.config import Experiment, apply_overrides
from fedclip.layout import Layout
from fedclip.model_file import check_alphabet, flatten, load_model, model_path
from fedclip.options import ConfigError
from fedclip.release import Release
from fedclip.replica import Replica
from fedclip.site import Site, evaluate_units
from fedclip.user_states import Forecast
from strategies.recipes import resolve


def run_command(experiment: Experiment, path: Path, quiet: bool, resume: bool = False) -> int:
    """Run an experiment, or go on with the run in a folder, and return the exit status. SIGTERM ends it in order, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prepared = prepare(experiment, resume=resume)
    with Reporter(experiment.run.rounds, quiet) as reporter:
        reporter.say(
            f"{experiment.run.name}: {prepared.experiment.population.size:,} users, cohorts of about {prepared.experiment.sampler.cohort:g}"
        )
        say_skipped(prepared, reporter)
        if note := getattr(prepared.task, "note", ""):
            reporter.say(note)
        if prepared.method.stateful:
            reporter.say(check_room(prepared, path, resume))
        with open_engine(prepared, path) as engine:
            if isinstance(engine, OnGrid):
                engine.watch(reporter.worker)
            return run_rounds(prepared, engine, path, reporter, resume)


def say_skipped(prepared: Prepared, reporter: Reporter) -> None:
    """Say what of the data is left out of the whole run, by cause."""
    for cause, (count, first) in getattr(prepared.task, "skipped", {}).items():
        reporter.say(f"left out: {count:,} utterances: {cause} ({first}{', and others' if count > 1 else ''})")


def check_room(prepared: Prepared, path: Path, resume: bool = False) -> str:
    """Return what the states of users will take on the disk of a run folder; a run that is gone on with has most of them already.

    Raises:
        ConfigError: that is more than there is for a new run.
    """
    forecast = Forecast.of(prepared.method, Layout.of(prepared.task.make_model()), prepared.experiment.run.rounds)
    place = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    said = (
        f"states of users: {size(forecast.each)} each, of about {forecast.users:,.0f} users who take part "
        f"{forecast.participations:.3g} times; {size(forecast.total)} in all"
    )
    if forecast.total > free and not resume:
        raise ConfigError(
            f"{said}, and {place} has {size(free)} free; set states.precision = 'float16', take a chain that keeps no state, "
            "or another folder by --out."
        )
    return said


def central_command(experiment: Experiment, path: Path, quiet: bool, resume: bool = False) -> int:
    """Train the central baseline, or go on with the one in a folder, and return the exit status. SIGTERM ends it in order."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prepared = prepare(experiment, resume=resume)
    # What is recorded is a run without noise; the baseline's cohorts are those of the experiment as it stands.
    public = dataclasses.replace(prepared, method=dataclasses.replace(prepared.method, release=Release()))
    with Reporter(experiment.run.rounds, quiet) as reporter:
        say_skipped(prepared, reporter)
        return run_rounds(public, Central(prepared), path, reporter, resume)


def evaluate_command(model: Path, overrides: list[str], data_dir: Path | None, as_json: bool) -> int:
    """Evaluate a saved model, print the metrics, and return the exit status."""
    saved, tensors = load_model(model_path(model))
    experiment = resolve(apply_overrides(saved, overrides))
    experiment = on_folder(experiment, data_dir, all_users=True) if data_dir is not None else experiment
    check_alphabet(model, saved, experiment.task)
    task = prepare(experiment).task
    site = Site(task, Replica.of(task, experiment.run.device))
    counts = [c for _, c in evaluate_units(site, flatten(tensors, site.replica.layout), range(task.held_out_units))]
    metrics, speakers, note = task.summarise(counts, 0), speaker_rows(counts), getattr(task, "note", "")
    if as_json:
        print(to_json(metrics | ({"speakers": speakers} if speakers else {}) | ({"note": note} if note else {})))
    else:
        print(f"{task.held_out_units} held-out units{describe_result(metrics)}")
        for line in (*describe_speakers(metrics), *([note] if note else [])):
            print(line)
        for name, value in metrics.items():
            print(f"  {name} {value:.4g}")
    return DONE
