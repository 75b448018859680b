"""Runs on images in idx files, by the real command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from tests.idx_folder import write_idx_folder

runner = CliRunner()


def run(*arguments: str | Path) -> tuple[int, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture
def images(vision: Path) -> Path:
    """Return the file of a small experiment on idx files; its folder has to be given."""
    text = vision.read_text(encoding="utf-8").replace('name = "vision"', 'name = "vision"\ndata = "idx"\nchannels = 4\nhidden = 8')
    vision.write_text(text.replace("size = 60", "size = 20").replace("rounds = 3", "rounds = 2"), encoding="utf-8")
    return vision


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the four files, gzipped."""
    path = tmp_path / "images"
    path.mkdir()
    return write_idx_folder(path, train=120, test=40, zipped=True)


def quick(images: Path, out: Path, *more: str | Path) -> list[str | Path]:
    return ["run", images, "--out", out, "--set", "run.engine=process", *more]


def test_a_run_on_idx_files_and_its_evaluation(images: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, output = run(*quick(images, out, "--data-dir", folder))
    assert status == 0, output
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["status"], summary["rounds"]) == ("done", 2)
    # On 8 x 8: (9 + 1) * 4, (4 * 9 + 1) * 8, (8 * 2 * 2 + 1) * 8 and (8 + 1) * 10.
    assert summary["parameters"] == 40 + 296 + 264 + 90
    assert 0 <= summary["accuracy_low"] <= summary["accuracy"] <= summary["accuracy_high"] <= 1
    for more in ([], ["--data-dir", str(folder)]):
        status, output = run("evaluate", out, "--json", *more)
        assert status == 0, output
        assert json.loads(output)["accuracy"] == summary["accuracy"]


def test_a_run_of_the_resnet(images: Path, folder: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "run", images.read_text(encoding="utf-8")
    images.write_text(text.replace("channels = 4\nhidden = 8", 'model = "resnet18"'), encoding="utf-8")
    smaller = ["--set", "sampler.cohort=2", "--set", "local.steps=1", "--set", "evaluation.every=0"]
    status, output = run(*quick(images, out, "--data-dir", folder, *smaller))
    assert status == 0, output
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["rounds"], summary["parameters"]) == (2, 11_172_810)


def damage(folder: Path, kind: str) -> str:
    """Spoil a folder of idx files; return what has to be said."""
    labels, pixels = folder / "train-labels-idx1-ubyte.gz", folder / "t10k-images-idx3-ubyte.gz"
    if kind == "missing":
        labels.unlink()
        return "There is no train-labels-idx1-ubyte in"
    if kind == "cut off":
        pixels.write_bytes(pixels.read_bytes()[:-20])
        return "is damaged gzip"
    pixels.write_bytes(labels.read_bytes())
    return "expected 3 dimensions, got 1"


@pytest.mark.parametrize("kind", ["missing", "cut off", "swapped"])
def test_missing_and_damaged_files_are_one_clear_message_and_status_2(images: Path, folder: Path, tmp_path: Path, kind: str) -> None:
    said, out = damage(folder, kind), tmp_path / "run"
    status, output = run(*quick(images, out, "--data-dir", folder))
    assert status == 2, output
    assert said in output
    assert "Traceback" not in output
    assert not out.exists()


def test_no_folder_is_status_2(images: Path, tmp_path: Path) -> None:
    status, output = run(*quick(images, tmp_path / "run"))
    assert (status, "run.data_dir is not set" in output) == (2, True), output
