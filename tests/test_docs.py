"""Every snippet of the documentation runs: Python as it stands, TOML as experiment or sweep, commands as far as the options they name."""

import re
import shlex
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from experiments.cli import app
from experiments.prepare import prepare
from experiments.sweep_plan import read_sweep
from fedclip.asr.languages import LANGUAGES, LATIN
from fedclip.config import make_experiment
from strategies.recipes import resolve
from tests.corpora_folders import FOLDERS
from tests.idx_folder import write_idx_folder

PROJECT = Path(__file__).parents[1]
PAGES = sorted([PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")])


def snippets(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for n, text in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            found.append(pytest.param(text, id=f"{page.name}-{n}"))
    return found


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("text", snippets("python"))
def test_python(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ModuleType("__main__")  # what a class of the snippet is looked up in, as in a script that is run
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(compile(text, "snippet", "exec"), vars(script))


@pytest.mark.parametrize("text", snippets("toml"))
def test_toml_is_an_experiment_or_a_sweep(text: str, tmp_path: Path) -> None:
    values = tomllib.loads(text)
    if "base" in values:
        (tmp_path / "sweep.toml").write_text(text.replace('base = "', f'base = "{PROJECT}/experiments/'), encoding="utf-8")
        assert len(read_sweep(tmp_path / "sweep.toml").trials) > 1
        return
    if values["task"].get("data") == "idx":
        values["run"]["data_dir"] = str(write_idx_folder(tmp_path, train=200))
    kind = values["task"].get("corpus", {}).get("kind")
    if kind in FOLDERS:
        values["run"]["data_dir"] = str(FOLDERS[kind](tmp_path / "data"))
        values["task"]["cache_dir"] = str(tmp_path / "cache")
    assert prepare(resolve(make_experiment(values))).task.users > 0


@pytest.mark.parametrize("text", snippets("sh"))
def test_commands_and_their_options_exist(text: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "make":
            assert words[1] in targets, line
        if words and Path(words[0]).name == "fedclip":
            command = [words[1], *(words[2:3] if words[1] in ("bench", "keys") else [])]
            known = CliRunner().invoke(app, [*command, "--help"]).output
            assert all(word in known for word in words[2:] if word.startswith("--")), line
            assert all((PROJECT / word).is_file() for word in words if word.startswith("experiments/")), line


def test_the_page_of_languages_has_the_table_that_the_code_has() -> None:
    page = (PROJECT / "docs/languages.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z]{2})` \| ([^|]+) \| (?:a-z ?)?([^|]*?) ?\|$", page, re.MULTILINE)
    assert listed == [(code, language.name, language.letters.removeprefix(LATIN)) for code, language in LANGUAGES.items()]
    for code, language in LANGUAGES.items():
        assert (f"| `{code}` | {language.name} | a-z" in page) == language.letters.startswith(LATIN)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
