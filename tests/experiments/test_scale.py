"""What does not grow: start-up, rounds and memory with the population, memory with the cohort. `pytest -m slow -s` prints the figures."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.engines import Engine, OnGrid, open_engine
from experiments.prepare import Prepared, prepare, read_experiment
from tests.random_images import PARAMETERS

PROJECT = Path(__file__).parents[2]
TASK = PROJECT / "tests" / "random_images.py"

EXPERIMENT = f"""
[run]
name = "scale"
rounds = 2
[task]
name = "{TASK}:make"
arguments = {{ processes = 2 }}
[population]
size = 100_000_000
[sampler]
name = "fixed_size"
cohort = 100
[local]
lr = 0.05
epochs = 1
batch_size = 10
[strategy]
method = "fedavg"
max_norm = 1.0
[evaluation]
every = 0
"""

POPULATIONS = [10**n for n in range(3, 9)]
COHORTS = [100, 1_000, 10_000, 100_000]
REPETITIONS = 20
ENGINES = ("process", "ray")
WORKERS = 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scale.toml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Figures:
    """Of `fedclip run`: seconds until its first round, seconds of its last one, and the most memory of who led it and of a worker."""

    startup: float
    round: float
    driver: int
    worker: int


def figures_of_a_run(file: Path, engine: str, population: int, cohort: int, rounds: int) -> Figures:
    out = file.parent / f"{engine}-{population}-{cohort}-{time.time_ns()}"
    keys = {"run.engine": engine, "run.workers": WORKERS, "population.size": population, "sampler.cohort": cohort}
    changes = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "experiments.cli", "run", str(file), "--rounds", str(rounds), "--out", str(out), *changes]
    begin = time.time()
    done = subprocess.run(
        command, cwd=PROJECT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["parameters"], summary["users"], summary["failed_users_total"]) == (PARAMETERS, cohort, 0)
    startup = (out / "environment.json").stat().st_mtime - begin
    worker = int(summary["worker_peak_memory_bytes"])
    return Figures(startup, summary["round_seconds"], summary["peak_memory_bytes"], worker)


def slope(seconds: np.ndarray) -> tuple[float, float]:
    """The slope of times over log10 of the population, in parts of their mean, and the upper end of its 95% interval.

    Each row is one turn of all the populations, over its mean: what slowed the machine down in that turn slowed all of them.
    """
    parts = seconds / seconds.mean(axis=1, keepdims=True)
    decades = np.tile(np.log10(POPULATIONS), len(parts))
    line = stats.linregress(decades, parts.ravel())
    return line.slope, line.slope + stats.t(parts.size - 2).ppf(0.975) * line.stderr


def take_turns(steps: Sequence[Callable[[], object]]) -> np.ndarray:
    """The seconds of each step in each turn, after one that does not count; another step begins each turn."""
    seconds = np.zeros((REPETITIONS + 1, len(steps)))
    for turn in range(len(seconds)):
        for n in np.roll(np.arange(len(steps)), turn):
            begin = time.perf_counter()
            steps[n]()
            seconds[turn, n] = time.perf_counter() - begin
    return seconds[1:]


def show(title: str, rows: Sequence[str]) -> None:
    print(f"\n{title}", *rows, f"load average {os.getloadavg()[0]:.1f}", sep="\n  ")


def experiment_of(file: Path, engine: str, population: int) -> Prepared:
    return prepare(read_experiment(file, [f"run.engine={engine}", f"population.size={population}", f"run.workers={WORKERS}"]))


@contextmanager
def engines_of(file: Path, engine: str) -> Iterator[list[Engine]]:
    """An engine for each population; on Ray they share the workers, as there is no room for so many."""
    prepared = [experiment_of(file, engine, population) for population in POPULATIONS]
    if engine == "ray":
        from clients.ray_grid import RayGrid

        with closing(RayGrid("clients.app:app", nodes=WORKERS, workers=WORKERS)) as grid:
            yield [OnGrid(each, grid) for each in prepared]
    else:
        yield [open_engine(each).__enter__() for each in prepared]


def start_of(file: Path, population: int) -> Callable[[], object]:
    def start() -> None:
        """All from the file to the end of the first round's draw, but for the imports."""
        prepared = experiment_of(file, "process", population)
        with open_engine(prepared):
            prepared.method.sampler.draw(np.random.default_rng(population))

    return start


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_rounds_take_no_longer_with_more_users_to_draw_from(file: Path, engine: str) -> None:
    with engines_of(file, engine) as engines:
        seconds = take_turns([each.round for each in engines])
    rise, upper = slope(seconds)
    medians = [f"{k:>11,} users: {s:.3f} s" for k, s in zip(POPULATIONS, np.median(seconds, axis=0), strict=True)]
    show(f"rounds of 100 users, {engine}: {rise:+.2%} a decade, at most {upper:+.2%}", medians)
    assert upper < 0.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_starts_no_later_with_more_users(file: Path) -> None:
    seconds = take_turns([start_of(file, population) for population in POPULATIONS])
    rise, upper = slope(seconds)
    medians = [f"{k:>11,} users: {s:.4f} s" for k, s in zip(POPULATIONS, np.median(seconds, axis=0), strict=True)]
    show(f"start-up without imports: {rise:+.2%} a decade, at most {upper:+.2%}", medians)
    assert upper < 0.05


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_does_not_grow_with_the_population(file: Path, engine: str) -> None:
    figures = [figures_of_a_run(file, engine, population, 100, 2) for population in POPULATIONS]
    rows = [
        f"{k:>11,} users: start {f.startup:.1f} s, driver {f.driver / 1e6:.0f} MB, worker {f.worker / 1e6:.0f} MB"
        for k, f in zip(POPULATIONS, figures, strict=True)
    ]
    show(f"fedclip run, {engine}", rows)
    for peaks in ([f.driver for f in figures], [f.worker for f in figures]):
        assert max(peaks) < 1.05 * min(peaks)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("engine", ENGINES)
def test_memory_does_not_grow_with_the_cohort(file: Path, engine: str) -> None:
    figures = list[Figures]()
    for cohort in COHORTS:
        figures.append(now := figures_of_a_run(file, engine, POPULATIONS[-1], cohort, 1))
        row = f"{now.round:.1f} s, {cohort / now.round:.0f} users/s, driver {now.driver / 1e6:.0f} MB, worker {now.worker / 1e6:.0f} MB"
        show(f"one round, {engine}", [f"{cohort:>8,} of 100,000,000: {row}"])
    for peaks in ([f.driver for f in figures], [f.worker for f in figures]):
        assert max(peaks) < 1.1 * min(peaks)
