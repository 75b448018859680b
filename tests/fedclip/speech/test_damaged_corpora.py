"""What damage to a corpus does: what is wrong with a listing is an error with its place, what is wrong with a recording is counted."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fedclip.asr.options import AsrOptions
from fedclip.tasks.asr import LeftOut, build_asr
from tests.corpora_folders import EACH, FOLDERS, tone, write

LIBRI, CV, TED = "train-clean-100/2/7", "en", "legacy/train"
CV_TRAIN, VOX_TRAIN = "en/train.tsv", "transcribed_data/en/asr_train.tsv"
NOBODY = "nobody is named as the speaker"
FLAC, TRANS = f"{LIBRI}/2-7-0001.flac", f"{LIBRI}/2-7.trans.txt"
CLIP = "en/clips/common_voice_en_021.mp3"
SPH, STM = f"{TED}/sph/Speaker2_2010X.sph", f"{TED}/stm/Speaker2_2010X.stm"
DURATIONS, MILLISECONDS = "en/clip_durations.tsv", r"clip_durations\.tsv, line 3: expected milliseconds from 0"
Damage = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """What is done to a file of a corpus, and what comes of it: an error, a count at the start, or one when it is read."""

    kind: str
    file: str
    damage: Damage
    error: str = ""
    skipped: str = ""
    left_out: str = ""
    options: dict[str, object] = field(default_factory=dict)
    count: int = 1
    """Utterances that are left out."""
    lost: int | None = None
    """Of them, those that would be trained on; None: all."""


def nothing(path: Path) -> None:
    pass


def replaced(old: str, new: str, count: int = 1) -> Damage:
    def damage(path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert re.search(old, text), text
        path.write_text(re.sub(old, new, text, count=count), encoding="utf-8")

    return damage


def latin(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], "é".encode("latin-1"), *lines[1:]]))


def second_line_twice(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1]]), encoding="utf-8")


def unreadable(path: Path) -> None:
    path.unlink()
    path.symlink_to("/proc/self/mem")  # for root, too


def gone(path: Path) -> None:
    path.unlink()


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no sound" * 100)


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"sample_coding -s3 pcm", b"sample_coding -s26 pcm,embedded-shorten-v2.00", 1))


def copied(name: str) -> Damage:
    return lambda path: shutil.copy(path, path.with_name(name)) and None


def audio(samples: np.ndarray, rate: int = 16_000) -> Damage:
    return lambda path: soundfile.write(path, samples, rate, format="WAV", subtype="FLOAT")


def long_tone(path: Path) -> None:
    write(path, tone(1, 1, seconds=2.5))


def durations(value: str) -> Damage:
    return lambda path: path.write_text(f"clip\tduration[ms]\na.mp3\t600\nb.mp3\t{value}\n") and None


def eight_channels(path: Path) -> None:
    write(path, tone(2, 1, channels=8))


def other_rate(path: Path) -> None:
    write(path, tone(2, 1, 44_100), 44_100)


def listed_twice(path: Path) -> None:
    other = path.with_name("validation_list.txt")
    other.write_text(other.read_text() + path.read_text().splitlines()[0])


def semicolons(path: Path) -> None:
    path.write_text(path.read_text().replace("\t", ";"))


def held_out_too(path: Path) -> None:
    row = path.read_text().splitlines()[1]
    other = path.with_name("dev.tsv")
    other.write_text(other.read_text() + row.replace("common_voice_en_000", "common_voice_en_500x") + "\n")
    shutil.copy(path.parent / "clips" / "common_voice_en_000.mp3", path.parent / "clips" / "common_voice_en_500x.mp3")


CASES = {
    # Errors: what is wrong with a listing, or with what is asked for.
    "listing not UTF-8": Case("librispeech", TRANS, latin, error=r"2-7\.trans\.txt, line 2: not UTF-8"),
    "listing unreadable": Case("speech_commands", "testing_list.txt", unreadable, error=r"testing_list\.txt cannot be read"),
    "listing empty": Case("common_voice", CV_TRAIN, no_bytes, error=r"first line of .*train\.tsv lacks the columns client_id"),
    "column missing": Case("common_voice", f"{CV}/dev.tsv", replaced("sentence\t", "text\t"), error=r"dev\.tsv lacks the columns sentence"),
    "column missing in VoxPopuli": Case("voxpopuli", VOX_TRAIN, replaced("speaker_id", "who"), error="lacks .* speaker_id"),
    "text column missing": Case("voxpopuli", VOX_TRAIN, replaced("raw_text", "x"), error="lacks .* raw_text", options={"text": "raw_text"}),
    "row too short": Case("common_voice", CV_TRAIN, replaced("\ten\t\n", "\n"), error=r"train\.tsv, line 2: too many or too few"),
    "path empty": Case("common_voice", CV_TRAIN, replaced(r"common_voice_en_000\.mp3", ""), error="line 2: the path is empty"),
    "clip twice": Case("common_voice", CV_TRAIN, second_line_twice, error=r"line 14: .*already listed at .*train\.tsv, line 2"),
    "identifier twice": Case("librispeech", TRANS, second_line_twice, error=r"line 4: .*0001\.flac is already listed at .*line 2"),
    "identifier malformed": Case("librispeech", TRANS, replaced("2-7-0001", "2_7_1"), error="line 2: expected 2-<chapter>-<number>"),
    "identifier of another": Case("librispeech", TRANS, replaced("2-7-0001", "3-7-0001"), error="line 2: expected 2-<chapter>"),
    "identifier without year": Case("voxpopuli", VOX_TRAIN, replaced("20100203", "x100203"), error="line 2: .*begins with a year"),
    "in two lists": Case("speech_commands", "testing_list.txt", listed_twice, error=r"testing_list.*, line 1: .*validation_list.*, line 7"),
    "speaker of another set": Case(
        "librispeech", "SPEAKERS.TXT", replaced("(?m)^2 .*100 ", "2 | F | dev-clean"), error="speaker 2 of train-clean-100 in dev-clean"
    ),
    "line of speakers": Case("librispeech", "SPEAKERS.TXT", replaced("(?m)^3 .*", "three"), error=r"SPEAKERS\.TXT, line 5: expected ID"),
    "segment malformed": Case("tedlium", STM, replaced("0.70", "later"), error=r"Speaker2_2010X\.stm, line 1: expected TALK"),
    "segment not a number": Case("tedlium", STM, replaced("0.70", "nan"), error=r"Speaker2_2010X\.stm, line 1: .*seconds from 0"),
    "segment endless": Case("tedlium", STM, replaced("2.70", "inf"), error=r"Speaker2_2010X\.stm, line 3: .*seconds from 0"),
    "segment negative": Case("tedlium", STM, replaced("0.10", "-0.10"), error=r"Speaker2_2010X\.stm, line 1: .*seconds from 0"),
    "duration no number": Case("common_voice", DURATIONS, durations("nan"), error=f"{MILLISECONDS}, got 'nan'"),
    "duration endless": Case("common_voice", DURATIONS, durations("inf"), error=f"{MILLISECONDS}, got 'inf'"),
    "duration negative": Case("common_voice", DURATIONS, durations("-1"), error=f"{MILLISECONDS}, got '-1'"),
    "set unknown": Case("librispeech", TRANS, nothing, error="x: not in .*there are: dev-clean", options={"subsets": ("x",)}),
    "held-out set unknown": Case("tedlium", STM, nothing, error="held_out: eval: not in", options={"held_out": ("eval",)}),
    "language unknown": Case("common_voice", CLIP, nothing, error="languages: xx.*there are: en", options={"languages": ("xx",)}),
    "set twice": Case("common_voice", CLIP, nothing, error="none in common", options={"subsets": ("train",), "held_out": ("train",)}),
    # Counted at the start.
    "file missing": Case("librispeech", FLAC, gone, skipped="there is no such file"),
    "held-out file missing": Case("speech_commands", "yes/00000032_nohash_0.wav", gone, skipped="there is no such file", lost=0),
    "talk missing": Case("tedlium", SPH, gone, skipped="there is no such file", count=EACH),
    "file empty": Case("common_voice", CLIP, no_bytes, skipped="the file is empty"),
    "text empty": Case("librispeech", TRANS, replaced("(2-7-0001) .*", r"\1 "), skipped="there is no text"),
    "nobody speaks": Case("common_voice", CV_TRAIN, replaced("0{64}", ""), skipped=NOBODY),
    "speaker unknown": Case("voxpopuli", VOX_TRAIN, replaced("\t1002\t", "\tNone\t"), skipped="nobody is named as the speaker"),
    "not listed": Case("librispeech", FLAC, copied("2-7-0009.flac"), skipped="recording that no listing has", lost=0),
    "not named as published": Case(
        "speech_commands", "yes/00000002_nohash_0.wav", copied("a.wav"), skipped="not named as published", lost=0
    ),
    "segment backwards": Case("tedlium", STM, replaced(r"1\.10 1\.70", "1.70 1.10"), skipped="segment that ends before it begins"),
    "speaker held out": Case("common_voice", CV_TRAIN, held_out_too, skipped="the speaker is held out", count=EACH),
    # Counted when read.
    "no audio": Case("librispeech", FLAC, garbage, left_out="unreadable"),
    "FLAC cut short": Case("librispeech", FLAC, half, left_out="unreadable"),
    "mp3 cut short": Case("common_voice", CLIP, half, left_out="unreadable"),
    "WAV cut short": Case("speech_commands", "yes/00000002_nohash_0.wav", half, left_out="unreadable"),
    "talk cut short": Case("tedlium", SPH, half, left_out="unreadable"),
    "talk compressed": Case("tedlium", SPH, shorten, left_out="unreadable", count=EACH),
    "no samples": Case("librispeech", FLAC, audio(np.zeros(0)), left_out="unreadable"),
    "no numbers": Case("librispeech", FLAC, audio(np.array([0.1, np.nan] * 4000)), left_out="unreadable"),
    "infinite": Case("librispeech", FLAC, audio(np.array([0.1, np.inf] * 4000)), left_out="unreadable"),
    "a rate of 1": Case("librispeech", FLAC, audio(np.zeros(10_000), 1), left_out="unreadable"),
    "over-long": Case("librispeech", FLAC, long_tone, left_out="over_long"),
    "too short": Case("librispeech", FLAC, audio(tone(1, 1, seconds=0.03)), left_out="too_short"),
    "other characters": Case("librispeech", TRANS, replaced("(2-7-0001) .*", r"\1 ROUTE 66"), left_out="untranscribable"),
    # No damage at all.
    "8 channels": Case("librispeech", FLAC, eight_channels),
    "44.1 kHz": Case("librispeech", FLAC, other_rate),
    "semicolons": Case("voxpopuli", VOX_TRAIN, semicolons),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in FOLDERS.items()}


def load(folder: Path, case: Case, cache: Path) -> tuple[int, dict[str, int], dict[str, int], list[str]]:
    """Return how many utterances are trained on, what is left out at the start and when read, by cause, and what is said of it."""
    section = {"corpus": {"kind": case.kind, **case.options}, "features": {"n_mels": 20}}
    options = AsrOptions.model_validate(section | {"cache_dir": cache, "cache_mb": 0, "max_seconds": 2.0})
    task = build_asr(options, population=None, data_dir=folder, seed=1)
    users = [task.load_user(n, np.random.default_rng(0)) for n in range(task.users)]
    left_out = {name: sum(getattr(user.left_out, name) for user in users) for name in vars(LeftOut())}
    skipped = {cause: count for cause, (count, _) in task.skipped.items()}
    return sum(map(len, users)), skipped, left_out, [fault for user in users for fault in user.faults]


def more(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {cause: count - before.get(cause, 0) for cause, count in after.items() if count != before.get(cause, 0)}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_damage(intact: dict[str, Path], case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(intact[case.kind], folder)
    case.damage(folder / case.file)
    if case.error:
        with pytest.raises(ValueError, match=case.error):
            load(folder, case, tmp_path / "cache")
        return
    before = load(intact[case.kind], case, tmp_path / "cache")
    used, skipped, left_out, faults = load(folder, case, tmp_path / "cache")
    count = case.count if case.skipped or case.left_out else 0
    assert used == before[0] - (count if case.lost is None else case.lost)
    assert more(skipped, before[1]) == ({case.skipped: count} if case.skipped else {})
    assert more(left_out, before[2]) == ({case.left_out: count} if case.left_out else {})
    assert len(faults) == left_out["unreadable"]
    assert all(str(folder / case.file) in fault for fault in faults)
