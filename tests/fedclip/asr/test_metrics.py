"""Error counts against a textbook edit distance, and the interval over units."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedclip.asr.metrics import (
    bootstrap_interval,
    count_errors,
    count_errors_by_group,
    error_rate,
    rates_by_group,
    rates_over_speakers,
    speaker_rows,
)

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


@given(st.lists(st.lists(st.tuples(TEXT, TEXT, st.sampled_from(["", "fr", "ro"])), max_size=4), min_size=1, max_size=4))
def test_a_group_counts_what_its_own_utterances_count(units):
    counts = [count_errors_by_group(*map(list, zip(*unit, strict=True))) if unit else count_errors_by_group([], [], []) for unit in units]
    everything = [triple for unit in units for triple in unit]
    for unit, c in zip(units, counts, strict=True):
        assert {k: v for k, v in c.items() if "." not in k} == count_errors([r for r, _, _ in unit], [h for _, h, _ in unit])
    rates, named = rates_by_group(counts), sorted({g for _, _, g in everything} - {""})
    assert set(rates) == {f"{key}.{g}" for g in named for key in ("wer", "cer", "eval_words") if len(named) > 1}
    for group in named if len(named) > 1 else ():
        own = count_errors([r for r, _, g in everything if g == group], [h for _, h, g in everything if g == group])
        assert rates[f"eval_words.{group}"] == own["words"]
        assert rates[f"wer.{group}"] == pytest.approx(error_rate([own], "word"), nan_ok=True)
        assert rates[f"cer.{group}"] == pytest.approx(error_rate([own], "character"), nan_ok=True)


def speaker(errors, words):
    return {"word_errors": float(errors), "words": float(words), "character_errors": 0.0, "characters": float(words)}


def test_spread_and_worst_decile_of_known_speakers():
    """Eleven speakers at 0%, 10% ... 100%, of ten words each but the second worst, and one who says nothing."""
    counts = [speaker(i, 10) for i in range(11)] + [speaker(3, 0)]
    counts[9] = speaker(90, 100)
    said = rates_over_speakers(counts)
    assert said == rates_over_speakers(counts[::-1])
    assert said["wer_speakers_median"] == pytest.approx(0.5)
    assert (said["wer_speakers_q25"], said["wer_speakers_q75"]) == pytest.approx((0.25, 0.75))
    assert said["wer_speakers_sd"] == pytest.approx(math.sqrt(10) / 10)  # of 0 .. 10: (n^2 - 1) / 12 = 10
    assert said["wer_worst_decile"] == pytest.approx((10 + 90) / 110)  # two of eleven, by their words
    equal = [speaker(1, 2), speaker(10, 20), speaker(0, 5)]
    assert rates_over_speakers(equal)["wer_worst_decile"] == 0.5
    assert all(math.isnan(v) for v in rates_over_speakers([speaker(2, 0)]).values())


def test_a_row_for_each_speaker():
    counts = [count_errors_by_group(["a b", "c"], ["a", "c"], ["ro", "fr"]), count_errors_by_group([], [], [])]
    rows = speaker_rows(counts)
    assert rows[0] | {"cer": None} == {
        "unit": 0,
        "group": "fr+ro",
        "words": 3,
        "word_errors": 1,
        "wer": pytest.approx(1 / 3),
        "characters": 4,
        "character_errors": 2,
        "cer": None,
    }
    assert (rows[1]["unit"], rows[1]["group"], rows[1]["words"]) == (1, "", 0)
    assert math.isnan(rows[1]["wer"])
    assert speaker_rows([{"images": 3.0}]) == []
