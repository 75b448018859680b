"""What a device keeps of runs: those used last, and never less than what is in use; nothing in that folder costs a round."""

import multiprocessing
import os
from pathlib import Path

import pytest

from clients.kept import KEPT_RUNS, forget, in_use


def used(folder: Path, run: str, at: float) -> Path:
    """Use a run, as if at some time."""
    with in_use(folder, run):
        (folder / run / "0" / "3").mkdir(parents=True, exist_ok=True)
        (folder / run / "0" / "3" / "00000001-0.state").write_bytes(b"state")
    os.utime(folder / run / ".lock", (at, at))
    return folder / run


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_runs_that_were_used_last_stay(tmp_path: Path) -> None:
    for n in range(KEPT_RUNS):
        used(tmp_path, f"run {n}", 100 + n)
    used(tmp_path, "run 0", 200)  # it goes on, which takes nobody away
    assert len(there(tmp_path)) == KEPT_RUNS
    used(tmp_path, "new", 300)
    assert there(tmp_path) == {"new", "run 0", *(f"run {n}" for n in range(2, KEPT_RUNS))}
    assert (tmp_path / "run 0" / "0" / "3" / "00000001-0.state").exists()


def test_a_use_that_fails_takes_nobody_away(tmp_path: Path) -> None:
    for n in range(KEPT_RUNS):
        used(tmp_path, f"run {n}", 100 + n)
    with pytest.raises(OSError, match="no room"), in_use(tmp_path, "new"):
        raise OSError("no room")
    assert there(tmp_path) >= {f"run {n}" for n in range(KEPT_RUNS)}


def hold(folder: Path, run: str, held: object, end: object) -> None:
    with in_use(folder, run):
        held.set()  # type: ignore[attr-defined]
        end.wait(30)  # type: ignore[attr-defined]


def test_a_run_that_another_process_works_for_stays(tmp_path: Path) -> None:
    for n in range(KEPT_RUNS):
        used(tmp_path, f"run {n}", 100 + n)
    fork = multiprocessing.get_context("fork")
    held, end = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(tmp_path, "run 0", held, end))
    process.start()
    assert held.wait(30)
    os.utime(tmp_path / "run 0" / ".lock", (1, 1))
    used(tmp_path, "new", 300)
    assert "run 0" in there(tmp_path)
    end.set()
    process.join()
    os.utime(tmp_path / "run 0" / ".lock", (1, 1))
    used(tmp_path, "newer", 400)
    assert "run 0" not in there(tmp_path)


def test_what_is_none_of_ours_stays_and_what_is_broken_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("not to be lost")
    (tmp_path / "a file").write_text("")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    (tmp_path / "a loop").symlink_to(tmp_path / "a loop")
    (tmp_path / "of old" / "0").mkdir(parents=True)  # without a lock
    os.utime(tmp_path / "of old" / "0", (50, 50))
    os.utime(tmp_path / "of old", (50, 50))
    (tmp_path / "odd" / ".lock").mkdir(parents=True)
    os.utime(tmp_path / "odd" / ".lock", (1, 1))
    (tmp_path / ".gone.once" / "0").mkdir(parents=True)  # a crash came between
    ours = {"notes", "a file", "elsewhere", "a loop", "odd"}
    for n in range(KEPT_RUNS):
        used(tmp_path, f"run {n}", 100 + n)
    assert there(tmp_path) == ours | {f"run {n}" for n in range(KEPT_RUNS)}
    assert (tmp_path / "notes" / "mine.txt").exists()
    forget(tmp_path / "nowhere", "run")
    with in_use(tmp_path / "a file", "run"):  # where nothing can be kept, the states say so
        pass
