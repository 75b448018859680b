"""The digits, with workers that die, hang or raise in the middle of a user or an evaluation: once for each file that a test lays down."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions

DIE, HANG = "die", "hang"
DIE_EVALUATING, RAISE_EVALUATING = "die-evaluating", "raise-evaluating"


class Failing:
    """Before a user is loaded or a unit evaluated, a worker looks for a file of such a name in a folder, takes it away, and obeys."""

    def __init__(self, task: Any, folder: Path) -> None:
        self._task, self._folder = task, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_task"], name)

    def load_user(self, user: int, rng: Any) -> Any:
        if self._told(DIE):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._told(HANG):
            time.sleep(1e6)
        return self._task.load_user(user, rng)

    def evaluate(self, model: Any, unit: int) -> Any:
        if self._told(DIE_EVALUATING):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._told(RAISE_EVALUATING):
            raise ValueError("no such unit")
        return self._task.evaluate(model, unit)

    def _told(self, name: str) -> bool:
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True


def make(population: int, data_dir: Path | None, seed: int, folder: str) -> Failing:
    return Failing(build_vision(VisionOptions(name="vision"), population=population, seed=seed), Path(folder))
