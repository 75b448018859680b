"""Doors: a user's own module or file, loaded once, with errors that say what is there."""

import pickle

import pytest

from fedclip.doors import load_door
from fedclip.options import ConfigError


def test_a_module_and_a_file(tmp_path, monkeypatch):
    import json

    assert load_door("json:dumps") is json.dumps
    (tmp_path / "mine.py").write_text("class Thing:\n    pass\n\nthing = Thing()\n")
    monkeypatch.chdir(tmp_path)
    assert load_door("mine.py:thing") is load_door(f"{tmp_path}/mine.py:thing"), "a file is loaded once a process"
    assert type(pickle.loads(pickle.dumps(load_door("mine.py:thing")))) is load_door("mine.py:Thing")


@pytest.mark.parametrize("reference", ["json", ":dumps", "json:", ""])
def test_what_is_no_door_is_refused(reference):
    with pytest.raises(ConfigError, match="module:name"):
        load_door(reference)


def test_errors_say_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_door(f"{tmp_path}/none.py:x")
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        load_door("no_such_module_at_all:x")
    (tmp_path / "has.py").write_text("here = 1\n")
    with pytest.raises(ConfigError, match=r"has no 'there'; it has: here"):
        load_door(f"{tmp_path}/has.py:there")


def test_a_file_that_raises_is_refused_each_time(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ConfigError, match="ZeroDivisionError"):
            load_door(f"{tmp_path}/bad.py:x")
