"""`flwr run .` on Flower's own engine, offline: the bits of one process, and a bundle with nothing in it that does not belong there."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.prepare import prepare, read_experiment
from fedclip.model_file import load_model
from fedclip.simulation import InProcess
from strategies.naming import run_digest

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 240


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return an environment in which Flower keeps to a folder and a port of its own, and end its daemon afterwards."""
    home = tmp_path_factory.mktemp("flower")
    port, control = _free_port(), _free_port()
    off = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
    on = ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION")
    environment = dict(os.environ) | dict.fromkeys(off, "0") | dict.fromkeys(on, "1")
    environment |= {"FLWR_HOME": str(home), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port), "FLWR_LOCAL_CONTROL_API_PORT": str(control)}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    yield environment
    for pid in _daemons(str(home), port):
        os.kill(pid, signal.SIGTERM)


def _daemons(home: str, port: int) -> list[int]:
    """Return the processes that `flwr run` left behind for this test: those with its port, or its folder in their environment."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
            surroundings = (folder / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "superlink" in command and (str(port) in command or f"FLWR_HOME={home}" in surroundings):
            pids.append(int(folder.name))
    return pids


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the daemon that it has to end by /proc")
def test_flwr_run_gives_the_bits_of_one_process(flower: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = f'experiment="vision.toml" rounds=3 out="{out}"'
    resources = "num-supernodes=2 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = [str(BIN / "flwr"), "run", str(PROJECT), "--stream", "--run-config", config, "--federation-config", resources]
    # Started elsewhere, so that what runs is the bundle.
    result = subprocess.run(command, env=flower, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    deadline = time.monotonic() + 30
    while not (out / "summary.json").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert (out / "summary.json").exists(), result.stdout + result.stderr
    assert json.loads((out / "summary.json").read_text())["status"] == "done"
    prepared = prepare(read_experiment(PROJECT / "experiments" / "vision.toml", ["run.rounds=3"]))
    engine = InProcess(prepared.method, prepared.task, "seed:1", run_digest(prepared.experiment))
    for _ in range(3):
        engine.round()
    _, tensors = load_model(out / "checkpoints" / "model.safetensors")
    expected = zip(engine.layout.names, engine.layout.shapes, engine.layout.split(engine.state.params), strict=True)
    assert all(torch.equal(tensors[name], values.view(shape)) for name, shape, values in expected)


def test_the_bundle_holds_the_packages_and_nothing_else(flower: dict[str, str], tmp_path: Path) -> None:
    result = subprocess.run(
        [str(BIN / "flwr"), "build", "--app", str(PROJECT)], env=flower, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    bundles = [*tmp_path.glob("*.fab"), *PROJECT.glob("*.fab")]
    assert len(bundles) == 1, result.stdout + result.stderr
    try:
        assert bundles[0].stat().st_size < 10 * 2**20
        names = zipfile.ZipFile(bundles[0]).namelist()
    finally:
        bundles[0].unlink()
    assert {"clients/app.py", "experiments/server_app.py", "experiments/vision.toml", "fedclip/asr/model.py", "LICENSE"} <= set(names)
    tops = {n.split("/")[0] for n in names}
    assert not tops & {"tests", "docs", "runs", ".venv"}
    assert not [n for n in names if n.endswith((".wav", ".flac")) or Path(n).name.startswith("test_")]
