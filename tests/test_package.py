"""What an installation gets that is not a link to the sources."""

import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGES = ("fedclip", "strategies", "clients", "experiments")


def files(folder: Path) -> set[Path]:
    return {
        path.relative_to(folder)
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_build_has_every_file_of_the_packages(tmp_path: Path) -> None:
    sources, built = tmp_path / "sources", tmp_path / "built"
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, sources)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run(build, cwd=sources, check=True)
    assert files(built) == files(sources)
