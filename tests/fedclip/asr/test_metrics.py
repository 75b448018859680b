"""Error counts against a textbook edit distance, and the interval over units."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.asr.metrics import bootstrap_interval, count_errors, error_rate

TEXT = st.lists(st.sampled_from(["a", "b", "ab", "c"]), max_size=5).map(" ".join)


def edit_distance(reference, hypothesis):
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, start=1):
        previous, row = row, [i]
        for j, h in enumerate(hypothesis, start=1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (r != h)))
    return row[-1]


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=4))
def test_counts_are_those_of_the_edit_distance(pairs):
    counts = count_errors([r for r, _ in pairs], [h for _, h in pairs])
    assert counts["word_errors"] == sum(edit_distance(r.split(), h.split()) for r, h in pairs)
    assert counts["words"] == sum(len(r.split()) for r, _ in pairs)
    assert counts["character_errors"] == sum(edit_distance(r, h) for r, h in pairs)
    assert counts["characters"] == sum(len(r) for r, _ in pairs)


def test_units_are_pooled_as_a_ratio_of_sums():
    units = [count_errors(["a b c d"], ["a b c d"]), count_errors(["a"], ["b"])]
    assert error_rate(units, "word") == pytest.approx(1 / 5)


def test_no_words_give_nan_and_not_an_error():
    units = [count_errors([""], ["a"]), count_errors([], [])]
    assert math.isnan(error_rate(units, "word"))
    assert all(math.isnan(end) for end in bootstrap_interval(units, "word", seed=0))


def test_counts_must_pair_up():
    with pytest.raises(ValueError, match="one hypothesis a reference"):
        count_errors(["a"], [])


def unit(errors, words):
    return {"word_errors": float(errors), "words": float(words)}


def test_the_interval_repeats_with_its_seed_and_holds_the_rate():
    units = [unit(i % 4, 10) for i in range(30)]
    low, high = bootstrap_interval(units, "word", seed=1)
    assert (low, high) == bootstrap_interval(units, "word", seed=1)
    assert (low, high) != bootstrap_interval(units, "word", seed=2)
    assert low < error_rate(units, "word") < high


def test_the_interval_has_the_width_of_the_normal_one():
    """Units of equal size: the rate is a mean, whose interval is 1.96 standard errors either way."""
    units = [unit(i % 2, 1) for i in range(400)]
    low, high = bootstrap_interval(units, "word", seed=0)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(400), rel=0.15)


def test_one_unit_has_no_spread():
    assert bootstrap_interval([unit(1, 4)], "word", seed=0) == (0.25, 0.25)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_the_level_is_a_share(level):
    with pytest.raises(ValueError, match=r"0\.95 is customary"):
        bootstrap_interval([unit(1, 4)], "word", seed=0, level=level)
