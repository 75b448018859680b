"""Errors of sections: the key as it is written in the file, the value, what is allowed, the nearest key."""

from typing import Annotated, Literal

import pytest
from pydantic import Field

from fedclip.options import ConfigError, Options, check_arguments, unknown, validate, with_defaults


class Inner(Options):
    kind: Literal["inner"] = "inner"
    size: Annotated[int, Field(ge=1)] = 1


class Other(Options):
    kind: Literal["other"] = "other"
    width: int = 1


class Section(Options):
    name: str
    inner: Inner = Inner()
    either: Inner | Other = Inner()
    parts: tuple[Inner, ...] = ()


def recipe(*, hidden, rate: float, steps: int = 3, tag: str | None = None):
    """A function with annotated parameters."""


def refused(values):
    with pytest.raises(ConfigError) as caught:
        validate(Section, values, "at")
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"nme": "x", "name": "y"},
            ["at.nme: unknown key (its value is 'x')", "known here: either, inner, name, parts", "Did you mean 'name'?"],
        ),
        ({"name": "x", "inner": {"sise": 2}}, ["at.inner.sise", "known here: kind, size", "Did you mean 'size'?"]),
        ({"name": "x", "inner": {"size": 0}}, ["at.inner.size", "greater than or equal to 1", "got 0"]),
        ({"name": "x", "parts": [{"size": 1}, {"size": "big"}]}, ["at.parts.1.size", "valid integer", "got 'big'"]),
        ({}, ["at.name: missing", "--set at.name=VALUE"]),
        ({"name": 3}, ["at.name", "valid string", "got 3"]),
    ],
)
def test_errors_say_where_what_and_what_else(values, said):
    message = refused(values)
    assert all(part in message for part in said), message


def test_all_the_mistakes_are_told_at_once():
    message = refused({"nme": 1, "inner": {"size": 0}})
    assert len(message.splitlines()) == 3


def test_arguments_are_checked_against_a_function_and_converted():
    assert check_arguments(recipe, {"rate": 1, "steps": 4}, "at", {"hidden": None}) == {"rate": 1.0, "steps": 4}
    assert with_defaults(recipe, {"rate": 1}, "at", {"hidden": None}) == {"rate": 1.0, "steps": 3}
    for given, said in (
        ({"rat": 1}, "Did you mean 'rate'?"),
        ({"rate": "x"}, "at.rate"),
        ({"rate": 1, "hidden": 2}, "at.hidden: unknown key"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_arguments(recipe, given, "at", {"hidden": None})
        assert said in str(caught.value)


def test_sections_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        validate(Section, {"name": "x"}).name = "y"


def test_an_unknown_name_gets_the_nearest():
    assert str(unknown("a.b", "fedavgg", ["fedopt", "fedavg"], "method")) == (
        "a.b: 'fedavgg' is no known method; known: fedavg, fedopt. Did you mean 'fedavg'?"
    )
    assert "Did you mean" not in str(unknown("a.b", "zzz", ["fedopt"], "method"))
