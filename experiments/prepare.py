"""From an experiment file to what a run needs: everything that can be refused is refused here, before a folder is made."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip.asr.options import AsrOptions
from fedclip.config import Experiment, load_experiment, make_experiment
from fedclip.options import ConfigError
from fedclip.speech.find import EXPECTED, FINDERS, languages_told
from fedclip.speech.options import StampsOptions
from fedclip.tasks.vision_options import VisionOptions
from strategies.naming import run_digest
from strategies.privacy import calibrated
from strategies.recipes import build_method, resolve

MAY_CHANGE = (
    "run.rounds",
    "run.workers",
    "run.engine",
    "run.reply",
    "run.out",
    "run.data_dir",
    "run.init_from",
    "run.trackers",
    "task.cache_dir",
    "task.cache_mb",
    "task.decoder.",
    "task.model.path",
    "task.model.adapters.base",
    "evaluation.",
    "ray.",
    "deployment.roster",
    "deployment.deadline_seconds",
    "deployment.least_users",
    "deployment.users_per_message",
)
"""Keys, or beginnings of keys, that a run may change when it is gone on with: they leave its parameters as they are."""

if TYPE_CHECKING:
    import torch

    from fedclip.layout import Layout
    from fedclip.method import Method
    from fedclip.tasks.base import Task
    from fedclip.tasks.build import TaskRecipe


@dataclass(frozen=True, eq=False)
class Prepared:
    """A checked experiment with its task and method. `population.size` and the cohort are numbers that the data can give.

    `initial` are the parameters of the model that the run begins with, shape (d,); None: they are drawn. `startup_memory` is what this
    process had, in bytes, before it made anything of the size of the data or of the model.
    """

    experiment: Experiment
    recipe: "TaskRecipe"
    task: "Task"
    method: "Method"
    initial: "torch.Tensor | None" = None
    startup_memory: int = 0


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

    Virtual speakers give way to the corpus whose layout the folder has, and to all the speakers that are there; so does a corpus of
    which only the kind is said, whose population stays. The languages that the layout tells come with it, where `task.languages` lacks
    one of them. `all_users` takes any corpus and all users, which is for evaluation. Images have
    no users of their own, so that their population stays.

    Raises:
        ConfigError: no such folder, a layout that is not known, or another than that of a corpus of which more is said than its kind.
    """
    if not folder.is_dir():
        raise ConfigError(f"No such data folder: {folder}; give the folder of the recordings or images by --data-dir.")
    values = experiment.plain()
    values["run"]["data_dir"] = str(folder.absolute())
    if values["task"]["name"] == "asr" and values["task"]["corpus"]["kind"] != (
        kind := corpus_kind(folder, values["task"]["corpus"]["kind"])
    ):
        all_users = all_users or _gives_way(experiment, kind)
        values["task"]["corpus"] = {"kind": kind}
        told = StampsOptions().languages if kind == "tuxpaint_stamps" else languages_told(kind, folder)
        if not {*told} <= {*values["task"]["languages"]}:
            values["task"]["languages"] = list(told)
    if all_users and values["task"]["name"] != "vision":
        values["population"] = {}
    return resolve(make_experiment(values))


def _gives_way(experiment: Experiment, kind: str) -> bool:
    """Return whether the population gives way with its corpus to one of another kind: that of virtual speakers does.

    Raises:
        ConfigError: settings of the corpus would be lost.
    """
    assert isinstance(experiment.task, AsrOptions)
    corpus = experiment.task.corpus
    said = sorted({*corpus.model_dump(exclude_defaults=True)} - {"kind"})
    if said and corpus.kind != "embedded":
        raise ConfigError(
            f"--data-dir: the folder has the layout of '{kind}', and task.corpus is '{corpus.kind}' with settings of its own "
            f"({', '.join(said)}); give a folder of '{corpus.kind}', or --set 'task.corpus={{kind=\"{kind}\"}}' and what it is to say."
        )
    return corpus.kind == "embedded"


def corpus_kind(folder: Path, preferred: str = "") -> str:
    """Return the kind of corpus that a folder's layout tells; the preferred one where the folder can be read as that.

    Raises:
        ConfigError: none of the known layouts.
    """
    kinds = [preferred, *FINDERS] if preferred in FINDERS else FINDERS
    kind = next((kind for kind in kinds if FINDERS[kind](folder) is not None), None)
    if kind is None:
        raise ConfigError(f"No known layout in {folder}: expected {', or '.join(EXPECTED.values())}.")
    return kind


def prepare(experiment: Experiment, *, resume: bool = False, weights: bool = True) -> Prepared:
    """Return the experiment with its task built, its population known and its method checked.

    Without `population.size` the population is all the users that the data has, and a larger cohort means all of them. A run that is
    gone on with does not need the model that it began with. Without `weights` none are drawn, where the model can do without: its
    tensors are on the meta device.

    Raises:
        ConfigError: the task, its data or the method are refused.
    """
    from experiments.live import indexing
    from fedclip.process import resident_memory, settle_process, trim_memory

    settle_process()
    startup = resident_memory()
    if experiment.ray.address is None:
        check_device(experiment)
    experiment, size = _with_weights(experiment), experiment.population.size
    with indexing() as watch:
        task = _recipe_of(experiment).build(watch)
    layout = _layout_of(task, experiment, weights)
    experiment, initial = (experiment, None) if resume else _with_initial(experiment, layout)
    if size is None:
        everybody = task.users if experiment.deployment is None else _enrolled(experiment.deployment.roster)
        cohort = min(experiment.sampler.cohort, float(everybody))
        sampler = experiment.sampler.model_copy(update={"cohort": cohort})
        population = experiment.population.model_copy(update={"size": everybody})
        experiment = experiment.model_copy(update={"population": population, "sampler": sampler})
    users = population_of(experiment, task)
    try:
        experiment = calibrated(experiment, users)
        method = build_method(experiment, users)
        method.check(layout)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"strategy: {error}") from error
    trim_memory()
    recipe = replace(_recipe_of(experiment), index=getattr(task, "index", ""))
    return Prepared(experiment, recipe, task, method, initial, startup)


def _enrolled(roster: Path) -> int:
    from clients.roster import Roster

    return Roster.read(roster).users


def _recipe_of(experiment: Experiment) -> "TaskRecipe":
    """Return how the task is built here; in a deployment on the data that are here, which are not those of the users."""
    from fedclip.tasks.build import TaskRecipe

    recipe = TaskRecipe.of(experiment)
    if experiment.deployment is None:
        return recipe
    # Speakers are those of the server's own recordings; images are dealt to as many users as one says.
    images = isinstance(experiment.task, VisionOptions)
    return replace(recipe, population=recipe.population or _enrolled(experiment.deployment.roster) if images else None)


def check_device(experiment: Experiment) -> None:
    """Refuse a GPU where there is none.

    Raises:
        ConfigError: there is none.
    """
    import torch

    if experiment.run.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device: '{experiment.run.device}' is not there (torch finds no GPU); use 'cpu'.")


def population_of(experiment: Experiment, task: "Task") -> int:
    """Return how many users take part: `population.size`, or all that the data has. The users of real devices have data of their own.

    Raises:
        ConfigError: the data has fewer.
    """
    size = experiment.population.size
    if experiment.deployment is not None:
        return size or 0
    if size is not None and size > task.users:
        raise ConfigError(
            f"population.size: expected at most {task.users}, the users that the data has, got {size}; leave it out to take them all."
        )
    return size or task.users


def read_run(run: Path, overrides: list[str], data_dir: Path | None = None, command: str = "run") -> Experiment:
    """Return the experiment of a run folder that is to be gone on with by a command of `fedclip`. Imports no PyTorch.

    Raises:
        ConfigError: there is no run, another command made it, its configuration was changed since it began, or a key is set anew that
            makes it another run.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise ConfigError(f"--resume: {run} holds no run (there is no config.toml in it); give a run folder.")
    before, experiment = read_experiment(file, []), read_experiment(file, overrides, data_dir)
    old, new = _flat(before.plain()), _flat(experiment.plain())
    changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k) and not k.startswith(MAY_CHANGE))
    if changed:
        key = changed[0]
        raise ConfigError(
            f"--resume: {key} was {old.get(key)!r} and is to be {new.get(key)!r}; that would be another run. Only "
            f"{', '.join(MAY_CHANGE)} may change."
        )
    try:
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        began, made_by = environment["run"], environment.get("command", "run")
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--resume: {run / 'environment.json'} does not say which run this is: {error!r}.") from error
    if made_by != command:
        raise ConfigError(f"--resume: {run} was made by fedclip {made_by}; go on with it by fedclip {made_by} --resume {run}.")
    if began != run_digest(before):
        raise ConfigError(f"--resume: {file} was changed since the run began; put back what it said, or start a new run from it.")
    return experiment


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _with_weights(experiment: Experiment) -> Experiment:
    """Return the experiment, which names the frozen weights of its model by what they are."""
    if not isinstance(experiment.task, AsrOptions):
        return experiment
    from fedclip.asr.weights import pinned

    return experiment.model_copy(update={"task": experiment.task.model_copy(update={"model": pinned(experiment.task.model)})})


def _with_initial(experiment: Experiment, layout: "Layout") -> "tuple[Experiment, torch.Tensor | None]":
    """Return the experiment, which names the weights it begins with, and these weights."""
    if experiment.run.init_from is None:
        return experiment, None
    from fedclip.model_file import check_alphabet, flatten, load_model, model_path

    path = model_path(experiment.run.init_from)
    saved, tensors = load_model(path)
    check_alphabet(path, saved, experiment.task)
    _check_frozen(path, saved, experiment)
    params = flatten(tensors, layout)
    digest = hashlib.blake2b(params.numpy().tobytes(), digest_size=16).hexdigest()
    if experiment.run.init_digest not in (None, digest):
        raise ConfigError(f"run.init_from: {path} holds other weights than the run began with ({digest}, {experiment.run.init_digest}).")
    origin = {"init_from": experiment.run.init_from.absolute(), "init_digest": digest}
    return experiment.model_copy(update={"run": experiment.run.model_copy(update=origin)}), params


def _check_frozen(path: Path, saved: Experiment, experiment: Experiment) -> None:
    """Refuse adapters of other frozen weights than those of the run: they fit them, and mean nothing to them."""
    if not (isinstance(saved.task, AsrOptions) and isinstance(experiment.task, AsrOptions)):
        return
    from fedclip.asr.weights import frozen_digest

    theirs, ours = frozen_digest(saved.task.model), frozen_digest(experiment.task.model)
    if None not in (theirs, ours) and theirs != ours:
        raise ConfigError(
            f"run.init_from: the adapters in {path} were trained on other frozen weights ({theirs}) than task.model names ({ours}); "
            "name the weights that they were trained on, or leave run.init_from out."
        )


def _layout_of(task: "Task", experiment: Experiment, weights: bool) -> "Layout":
    """Return the layout of a task's model: the first look at a task that may be a user's own."""
    from fedclip.layout import Layout
    from fedclip.shapes import shapes_only

    try:
        if min(int(task.users), int(task.held_out_units)) < 1:
            raise ValueError(f"it has {task.users} users and {task.held_out_units} held-out units")
        return Layout.of(task.make_model() if weights else shapes_only(task.make_model))
    except Exception as error:
        raise ConfigError(f"task.name: '{experiment.task.name}' gives no task to run: {type(error).__name__}: {error}.") from error
