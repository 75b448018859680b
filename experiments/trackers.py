"""Where a run's numbers are shown besides its folder: TensorBoard, MLflow, Weights & Biases. What becomes of them never fails a run."""

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import uuid4

from fedclip.options import ConfigError
from fedclip.storage import Storage, replace

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

PATIENCE: Final = 3
"""Calls in a row that may fail before a tracker is left alone: one that waits for a network would hold up every round."""

MOST_PARAMS: Final = 100
"""Parameters that MLflow takes at a time."""

LONGEST_PARAM: Final = 6000
"""Characters of a parameter that MLflow takes."""


MLFLOW_DEFAULTS: Final = {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Where the environment says nothing: a folder, which MLflow takes for old-fashioned, is meant; it sends nothing of its own; and a server
that is not there is not asked for minutes."""


class Tracker(Protocol):
    """One place that shows runs. Each method may raise anything."""

    def begin(self, config: Mapping[str, Any], stamp: str) -> None:
        """Open it, and say what is run: the sections of the resolved configuration. A run that goes on is the same run here.

        The stamp is to be shown with the run: what its numbers are not, under noise; "" without.
        """

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of a round."""

    def finish(self, summary: Mapping[str, float], status: str) -> None:
        """Add the numbers of the whole run and how it ended (the `status` of `summary.json`), and close it."""


class Trackers:
    """Several trackers as one that never raises: a failure is logged once a tracker, and counted.

    Args:
        named: the trackers by name.

    Attributes:
        failures: for each tracker that failed, how many calls it has not got. One that failed three times in a row is only closed at
            the end; one that could not be opened gets no call any more.
    """

    def __init__(self, named: Mapping[str, Tracker]) -> None:
        self.failures = dict[str, int]()
        self._named, self._in_a_row, self._open = dict(named), dict.fromkeys(named, 0.0), False

    def begin(self, config: Mapping[str, Any], stamp: str = "") -> None:
        """Open all; those that cannot be opened are left alone."""
        self._open = True
        self._each(lambda tracker: tracker.begin(config, stamp), weight=math.inf)

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of a round."""
        self._each(lambda tracker: tracker.row(step, metrics))

    def finish(self, summary: Mapping[str, float], status: str) -> None:
        """Close all; a second time does nothing."""
        if self._open:
            self._open = False
            self._each(lambda tracker: tracker.finish(summary, status), most=math.inf)

    def _each(self, call: Callable[[Tracker], None], weight: float = 1, most: float = PATIENCE) -> None:
        """Call each that has not failed so often in a row; a failure of this call counts as so many."""
        for name, tracker in self._named.items():
            try:
                if self._in_a_row[name] < most:
                    call(tracker)
                    self._in_a_row[name] = 0
                    continue
            except Exception as error:  # noqa: BLE001  the library, its server and the disk may raise anything; the run goes on
                self._in_a_row[name] += weight
                if name not in self.failures:
                    log.warning("the tracker %s failed, and the run goes on: %s: %s", name, type(error).__name__, error)
            self.failures[name] = self.failures.get(name, 0) + 1


class TensorBoard:
    """Event files in a folder, a curve for each number; not `timed`, the time of each point is its round, in seconds."""

    def __init__(self, folder: Path, timed: bool = True) -> None:
        self._folder, self._timed = folder, timed
        self._writer: SummaryWriter

    def begin(self, config: Mapping[str, Any], stamp: str) -> None:
        """Begin an event file; the stamp is among its texts."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder))
        if stamp:
            self._writer.add_text("privacy", stamp)

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step, walltime=None if self._timed else float(step))

    def finish(self, summary: Mapping[str, float], status: str) -> None:
        """Close the file."""
        self._writer.close()


class MlFlow:
    """A run of MLflow: at `MLFLOW_TRACKING_URI`, or in the folder `mlruns` of the run folder, where that is not set.

    Its experiment has the name of the fedclip experiment, its parameters are the configuration as the run began. Not `timed`, the time of
    each point is its round, in milliseconds.
    """

    def __init__(self, path: Path, name: str, timed: bool = True) -> None:
        self._path, self._name, self._step, self._timed = path, name, 0, timed
        self._client: Any
        self._id = ""

    def begin(self, config: Mapping[str, Any], stamp: str) -> None:
        """Open the run, or make one, and give it the parameters that it has not got; the stamp is its tag `privacy`."""
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        where = os.environ.get("MLFLOW_TRACKING_URI") or (self._path / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=where)
        self._id = _kept(self._path / "mlflow.id", self._make)
        self._client.update_run(self._id, status="RUNNING")
        if stamp:
            self._client.set_tag(self._id, "privacy", stamp)
        there = self._client.get_run(self._id).data.params
        params = {name: text[:LONGEST_PARAM] for name, text in _flat(config)}
        new = [Param(name, text) for name, text in params.items() if name not in there]
        for start in range(0, len(new), MOST_PARAMS):
            self._client.log_batch(self._id, params=new[start : start + MOST_PARAMS])
        for name, text in params.items():
            if there.get(name, text) != text:  # a parameter is for good: what was changed on the way becomes a tag
                self._client.set_tag(self._id, name, text)

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each metric."""
        from mlflow.entities import Metric

        self._step, now = step, int(1000 * time.time()) if self._timed else step
        self._client.log_batch(self._id, metrics=[Metric(name, float(value), now, step) for name, value in metrics.items()])

    def finish(self, summary: Mapping[str, float], status: str) -> None:
        """End the run as finished, killed or failed; the tag `status` says it in our words."""
        self.row(self._step, summary)
        self._client.set_tag(self._id, "status", status)
        ended = {"done": "FINISHED", "budget spent": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        self._client.set_terminated(self._id, ended)

    def _make(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._name
        experiment = self._client.get_experiment_by_name(name)
        made = experiment.experiment_id if experiment is not None else self._client.create_experiment(name)
        return str(self._client.create_run(made, run_name=self._path.name).info.run_id)


class WandB:
    """A run of Weights & Biases, in the folder `wandb` of the run folder: offline, unless `WANDB_MODE` says otherwise.

    Its project is `WANDB_PROJECT`, or has the name of the experiment. The library is kept from adding what nobody asked for: the
    machine, its load, the source, the terminal's output, its own crash reports. It writes the time of each point, whatever it is told.
    """

    def __init__(self, path: Path, name: str, timed: bool = True) -> None:
        self._path, self._name = path, name
        self._run: Any

    def begin(self, config: Mapping[str, Any], stamp: str) -> None:
        """Begin the run, or go on with the one of its id; the stamp is its notes."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = os.environ.get("WANDB_MODE") or "offline"
        quiet = wandb.Settings(
            console="off",
            disable_git=True,
            save_code=False,
            silent=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            mode=mode,
            project=os.environ.get("WANDB_PROJECT") or self._name,
            name=self._path.name,
            notes=stamp or None,
            reinit="create_new",  # another run of this process, that was not closed, is not gone on with
            id=_kept(self._path / "wandb.id", lambda: uuid4().hex[:12]),
            resume=None if mode == "offline" else "allow",
            dir=self._path,
            config=dict(config),
            settings=quiet,
        )
        # Its own steps may not go back, as those of a run do that goes on from a checkpoint.
        self._run.define_metric("*", step_metric="round")

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to each metric, over `round`."""
        self._run.log({**metrics, "round": step})

    def finish(self, summary: Mapping[str, float], status: str) -> None:
        """End the run; its summary has `status`."""
        self._run.summary.update({**summary, "status": status})
        self._run.finish(exit_code=0 if status in ("done", "budget spent") else 1)


EXTRAS: Final[Mapping[str, Callable[[Path, str, bool], Tracker]]] = {"mlflow": MlFlow, "wandb": WandB}
"""The trackers that an experiment may name, each called as its package and as the extra that brings it."""


def open_trackers(names: tuple[str, ...], path: Path, name: str, *, timed: bool = True) -> Trackers:
    """Return TensorBoard and the trackers of these names, none of them begun.

    Args:
        names: some of `EXTRAS`.
        path: the run folder, where they keep what they keep.
        name: the experiment's.
        timed: whether points have the time at which they were made.

    Raises:
        ConfigError: the package of one is not installed.
    """
    check_trackers(names)
    named: dict[str, Tracker] = {extra: EXTRAS[extra](path, name, timed) for extra in names}
    return Trackers({"tensorboard": TensorBoard(path / "tensorboard", timed), **named})


def check_trackers(names: tuple[str, ...]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        ConfigError: there is one.
    """
    missing = [extra for extra in names if not installed(extra)]
    if missing:
        raise ConfigError(
            f"run.trackers: {missing[0]} is not installed: pip install 'fedclip[{missing[0]}]'; or leave it out by --set 'run.trackers=[]'."
        )


def installed(package: str) -> bool:
    """Return whether there is a package, not counting a bare folder of its name, as these trackers leave behind."""
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of a package that it is in
        return False
    return found is not None and found.origin is not None


def _kept(file: Path, make: Callable[[], str]) -> str:
    """Return the id in a file, which is made where there is none."""
    if file.is_file() and (known := file.read_text(encoding="utf-8").strip()):
        return known
    made = make()
    replace(Storage(), file, [f"{made}\n".encode()])
    return made


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted keys of nested sections, and what they say as text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)
