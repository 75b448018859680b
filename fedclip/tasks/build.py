"""Building the task that a configuration names."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedclip.asr.options import AsrOptions
from fedclip.config import Experiment, TaskOptions
from fedclip.doors import load_door
from fedclip.options import ConfigError, Options, validate
from fedclip.tasks.base import Task
from fedclip.tasks.vision_options import VisionOptions

if TYPE_CHECKING:
    from fedclip.speech.index_file import Watch


class _Holder(Options):
    task: TaskOptions


@dataclass(frozen=True)
class TaskRecipe:
    """All that a task is built from, as plain data, so that a worker builds the same one.

    Attributes:
        options: the `[task]` section as JSON text (text, so that the recipe can be hashed).
        population: training users asked for; None: all that the data has.
        seed: seed of the data and of the initial weights.
        data_dir: folder of the data; None for a task that needs none.
        index: digest of the index of the data that the run was prepared with; empty: none, or the files are to be looked at.
    """

    options: str
    population: int | None
    seed: int
    data_dir: str | None
    index: str = ""

    @classmethod
    def of(cls, experiment: Experiment) -> "TaskRecipe":
        """Return the recipe of an experiment's task. Paths become absolute: workers run in other folders."""
        folder, options = experiment.run.data_dir, experiment.plain()["task"]
        model, decoder = options.get("model"), options.get("decoder", {})
        for section in (options, *([model] if isinstance(model, dict) else [])):
            place, _, factory = section.get("name", "").rpartition(":")
            if place.endswith(".py"):
                section["name"] = f"{_absolute(place)}:{factory}"
        for section, key in ((options, "cache_dir"), (decoder, "lm")):
            if key in section:
                section[key] = _absolute(section[key])
        data_dir = str(folder.expanduser().absolute()) if folder else None
        return cls(json.dumps(options, sort_keys=True), experiment.population.size, experiment.run.seed, data_dir)

    def to_json(self) -> str:
        """Return the recipe as text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "TaskRecipe":
        """Return the recipe that `to_json` wrote."""
        return cls(**json.loads(text))

    def build(self, watch: "Watch | None" = None) -> Task:
        """Return the task; `watch` is told how far the making of an index is.

        Raises:
            ConfigError: the options, the folder or what lies in it are refused, or the task's constructor raised.
        """
        options: Any = validate(_Holder, {"task": json.loads(self.options)}).task
        folder = Path(self.data_dir) if self.data_dir else None
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"No such data folder: {folder}; give the folder of the recordings or images by --data-dir or run.data_dir.")
        if isinstance(options, AsrOptions):
            from fedclip.tasks.asr import build_asr

            return build_asr(options, population=self.population, data_dir=folder, seed=self.seed, index=self.index, watch=watch)
        if isinstance(options, VisionOptions):
            from fedclip.tasks.vision import build_vision

            return build_vision(options, population=self.population, seed=self.seed, data_dir=folder)
        factory = load_door(options.name)
        try:
            task: Task = factory(population=self.population, data_dir=folder, seed=self.seed, **options.arguments)
        except Exception as error:
            raise ConfigError(f"task.name: '{options.name}' raised when it was built: {type(error).__name__}: {error}.") from error
        return task


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())
