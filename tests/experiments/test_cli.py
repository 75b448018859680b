"""The command line as a person meets it: results, refusals, failures and interruptions, each with its exit status."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.report.page import data_of
from fedclip.model_file import load_model

runner = CliRunner()


def run(*arguments: str | Path) -> tuple[int, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def quick(vision: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(vision), "--out", str(out), "--set", "run.engine=process", *more]


def test_a_run_leaves_the_folder_that_is_documented(vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, output = run(*quick(vision, out))
    assert status == 0, output
    assert "3/3" in output
    assert "accuracy" in output
    names = {p.name for p in out.iterdir()}
    files = {"config.toml", "environment.json", "metrics.jsonl", "summary.json", "heartbeat.json", "ledger.jsonl", "curves.png", ".lock"}
    assert names == files | {"checkpoints", "tensorboard", "report.html"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rows] == [1, 2, 3]
    expected = {
        "round",
        "attempt",
        "train_loss",
        "users",
        "failed_users",
        "uplink_bytes",
        "downlink_bytes",
        "users_per_second",
        "round_seconds",
    }
    assert all(expected <= r.keys() for r in rows)
    assert ["accuracy" in r for r in rows] == [False, True, True]
    summary = json.loads((out / "summary.json").read_text())
    (shown,) = data_of((out / "report.html").read_text(encoding="utf-8"))["runs"]
    assert (shown["status"], shown["results"]["rate"], shown["stamps"][0]) == ("done", summary["accuracy"], "private")
    assert f"report: {out / 'report.html'}" in output
    assert summary["status"] == "done"
    assert summary["rounds"] == 3
    assert summary["uplink_bytes_total"] == sum(r["uplink_bytes"] for r in rows)
    assert summary["users_total"] == sum(r["users"] for r in rows)
    # Every user's dense update is 20 bytes of header and 4 a parameter.
    assert summary["uplink_bytes_total"] == summary["users_total"] * (20 + 4 * summary["parameters"])
    assert json.loads((out / "environment.json").read_text())["seed"] == 1
    page = (Path(__file__).parents[2] / "docs" / "run-folder.md").read_text(encoding="utf-8")
    assert [key for key in {*summary, *(key for row in rows for key in row)} if f"`{key}`" not in page] == []


def test_a_page_that_cannot_be_made_is_said_and_fails_no_run(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(_: object) -> str:
        raise RuntimeError("no such figure")

    monkeypatch.setattr("experiments.report.command.render", fault)
    status, output = run(*quick(vision, tmp_path / "run", "--rounds", "1", "--quiet"))
    assert (status, json.loads((tmp_path / "run/summary.json").read_text())["status"]) == (0, "done")
    assert f"report.html was not made (RuntimeError: no such figure); fedclip report {tmp_path / 'run'} makes it" in output


def test_the_resolved_configuration_runs_again_to_the_same_model(vision: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*quick(vision, first, "--set", "local.lr=0.05"))[0] == 0
    assert run("run", first / "config.toml", "--out", second, "--quiet")[0] == 0
    models = [load_model(p / "checkpoints" / "model.safetensors")[1] for p in (first, second)]
    assert all((models[0][n] == models[1][n]).all() for n in models[0])
    environments = [json.loads((p / "environment.json").read_text())["run"] for p in (first, second)]
    assert environments[0] == environments[1]


def test_evaluate_gives_what_the_run_measured(vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*quick(vision, out))[0] == 0
    summary = json.loads((out / "summary.json").read_text())
    for model in (out, out / "checkpoints" / "model.safetensors"):
        status, output = run("evaluate", model, "--json")
        assert status == 0, output
        assert json.loads(output)["accuracy"] == summary["accuracy"]
    status, output = run("evaluate", out)
    assert status == 0
    assert "95% interval" in output


def test_train_central_takes_the_same_batches_as_a_run(door: Path, tmp_path: Path) -> None:
    def batches(command: str) -> list[str]:
        log = tmp_path / "batches.log"  # the same name for both: it is part of what names the run
        log.unlink(missing_ok=True)
        options = ["--set", f"task.arguments.log='{log}'", "--set", "run.engine=process", "--set", "evaluation.every=0"]
        status, output = run(command, door, "--out", tmp_path / command, "--rounds", "2", *options)
        assert status == 0, output
        return log.read_text().splitlines()

    federated = batches("run")
    assert len(federated) > 10
    assert batches("train-central") == federated


def test_train_central_learns_and_claims_no_bytes(vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "central"
    status, output = run("train-central", vision, "--out", out, "--set", "central.lr=0.01", "--rounds", "20")
    assert status == 0, output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["accuracy"] > 0.8
    assert summary["uplink_bytes_total"] == summary["downlink_bytes_total"] == 0
    assert "privacy" not in summary


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "local.stpes=3"], ["local.stpes: unknown key (its value is 3)", "Did you mean 'steps'?"]),
        (["--set", "strategy.max_nrom=3"], ["strategy.max_nrom: unknown key", "Did you mean 'max_norm'?"]),
        (["--set", "strategy.max_norm=-1"], ["strategy.max_norm: input should be greater than 0; got -1."]),
        (["--set", "run.engine=rya"], ["run.engine: input should be 'ray' or 'process'; got 'rya'."]),
        (["--set", "task.name=visoin"], ["task.name: 'visoin' is no known task", "Did you mean 'vision'?"]),
        (["--set", "strategy.method=fedavgg"], ["strategy.method: 'fedavgg' is no known method", "Did you mean 'fedavg'?"]),
        (["--set", "sampler.cohort=61"], ["sampler.cohort: expected at most population.size = 60, got 61."]),
        (["--set", "local.momentum=0.9"], ["Momentum on both sides of the same tensors", "lamb"]),
        (["--set", "population.size=100000"], ["population.size: expected at most 1438 users"]),
        (["--seed", "-1"], ["run.seed: input should be greater than or equal to 0; got -1."]),
        (["--set", "run.device=cuda"], ["run.device: 'cuda' is not there"]),
        (["--rounds", "0"], ["run.rounds: input should be greater than or equal to 1; got 0."]),
        (["--data-dir", "/nowhere/at/all"], ["No such data folder: /nowhere/at/all"]),
        (["--set", "task.name=missing.py:make"], ["No such file", "missing.py"]),
        (["--set", "nonsense"], ["Expected --set section.key=value, got 'nonsense'."]),
    ],
)
def test_bad_input_is_one_clear_message_status_2_and_no_folder(vision: Path, tmp_path: Path, arguments: list[str], said: list[str]) -> None:
    out = tmp_path / "run"
    status, output = run(*quick(vision, out, *arguments))
    assert status == 2, output
    for words in said:
        assert words in output
    assert "Traceback" not in output
    assert not out.exists()


def test_a_missing_or_broken_file_is_refused(tmp_path: Path) -> None:
    status, output = run("run", tmp_path / "none.toml")
    assert (status, "No such experiment file" in output) == (2, True)
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n", encoding="utf-8")
    status, output = run("run", broken)
    assert (status, "is not TOML" in output) == (2, True)


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(*quick(vision, out))[0] == 0
    before = (out / "metrics.jsonl").read_bytes()
    status, output = run(*quick(vision, out))
    assert (status, "already holds a run" in output) == (2, True)
    assert (out / "metrics.jsonl").read_bytes() == before


DOOR = """
import numpy as np
from fedclip.tasks.vision import build_vision
from fedclip.tasks.vision_options import VisionOptions


class Failing:
    def __init__(self, task, share, log, unfit):
        self.task, self.share, self.log, self.unfit = task, share, log, unfit

    def __getattr__(self, name):
        return getattr(self.task, name)

    def load_user(self, user, rng):
        if user % 100 < 100 * self.share:
            raise OSError(f"disk of user {user} is gone")
        return self.task.load_user(user, rng)


    def loss(self, model, batch):
        if self.log:
            with open(self.log, "a") as file:
                print(float(batch[0].sum()), batch[1].tolist(), file=file)
        return self.task.loss(model, batch)

    def make_model(self):
        if self.unfit == "model":
            raise RuntimeError("no model today")
        return self.task.make_model()

    def evaluate(self, model, unit):
        if self.unfit == "evaluate":
            raise RuntimeError("cannot evaluate")
        return self.task.evaluate(model, unit)


def make(population, data_dir, seed, share=0.0, log="", unfit=""):
    if unfit == "constructor":
        raise RuntimeError("the constructor is broken")
    if unfit == "nothing":
        return None
    return Failing(build_vision(VisionOptions(name="vision"), population=population, seed=seed), share, log, unfit)
"""


@pytest.fixture
def door(tmp_path: Path, vision: Path) -> Path:
    """Return an experiment whose task comes from a file of the user's own."""
    (tmp_path / "own.py").write_text(DOOR, encoding="utf-8")
    text = vision.read_text(encoding="utf-8").replace('name = "vision"', f'name = "{tmp_path}/own.py:make"')
    path = tmp_path / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_task_of_ones_own_runs(door: Path, tmp_path: Path) -> None:
    status, output = run(*quick(door, tmp_path / "run"))
    assert status == 0, output
    assert "accuracy" in output


@pytest.mark.usefixtures("ray_session")
def test_a_task_of_ones_own_runs_on_ray_from_its_relative_path(door: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "bob's run"
    status, output = run("run", door, "--out", out, "--set", "task.name=own.py:make", "--workers", "2", "--rounds", "1")
    assert status == 0, output
    assert (out / "summary.json").exists()


@pytest.mark.parametrize(
    ("unfit", "said"),
    [
        ("constructor", "own.py:make' raised when it was built: RuntimeError: the constructor is broken."),
        ("nothing", "own.py:make' gives no task to run: AttributeError"),
        ("model", "own.py:make' gives no task to run: RuntimeError: no model today."),
    ],
)
def test_a_task_that_cannot_be_built_is_bad_input(door: Path, tmp_path: Path, unfit: str, said: str) -> None:
    status, output = run(*quick(door, tmp_path / "run", "--set", f"task.arguments.unfit={unfit}"))
    assert status == 2
    assert said in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_raises_ends_the_run_in_order(door: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, output = run(*quick(door, out, "--set", "task.arguments.unfit=evaluate"))
    summary = json.loads((out / "summary.json").read_text())
    assert (status, summary["status"], summary["rounds"]) == (1, "failed", 2)
    assert "RuntimeError: cannot evaluate" in output
    assert "cannot evaluate" in (out / "traceback.txt").read_text()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


def test_few_failing_users_are_zeros_and_counted(door: Path, tmp_path: Path) -> None:
    status, output = run(*quick(door, tmp_path / "run", "--rounds", "6", "--set", "task.arguments.share=0.04"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert status == 0, output
    assert 0 < summary["failed_users_total"] < 10
    assert "each counted as zero" in output
    assert "is gone" in output


def test_too_many_failing_users_stop_a_run_without_noise(door: Path, tmp_path: Path) -> None:
    text = door.read_text(encoding="utf-8").replace("noise_multiplier = 0.05", "")
    door.write_text(text, encoding="utf-8")
    status, _ = run(*quick(door, tmp_path / "run", "--rounds", "50", "--set", "task.arguments.share=0.5"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert status == 1
    assert summary["status"] == "too many users failed"
    assert summary["failed_users_total"] >= 10
    assert summary["rounds"] < 50
    assert (tmp_path / "run" / "checkpoints" / "model.safetensors").exists()


def test_too_many_failing_users_never_stop_a_run_under_noise(door: Path, tmp_path: Path) -> None:
    status, _ = run(*quick(door, tmp_path / "run", "--rounds", "6", "--set", "task.arguments.share=0.9"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (status, summary["status"], summary["rounds"]) == (1, "too many users failed", 6)


def test_ctrl_c_keeps_what_is_done(vision: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A shell starts what runs in the background with Ctrl-C ignored, and the tests may run there.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from experiments.cli import main; main()"
    command = [sys.executable, "-c", code, *quick(vision, out, "--rounds", "100000")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "metrics.jsonl").exists():
        time.sleep(0.2)
    time.sleep(2)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    summary = json.loads((out / "summary.json").read_text())
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert summary["status"] == "interrupted"
    assert summary["rounds"] == len(rows) > 0
    assert load_model(out / "checkpoints" / "model.safetensors")[0].run.name == "small"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["run", "none.toml"], ["evaluate", "--help"]])
def test_help_and_mistakes_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom experiments.cli import app\ntry:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", ["run", "train-central", "evaluate"])
def test_every_help_shows_an_example(command: str) -> None:
    status, output = run(command, "--help")
    assert status == 0
    assert f"fedclip {command}" in output


def broken(*arguments: object, **more: object) -> None:
    raise ValueError("no font")


def test_a_picture_that_cannot_be_drawn_fails_no_run(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.run.draw_curves", broken)
    status, output = run(*quick(vision, tmp_path / "run"))
    assert (status, "curves.png was not made (ValueError: no font)" in output) == (0, True), output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "done"


def test_a_last_model_that_cannot_be_written_leaves_a_summary_that_says_so(
    vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.folder.RunFolder.save_model", broken)
    status, _ = run(*quick(vision, tmp_path / "run", "--rounds", "1"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (status, summary["status"]) == (1, "failed")
    assert "no font" in summary["error"]
