"""The ServerApp, for Flower's own engine: `flwr run .` runs an experiment with the supernodes as workers.

Run configuration (`--run-config 'experiment="vision.toml" rounds=3 out="/tmp/run"'`): `experiment`, a file beside this one or a path;
`rounds` and `seed`, 0 for the file's; `data-dir`; `out`, the run folder; `set`, keys set anew, separated by `;`.
"""

import json
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from experiments.cli import run_folder
from experiments.engines import OnGrid, account_of
from experiments.folder import STATES
from experiments.live import Reporter
from experiments.prepare import prepare, read_experiment
from experiments.run import DONE, run_rounds
from fedclip.config import Experiment

app = ServerApp()

SECONDS_BETWEEN_LOOKS = 0.2


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run an experiment on the nodes of the grid.

    Raises:
        ConfigError: the run configuration or the experiment is refused.
        RuntimeError: too many users failed, or it was interrupted; the run folder says more.
    """
    experiment = read_run_config(context)
    prepared = prepare(experiment)
    while not list(grid.get_node_ids()):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    path = run_folder(experiment)
    engine = OnGrid(prepared, grid, account_of(prepared, path), path / STATES)
    with Reporter(experiment.run.rounds, quiet=False) as reporter:
        status = run_rounds(prepared, engine, path, reporter)
    if status != DONE:
        raise RuntimeError(f"The run ended with status {status}; see summary.json in the run folder.")


def read_run_config(context: Context) -> Experiment:
    """Return the experiment that a run configuration asks for.

    Raises:
        ConfigError: the file or a key is refused.
    """
    config = {name: str(value) for name, value in context.run_config.items()}
    beside = Path(__file__).parent / config["experiment"]
    overrides = [part.strip() for part in config["set"].split(";") if part.strip()]
    overrides += [f"run.{name}={config[name]}" for name in ("rounds", "seed") if config[name] != "0"]
    overrides += [f"run.out={json.dumps(config['out'])}"] if config["out"] else []
    data_dir = Path(config["data-dir"]) if config["data-dir"] else None
    return read_experiment(beside if beside.is_file() else Path(config["experiment"]), overrides, data_dir)
