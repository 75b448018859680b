"""Tests of recorded speech: manifests, connected digits, and what is wrong with files."""

import csv
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fedclip.speech.build import build_corpus
from fedclip.speech.corpus import SAMPLE_RATE, Corpus
from fedclip.speech.digits import SpokenDigitsCorpus
from fedclip.speech.errors import CorpusError
from fedclip.speech.grammar import DIGITS
from fedclip.speech.index import Shelf
from fedclip.speech.options import ManifestOptions, SpokenDigitsOptions
from fedclip.speech.recorded import RecordedCorpus
from fedclip.speech.recordings import Recording, read
from tests.speech_folder import VOICES, spoken_digits, write_spoken_digits

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spoken_digits(tmp_path_factory.mktemp("digits"))


def tone(seconds: float = 0.3, rate: int = SAMPLE_RATE, channels: int = 1) -> np.ndarray:
    time = np.arange(round(seconds * rate)) / rate
    return np.repeat(0.5 * np.sin(2 * np.pi * 440 * time)[:, None], channels, axis=1)


def write_manifest(folder: Path, rows: Rows, name: str = "manifest.csv", audio: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows if audio else []:
        path = folder / row.get("path", "x.wav")
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone(), SAMPLE_RATE)
    return folder


def many_rows(speakers: int = 5, each: int = 10) -> Rows:
    return [
        {"speaker": f"s{s}", "path": f"clips/{s}-{u}.wav", "text": f"Say it {'again ' * u}"} for s in range(speakers) for u in range(each)
    ]


def open_manifest(folder: Path, options: ManifestOptions | None = None, population: int | None = None) -> RecordedCorpus:
    cache = folder.parent / f"{folder.name}-cache"
    corpus = build_corpus(options or ManifestOptions(), population=population, data_dir=folder, seed=1, cache_dir=cache)
    assert isinstance(corpus, RecordedCorpus)
    return corpus


def all_texts(corpus: Corpus, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    train = [u.text for s in range(corpus.train_speakers) for u in corpus.train(s, rng)]
    return train, [u.text for s in range(corpus.held_out_speakers) for u in corpus.held_out(s)]


def listed(shelf: Shelf) -> set[Path]:
    return {recording.path for recording in shelf.recordings(shelf.chosen)}


def recording(path: Path) -> Recording:
    return Recording(path, "x", path.stat().st_size)


# Reading files


@pytest.mark.parametrize(
    ("rate", "channels", "name"), [(8000, 1, "a.wav"), (44_100, 2, "a.flac"), (16_000, 2, "a.wav"), (48_000, 1, "a.wav")]
)
def test_any_rate_and_channels_become_16_khz_mono_float32(tmp_path: Path, rate: int, channels: int, name: str) -> None:
    soundfile.write(tmp_path / name, tone(0.5, rate, channels), rate)
    audio = read(recording(tmp_path / name))
    assert audio.dtype == np.float32
    assert audio.shape == (8000,)
    # Away from the ends, where the resampling filter sees the cut.
    np.testing.assert_allclose(audio[200:-200], tone(0.5)[200:-200, 0], atol=0.01)


def test_channels_are_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([np.full(100, 0.5), np.full(100, -0.1)], axis=1), SAMPLE_RATE)
    np.testing.assert_allclose(read(recording(tmp_path / "a.wav")), 0.2, atol=1e-4)


def no_audio(path: Path) -> None:
    path.write_text("not audio at all")


def no_samples(path: Path) -> None:
    soundfile.write(path, tone(0), SAMPLE_RATE)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def no_file(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (no_audio, "no readable recording"),
        (no_samples, "it has no samples"),
        (cut_short, "bytes are missing"),
        (no_bytes, "the file is empty"),
        (no_file, "there is no such file"),
        (a_folder, "there is no such file"),
    ],
)
def test_a_bad_file_is_named_when_the_corpus_is_built(tmp_path: Path, damage: object, cause: str) -> None:
    folder = write_manifest(tmp_path, many_rows())
    damage(folder / "clips/3-4.wav")  # type: ignore[operator]
    with pytest.raises(CorpusError, match=rf"3-4\.wav.*{cause}.*(replace|put|leave)"):
        open_manifest(folder)


def test_a_file_that_goes_bad_later_is_named_when_read(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, many_rows(speakers=1))
    corpus = open_manifest(folder)
    for path in (folder / "clips").iterdir():
        no_audio(path)
    utterances = corpus.train(0, np.random.default_rng(0))
    assert utterances
    for utterance in utterances:
        assert re.search(r"0-\d\.wav is no readable recording", utterance.fault)
        assert not len(utterance.audio)


def test_samples_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([0.1, np.nan]), SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(CorpusError, match="no numbers"):
        read(recording(tmp_path / "a.wav"))


# Manifests


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.tsv"])
def test_a_manifest_with_a_split_is_read_as_it_says(tmp_path: Path, name: str) -> None:
    rows = [
        {"split": "train", "speaker": "bob", "path": "b1.wav", "text": "Well, hello there!", "age": "44"},
        {"split": "test", "speaker": "bob", "path": "b2.wav", "text": "DON\u2019T go", "age": "44"},
        {"split": "train", "speaker": "ann", "path": "deep/a1.wav", "text": "Caf\u00e9 na\u00efve", "age": ""},
    ]
    corpus = open_manifest(write_manifest(tmp_path, rows, name))
    assert (corpus.train_speakers, corpus.held_out_speakers, corpus.cacheable) == (2, 1, True)
    assert all_texts(corpus, np.random.default_rng(0)) == (["Caf\u00e9 na\u00efve", "Well, hello there!"], ["DON\u2019T go"])
    assert corpus.train_seconds(0) == pytest.approx(0.3)


def test_a_manifest_may_have_absolute_paths(tmp_path: Path) -> None:
    folder, outside = tmp_path / "data", tmp_path / "elsewhere" / "3.wav"
    rows = [*good(path=str(folder / "1.wav")), {"speaker": "a", "path": str(outside), "text": "three", "split": "train"}]
    corpus = open_manifest(write_manifest(folder, rows))
    assert listed(corpus.trained) == {folder / "1.wav", outside}
    assert all(u.text in ("one", "three") and len(u.audio) for u in corpus.train(0, np.random.default_rng(0)))
    rows[1]["path"] = "1.wav"
    with pytest.raises(CorpusError, match=r"line 3: 1\.wav is already listed at .*line 2"):
        open_manifest(write_manifest(folder, rows))


def test_utterances_are_held_out_by_name_alone(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, many_rows(speakers=20, each=20))
    corpus = open_manifest(folder, ManifestOptions(hold_out="utterances", held_out_fraction=0.2))
    train, held_out = listed(corpus.trained), listed(corpus.reserved)
    assert not train & held_out
    assert len(train | held_out) == 400
    # Five standard deviations of a binomial share.
    assert len(held_out) / 400 == pytest.approx(0.2, abs=5 * (0.16 / 400) ** 0.5)
    write_manifest(folder, many_rows(speakers=20, each=10), audio=False)
    fewer = open_manifest(folder, corpus.options)
    assert listed(fewer.reserved) < held_out


def test_whole_speakers_are_held_out(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, many_rows(speakers=30, each=2))
    corpus = open_manifest(folder, ManifestOptions(hold_out="speakers", held_out_fraction=0.3))
    assert not set(corpus.trained.names) & set(corpus.reserved.names)
    assert len(corpus.trained) + len(corpus.reserved) == 30
    assert 0 < len(corpus.reserved) < 20


def test_a_limit_draws_other_utterances_each_round(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, many_rows(speakers=1, each=20))
    corpus = open_manifest(folder, ManifestOptions(utterances=4))
    rounds = [tuple(u.text for u in corpus.train(0, np.random.default_rng(seed))) for seed in (0, 1, 0)]
    assert not corpus.cacheable
    assert [len(set(texts)) for texts in rounds] == [4, 4, 4]
    assert rounds[0] == rounds[2] != rounds[1]
    assert corpus.train_seconds(0) == pytest.approx(4 * 0.3, rel=0.01)


def test_the_population_takes_the_first_speakers(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, many_rows())
    everyone, three = open_manifest(folder), open_manifest(folder, population=3)
    assert (everyone.train_speakers, three.train_speakers) == (5, 3)
    assert three.held_out_speakers == everyone.held_out_speakers
    for population in (0, 6):
        with pytest.raises(CorpusError, match=f"population is {population}.*has 5 training speakers"):
            open_manifest(folder, population=population)


def test_the_recipe_changes_with_the_files_and_options(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, many_rows())
    recipe = open_manifest(folder).recipe
    assert open_manifest(folder).recipe == recipe
    assert open_manifest(folder, ManifestOptions(held_out_fraction=0.3)).recipe != recipe
    soundfile.write(folder / "clips/0-0.wav", tone(0.4), SAMPLE_RATE)
    assert open_manifest(folder).recipe != recipe


def test_a_corpus_survives_pickling(tmp_path: Path) -> None:
    corpus = open_manifest(write_manifest(tmp_path, many_rows()))
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.recipe == corpus.recipe
    assert [u.text for u in copy.held_out(0)] == [u.text for u in corpus.held_out(0)]


def good(**change: str) -> Rows:
    return [
        {"speaker": "a", "path": "1.wav", "text": "one", "split": "train", **change},
        {"speaker": "a", "path": "2.wav", "text": "two", "split": "test"},
    ]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "a", "path": "1.wav"}], r"lacks the columns speaker, text \(it has: name, path\)"),
        (good(split="dev"), "line 2: the split is 'dev'; expected 'train' or 'test'"),
        (good(speaker=""), "line 2: the speaker is empty"),
        (good(path=""), "line 2: the path is empty"),
        (good(text=" "), "line 2: the text is empty"),
        (good(path="2.wav"), "line 3: 2.wav is already listed at .*line 2"),
        (good(split="test"), "left without training recordings"),
    ],
)
def test_a_wrong_manifest_is_explained(tmp_path: Path, rows: Rows, message: str) -> None:
    folder = write_manifest(tmp_path / "data", good())
    write_manifest(folder, rows, audio=False)
    with pytest.raises(CorpusError, match=message):
        open_manifest(folder)


def test_a_manifest_with_broken_lines_or_letters_is_explained(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, good())
    manifest = folder / "manifest.csv"
    manifest.write_text("speaker,path,text\na,1.wav,one, two\n")
    with pytest.raises(CorpusError, match="line 2: too many or too few values"):
        open_manifest(folder)
    manifest.write_bytes("speaker,path,text\na,1.wav,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(CorpusError, match="not UTF-8"):
        open_manifest(folder)
    manifest.write_text("")
    with pytest.raises(CorpusError, match="lacks the columns speaker, path, text"):
        open_manifest(folder)
    manifest.unlink()
    with pytest.raises(CorpusError, match=r"expected a manifest\.csv or manifest\.tsv"):
        open_manifest(folder)


def test_a_split_that_is_not_there_is_explained(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, many_rows())
    with pytest.raises(CorpusError, match="lacks the column 'split'"):
        open_manifest(folder, ManifestOptions(hold_out="split"))


def test_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="data_dir is not set"):
        build_corpus(ManifestOptions(), population=None, data_dir=None, seed=1)
    for options in (ManifestOptions(), SpokenDigitsOptions()):
        with pytest.raises(CorpusError, match=r"There is no folder .*nowhere.*data_dir"):
            build_corpus(options, population=None, data_dir=tmp_path / "nowhere", seed=1)


# Spoken digits


def test_a_recording_that_no_listing_has_is_named_without_a_line(tmp_path: Path) -> None:
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "0_ann_0.wav").touch()
    with pytest.raises(CorpusError, match=r"^\S*0_ann_0\.wav: \S*0_ann_0\.wav: the file is empty"):
        SpokenDigitsCorpus.open(SpokenDigitsOptions(), tmp_path, seed=1)


def test_digits_are_joined_by_speaker_and_differ_from_round_to_round(digits: Path) -> None:
    corpus = build_corpus(SpokenDigitsOptions(digits=(2, 4), utterances=5), population=None, data_dir=digits, seed=1)
    assert corpus.train_speakers == corpus.held_out_speakers == 6
    assert not corpus.cacheable
    rounds = [corpus.train(2, np.random.default_rng(seed)) for seed in (0, 1, 0)]
    assert [u.text for u in rounds[0]] == [u.text for u in rounds[2]] != [u.text for u in rounds[1]]
    for utterance in rounds[0]:
        words = utterance.text.split()
        assert set(words) <= set(DIGITS)
        assert 2 <= len(words) <= 4
        assert 0.15 * len(words) < len(utterance.audio) / SAMPLE_RATE < 2.5 * len(words)
        assert utterance.audio.dtype == np.float32
        assert 0 < np.abs(utterance.audio).max() <= 1


def test_the_published_test_split_is_held_out_and_each_recording_heard_once(digits: Path) -> None:
    corpus = SpokenDigitsCorpus.open(SpokenDigitsOptions(), digits, seed=1)
    train, held_out = listed(corpus.trained), listed(corpus.reserved)
    assert not train & held_out
    assert {path.stem.split("_")[2] for path in held_out} == {"0", "1", "2", "3", "4"}
    assert not {path.stem.split("_")[2] for path in train} & {"0", "1", "2", "3", "4"}
    for speaker in range(corpus.held_out_speakers):
        utterances = corpus.held_out(speaker)
        words = [word for utterance in utterances for word in utterance.text.split()]
        assert sorted(words) == sorted(DIGITS * 5)
        assert [u.text for u in corpus.held_out(speaker)] == [u.text for u in utterances]
    other = SpokenDigitsCorpus.open(SpokenDigitsOptions(), digits, seed=2)
    assert [u.text for u in other.held_out(0)] != [u.text for u in corpus.held_out(0)]
    assert other.recipe != corpus.recipe


def test_a_whole_speaker_is_held_out(digits: Path) -> None:
    everyone = SpokenDigitsCorpus.open(SpokenDigitsOptions(), digits, seed=1)
    name = everyone.trained.names[3]
    corpus = SpokenDigitsCorpus.open(SpokenDigitsOptions(hold_out=name), digits, seed=1)
    assert corpus.reserved.names == (name,)
    assert (corpus.train_speakers, corpus.held_out_speakers) == (5, 1)
    assert name not in corpus.trained.names
    assert {path.stem.split("_")[1] for path in listed(corpus.reserved)} == {name}
    with pytest.raises(CorpusError, match=rf"no such speaker; choose 'recordings' or one of .*{name}"):
        SpokenDigitsCorpus.open(SpokenDigitsOptions(hold_out="nobody"), digits, seed=1)


def test_seconds_are_about_right(digits: Path) -> None:
    corpus = SpokenDigitsCorpus.open(SpokenDigitsOptions(utterances=8), digits, seed=1)
    for speaker in range(corpus.train_speakers):
        rounds = [sum(len(u.audio) for u in corpus.train(speaker, np.random.default_rng(seed))) / SAMPLE_RATE for seed in range(4)]
        assert corpus.train_seconds(speaker) == pytest.approx(np.mean(rounds), rel=0.3)


def test_no_recording_is_used_twice_a_round(tmp_path: Path) -> None:
    folder = write_spoken_digits(tmp_path, speakers=1, per_digit=6)
    corpus = SpokenDigitsCorpus.open(SpokenDigitsOptions(digits=(2, 3), utterances=50), folder, seed=1)
    words = [word for u in corpus.train(0, np.random.default_rng(0)) for word in u.text.split()]
    assert sorted(words) == sorted(DIGITS)


def test_the_pause_lies_between_digits(tmp_path: Path) -> None:
    folder = write_spoken_digits(tmp_path, speakers=1, per_digit=6)
    lengths = [
        sum(len(u.audio) for u in SpokenDigitsCorpus.open(SpokenDigitsOptions(digits=(5, 5), pause=(p, p)), folder, 1).held_out(0))
        for p in (0.0, 0.5)
    ]
    # Fifty recordings in tens of five: four pauses of 0.5 s in each of ten utterances.
    assert lengths[1] - lengths[0] == 10 * 4 * 8000


def test_a_generated_folder_is_distinct_and_repeatable(tmp_path: Path) -> None:
    one, two = write_spoken_digits(tmp_path / "1", 2, 6), write_spoken_digits(tmp_path / "2", 2, 6)
    names = sorted(path.name for path in (one / "recordings").iterdir())
    assert len(names) == 2 * 10 * 6
    assert {name.split("_")[1] for name in names} == {VOICES[0].name, VOICES[1].name}
    contents = [(one / "recordings" / name).read_bytes() for name in names]
    assert contents == [(two / "recordings" / name).read_bytes() for name in names]
    assert len(set(contents)) == len(names)
    durations = [soundfile.info(one / "recordings" / name).duration for name in names]
    assert min(durations) > 0.2
    assert max(durations) < 1


def test_a_folder_that_is_not_of_digits_is_explained(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"There is no folder .*recordings"):
        SpokenDigitsCorpus.open(SpokenDigitsOptions(), tmp_path, 1)
    (tmp_path / "recordings").mkdir()
    with pytest.raises(CorpusError, match=r"has no \.wav files"):
        SpokenDigitsCorpus.open(SpokenDigitsOptions(), tmp_path, 1)
    soundfile.write(tmp_path / "recordings/hello.wav", tone(), SAMPLE_RATE)
    with pytest.raises(CorpusError, match=r"hello\.wav is not named"):
        SpokenDigitsCorpus.open(SpokenDigitsOptions(), tmp_path, 1)


def test_speakers_that_do_not_exist_are_refused(digits: Path) -> None:
    corpus = SpokenDigitsCorpus.open(SpokenDigitsOptions(), digits, 1)
    with pytest.raises(IndexError, match="training speaker from 0 to 5, got 6"):
        corpus.train(6, np.random.default_rng(0))
    with pytest.raises(IndexError, match="held-out speaker from 0 to 5, got -1"):
        corpus.held_out(-1)
