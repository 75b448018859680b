"""From an experiment file to what a run needs: everything that can be refused is refused here, before a folder is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip.config import Experiment, load_experiment, make_experiment
from fedclip.options import ConfigError
from strategies.recipes import build_method, calibrated, resolve

if TYPE_CHECKING:
    from fedclip.layout import Layout
    from fedclip.method import Method
    from fedclip.tasks.base import Task
    from fedclip.tasks.build import TaskRecipe


@dataclass(frozen=True, eq=False)
class Prepared:
    """A checked experiment with its task and method. `population.size` and the cohort are numbers that the data can give."""

    experiment: Experiment
    recipe: "TaskRecipe"
    task: "Task"
    method: "Method"


def read_experiment(path: Path, overrides: list[str], data_dir: Path | None = None) -> Experiment:
    """Return the resolved experiment of a file, with keys set anew, on the user's own data where a folder is given.

    Imports no PyTorch.

    Raises:
        ConfigError: the file, a key, a value or the folder is refused.
    """
    experiment = resolve(load_experiment(path, overrides))
    return on_folder(experiment, data_dir) if data_dir is not None else experiment


def check_free(path: Path) -> None:
    """Refuse a folder that already holds a run.

    Raises:
        ConfigError: it does, or it is no folder.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"--out: {path} is a file; give a folder.")
    if (path / "config.toml").exists():
        raise ConfigError(f"--out: {path} already holds a run; give another folder, or take that one away.")


def on_folder(experiment: Experiment, folder: Path, *, all_users: bool = False) -> Experiment:
    """Return the experiment with its data read from a folder.

    Speech changes to the corpus whose layout the folder has, where that is another, and then to all the speakers that are there;
    `all_users` takes all of them in any case.

    Raises:
        ConfigError: no such folder, or a layout that is not known.
    """
    if not folder.is_dir():
        raise ConfigError(f"No such data folder: {folder}; give the folder of the recordings by --data-dir.")
    values = experiment.plain()
    values["run"]["data_dir"] = str(folder.absolute())
    if values["task"]["name"] == "asr" and values["task"]["corpus"]["kind"] != (
        kind := corpus_kind(folder, values["task"]["corpus"]["kind"])
    ):
        values["task"]["corpus"], all_users = {"kind": kind}, True
    if all_users:
        values["population"] = {}
    return resolve(make_experiment(values))


def corpus_kind(folder: Path, preferred: str = "") -> str:
    """Return the kind of corpus that a folder's layout tells; the preferred one where the folder can be read as that.

    Raises:
        ConfigError: none of the known layouts.
    """
    there = {
        "manifest": any((folder / name).is_file() for name in ("manifest.csv", "manifest.tsv")),
        "spoken_digits": (folder / "recordings").is_dir(),
    }
    kinds = [kind for kind, is_there in there.items() if is_there]
    if kinds:
        return preferred if preferred in kinds else kinds[0]
    raise ConfigError(
        f"No known layout in {folder}: expected a manifest.csv or manifest.tsv with the columns speaker, path and text, "
        "or recordings/<digit>_<speaker>_<number>.wav."
    )


def prepare(experiment: Experiment) -> Prepared:
    """Return the experiment with its task built, its population known and its method checked.

    Without `population.size` the population is all the users that the data has, and a larger cohort means all of them.

    Raises:
        ConfigError: the task, its data or the method are refused.
    """
    import torch

    from fedclip.process import settle_process
    from fedclip.tasks.build import TaskRecipe

    settle_process()
    if experiment.run.device.startswith("cuda") and experiment.ray.address is None and not torch.cuda.is_available():
        raise ConfigError(f"run.device: '{experiment.run.device}' is not there (torch finds no GPU); use 'cpu'.")
    size = experiment.population.size
    task = TaskRecipe.of(experiment).build()
    layout = _layout_of(task, experiment)
    if size is None:
        cohort = min(experiment.sampler.cohort, float(task.users))
        sampler = experiment.sampler.model_copy(update={"cohort": cohort})
        population = experiment.population.model_copy(update={"size": task.users})
        experiment = experiment.model_copy(update={"population": population, "sampler": sampler})
    elif size > task.users:
        raise ConfigError(
            f"population.size: expected at most {task.users}, the users that the data has, got {size}; leave it out to take them all."
        )
    users = experiment.population.size or task.users
    try:
        experiment = calibrated(experiment, users)
        method = build_method(experiment, users)
        method.check(layout)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"strategy: {error}") from error
    return Prepared(experiment, TaskRecipe.of(experiment), task, method)


def _layout_of(task: "Task", experiment: Experiment) -> "Layout":
    """Return the layout of a task's model: the first look at a task that may be a user's own."""
    from fedclip.layout import Layout

    try:
        if min(int(task.users), int(task.held_out_units)) < 1:
            raise ValueError(f"it has {task.users} users and {task.held_out_units} held-out units")
        return Layout.of(task.make_model())
    except Exception as error:
        raise ConfigError(f"task.name: '{experiment.task.name}' gives no task to run: {type(error).__name__}: {error}.") from error
