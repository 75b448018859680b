"""Which characters each language is spelt with: one table, and what is folded before a text is looked up in it. No PyTorch here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

LATIN: Final = "abcdefghijklmnopqrstuvwxyz"

MARKS: Final = " '-"
"""What every language has beside its letters: the space, the apostrophe and the hyphen."""


@dataclass(frozen=True)
class Language:
    """How a language is spelt: lower-case letters in a fixed order, in Unicode's composed form (NFC).

    `folds` are characters that mean a letter of the language and are written otherwise, in lower or upper case; they are replaced
    before anything becomes lower case.
    """

    name: str
    letters: str
    folds: Mapping[str, str] = field(default_factory=dict)


LANGUAGES: Final[Mapping[str, Language]] = {
    "en": Language("English", LATIN),
    "be": Language("Belarusian", "абвгдеёжзійклмнопрстуўфхцчшыьэюя"),
    "bg": Language("Bulgarian", "абвгдежзийклмнопрстуфхцчшщъьюя"),
    "ca": Language("Catalan", LATIN + "àçèéíïòóúü·"),
    "cs": Language("Czech", LATIN + "áčďéěíňóřšťúůýž"),
    "da": Language("Danish", LATIN + "æøå"),
    "de": Language("German", LATIN + "äöüß"),
    "el": Language("Greek", "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ"),
    "eo": Language("Esperanto", LATIN + "ĉĝĥĵŝŭ"),
    "es": Language("Spanish", LATIN + "áéíñóúü"),
    "et": Language("Estonian", LATIN + "äõöüšž"),
    "fi": Language("Finnish", LATIN + "åäöšž"),
    "fr": Language("French", LATIN + "àâæçèéêëîïôùûüÿœ"),
    "gl": Language("Galician", LATIN + "áéíïñóúü"),
    "hr": Language("Croatian", LATIN + "čćđšž"),
    "hu": Language("Hungarian", LATIN + "áéíóöőúüű"),
    "id": Language("Indonesian", LATIN),
    "it": Language("Italian", LATIN + "àèéìíîòóùú"),
    "lt": Language("Lithuanian", LATIN + "ąčęėįšųūž"),
    "lv": Language("Latvian", LATIN + "āčēģīķļņšūž"),
    "nb": Language("Norwegian Bokmål", LATIN + "æøå"),
    "nl": Language("Dutch", LATIN + "áèéêëíïóöúü"),
    "nn": Language("Norwegian Nynorsk", LATIN + "æøå"),
    "pl": Language("Polish", LATIN + "ąćęłńóśźż"),
    "pt": Language("Portuguese", LATIN + "àáâãçéêíóôõúü"),
    # Cedillas are what fonts and keyboards had before the comma below was encoded.
    "ro": Language("Romanian", LATIN + "ăâîșț", {"ş": "ș", "Ş": "Ș", "ţ": "ț", "Ţ": "Ț"}),
    "ru": Language("Russian", "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"),
    "sk": Language("Slovak", LATIN + "áäčďéíĺľňóôŕšťúýž"),
    "sl": Language("Slovenian", LATIN + "čšž"),
    "sr": Language("Serbian (Cyrillic)", "абвгдђежзијклљмнњопрстћуфхцчџш"),
    "sv": Language("Swedish", LATIN + "åäöé"),
    "sw": Language("Swahili", LATIN),
    "tr": Language("Turkish", LATIN + "âçğıîöşûü", {"I": "ı", "İ": "i"}),
    "uk": Language("Ukrainian", "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя"),
}
"""The languages by their ISO 639-1 codes. Letters of the language itself only: what foreign words bring loses its accents."""


def code_of(tag: str) -> str:
    """Return the code of a language tag without region or variant: `code_of("sv-SE")` is "sv"."""
    return tag.replace("_", "-").split("-")[0].lower()
