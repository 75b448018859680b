"""Characters: from a transcript to CTC targets, and from the best symbol of each frame back to a transcript."""

import itertools
import unicodedata
from collections.abc import Sequence
from typing import Final

BLANK = 0
"""The index of the CTC blank: 0, which is also where `torch.nn.functional.ctc_loss` looks by default."""

ALPHABET = "abcdefghijklmnopqrstuvwxyz '-"
"""The characters that a transcript is spelt with; the symbol of `ALPHABET[i]` is `i + 1`."""

SYMBOLS = len(ALPHABET) + 1
"""How many outputs a model has: 29 characters and the blank."""

_APOSTROPHES: Final = "\u2018\u2019\u02bc\u0060\u00b4"
_DASHES: Final = "\u2010\u2011\u2012\u2013\u2014\u2212"
_TABLE: Final = str.maketrans({**dict.fromkeys(_APOSTROPHES, "'"), **dict.fromkeys(_DASHES, "-")})


def normalise(text: str) -> str:
    """Return a transcript in lower case, without accents and punctuation, words apart by one space.

    Digits and letters of other alphabets stay: how they are pronounced isn't known here, so they can be neither spelt nor
    dropped (`encode` refuses them).

    >>> normalise("  Don\u2019t stop, Ren\u00e9e! ")
    "don't stop renee"
    """
    decomposed = unicodedata.normalize("NFKD", text.translate(_TABLE)).lower()
    kept = (c for c in decomposed if not unicodedata.combining(c))
    spaced = "".join(c if c in ALPHABET or c.isalnum() else " " for c in kept)
    # A dash or quote that touches no letter is punctuation and not spelling.
    words = (word for word in spaced.split() if any(c.isalnum() for c in word))
    return " ".join(words)


def encode(text: str) -> tuple[int, ...]:
    """Return the symbols of a normalised transcript, shape (characters,), each 1 .. 29.

    Raises:
        ValueError: a character has no symbol. Spell numbers out, or leave the utterance out.
    """
    symbols = tuple(ALPHABET.find(c) + 1 for c in text)
    if 0 in symbols:
        raise ValueError(
            f"The transcript {text!r} has {text[symbols.index(0)]!r}, which is none of {ALPHABET!r}: normalise it and spell numbers out."
        )
    return symbols


def decode(symbols: Sequence[int]) -> str:
    """Return the text of symbols without blanks: the inverse of `encode`."""
    return "".join(ALPHABET[s - 1] for s in symbols if s != BLANK)


def collapse(frames: Sequence[int]) -> tuple[int, ...]:
    """Return the symbols that a CTC path stands for: runs become one symbol, then blanks go.

    >>> decode(collapse([0, 8, 8, 0, 9, 9]))
    'hi'
    """
    heads = (symbol for i, symbol in enumerate(frames) if i == 0 or symbol != frames[i - 1])
    return tuple(symbol for symbol in heads if symbol != BLANK)


def greedy(frames: Sequence[int]) -> str:
    """Return the transcript of the best symbol of each frame, with the spaces that a reference can have."""
    return " ".join(decode(collapse(frames)).split())


def frames_needed(symbols: Sequence[int]) -> int:
    """Return the fewest frames a CTC path needs for a target: a blank must part two equal neighbours."""
    return len(symbols) + sum(a == b for a, b in itertools.pairwise(symbols))
