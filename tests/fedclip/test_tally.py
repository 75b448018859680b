"""Sums of measurements."""

import pytest

from fedclip.tally import add_up, number


def test_sums_by_name_and_lists_by_place():
    a, b = {"x": 1.0, "h": [1.0, 2.0]}, {"x": 2.0, "y": 5.0, "h": [10.0, 20.0]}
    assert add_up([a, b]) == {"x": 3.0, "y": 5.0, "h": [11.0, 22.0]}
    assert a == {"x": 1.0, "h": [1.0, 2.0]}, "an input was changed"
    total = add_up([b])
    total["h"][0] = 0
    assert b["h"] == [10.0, 20.0], "the sum shares a list with its input"


def test_nothing_is_zero():
    assert add_up([]) == {}
    assert number({}, "users") == 0.0


def test_sums_of_two_kinds_are_refused():
    for other in (1.0, [1.0]):
        with pytest.raises(ValueError, match="'h'"):
            add_up([{"h": [1.0, 2.0]}, {"h": other}])
    with pytest.raises(ValueError, match="'h'"):
        number({"h": [1.0]}, "h")
