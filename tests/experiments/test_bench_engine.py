"""`fedclip bench engine`: all contestants do the same work, in turns, and the figures follow from what they say."""

import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from experiments.bench_engine import KINDS, STAGES, Kind, Times, parts_of
from experiments.cli import app
from experiments.contestants import workload
from experiments.contestants.process import Contestant, Setting, session_seconds
from experiments.contestants.task import ImagesTask
from fedclip.local import LocalSGD
from fedclip.replica import Replica

PAGE = Path(__file__).parents[2] / "docs" / "bench.md"


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "engine", *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(("name", "size"), [("mlp", 216_894), ("cnn200k", 185_810), ("cnn1m2", 1_206_590)])
def test_the_engine_and_the_bare_loop_make_the_same_update(name: str, size: int) -> None:
    task, rng = ImagesTask(name, 100), np.random.default_rng(1)
    replica = Replica(task.make_model())
    start = replica.params.clone()
    assert len(start) == size
    examples = task.load_user(7, rng)
    assert len(examples) == workload.SAMPLES
    LocalSGD(lr=workload.LR, epochs=1, batch_size=workload.BATCH).train(replica, task, examples, rng)
    moved = replica.params - start
    expected = moved * min(1.0, workload.CLIP / float(moved.norm()))
    model = workload.make_model(name)
    parts = workload.train_user(model, [p.detach().clone() for p in model.parameters()], 7)
    bare = torch.cat([p.flatten() for p in parts])
    assert float(bare.norm()) > 0.01
    torch.testing.assert_close(bare, expected, rtol=1e-4, atol=1e-6)


def test_the_command_times_both_in_turns_and_says_what_is_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "pfl", Kind("pfl_sim", package="no_such_package"))
    options = ("--model", "mlp", "--cohort", "8", "--population", "500", "--rounds", "2", "--workers", "1", "--peers", "bare,pfl", "--json")
    status, output = bench(*options)
    assert status == 0, output
    said = json.loads(output)
    assert (said["parameters"], said["population"], said["not_installed"]) == (216_894, 500, ["pfl"])
    assert list(said["contestants"]) == ["fedclip", "bare"]
    assert all(len(c["rates"]) == 2 and min(c["rates"]) > 0 for c in said["contestants"].values())
    ours, bare = said["contestants"]["fedclip"], said["contestants"]["bare"]
    assert bare["ratio"] == ours["users_per_second"] / bare["users_per_second"]
    assert bare["ratio_low"] <= bare["ratio"] <= bare["ratio_high"]
    assert said["parts"].keys() == STAGES.keys()
    assert min(said["parts"][name] for name in ("train", "clip", "accounting")) > 0
    assert sum(said["parts"].values()) < 1.5  # reading and adding go on while training does
    assert {*said, *ours, *bare} <= set(re.findall(r"`(\w+)`", PAGE.read_text(encoding="utf-8")))


BUSY = r"""
import json, os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", f"import os\nwhile os.getppid() == {os.getpid()}: pass"])
print(json.dumps({"session": os.getpid()}), flush=True)
for round, _ in enumerate(sys.stdin, 1):
    time.sleep(0.2)
    print(json.dumps({"round": round}), flush=True)
"""


def test_who_waits_for_a_turn_stands_still_with_all_that_it_started(tmp_path: Path) -> None:
    with Contestant("busy", [sys.executable, "-c", BUSY], Setting("mlp", 1, 1, 1, "cpu"), tmp_path) as busy:
        session = busy.described["session"]
        before = session_seconds(session)
        time.sleep(0.3)
        assert session_seconds(session) == before
        busy.turn(2)
        assert [answer["round"] for answer in busy.answers] == [2, 3]  # the first of a turn does not count
        assert min(answer["cpu_seconds"] for answer in busy.answers) > 0
        assert session_seconds(session) > before
    deadline = time.monotonic() + 10
    while session_seconds(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not session_seconds(session)  # they went on, and ended


def test_ratios_are_of_medians_and_their_interval_holds_rounds_together() -> None:
    ours, theirs = Times((10.0, 20.0, 30.0, 1000.0, 15.0)), Times((5.0, 10.0, 15.0, 500.0, 7.5))
    assert ours.ratio(theirs) == (2.0, 2.0, 2.0)  # what hits a round hits both
    ratio, low, high = ours.ratio(Times((10.0, 10.0, 10.0, 10.0, 10.0)))
    assert ratio == 2.0
    assert 1.0 <= low < 2.0 < high


def test_parts_of_what_workers_do_at_a_time_count_once() -> None:
    seconds = {key: 1.0 for key, _ in STAGES.values()}
    parts = parts_of([{"seconds": 10.0, "stages": seconds}], workers=2)
    assert (parts["train"], parts["server step"]) == (0.05, 0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cohort", "0"], "--cohort: expected 1 to 10000, the population, got 0"),
        (["--population", "50"], "--cohort: expected 1 to 50, the population, got 200"),
        (["--peers", "bare,nvflare"], "--peers: expected some of updates, bare"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    status, output = bench(*arguments)
    assert (status, output.count("\n")) == (2, 1)
    assert said in output


def test_a_contestant_that_ends_is_said() -> None:
    status, output = bench("--model", "mlp", "--cohort", "2", "--workers", "1", "--peers", "bare", "--device", "cuda:99")
    assert status == 2
    assert re.fullmatch(r"fedclip: bench engine: fedclip ended: .*cuda:99.*\n", output), output


@pytest.mark.slow
def test_two_workers_on_ray_in_both_reply_modes() -> None:
    status, output = bench("--model", "cnn200k", "--cohort", "50", "--rounds", "5", "--json")
    assert status == 0, output
    said = json.loads(output)["contestants"]
    assert {"fedclip", "updates", "bare"} <= said.keys()
    assert said["bare"]["ratio"] > 0.5


@pytest.mark.slow
def test_plain_flower_takes_turns() -> None:
    status, output = bench("--model", "mlp", "--cohort", "20", "--population", "50", "--rounds", "2", "--peers", "flower", "--json")
    assert status == 0, output
    assert len(json.loads(output)["contestants"]["flower"]["rates"]) == 2


@pytest.mark.slow
def test_the_plain_loop_for_speech_trains_the_same_users() -> None:
    options = ("--model", "asr", "--cohort", "4", "--rounds", "2", "--workers", "1", "--json")
    status, output = bench(*options)
    assert status == 0, output
    said = json.loads(output)
    assert list(said["contestants"]) == ["fedclip", "bare asr"]
    assert said["contestants"]["bare asr"]["users"] == said["contestants"]["fedclip"]["users"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pfl") is None, reason="pfl is not installed")
def test_pfl_takes_turns() -> None:
    status, output = bench("--model", "mlp", "--cohort", "20", "--population", "50", "--rounds", "2", "--peers", "pfl", "--json")
    assert status == 0, output
    assert len(json.loads(output)["contestants"]["pfl"]["rates"]) == 2
