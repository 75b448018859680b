"""A folder in the layout of Tux Paint's stamps, of tones, for tests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000


def write_stamp(folder: Path, name: str, texts: Mapping[str, str], seconds: float = 0.6) -> None:
    """Write `NAME.txt` and a recording of each language's text, which differs from all others'."""
    place = folder / f"{name}.txt"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("In English.\n" + "".join(f"{language}.utf8={text}\n" for language, text in texts.items()), encoding="utf-8")
    time = np.arange(round(seconds * RATE)) / RATE
    for language, text in texts.items():
        pitch = 200 + sum((i + 1) * ord(c) for i, c in enumerate(f"{name}{language}{text}")) % 3000
        path = place.with_name(f"{place.stem}_desc_{language}.ogg")
        soundfile.write(path, 0.5 * np.sin(2 * np.pi * pitch * time), RATE, format="OGG", subtype="VORBIS")


def write_stamps(folder: Path, each: int = 24, languages: tuple[str, ...] = ("fr", "ru")) -> Path:
    """Write `each` stamps with a text in each language, below the folder of the installed package, and return `folder`."""
    letters = {"fr": "abcdéfgêij", "ru": "абвгдежзий"}
    for i in range(each):
        texts = {code: f"{letters[code][i // 10]}{letters[code][i % 10]} {letters[code][-1]}" for code in languages}
        write_stamp(folder / "usr/share/tuxpaint/stamps", f"animals/n{i:02d}", texts)
    return folder
