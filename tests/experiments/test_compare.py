"""Runs compared by what they sent until they were as good as the first one."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app

runner = CliRunner()


def folder(path: Path, errors: dict[int, float], up: int, down: int, metric: str = "wer") -> Path:
    """Return a run folder of as many rounds as the last evaluation says."""
    path.mkdir()
    rows = []
    for number in range(1, max(errors, default=3) + 1):
        row = {"round": number, "uplink_bytes": up, "downlink_bytes": down}
        if number in errors:
            value = errors[number]
            row |= {metric: value, f"{metric}_low": value - 0.01, f"{metric}_high": value + 0.02}
        rows.append(json.dumps(row))
    (path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(app, ["compare", *map(str, arguments)])
    return result.exit_code, result.output


def test_bytes_are_counted_both_ways_up_to_the_first_evaluation_that_is_good_enough(tmp_path: Path) -> None:
    dense = folder(tmp_path / "dense", {2: 0.5, 4: 0.11, 6: 0.10}, 1000, 1000)
    thin = folder(tmp_path / "thin", {2: 0.6, 4: 0.3, 6: 0.105, 8: 0.2}, 10, 40)
    poor = folder(tmp_path / "poor", {4: 0.3, 6: 0.2}, 1, 1)
    status, output = run(dense, thin, poor, "--json")
    assert status == 0, output
    found = json.loads(output)
    assert found["target"] == pytest.approx(0.11)
    first, second, third = found["runs"]
    assert (first["rounds_to_target"], first["bytes_to_target"], first["times_less"]) == (4, 8000, 1.0)
    assert (second["rounds_to_target"], second["bytes_to_target"]) == (6, 300)
    assert second["times_less"] == pytest.approx(8000 / 300)
    assert (second["error"], second["best_error"], second["uplink_bytes_total"]) == (0.2, 0.105, 80)
    assert (third["bytes_to_target"], third["best_error"]) == (None, 0.2)
    status, output = run(dense, thin, poor)
    assert status == 0
    assert "until WER 11.0%" in output
    assert "never" in output
    assert "26.7" in output


def test_accuracy_is_compared_by_its_errors_and_drawn(tmp_path: Path) -> None:
    runs = [folder(tmp_path / name, {1: 0.5, 3: end}, 10, 10, "accuracy") for name, end in (("a", 0.9), ("b", 0.95))]
    for ending in ("png", "svg"):
        status, output = run(*runs, "--plot", tmp_path / f"plot.{ending}")
        assert status == 0, output
        assert (tmp_path / f"plot.{ending}").stat().st_size > 1000
    found = json.loads(run(*runs, "--json")[1])["runs"]
    assert found[1]["error"] == pytest.approx(0.05)
    assert (found[1]["error_low"], found[1]["error_high"]) == (pytest.approx(0.03), pytest.approx(0.06))


def test_a_task_of_one_s_own_may_have_no_interval(tmp_path: Path) -> None:
    path = folder(tmp_path / "own", {1: 0.5, 2: 0.8}, 1, 1, "accuracy")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("accuracy_low", None), row.pop("accuracy_high", None)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads(run(path, "--json")[1])["runs"][0]
    assert found["error"] == found["error_low"] == found["error_high"] == pytest.approx(0.2)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    good = folder(tmp_path / "good", {1: 0.5}, 1, 1)
    for other, said in (
        (tmp_path / "none", "holds no run"),
        (folder(tmp_path / "blind", {}, 1, 1), "was never evaluated"),
        (folder(tmp_path / "images", {1: 0.5}, 1, 1, "accuracy"), "WER and error"),
    ):
        status, output = run(good, other)
        assert status == 2
        assert said in output
    status, output = run(good, "--plot", tmp_path / "plot.nothing")
    assert status == 2
    assert "--plot" in output
