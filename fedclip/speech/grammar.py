"""A small grammar of English sentences: digit strings and household commands, of a-z, space and apostrophe only.

    sentence := digits | command
    digits   := two to five of zero .. nine
    command  := one of COMMANDS, each {slot} replaced by one of SLOTS[slot]
    {number} := one of one .. nine

Every second sentence is a digit string; all commands are equally likely, and so are all fillers of a slot.
"""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

COMMANDS = (
    "turn {switch} the {room} {device}",
    "turn {switch} the {device}",
    "set the {clock} to {number} {unit}",
    "call {person}",
    "play {music}",
    "what time is it",
    "where's my {thing}",
    "{move} the {opening}",
    "don't {move} the {opening}",
    "volume {level}",
)

SLOTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "switch": ("on", "off"),
        "room": ("kitchen", "bedroom", "garden"),
        "device": ("light", "heater", "radio"),
        "clock": ("timer", "alarm"),
        "number": DIGITS[1:],
        "unit": ("minutes", "hours"),
        "person": ("home", "mother", "anna", "peter"),
        "music": ("some music", "the news"),
        "thing": ("phone", "key"),
        "move": ("open", "close"),
        "opening": ("door", "window"),
        "level": ("up", "down"),
    }
)
"""What may stand in each slot of a command."""


def draw_sentence(rng: np.random.Generator) -> str:
    """Return a sentence of the grammar, one to ten words long."""
    if rng.random() < 0.5:
        return " ".join(DIGITS[digit] for digit in rng.integers(0, 10, size=rng.integers(2, 6)))
    command = COMMANDS[rng.integers(len(COMMANDS))]
    fillers = {slot: words[rng.integers(len(words))] for slot, words in SLOTS.items() if f"{{{slot}}}" in command}
    return command.format(**fillers)


def vocabulary() -> frozenset[str]:
    """Return every word that a sentence may have."""
    texts = [*DIGITS, *(filler for words in SLOTS.values() for filler in words)]
    texts += [" ".join(word for word in command.split() if "{" not in word) for command in COMMANDS]
    return frozenset(word for text in texts for word in text.split())
