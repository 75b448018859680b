"""`fedclip bench`: it measures, says what it is documented to say, and refuses what it cannot measure."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from experiments.bench import ROUNDINGS, wire_costs
from experiments.cli import app

LAYERS = "decode, guard by layer and fold float16"
PAGE = Path(__file__).parents[2] / "docs" / "wire.md"


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "wire", *arguments])
    return result.exit_code, result.output


def test_json_has_what_is_documented() -> None:
    threads = torch.get_num_threads()
    status, output = bench("--size", "20000", "--density", "0.01", "--json")
    assert status == 0, output
    assert torch.get_num_threads() == threads
    said = json.loads(output)
    assert (said["size"], said["density"], said["kept"]) == (20_000, 0.01, 200)
    stages = [f"{step} {name}" for step in ("encode", "select and encode", "decode", "decode, guard and fold") for name in ROUNDINGS]
    assert set(said["steps"]) == {"copyto", "select", "guard clip_by_global_norm", "guard clip_per_layer", "fold", LAYERS, *stages}
    page = PAGE.read_text(encoding="utf-8")
    for name, step in said["steps"].items():
        payload = {"bytes", "times_smaller"} if name in [f"encode {n}" for n in ROUNDINGS] else set()
        assert step.keys() == {"ms", "times_copyto"} | payload
        assert all(number > 0 for number in step.values())
        assert set(said) | set(step) <= set(re.findall(r"`(\w+)`", page))
    sizes = [said["steps"][f"encode {name}"]["bytes"] for name in ("float32", "float16")]
    assert sizes[0] > sizes[1] > 2 * 200


@pytest.mark.parametrize("size", ["1", "99", "101"])
def test_small_and_uneven_sizes(size: str) -> None:
    status, output = bench("--size", size, "--density", "1")
    assert status == 0, output
    assert all(word in output for word in ("copyto", "select and encode float16", "decode, guard and fold int8"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--size", "0"], "--size: expected 1 to 1000000000, got 0"),
        (["--size", "-5"], "--size: expected 1 to 1000000000, got -5"),
        (["--size", "1000000001"], "got 1000000001"),
        (["--density", "0"], "--density: Expected 0 < density <= 1, got 0.0"),
        (["--density", "2"], "--density: Expected 0 < density <= 1, got 2.0"),
        (["--density", "nan"], "--density: Expected 0 < density <= 1, got nan"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    status, output = bench(*arguments)
    assert (status, output.count("\n")) == (2, 1)
    assert said in output


def test_help_shows_an_example() -> None:
    status, output = bench("--help")
    assert status == 0
    assert "fedclip bench wire" in output


@pytest.mark.slow
def test_an_upload_of_a_thousandth_of_ten_million_costs_a_few_copies() -> None:
    runs = [wire_costs(10**7, 0.001)[1] for _ in range(3)]
    limits = {"select and encode float16": 2.5, "decode, guard and fold float16": 0.3, "decode, guard by layer and fold float16": 0.3}
    for name, most in limits.items():
        ratios = [costs[name].seconds / costs["copyto"].seconds for costs in runs]
        print(f"{name}: {', '.join(f'{r:.3f}' for r in ratios)} times a copy, at most {most}")
        assert statistics.median(ratios) <= most
