"""The ServerApp: `flwr run .` runs an experiment with Flower's supernodes, as the workers of a simulation or as real devices.

Run configuration (`--run-config 'experiment="vision.toml" rounds=3 out="/tmp/run"'`): `experiment`, a file beside this one or a path;
`rounds` and `seed`, 0 for the file's; `data-dir`; `out`, the run folder; `set`, keys set anew, separated by `;`; `resume`, the folder of
a run on real devices that is to be gone on with, in the place of `experiment`, `seed` and `out`.

An experiment with a section `[deployment]` runs on real devices.
"""

import dataclasses
import json
import secrets
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from clients.roster import Roster
from experiments.cli import run_folder
from experiments.engines import Engine, OnGrid, account_of, secret_of
from experiments.folder import STATES, append_line, deployed_as
from experiments.live import Reporter
from experiments.prepare import Prepared, prepare, read_experiment, read_run
from experiments.run import DONE, run_rounds
from fedclip.config import Experiment
from strategies.fleet import Fleet, Rejection
from strategies.naming import run_digest
from strategies.privacy import rates_of_devices

app = ServerApp()

SECONDS_BETWEEN_LOOKS = 0.2

SECURITY_LOG = "security.jsonl"
"""In the run folder, for the operator alone: what was not taken of nodes, and why."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run an experiment on the nodes of the grid.

    Raises:
        ConfigError: the run configuration or the experiment is refused.
        RuntimeError: too many users failed, or it was interrupted; the run folder says more.
    """
    resumed = str(context.run_config["resume"])
    experiment = read_resumed(context) if resumed else read_run_config(context)
    prepared = prepare(experiment, resume=bool(resumed))
    path = Path(resumed) if resumed else run_folder(experiment)
    with Reporter(experiment.run.rounds, quiet=False) as reporter:
        engine: Engine
        if experiment.deployment is None:
            while not list(grid.get_node_ids()):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            engine = OnGrid(prepared, grid, account_of(prepared, path), path / STATES)
        else:
            engine = on_devices(prepared, grid, path, reporter)
        status = run_rounds(prepared, engine, path, reporter, resume=bool(resumed))
    if status != DONE:
        raise RuntimeError(f"The run ended with status {status}; see summary.json in the run folder.")


def on_devices(prepared: Prepared, grid: Grid, path: Path, reporter: Reporter) -> Fleet:
    """Return the engine of a run on real devices; the run keeps the name that is drawn for it here."""
    experiment, options = prepared.experiment, prepared.experiment.deployment
    if options is None:
        raise ValueError("Expected an experiment with a section [deployment].")
    Roster.read(options.roster)
    name = deployed_as(path) or run_digest(experiment) + ("" if options.seeded else f"-{secrets.token_hex(8)}")
    secret, device = secret_of(prepared) if options.seeded else "", experiment.run.device
    names = (prepared.method, prepared.task, prepared.recipe, secret, name, grid, options)
    fleet = Fleet(*names, device=device, account=account_of(prepared, path), rates=rates_of_devices(experiment))
    fleet.say = reporter.say
    fleet.warn = lambda rejection: _log(path, rejection, reporter)
    return fleet


def read_run_config(context: Context) -> Experiment:
    """Return the experiment that a run configuration asks for.

    Raises:
        ConfigError: the file or a key is refused.
    """
    config = {name: str(value) for name, value in context.run_config.items()}
    beside = Path(__file__).parent / config["experiment"]
    overrides = _overrides(config) + ([f"run.seed={config['seed']}"] if config["seed"] != "0" else [])
    overrides += [f"run.out={json.dumps(config['out'])}"] if config["out"] else []
    return read_experiment(beside if beside.is_file() else Path(config["experiment"]), overrides, _data_dir(config))


def read_resumed(context: Context) -> Experiment:
    """Return the experiment of the run that a run configuration asks to go on with.

    Raises:
        ConfigError: there is no such run, or it would become another.
    """
    config = {name: str(value) for name, value in context.run_config.items()}
    return read_run(Path(config["resume"]), _overrides(config), _data_dir(config), command=Fleet.command)


def _overrides(config: dict[str, str]) -> list[str]:
    rounds = [f"run.rounds={config['rounds']}"] if config["rounds"] != "0" else []
    return [part.strip() for part in config["set"].split(";") if part.strip()] + rounds


def _data_dir(config: dict[str, str]) -> Path | None:
    return Path(config["data-dir"]) if config["data-dir"] else None


def _log(path: Path, rejection: Rejection, reporter: Reporter) -> None:
    line = dataclasses.asdict(rejection) | {"time": time.time()}
    append_line(path / SECURITY_LOG, line)
    reporter.say(f"round {rejection.round}: nothing taken of {rejection.node} ({rejection.cause})")
