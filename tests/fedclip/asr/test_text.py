"""Characters: normalising, encoding, and collapsing CTC paths."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip.asr.text import ALPHABET, BLANK, SYMBOLS, collapse, decode, encode, frames_needed, greedy, normalise

SYMBOL = st.integers(min_value=1, max_value=SYMBOLS - 1)


def test_there_are_thirty_symbols_with_the_blank():
    assert SYMBOLS == 30
    assert BLANK == 0
    assert len(set(ALPHABET)) == 29


@given(st.text(alphabet=ALPHABET))
def test_decode_inverts_encode(text):
    assert decode(encode(text)) == text


@given(st.text())
def test_normalised_text_is_stable_and_single_spaced(text):
    once = normalise(text)
    assert normalise(once) == once
    assert once == " ".join(once.split())


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("", ""),
        ("  Hello,   WORLD! ", "hello world"),
        ("Don\u2019t", "don't"),
        ("Ren\u00e9e na\u00efve", "renee naive"),
        ("well\u2013known \u2014 fact", "well-known fact"),
        ("' - '", ""),
        ("route 66", "route 66"),
    ],
)
def test_normalise(raw, expected):
    assert normalise(raw) == expected


@pytest.mark.parametrize("text", ["route 66", "\u0436", "a\tb"])
def test_encode_names_what_it_cannot_spell(text):
    with pytest.raises(ValueError, match="spell numbers out"):
        encode(text)


@given(st.lists(SYMBOL, max_size=12), st.data())
def test_collapse_inverts_any_ctc_path(target, data):
    """A path is any stretching of the target with blanks, one of which parts equal neighbours."""
    path = data.draw(st.lists(st.just(BLANK), max_size=2))
    for i, symbol in enumerate(target):
        gap = data.draw(st.integers(1 if i and target[i - 1] == symbol else 0, 3))
        path += [BLANK] * gap + [symbol] * data.draw(st.integers(1, 3))
    assert collapse(path) == tuple(target)


@given(st.lists(st.integers(0, 2), max_size=5))
def test_frames_needed_is_the_shortest_path_by_exhaustion(frames):
    target = collapse(frames)
    shortest = next(n for n in range(6) if any(collapse(p) == target for p in itertools.product(range(3), repeat=n)))
    assert frames_needed(target) == shortest


def test_greedy_text_has_single_spaces_only():
    space = encode(" ")[0]
    assert greedy([space, BLANK, space, *encode("a"), space, BLANK, space, *encode("b"), space]) == "a b"
    assert greedy([]) == ""
