"""Tests of the sentence grammar."""

import re

import numpy as np
import pytest

from fedclip.speech.grammar import COMMANDS, DIGITS, SLOTS, draw_sentence, vocabulary


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [draw_sentence(rng) for _ in range(count)]


def test_sentences_have_only_letters_spaces_and_apostrophes() -> None:
    for sentence in sentences(2000):
        assert re.fullmatch(r"[a-z']+( [a-z']+)*", sentence)
        assert len(sentence.split()) <= 10


def test_the_vocabulary_is_exactly_what_is_said_and_of_the_documented_size() -> None:
    assert {word for sentence in sentences(4000) for word in sentence.split()} == vocabulary()
    assert 40 <= len(vocabulary()) <= 60


def test_digit_strings_have_two_to_five_digits_and_are_every_second_sentence() -> None:
    drawn = [sentence.split() for sentence in sentences(4000)]
    strings = [words for words in drawn if set(words) <= set(DIGITS)]
    assert {len(words) for words in strings} == {2, 3, 4, 5}
    # Five standard deviations of a binomial share.
    assert len(strings) / 4000 == pytest.approx(0.5, abs=5 * (0.5 * 0.5 / 4000) ** 0.5)


def test_every_slot_of_a_command_has_fillers() -> None:
    used = {slot for command in COMMANDS for slot in re.findall(r"\{(\w+)\}", command)}
    assert used == set(SLOTS)


def test_the_same_generator_gives_the_same_sentences() -> None:
    assert sentences(50, seed=3) == sentences(50, seed=3) != sentences(50, seed=4)
