"""From what a model says of frames to a text: greedy, or a beam with an n-gram model by the library flashlight-text."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedclip.asr.options import DecoderOptions
from fedclip.asr.text import BLANK, Alphabet
from fedclip.options import ConfigError

UNKNOWN: Final = "<unk>"
"""Any other word, in n-gram models."""

BOUNDARY: Final = "|"
"""How a space is written in n-gram models over characters."""

NEVER: Final = -1e4
"""The log probability of what cannot be: the library takes no infinities."""

_NO_LIMIT: Final = 1e9
"""Beams are limited by their size alone."""


class Decoder(Protocol):
    """Makes texts of logits."""

    def __call__(self, logits: Tensor, frames: Tensor) -> list[str]:
        """Return the texts of logits, shape (batch, frames, symbols), of so many frames each, shape (batch,)."""


@dataclass(frozen=True)
class Greedy:
    """The text of the best symbol of each frame."""

    alphabet: Alphabet

    def __call__(self, logits: Tensor, frames: Tensor) -> list[str]:
        """Return the texts of logits, shape (batch, frames, symbols), of so many frames each, shape (batch,)."""
        paths = zip(logits.argmax(dim=-1).tolist(), frames.tolist(), strict=True)
        return [self.alphabet.greedy(path[:count]) for path, count in paths]


class BeamSearch:
    """The text of the largest score in a beam: the log of the sum of its paths' probabilities, and what the n-gram model adds.

    Args:
        options: the beam and the n-gram model.
        alphabet: what the symbols stand for.

    Raises:
        ConfigError: the library is not installed, or the n-gram model cannot be read.
    """

    def __init__(self, options: DecoderOptions, alphabet: Alphabet) -> None:
        self._options, self._alphabet = options, alphabet
        self._space = alphabet.characters.index(" ") + 1
        self._spelt = dict[int, str]()
        try:
            self._decoder = self._of_words(options.lm) if options.lm is not None and options.unit == "word" else self._of_symbols()
        except ImportError as error:
            raise ConfigError("task.decoder.beam: beam search needs flashlight-text: pip install 'fedclip[decoder]'.") from error

    def __reduce__(self) -> tuple[type["BeamSearch"], tuple[DecoderOptions, Alphabet]]:
        """Pickle as the options: the library's objects do not."""
        return type(self), (self._options, self._alphabet)

    def __call__(self, logits: Tensor, frames: Tensor) -> list[str]:
        """Return the texts of logits, shape (batch, frames, symbols), of so many frames each, shape (batch,)."""
        log_probs = functional.log_softmax(logits.float(), dim=-1).clamp(min=NEVER).cpu()
        return [self._text(utterance[:count]) for utterance, count in zip(log_probs, frames.tolist(), strict=True)]

    def _text(self, log_probs: Tensor) -> str:
        # A space after the end, for certain: it ends the last word, and adds no other.
        end = torch.full((1, self._alphabet.symbols), NEVER)
        end[0, self._space] = 0.0
        emissions = torch.cat((log_probs, end)).contiguous()
        best = self._decoder.decode(emissions.data_ptr(), *emissions.shape)[0]
        if self._spelt:
            return " ".join(self._spelt[word] for word in best.words if word in self._spelt)
        return self._alphabet.greedy(best.tokens)

    def _of_symbols(self) -> Any:
        from flashlight.lib.text.decoder import CriterionType, LexiconFreeDecoder, LexiconFreeDecoderOptions, ZeroLM

        names = ["<blank>", *(BOUNDARY if c == " " else c for c in self._alphabet.characters)]
        lm = ZeroLM()
        if self._options.lm is not None:
            if not {*names} & {*_unigrams(self._options.lm)}:
                raise ConfigError("task.decoder.lm: no 1-gram of it is a character; expected ARPA text over characters, or unit 'word'.")
            lm = _read(self._options.lm, names)
        search = LexiconFreeDecoderOptions(
            self._options.beam, self._alphabet.symbols, _NO_LIMIT, self._options.lm_weight, 0.0, True, CriterionType.CTC
        )
        return LexiconFreeDecoder(search, lm, self._space, BLANK, [])

    def _of_words(self, path: Path) -> Any:
        from flashlight.lib.text.decoder import CriterionType, LexiconDecoder, LexiconDecoderOptions, SmearingMode, Trie

        options, words = self._options, _unigrams(path)
        lm, self._spelt = _read(path, words), _spelt(words, self._alphabet)
        start, trie = lm.start(False), Trie(self._alphabet.symbols, self._space)
        for index, text in self._spelt.items():
            trie.insert([*self._alphabet.encode(text), self._space], index, lm.score(start, index)[1])
        trie.smear(SmearingMode.MAX)
        search = LexiconDecoderOptions(
            options.beam, self._alphabet.symbols, _NO_LIMIT, options.lm_weight, options.word_score, -math.inf, 0.0, True, CriterionType.CTC
        )
        return LexiconDecoder(search, trie, lm, self._space, BLANK, words.index(UNKNOWN), [], False)


def open_decoder(options: DecoderOptions, alphabet: Alphabet) -> Decoder:
    """Return the decoder that the options describe.

    Raises:
        ConfigError: see `BeamSearch`.
    """
    return BeamSearch(options, alphabet) if options.beam else Greedy(alphabet)


def _unigrams(path: Path) -> list[str]:
    """Return the words of an n-gram model in ARPA text, and `<unk>`, each once.

    Raises:
        ConfigError: no such file, or no ARPA text.
    """
    words, inside = [UNKNOWN], False
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("\\"):
                    if inside:
                        break
                    inside = line.strip() == "\\1-grams:"
                elif inside and (parts := line.split()):
                    words.append(parts[1])
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise ConfigError(f"task.decoder.lm: {path} cannot be read as ARPA text: {error}.") from error
    return list(dict.fromkeys(w for w in words if w not in ("<s>", "</s>")))


def _spelt(words: list[str], alphabet: Alphabet) -> dict[int, str]:
    """Return how words are written in transcripts, by their index; without those that have characters of no symbol.

    Raises:
        ConfigError: there is none.
    """
    spelt = {}
    for index, word in enumerate(words):
        text = alphabet.normalise(word) if word != UNKNOWN else ""
        with suppress(ValueError):
            if alphabet.encode(text) and " " not in text:
                spelt[index] = text
    if not spelt:
        raise ConfigError("task.decoder.lm: none of its words can be spelt; expected ARPA text over words in its 1-grams.")
    return spelt


def _read(path: Path, names: list[str]) -> Any:
    """Return the library's n-gram model over names, which it knows by their index.

    Raises:
        ConfigError: it cannot be read.
    """
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    known = Dictionary(names)
    known.set_default_index(names.index(UNKNOWN) if UNKNOWN in names else BLANK)
    try:
        return KenLM(str(path), known)
    except RuntimeError as error:
        raise ConfigError(f"task.decoder.lm: {path} cannot be read: {str(error).splitlines()[-1]}") from error
