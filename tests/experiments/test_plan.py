"""`fedclip plan` beside the runs that it plans."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from fedclip.process import peak_memory, resident_memory

LARGE = """
[run]
name = "large"
rounds = 2000

[task]
name = "asr"

[task.model]
dim = 768
layers = 36
heads = 4
mlp_dim = 3072
kernel = 7
stride = 3

[population]
size = 1_000_000

[sampler]
cohort = 1024

[local]
lr = 0.2
steps = 10
batch_size = 2

[strategy]
method = "pfl4asr"
max_norm = 0.01
"""


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def plan(*arguments: str | Path) -> dict[str, object]:
    status, output = invoke("plan", *arguments, "--json")
    assert status == 0, output
    return json.loads(output)


FIXED = ["--set", "sampler.name=fixed_size", "--set", 'task.partition={name="iid"}', "--set", "run.engine=process"]
"""Everybody has data, and cohorts have one size: bytes are known before."""


CONTROL = ["--set", "strategy={method='scaffold'}", "--set", "local={lr=0.1, steps=2}", "--set", "privacy={}"]


@pytest.mark.parametrize("method", [[], CONTROL], ids=["pfl4asr", "scaffold"])
def test_the_bytes_of_a_dense_run_are_known_to_the_byte(vision: Path, tmp_path: Path, method: list[str]) -> None:
    options = [*FIXED, *method]
    planned, guessed = plan(vision, *options), plan(vision, *options, "--no-measure")
    status, output = invoke("run", vision, *options, "--out", tmp_path / "run", "--quiet")
    assert status == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for found in (planned, guessed):
        assert found["bytes_are_exact"]
        for way in ("uplink", "downlink"):
            assert found[f"{way}_bytes_total"] == summary[f"{way}_bytes_total"]
            assert found[f"{way}_bytes_per_user"] == summary[f"{way}_bytes_per_user"]
        assert found["parameters"] == summary["parameters"]
    assert guessed["total_seconds"] is guessed["flops_total"] is guessed["measured"] is None
    assert planned["total_seconds"] > 0
    assert planned["flops_total"] == planned["flops_per_user"] * 9 * 3
    newest = max((tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    # Two newest checkpoints, the best, and one being written, and under noise a release; beside the vectors a file has a header.
    released = 0 if method else 4 * summary["parameters"]
    assert 0 <= newest.stat().st_size - (planned["disk_bytes"]["checkpoints"] - released) / 4 < 4096


def test_the_bytes_of_a_compressed_run_are_near(vision: Path, tmp_path: Path) -> None:
    client = "strategy={client=[{top_k={density=0.05}}, {quantize={bits=8}}], server=[{sgd={lr=1.0}}]}"
    options = [*FIXED, "--set", client, "--set", "privacy={}", "--set", "codec.name=packed"]
    options += ["--set", "downlink={stages=[{quantize={bits=8}}], differences=true}", "--rounds", "8"]
    status, output = invoke("run", vision, *options, "--out", tmp_path / "run", "--quiet")
    assert status == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    options = [*options[:-2], "--set", "run.rounds=8"]
    planned, guessed = plan(vision, *options), plan(vision, *options, "--no-measure")
    assert not planned["bytes_are_exact"]
    for way in ("uplink", "downlink"):
        assert planned[f"{way}_bytes_total"] == pytest.approx(summary[f"{way}_bytes_total"], rel=0.15)
        assert guessed[f"{way}_bytes_total"] == pytest.approx(summary[f"{way}_bytes_total"], rel=0.4)


def test_the_large_model_is_planned_without_its_weights(tmp_path: Path) -> None:
    file = tmp_path / "large.toml"
    file.write_text(LARGE, encoding="utf-8")
    peak, now = peak_memory(), resident_memory()
    found = plan(file, "--no-measure", "--workers", "8")
    d = 255_800_864
    assert (found["parameters"], found["tensors"], found["cohort"], found["workers"]) == (d, 296, 1024, 8)
    assert found["uplink_bytes_per_round"] == 1024 * (20 + 4 * d)
    assert found["memory"]["worker"]["count"] == 8
    assert found["memory"]["server"]["kept"]["moments of the server"] == 8 * d
    assert found["memory_bytes_total"] == sum(p["count"] * (p["peak_bytes"] + found["start_up_bytes"]) for p in found["memory"].values())
    assert peak_memory() <= max(peak, now + 2 * d)  # nothing of the model's size was allocated


def test_what_is_printed_says_what_it_assumes(vision: Path) -> None:
    status, output = invoke("plan", vision, "--cohort", "20", "--workers", "4")
    assert status == 0, output
    for words in (
        "4 Ray workers",
        "about 20 of 60 users",
        "memory of 4 x worker",
        "operations:",
        "bytes up (exact)",
        "every user is like user",
    ):
        assert words in output
    status, output = invoke("plan", vision, "--no-measure", "--set", "run.engine=process")
    assert status == 0, output
    assert "nothing was measured" in output
    assert "memory of process" in output


def test_bad_input_is_one_message_and_status_2(vision: Path) -> None:
    status, output = invoke("plan", vision, "--cohort", "61")
    assert (status, "sampler.cohort: expected at most population.size = 60, got 61" in output) == (2, True)
    status, output = invoke("plan", vision, "--set", "strategy.max_norm=-1")
    assert (status, "strategy.max_norm" in output) == (2, True)


RUN = """
import resource, sys, tempfile
from pathlib import Path
from torch.utils.tensorboard import SummaryWriter
import experiments.curves
from experiments.engines import open_engine
from experiments.live import Reporter
from experiments.prepare import prepare, read_experiment
from experiments.run import run_rounds

prepared = prepare(read_experiment(Path(sys.argv[1]), sys.argv[2:]), resume=True, weights=False)
start, out = prepared.startup_memory, Path(tempfile.mkdtemp()) / "run"
with Reporter(1, quiet=True) as reporter, open_engine(prepared, out) as engine:
    run_rounds(prepared, engine, out, reporter)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [[], ["strategy.method=fedavg", "strategy.max_norm=1.0", "privacy={}"]])
def test_memory_is_within_a_fifth_of_what_a_run_takes(vision: Path, tmp_path: Path, strategy: list[str]) -> None:
    options = ["run.engine=process", "run.rounds=2", "task.model=resnet18", "sampler.cohort=3", "evaluation.every=0", *strategy]
    if strategy:
        vision.write_text(vision.read_text(encoding="utf-8").replace("server_lr = 0.02", ""), encoding="utf-8")
    found = plan(vision, *(word for option in options for word in ("--set", option)))
    done = subprocess.run([sys.executable, "-c", RUN, str(vision), *options], check=True, capture_output=True, text=True)
    assert found["memory"]["process"]["peak_bytes"] == pytest.approx(int(done.stdout.splitlines()[-1]), rel=0.2)
