"""Beam search against enumeration of every path, and n-gram models that settle what the sounds leave open."""

import itertools
import math
import pickle

import pytest
import torch

from fedclip.asr.decoding import BeamSearch, Greedy, open_decoder
from fedclip.asr.options import DecoderOptions
from fedclip.asr.text import Alphabet, collapse
from fedclip.options import ConfigError, validate

ENGLISH = Alphabet(("en",))
SYMBOLS, decode, encode = ENGLISH.symbols, ENGLISH.decode, ENGLISH.encode
(SPACE,) = encode(" ")

WORDS = """\\data\\
ngram 1=6
ngram 2=3

\\1-grams:
-2.0\t<unk>
0\t<s>\t-0.3
-0.9\t</s>
-0.6\tA\t-0.2
-0.8\tab\t-0.4
-1.3\tba\t-0.1

\\2-grams:
-0.2\t<s> ba
-0.3\tA ba
-0.1\tba </s>

\\end\\
"""
LETTERS = """\\data\\
ngram 1=6
ngram 2=2

\\1-grams:
-3.0\t<unk>
0\t<s>\t-0.3
-0.9\t</s>
-0.6\ta\t-0.2
-0.8\tb\t-0.4
-1.0\t|\t-0.1

\\2-grams:
-0.1\ta b
-0.2\tb </s>

\\end\\
"""
ONE = {"<unk>": -2.0, "</s>": -0.9, "a": -0.6, "ab": -0.8, "ba": -1.3}
TWO = {("<s>", "ba"): -0.2, ("a", "ba"): -0.3, ("ba", "</s>"): -0.1}
BACKOFF = {"<s>": -0.3, "a": -0.2, "ab": -0.4, "ba": -0.1}
ONE_LETTER = {"<unk>": -3.0, "</s>": -0.9, "a": -0.6, "b": -0.8, "|": -1.0}
TWO_LETTERS = {("a", "b"): -0.1, ("b", "</s>"): -0.2}
BACKOFF_LETTERS = {"<s>": -0.3, "a": -0.2, "b": -0.4, "|": -0.1}
HEARD = (0, *encode("ab "))
"""The blank, a, b and the space: all that is possible in these matrices."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "words.arpa"
    path.write_text(WORDS)
    return path


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "letters.arpa"
    path.write_text(LETTERS)
    return path


def matrix(seed, frames=5):
    """Logits of frames over four symbols; the others cannot be."""
    logits = torch.full((frames, SYMBOLS), -1e4)
    logits[:, list(HEARD)] = 1.5 * torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed))
    return logits


def texts(logits):
    """The probability of each string of symbols, by every path. Each string begins and ends with a space, as the search has it."""
    log_probs = logits.log_softmax(dim=-1)
    found = {}
    for path in itertools.product(HEARD, repeat=len(logits)):
        text = decode(collapse((SPACE, *path, SPACE)))
        score = sum(float(log_probs[t, s]) for t, s in enumerate(path))
        found[text] = found.get(text, 0.0) + math.exp(score)
    return found


def by_words(found):
    """The probability of each text, whatever spaces it begins and ends with, and however many part two words."""
    pooled = {}
    for text, probability in found.items():
        pooled[" ".join(text.split())] = pooled.get(" ".join(text.split()), 0.0) + probability
    return pooled


def log10_probability(tokens, one, two, backoff):
    """A bigram model by hand, the end of the sentence among it."""
    total, before = 0.0, "<s>"
    for token in [*tokens, "</s>"]:
        total += two[before, token] if (before, token) in two else backoff[before] + one[token]
        before = token
    return total


def found_by(options, logits):
    frames = torch.tensor([len(logits)])
    (text,) = open_decoder(validate(DecoderOptions, options), ENGLISH)(logits[None], frames)
    return text


def test_without_a_language_model_the_best_string_of_all_paths_is_found_where_greedy_is_wrong():
    corrected = 0
    for seed in range(30):
        found = texts(matrix(seed))
        best = max(found, key=found.get)
        assert found_by({"beam": 500}, matrix(seed)) == " ".join(best.split())
        corrected += Greedy(ENGLISH)(matrix(seed)[None], torch.tensor([5])) != [" ".join(best.split())]
    assert corrected > 2


@pytest.mark.parametrize(("weight", "word_score"), [(1.0, 0.0), (2.0, 0.7), (0.5, -0.5)])
def test_with_words_the_best_of_all_texts_of_its_words_is_found(words, weight, word_score):
    changed = 0
    for seed in range(20):
        pooled = {t: p for t, p in by_words(texts(matrix(seed))).items() if set(t.split()) <= {"a", "ab", "ba"}}
        scores = {
            t: math.log(p) + weight * log10_probability(t.split(), ONE, TWO, BACKOFF) + word_score * len(t.split())
            for t, p in pooled.items()
        }
        best = max(scores, key=scores.get)
        options = {"beam": 2000, "lm": words, "lm_weight": weight, "word_score": word_score}
        assert found_by(options, matrix(seed)) == best, seed
        changed += best != max(pooled, key=pooled.get)
    assert changed > 2


def test_with_characters_the_best_of_all_strings_is_found(letters):
    changed = 0
    for seed in range(20):
        found = texts(matrix(seed))
        scores = {
            t: math.log(p) + log10_probability(t[1:].replace(" ", "|"), ONE_LETTER, TWO_LETTERS, BACKOFF_LETTERS) for t, p in found.items()
        }
        best = max(scores, key=scores.get)
        assert found_by({"beam": 2000, "lm": letters, "unit": "character"}, matrix(seed)) == " ".join(best.split()), seed
        changed += best != max(found, key=found.get)
    assert changed > 2


def spelt(*choices):
    """Logits that spell letters for certain, a blank after each; more than one letter in a place is as likely each."""
    logits = torch.full((2 * len(choices), SYMBOLS), -1e4)
    logits[1::2, 0] = 0.0
    for n, choice in enumerate(choices):
        logits[2 * n, list(encode(choice) if choice != " " else encode(" "))] = torch.arange(len(choice), 0, -1.0) * 0.1
    return logits


def test_an_n_gram_settles_what_is_heard_either_way_and_frames_past_the_end_do_not_count(tmp_path):
    lm = tmp_path / "lm.arpa"
    lm.write_text(
        "\\data\\\nngram 1=7\nngram 2=2\n\n\\1-grams:\n-3\t<unk>\n0\t<s>\t0\n-1\t</s>\n-1\tcall\t0\n-1\tat\t0\n-1\tnine\t0\n-1\tmine\t0\n\n"
        "\\2-grams:\n-0.1\tat nine\n-0.1\tcall mine\n\n\\end\\\n"
    )
    at, call = spelt(*"at ", "mn", *"ine"), spelt(*"call ", "nm", *"ine")
    logits = torch.nn.utils.rnn.pad_sequence([at, call], batch_first=True)
    logits[0, len(at) :, encode("z")[0]] = 50.0
    frames = torch.tensor([len(at), len(call)])
    assert Greedy(ENGLISH)(logits, frames) == ["at mine", "call nine"]
    beam = BeamSearch(DecoderOptions(beam=50, lm=lm), ENGLISH)
    assert beam(logits, frames) == ["at nine", "call mine"]
    assert pickle.loads(pickle.dumps(beam))(logits, frames) == ["at nine", "call mine"]
    assert BeamSearch(DecoderOptions(beam=50), ENGLISH)(logits, frames) == ["at mine", "call nine"]


def test_words_are_spelt_as_transcripts_are_and_those_that_cannot_be_are_never_found(tmp_path):
    lm = tmp_path / "lm.arpa"
    lm.write_text(WORDS.replace("\tA", "\tDON\u2019T").replace("A ba", "DON\u2019T ba").replace("\tab", "\t4TH"))
    assert found_by({"beam": 20, "lm": lm}, spelt(*"don't")) == "don't"
    assert found_by({"beam": 20, "lm": lm}, spelt("d", "o", "n", "'", "t", " ", "dx", "o", "n", "'", "t")) == "don't don't"


def test_silence_is_no_text(words):
    silent = torch.full((4, SYMBOLS), -50.0)
    silent[:, 0] = 0.0
    assert found_by({"beam": 20}, silent) == found_by({"beam": 20, "lm": words}, silent) == ""


def test_what_is_no_language_model_is_refused(tmp_path):
    binary = tmp_path / "lm.bin"
    binary.write_bytes(b"mmap lm\xff\xfe")
    empty = tmp_path / "lm.arpa"
    empty.write_text(WORDS.replace("ngram 2=3", "ngram 2=4"))
    for path, message in ((binary, "cannot be read"), (empty, "cannot be read"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ConfigError, match=f"task.decoder.lm.*{message}"):
            open_decoder(DecoderOptions(beam=5, lm=path), ENGLISH)
    nothing = tmp_path / "nothing.arpa"
    nothing.write_text(WORDS.replace("\tA", "\t4").replace("A ba", "4 7").replace("ba", "7").replace("ab", "6"))
    with pytest.raises(ConfigError, match="can be spelt"):
        open_decoder(DecoderOptions(beam=5, lm=nothing), ENGLISH)
    with pytest.raises(ConfigError, match="or unit 'word'"):
        open_decoder(DecoderOptions(beam=5, lm=nothing, unit="character"), ENGLISH)
    with pytest.raises(ConfigError, match="beside word_score"):
        validate(DecoderOptions, {"beam": 5, "word_score": 1.0})
    with pytest.raises(ConfigError, match="beam >= 1"):
        validate(DecoderOptions, {"lm": empty})
