"""Characters: from a transcript to CTC targets, and from the best symbol of each frame back to a transcript."""

import itertools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from fedclip.asr.languages import LANGUAGES, MARKS, code_of
from fedclip.options import ConfigError

BLANK = 0
"""The index of the CTC blank: 0, which is also where `torch.nn.functional.ctc_loss` looks by default."""

_APOSTROPHES: Final = "\u2018\u2019\u02bc\u0060\u00b4"
_DASHES: Final = "\u2010\u2011\u2012\u2013\u2014\u2212"
_TABLE: Final = str.maketrans({**dict.fromkeys(_APOSTROPHES, "'"), **dict.fromkeys(_DASHES, "-")})


@dataclass(frozen=True)
class Alphabet:
    """The characters that the transcripts of some languages are spelt with; the symbol of `characters[i]` is `i + 1`.

    Guarantees: a language more adds characters at the end and moves none.
    """

    languages: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuse languages that are not in the table."""
        strange = [language for language in self.languages if language not in LANGUAGES]
        if strange or not self.languages or len(set(self.languages)) < len(self.languages):
            wrong = f"{strange[0]!r} is none" if strange else "none is given, or one twice"
            raise ConfigError(f"expected languages of {', '.join(sorted(LANGUAGES))}, each once; {wrong}")

    @cached_property
    def characters(self) -> str:
        """The letters of the first language, space, apostrophe and hyphen, and the letters that each further language adds."""
        first, *others = (LANGUAGES[language].letters for language in self.languages)
        return "".join(dict.fromkeys(first + MARKS + "".join(others)))

    @property
    def symbols(self) -> int:
        """How many outputs a model has: the characters and the blank."""
        return len(self.characters) + 1

    def normalise(self, text: str, language: str = "") -> str:
        """Return a transcript in lower case, words apart by one space, without punctuation and accents that its language lacks.

        Digits and letters of other alphabets stay: how they are pronounced isn't known here, so they can be neither spelt nor
        dropped (`encode` refuses them).

        Args:
            text: What was said.
            language: Its language, a region aside ("sv-SE" is "sv"); by default the text may have the letters of all of them,
                and characters are folded only where there is one language.

        Raises:
            ConfigError: the language is none of the alphabet's.

        >>> Alphabet(("en",)).normalise("  Don\u2019t stop, Ren\u00e9e! ")
        "don't stop renee"
        >>> Alphabet(("en", "fr")).normalise("\u00c0 No\u00ebl, se\u00f1or", "fr")
        '\u00e0 no\u00ebl senor'
        """
        letters, spoken = self._letters(language), self._spoken(language)
        # What one language folds may be a letter of another: I is i but for Turkish, and Turkish has the s with a cedilla.
        folds = {ord(k): v for k, v in LANGUAGES[spoken[0]].folds.items()} if len(spoken) == 1 else {}
        folded = unicodedata.normalize("NFC", text).translate(folds) if folds else text
        decomposed = unicodedata.normalize("NFKD", folded.translate(_TABLE)).lower()
        kept: list[str] = []
        for c in decomposed:
            if not unicodedata.combining(c):
                kept.append(c)
            elif kept and (letter := unicodedata.normalize("NFC", kept[-1] + c)) in letters:
                kept[-1] = letter  # the accent is part of a letter
        spaced = "".join(c if c in letters or c.isalnum() else " " for c in kept)
        # A dash or quote that touches no letter is punctuation and not spelling.
        words = (word for word in spaced.split() if any(c.isalnum() for c in word))
        return " ".join(words)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the symbols of a normalised transcript, shape (characters,), each 1 .. `symbols` - 1.

        Raises:
            ValueError: a character has no symbol. Spell numbers out, name its language, or leave the utterance out.
        """
        symbols = tuple(self.characters.find(c) + 1 for c in text)
        if 0 in symbols:
            raise ValueError(
                f"The transcript {text!r} has {text[symbols.index(0)]!r}, which is none of {self.characters!r}: "
                "normalise it, spell numbers out, or add its language to task.languages."
            )
        return symbols

    def decode(self, symbols: Sequence[int]) -> str:
        """Return the text of symbols without blanks: the inverse of `encode`."""
        return "".join(self.characters[s - 1] for s in symbols if s != BLANK)

    def greedy(self, frames: Sequence[int]) -> str:
        """Return the transcript of the best symbol of each frame, with the spaces that a reference can have."""
        return " ".join(self.decode(collapse(frames)).split())

    def _spoken(self, language: str) -> tuple[str, ...]:
        if not language:
            return self.languages
        code = code_of(language)
        if code not in self.languages:
            raise ConfigError(
                f"task.languages: an utterance is in {language!r}, and the model spells {', '.join(self.languages)} only; add '{code}'."
            )
        return (code,)

    def _letters(self, language: str) -> frozenset[str]:
        return frozenset(MARKS).union(*(LANGUAGES[code].letters for code in self._spoken(language)))


def collapse(frames: Sequence[int]) -> tuple[int, ...]:
    """Return the symbols that a CTC path stands for: runs become one symbol, then blanks go.

    >>> Alphabet(("en",)).decode(collapse([0, 8, 8, 0, 9, 9]))
    'hi'
    """
    heads = (symbol for i, symbol in enumerate(frames) if i == 0 or symbol != frames[i - 1])
    return tuple(symbol for symbol in heads if symbol != BLANK)


def frames_needed(symbols: Sequence[int]) -> int:
    """Return the fewest frames a CTC path needs for a target: a blank must part two equal neighbours."""
    return len(symbols) + sum(a == b for a, b in itertools.pairwise(symbols))
