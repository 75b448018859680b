"""Trackers: what they get, that none fails a run, and both extras by their real libraries, where these are installed."""

import json
import logging
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from experiments.cli import app
from experiments.folder import STAMP, RunFolder, read_metrics
from experiments.prepare import read_experiment
from experiments.trackers import EXTRAS, MLFLOW_DEFAULTS, MlFlow, Trackers, installed

NOT_CURVES = {"round", "attempt"}


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def start(vision: Path, out: Path, *more: str | Path) -> None:
    status, output = run("run", vision, "--out", out, "--set", "run.engine=process", "--set", "evaluation.every=1", *more)
    assert status == 0, output


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in NOT_CURVES and isinstance(value, int | float)}


@pytest.fixture
def public(vision: Path) -> Path:
    """Return the experiment without noise."""
    vision.write_text(vision.read_text().replace("noise_multiplier = 0.05", ""), encoding="utf-8")
    return vision


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the user's settings out, and what the trackers set."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)
    for name, value in (MLFLOW_DEFAULTS | {"WANDB_ERROR_REPORTING": "false"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))


class Noted:
    """Keeps what it is told, and raises at the calls it is to raise at."""

    def __init__(self, path: Path, name: str, raises: tuple[str, ...] = ()) -> None:
        self.calls, self._raises = list[tuple[str, Any, Any]](), raises

    def begin(self, config: Mapping[str, Any], stamp: str) -> None:
        self._note("begin", config, stamp)

    def row(self, step: int, metrics: Mapping[str, float]) -> None:
        self._note("row", step, dict(metrics))

    def finish(self, summary: Mapping[str, float], status: str) -> None:
        self._note("finish", dict(summary), status)

    def _note(self, name: str, *told: Any) -> None:
        self.calls.append((name, *told))
        if name in self._raises:
            raise OSError("no room")


def noted(monkeypatch: pytest.MonkeyPatch, *raises: str) -> list[Noted]:
    made: list[Noted] = []

    def make(path: Path, name: str, timed: bool) -> Noted:
        made.append(Noted(path, name, raises))
        return made[-1]

    monkeypatch.setattr("experiments.trackers.EXTRAS", {"mlflow": make})
    monkeypatch.setattr("experiments.trackers.installed", lambda name: True)
    return made


def test_under_noise_a_tracker_gets_the_rows_and_nothing_else(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = noted(monkeypatch)
    start(vision, tmp_path / "run", "--set", "run.trackers=['mlflow']")
    begin, *rows, finish = made[0].calls
    assert begin[1]["run"]["trackers"] == ["mlflow"]
    assert begin[2] == STAMP
    shown = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert shown.Tensors("privacy/text_summary")[0].tensor_proto.string_val == [STAMP.encode()]
    assert rows == [("row", row["round"], numbers(row)) for row in read_metrics(tmp_path / "run")]
    assert "epsilon" in rows[0][2]
    assert finish == ("finish", {}, "done")


def test_without_noise_it_gets_the_totals_too_and_a_run_may_take_one_on_its_way(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = noted(monkeypatch)
    start(public, tmp_path / "run", "--set", "run.rounds=1")
    assert made == []
    status, output = run("run", "--resume", tmp_path / "run", "--rounds", "2", "--set", "run.trackers=['mlflow']")
    assert status == 0, output
    assert made[0].calls[0][2] == ""
    assert [(name, step) for name, step, _ in made[0].calls[1:-1]] == [("row", 2)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    totals = made[0].calls[-1][1]
    assert totals["uplink_bytes_total"] == summary["uplink_bytes_total"] > 0
    assert not {*totals} & {"accuracy", "train_loss", "name"}
    assert "tracker_failures" not in summary


def test_a_tracker_that_fails_is_named_once_and_counted_and_the_run_is_the_same(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(public, tmp_path / "without")
    made = noted(monkeypatch, "row", "finish")
    start(public, tmp_path / "with", "--set", "run.trackers=['mlflow']", "--rounds", "5")
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "the tracker mlflow failed, and the run goes on: OSError: no room"
    ]
    summary = json.loads((tmp_path / "with" / "summary.json").read_text())
    assert (summary["status"], summary["tracker_failures"]) == ("done", {"mlflow": 6})  # five rows and the end
    assert [name for name, *_ in made[0].calls] == ["begin", "row", "row", "row", "finish"]  # it gets no more rows
    same = [[row[key] for key in ("train_loss", "accuracy", "uplink_bytes")] for row in read_metrics(tmp_path / "with")[:3]]
    assert same == [[row[key] for key in ("train_loss", "accuracy", "uplink_bytes")] for row in read_metrics(tmp_path / "without")]
    environments = [json.loads((tmp_path / name / "environment.json").read_text())["run"] for name in ("with", "without")]
    assert environments[0] == environments[1]


def test_one_that_cannot_be_opened_is_not_called_again_and_the_others_are() -> None:
    closed, opened = Noted(Path(), "", ("begin",)), Noted(Path(), "")
    trackers = Trackers({"closed": closed, "opened": opened})
    trackers.begin({})
    trackers.row(1, {"loss": 1.0})
    trackers.finish({}, "done")
    trackers.finish({}, "failed")
    assert [name for name, *_ in closed.calls] == ["begin"]
    assert [(name, last) for name, _, last in opened.calls] == [("begin", ""), ("row", {"loss": 1.0}), ("finish", "done")]
    assert trackers.failures == {"closed": 3}


def test_a_run_that_does_not_end_in_order_is_closed_as_failed(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = noted(monkeypatch)
    RunFolder(tmp_path / "run", read_experiment(vision, ["run.trackers=['mlflow']"])).close()
    assert made[0].calls[-1] == ("finish", {}, "failed")


def test_a_tracker_that_is_not_installed_is_refused_before_a_folder_is_made(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.trackers.installed", lambda name: name != "wandb")
    status, output = run("run", vision, "--out", tmp_path / "run", "--set", "run.trackers=['wandb']")
    assert (status, "pip install 'fedclip[wandb]'" in output) == (2, True), output
    assert not (tmp_path / "run").exists()
    status, output = run("run", vision, "--set", "run.trackers=['comet']")
    assert (status, "run.trackers.0" in output) == (2, True), output


def test_a_bare_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offline_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("offline_runs")
    assert installed("json")
    assert {*EXTRAS} == {"mlflow", "wandb"}


def test_without_time_the_points_of_mlflow_have_their_round_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setitem(sys.modules, "mlflow.entities", SimpleNamespace(Metric=lambda *said: told.append(said)))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(entities=sys.modules["mlflow.entities"]))
    for timed in (False, True):
        tracker = MlFlow(tmp_path, "small", timed)
        tracker._client = SimpleNamespace(log_batch=lambda run, metrics: None)
        tracker.row(7, {"wer": 0.5})
    assert told[0] == ("wer", 0.5, 7, 7)
    assert told[1][2] > 1e12


@pytest.mark.skipif(not installed("mlflow"), reason="the extra mlflow is not installed")
def test_mlflow_has_the_run_in_its_folder_and_goes_on_with_it(public: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    out = tmp_path / "run"
    start(public, out, "--set", "run.trackers=['mlflow']")
    status, output = run("run", "--resume", out, "--rounds", "4")
    assert status == 0, output
    rows, summary = read_metrics(out), json.loads((out / "summary.json").read_text())
    assert "tracker_failures" not in summary
    client = MlflowClient(tracking_uri=(out / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("small")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_id == (out / "mlflow.id").read_text().strip()
    assert (found.info.status, found.info.run_name, found.data.tags["status"]) == ("FINISHED", "run", "done")
    assert found.data.params["local.lr"] == "0.1"
    assert (found.data.params["run.rounds"], found.data.tags["run.rounds"]) == ("3", "4")
    assert found.data.metrics["uplink_bytes_total"] == summary["uplink_bytes_total"]
    for name in numbers(rows[-1]):
        points = [(p.step, p.value) for p in client.get_metric_history(found.info.run_id, name)]
        assert points == [(row["round"], row[name]) for row in rows], name


def records(log: bytes) -> Iterator[bytes]:
    """Yield the records of an offline run: a log of LevelDB's, in blocks of 32 KiB, after a header of seven bytes."""
    at, parts = 7, b""
    while at + 7 <= len(log):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)
        parts += log[at + 7 : at + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
        at += 7 + length


def whole(file: Path) -> list[Any]:
    """Return the records of an offline run up to its end, which the library's own process may write a little later."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(100):
        read = [Record.FromString(data) for data in records(file.read_bytes())]
        if any(record.HasField("exit") for record in read):
            return read
        time.sleep(0.1)
    raise AssertionError(f"{file} does not end")


@pytest.mark.skipif(not installed("wandb"), reason="the extra wandb is not installed")
def test_wandb_keeps_the_run_offline_and_goes_on_with_its_id(public: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    start(public, out, "--set", "run.trackers=['wandb']")
    status, output = run("run", "--resume", out, "--rounds", "4")
    assert status == 0, output
    assert "tracker_failures" not in json.loads((out / "summary.json").read_text())
    known = (out / "wandb.id").read_text().strip()
    parts = sorted((out / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(parts) == 2
    histories, names = [], set()
    for part in parts:
        for record in whole(part):
            names |= {(record.run.project, record.run.display_name)} if record.HasField("run") else set()
            if record.HasField("history"):
                histories.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert names == {("small", "run")}
    rows = read_metrics(out)
    assert [h["round"] for h in histories] == [1, 2, 3, 4]
    for row, history in zip(rows, histories, strict=True):
        assert numbers(row).items() <= history.items()
        assert {*history} - {*row} <= {"_step", "_runtime", "_timestamp"}
    metadata = [path.name for path in (out / "wandb").rglob("files/*")]
    assert not {*metadata} & {"wandb-metadata.json", "output.log", "requirements.txt"}
