"""Small folders in the layouts of published corpora for tests: tones with a few words, a tone a speaker."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

SECONDS = 0.6
WORDS = ("Yes, I do!", "no", "Turn it on", "stop", "go")
TRAIN, HELD_OUT, EACH = 4, 2, 3
"""Speakers of the training and of each held-out set, and utterances of each."""


def tone(speaker: int, number: int, rate: int = 16_000, channels: int = 1, seconds: float = SECONDS) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    mono = 0.3 * np.sin(2 * np.pi * (200 + 40 * speaker + 7 * number) * time)
    return mono if channels == 1 else np.repeat(mono[:, None], channels, axis=1)


def write(path: Path, audio: np.ndarray, rate: int = 16_000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {".sph": {"format": "NIST", "subtype": "PCM_16"}, ".mp3": {"format": "MP3"}, ".ogg": {"format": "OGG", "subtype": "VORBIS"}}
    soundfile.write(path, audio, rate, **kinds.get(path.suffix, {}))


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def people(name: str) -> range:
    """Return the numbers of the speakers of a set: no two sets have one in common."""
    return {"train": range(TRAIN), "dev": range(50, 50 + HELD_OUT), "test": range(80, 80 + HELD_OUT)}[name]


def text(speaker: int, number: int) -> str:
    return WORDS[(speaker + number) % len(WORDS)]


def librispeech(folder: Path) -> Path:
    """Write `train-clean-100`, `train-clean-360`, `train-other-500`, `dev-clean` and `test-clean`."""
    lines = ["; ID | SEX | SUBSET | MINUTES | NAME"]
    shifts = {"train-clean-100": 0, "train-clean-360": 20, "train-other-500": 30, "dev-clean": 0, "test-clean": 0}
    for subset, shift in shifts.items():
        for speaker in (p + shift for p in people(subset.partition("-")[0])):
            lines.append(f"{speaker:<4} | F | {subset:<16} | 0.03 | Some | Body")
            chapter = folder / subset / str(speaker) / "7"
            transcript = []
            for n in range(EACH):
                write(chapter / f"{speaker}-7-{n:04}.flac", tone(speaker, n))
                transcript.append(f"{speaker}-7-{n:04} {text(speaker, n).upper()}")
            write_text(chapter / f"{speaker}-7.trans.txt", *transcript)
    write_text(folder / "SPEAKERS.TXT", *lines)
    return folder


def common_voice(folder: Path) -> Path:
    """Write a release with one language, 32 kHz mp3."""
    for name in ("train", "dev", "test"):
        rows = ["client_id\tpath\tsentence_id\tsentence\tup_votes\tlocale\tsegment"]
        for speaker in people(name):
            for n in range(EACH):
                clip = f"common_voice_en_{speaker:02}{n}.mp3"
                write(folder / "en" / "clips" / clip, tone(speaker, n, 32_000), 32_000)
                rows.append(f'{speaker:064x}\t{clip}\ts{n}\t"{text(speaker, n)}\t2\ten\t')
        write_text(folder / "en" / f"{name}.tsv", *rows)
    return folder


def speech_commands(folder: Path) -> Path:
    """Write a folder a word, the two lists and some background noise."""
    lists: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for name, paths in lists.items():
        for speaker in people(name):
            for n in range(EACH):
                path = f"{('yes', 'no', 'stop')[n]}/{speaker:08x}_nohash_{n}.wav"
                write(folder / path, tone(speaker, n))
                paths.append(path)
    write(folder / "_background_noise_" / "running_tap.wav", tone(0, 0, seconds=2))
    write_text(folder / "validation_list.txt", *lists["dev"])
    write_text(folder / "testing_list.txt", *lists["test"])
    return folder


def tedlium(folder: Path) -> Path:
    """Write `legacy`, a talk a speaker, with a segment that is not scored."""
    for name in ("train", "dev", "test"):
        for speaker in people(name):
            talk, place = f"Speaker{speaker}_2010X", folder / "legacy" / name
            write(place / "sph" / f"{talk}.sph", np.concatenate([tone(speaker, n, seconds=1.0) for n in range(EACH + 1)]))
            lines = [f"{talk} 1 {talk} {n}.10 {n}.70 <o,f0,female> it 's {text(speaker, n).lower()} <unk> {{SMACK}}" for n in range(EACH)]
            lines.append(f"{talk} 1 inter_segment_gap {EACH}.00 {EACH}.90 <o,,unknown> ignore_time_segment_in_scoring")
            write_text(place / "stm" / f"{talk}.stm", *lines)
    return folder


def voxpopuli(folder: Path) -> Path:
    """Write `transcribed_data` with one language."""
    place = folder / "transcribed_data" / "en"
    for name in ("train", "dev", "test"):
        rows = ["id\traw_text\tnormalized_text\tspeaker_id\tsplit\tgender"]
        for speaker in people(name):
            for n in range(EACH):
                key = f"20{10 + n}0203-0900-PLENARY-{speaker}-en_20100203-09:0{n}:00_{n}"
                write(place / key[:4] / f"{key}.ogg", tone(speaker, n))
                rows.append(f"{key}\t\t{text(speaker, n).lower()}\t{1000 + speaker}\t{name}\tmale")
        write_text(place / f"asr_{name}.tsv", *rows)
    return folder


def manifest(folder: Path) -> Path:
    """Write a manifest with a split by speaker."""
    rows = ["speaker,path,text,split,language"]
    for name in ("train", "test"):
        for speaker in people(name):
            for n in range(EACH):
                path = f"clips/{speaker}-{n}.wav"
                write(folder / path, tone(speaker, n))
                rows.append(f'{speaker},{path},"{text(speaker, n)}",{name},en')
    write_text(folder / "manifest.csv", *rows)
    return folder


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "librispeech": librispeech,
    "common_voice": common_voice,
    "speech_commands": speech_commands,
    "tedlium": tedlium,
    "voxpopuli": voxpopuli,
    "manifest": manifest,
}
"""How each layout is written."""
