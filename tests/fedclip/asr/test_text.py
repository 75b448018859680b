"""Characters: normalising, encoding, and collapsing CTC paths."""

import itertools
import pickle
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedclip.asr.languages import LANGUAGES, MARKS
from fedclip.asr.text import BLANK, Alphabet, collapse, frames_needed
from fedclip.options import ConfigError

ENGLISH = Alphabet(("en",))
ALL = Alphabet(tuple(LANGUAGES))
SYMBOL = st.integers(min_value=1, max_value=ENGLISH.symbols - 1)


def test_english_has_thirty_symbols_with_the_blank():
    assert BLANK == 0
    assert ENGLISH.characters == "abcdefghijklmnopqrstuvwxyz '-"
    assert ENGLISH.symbols == 30


def test_a_language_more_adds_characters_at_the_end():
    assert Alphabet(("ru", "en")).characters == LANGUAGES["ru"].letters + MARKS + LANGUAGES["en"].letters
    for count in range(1, len(LANGUAGES)):
        first = Alphabet(ALL.languages[:count])
        assert ALL.characters.startswith(first.characters)
        assert len(set(first.characters)) == len(first.characters)
    again = pickle.loads(pickle.dumps(ALL))
    assert (again, again.characters) == (ALL, ALL.characters)


@pytest.mark.parametrize("languages", [(), ("en", "en"), ("en", "xx")])
def test_languages_that_are_not_known_or_twice_there_are_refused(languages):
    with pytest.raises(ConfigError, match="each once"):
        Alphabet(languages)


@pytest.mark.parametrize("code", LANGUAGES)
def test_each_letter_of_a_language_is_one_character_that_normalising_keeps(code):
    """In lower and upper case, composed and decomposed, and not those of another language of the model."""
    alphabet = Alphabet((code,))
    letters = LANGUAGES[code].letters
    assert len(set(letters)) == len(letters)
    for letter in letters:
        assert letter == unicodedata.normalize("NFC", letter.lower())
        spelt = f"{letter}x{letter}" if letter == "·" else letter
        for written in (spelt, unicodedata.normalize("NFD", spelt)):
            assert alphabet.normalise(written) == ALL.normalise(written, code) == spelt
    capital = {"ß": "ẞ", "ı": "I", "i": "İ"} if code == "tr" else {"ß": "ẞ"}
    assert alphabet.normalise("".join(capital.get(c, c.upper()) for c in letters if c not in "·ςΐΰ")) == "".join(
        c for c in letters if c not in "·ςΐΰ"
    )


@given(st.text(alphabet=ALL.characters))
def test_decode_inverts_encode(text):
    assert ALL.decode(ALL.encode(text)) == text


@given(st.text(), st.sampled_from(["", *LANGUAGES]))
def test_normalised_text_is_stable_and_single_spaced(text, language):
    once = ALL.normalise(text, language)
    assert ALL.normalise(once, language) == once
    assert once == " ".join(once.split())


def without_accents(text):
    """What normalising was when English was the only language: every accent goes, and what is left is looked up."""
    quotes = dict.fromkeys("\u2018\u2019\u02bc\u0060\u00b4", "'")
    dashes = dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-")
    decomposed = unicodedata.normalize("NFKD", text.translate(str.maketrans(quotes | dashes))).lower()
    kept = (c for c in decomposed if not unicodedata.combining(c))
    spaced = "".join(c if c in "abcdefghijklmnopqrstuvwxyz '-" or c.isalnum() else " " for c in kept)
    return " ".join(word for word in spaced.split() if any(c.isalnum() for c in word))


def test_english_loses_every_accent():
    for start in range(0, sys.maxunicode + 1, 4096):
        points = [chr(i) for i in range(start, start + 4096) if not 0xD800 <= i < 0xE000]
        together = "a".join(points)
        assert ENGLISH.normalise(together) == without_accents(together)


@given(st.text())
def test_any_english_text_loses_every_accent(text):
    assert ENGLISH.normalise(text) == without_accents(text)


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
    assert ENGLISH.normalise(raw) == expected


@pytest.mark.parametrize(
    ("language", "raw", "expected"),
    [
        ("fr", "L\u2019\u0153uf d\u00e9j\u00e0 \u2014 se\u00f1or, \u017d", "l'\u0153uf d\u00e9j\u00e0 - senor z"),
        ("es", "\u00bfQu\u00e9? El ni\u00f1o, \u00e7a", "qu\u00e9 el ni\u00f1o ca"),
        ("de", "Stra\u00dfe, \u01d7ber", "stra\u00dfe \u00fcber"),
        ("ro", "\u015ei \u0163ar\u0103, \u0218\u021a", "\u0219i \u021bar\u0103 \u0219\u021b"),
        ("ru", "\u0437\u0430\u0301\u043c\u043e\u043a \u0401\u0436", "\u0437\u0430\u043c\u043e\u043a \u0451\u0436"),
        ("ca", "col\u00b7lecci\u00f3 \u00b7", "col\u00b7lecci\u00f3"),
        ("tr", "IS\u0130", "\u0131si"),
        ("el", "\u039f\u0394\u039f\u03a3", "\u03bf\u03b4\u03bf\u03c2"),
        ("fr-CA", "\u00c9t\u00e9", "\u00e9t\u00e9"),
        ("", "\u00dc \u00e9 \u0436", "\u00fc \u00e9 \u0436"),
    ],
)
def test_a_text_keeps_the_letters_of_its_own_language(language, raw, expected):
    assert ALL.normalise(raw, language) == expected.replace(" - ", " ")


def test_what_one_language_folds_is_left_to_the_others_where_none_is_told():
    both = Alphabet(("en", "tr", "ro"))
    assert both.normalise("I LIKE IT") == both.normalise("I LIKE IT", "en") == "i like it"
    assert both.normalise("\u015e\u0219") == "\u015f\u0219"  # a Turkish letter and a Romanian one
    assert both.normalise("IS\u0130 \u015e", "tr") == Alphabet(("tr",)).normalise("IS\u0130 \u015e") == "\u0131si \u015f"
    assert both.normalise("\u015e", "ro") == Alphabet(("ro",)).normalise("\u015e") == "\u0219"


def test_a_language_that_the_model_does_not_spell_is_refused():
    with pytest.raises(ConfigError, match=r"in 'de'.*spells en, fr only; add 'de'"):
        Alphabet(("en", "fr")).normalise("gut", "de")


@pytest.mark.parametrize("text", ["route 66", "\u0436", "a\tb"])
def test_encode_names_what_it_cannot_spell(text):
    with pytest.raises(ValueError, match="spell numbers out"):
        ENGLISH.encode(text)


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
    encode = ENGLISH.encode
    space = encode(" ")[0]
    assert ENGLISH.greedy([space, BLANK, space, *encode("a"), space, BLANK, space, *encode("b"), space]) == "a b"
    assert ENGLISH.greedy([]) == ""
