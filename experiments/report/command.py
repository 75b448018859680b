"""What `fedclip report` does: write the page, the files of `--export`, and both anew while runs go on."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.report.collect import collect
from experiments.report.export import export
from experiments.report.page import render
from experiments.report.read import Json
from fedclip.options import ConfigError

ENDED = ("done", "failed", "interrupted", "budget spent", "too many users failed")


def report_command(
    paths: Sequence[Path], out: Path | None, watch: bool, every: float, folder: Path | None, wait: Callable[[float], None] = time.sleep
) -> int:
    """Write the report of run and sweep folders, and return the exit status; with `watch` until nobody works on any run, or Ctrl-C.

    Raises:
        ConfigError: a path is no run or sweep folder, a file of it is damaged, or the report cannot be written.
    """
    file = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    try:
        report = _watched(paths, file, every, wait) if watch else collect(paths)
        _write(file, render(report))
        return _said(report, file, folder)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def write_page(run: Path) -> Path:
    """Write the `report.html` of a run folder, and return where it is.

    Raises:
        ConfigError: it is no run folder, a file of it is damaged, or the page cannot be written.
    """
    file = run / "report.html"
    _write(file, render(collect([run])))
    return file


def _watched(paths: Sequence[Path], file: Path, every: float, wait: Callable[[float], None]) -> Json:
    """Write the page anew until nobody works on any run, and return the last report; Ctrl-C ends it once there is a page."""
    report: Json | None = None
    try:
        while True:
            report = collect(paths)
            if _ended(report):
                return report
            _write(file, render(report, every))
            print(f"{file}: {_progress(report)}", flush=True)
            wait(every)
    except KeyboardInterrupt:
        if report is None:
            raise
        return collect(paths)  # the last page must not ask for a next one


def _said(report: Json, file: Path, folder: Path | None) -> int:
    print(f"report: {file} ({len(report['runs'])} runs)")
    if folder is not None:
        for name in export(report, folder):
            print(f"  {folder / name}")
    return 0


def _ended(report: Json) -> bool:
    return all(run["status"] in ENDED or run["idle"] for run in report["runs"])


def _progress(report: Json) -> str:
    statuses = [run["status"] for run in report["runs"]]
    return ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))


def _write(file: Path, page: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")  # a run that ends writes its own while it is watched
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise ConfigError(f"The report cannot be written: {error}; choose another file by --out.") from error
