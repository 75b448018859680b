"""What a run says of its bytes and of the room for states: totals are sums over rounds, ratios are against dense float32 both ways."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from experiments.cli import app

runner = CliRunner()
DGC = (
    "strategy={method='deep_gradient_compression', density=0.01, warmup=[[0.25, 1], [0.0625, 1]], grid='int8', max_norm=0.5}",
    "codec.name=packed",
    "downlink.stages=[{quantize={bits=8, block=256}}]",
    "sampler.cohort=60",
    "local.steps=1",
)


def run(vision: Path, out: Path, *more: str) -> tuple[int, str]:
    sets = [part for override in (*DGC, "run.engine=process", "evaluation.every=0", *more) for part in ("--set", override)]
    result = runner.invoke(app, ["run", str(vision), "--out", str(out), "--rounds", "4", *sets])
    return result.exit_code, " ".join(result.output.split())


def test_bytes_of_a_run_are_those_of_its_rounds(vision: Path, tmp_path: Path) -> None:
    status, output = run(vision, tmp_path / "run")
    assert status == 0, output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    up, down, users = (sum(row[key] for row in rows) for key in ("uplink_bytes", "downlink_bytes", "users"))
    dense = 4 * summary["parameters"]
    assert (summary["uplink_bytes_total"], summary["downlink_bytes_total"], users) == (up, down, 240)
    assert summary["uplink_bytes_per_user"] == pytest.approx(up / users)
    assert summary["downlink_bytes_per_user"] == pytest.approx(down / users)
    assert summary["uplink_ratio"] == pytest.approx(dense * users / up)
    assert summary["both_ways_ratio"] == pytest.approx(2 * dense * users / (up + down))
    assert summary["uplink_ratio_steady"] == pytest.approx(dense * rows[-1]["users"] / rows[-1]["uplink_bytes"])
    assert summary["uplink_ratio_steady"] > 1.5 * summary["uplink_ratio"], "the warm-up counts"
    assert summary["participations_per_user"] == 4
    assert f"up alone {summary['uplink_ratio']:.4g} (steady state {summary['uplink_ratio_steady']:.4g})" in output
    assert "each user took part 4 times" in output


def test_the_room_for_states_is_said_before_and_half_of_it_with_half_precision(vision: Path, tmp_path: Path) -> None:
    said = {}
    for precision in ("float32", "float16"):
        status, output = run(vision, tmp_path / precision, f"states.precision={precision}")
        assert status == 0, output
        said[precision] = output
        on_disk = [p.stat().st_size for p in (tmp_path / precision).rglob("*.state")]
        assert len(on_disk) == 60 * 3
        parameters = json.loads((tmp_path / precision / "summary.json").read_text())["parameters"]
        each = 2 * parameters * (4 if precision == "float32" else 2)
        assert all(each < size < each + 1000 for size in on_disk)
    assert "of about 60 users who take part 4 times" in said["float32"]
    models = [json.loads((tmp_path / p / "summary.json").read_text())["train_loss"] for p in said]
    assert models[0] != models[1]
    assert models[0] == pytest.approx(models[1], rel=0.02)


def test_states_that_do_not_fit_are_refused_before_anything_is_made(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    status, output = run(vision, tmp_path / "run")
    assert status == 2
    assert "1.0 kB free; set states.precision = 'float16'" in output
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_gone_on_with_has_its_states_already(vision: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(vision, tmp_path / "run")[0] == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = runner.invoke(app, ["run", "--resume", str(tmp_path / "run"), "--rounds", "5"])
    assert result.exit_code == 0, result.output
