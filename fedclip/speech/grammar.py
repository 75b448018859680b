"""A small grammar of English sentences: digit strings and household commands, of a-z, space and apostrophe only.

    sentence := digits | command
    digits   := two to six of zero .. nine
    command  := one of COMMANDS, each {slot} replaced by one of SLOTS[slot]
    {number} := a whole number 1 .. 59 in words ("twenty five")

Two sentences in five are digit strings; all commands are equally likely, and so are all fillers of a slot.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
_TENS = ("twenty", "thirty", "forty", "fifty")

COMMANDS = (
    "turn {switch} the {room} {device}",
    "turn {switch} the {device}",
    "set the {clock} to {number} {unit}",
    "set the {clock} to {number} {unit}",
    "make the {room} {warmth}",
    "call {person}",
    "send a message to {person}",
    "remind me to call {person} {day}",
    "play {music}",
    "what's the weather {day}",
    "what time is it",
    "where's my {thing}",
    "don't {move} the {opening}",
    "{move} the {opening}",
    "volume {level}",
)

SLOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "switch": ("on", "off"),
        "room": ("kitchen", "bedroom", "bathroom", "garden", "hall"),
        "device": ("light", "lamp", "heater", "fan", "radio"),
        "clock": ("timer", "alarm"),
        "unit": ("seconds", "minutes", "hours"),
        "warmth": ("warmer", "colder", "brighter"),
        "person": ("home", "mother", "father", "anna", "peter", "doctor green"),
        "music": ("some music", "the next song", "the news", "it again"),
        "day": ("today", "tonight", "tomorrow", "on monday", "on friday"),
        "thing": ("phone", "key", "coffee"),
        "move": ("open", "close", "lock"),
        "opening": ("front door", "window", "garage"),
        "level": ("up", "down", "off"),
    }
)
"""What may stand in each slot of a command; {number} is drawn by `spell_number` instead."""


def spell_number(number: int) -> str:
    """Return a whole number from 0 to 59 in words.

    >>> spell_number(25), spell_number(40), spell_number(7)
    ('twenty five', 'forty', 'seven')

    Raises:
        ValueError: the number is outside 0 .. 59.
    """
    if not 0 <= number < 60:
        raise ValueError(f"Expected a number from 0 to 59, got {number}; the grammar knows no words beyond fifty nine.")
    if number < 10:
        return DIGITS[number]
    if number < 20:
        return _TEENS[number - 10]
    tens = _TENS[number // 10 - 2]
    return f"{tens} {DIGITS[number % 10]}" if number % 10 else tens


def draw_sentence(rng: np.random.Generator) -> str:
    """Return a sentence of the grammar, one to ten words long."""
    if rng.random() < 0.4:
        return " ".join(DIGITS[digit] for digit in rng.integers(0, 10, size=rng.integers(2, 7)))
    command = COMMANDS[rng.integers(len(COMMANDS))]
    fillers = {slot: words[rng.integers(len(words))] for slot, words in SLOTS.items() if f"{{{slot}}}" in command}
    return command.format(number=spell_number(int(rng.integers(1, 60))), **fillers)


def vocabulary() -> frozenset[str]:
    """Return every word that a sentence may have."""
    texts = [*DIGITS, *_TEENS, *_TENS, *(filler for words in SLOTS.values() for filler in words)]
    texts += [" ".join(word for word in command.split() if "{" not in word) for command in COMMANDS]
    return frozenset(word for text in texts for word in text.split())
