"""Published corpora: each layout is found, indexed, read and trained on; who is held out; what is kept; what damage does."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from experiments.cli import app
from experiments.prepare import corpus_kind, read_experiment
from fedclip.asr.options import AsrOptions
from fedclip.speech.build import build_corpus
from fedclip.speech.errors import CorpusError
from fedclip.speech.options import LibriSpeechOptions, ListedOptions
from fedclip.speech.recorded import RecordedCorpus
from fedclip.speech.recordings import read, utterances
from fedclip.tasks.asr import build_asr
from tests.corpora_folders import EACH, FOLDERS, TRAIN, tone, write

SECTION: TypeAdapter[ListedOptions] = TypeAdapter(ListedOptions)
EXPERIMENT = Path(__file__).parents[3] / "experiments" / "quickstart.toml"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in FOLDERS.items()}


def open_corpus(folder: Path, kind: str, cache: Path, **options: object) -> RecordedCorpus:
    section = SECTION.validate_python({"kind": kind, **options})
    corpus = build_corpus(section, population=None, data_dir=folder, seed=1, cache_dir=cache)
    assert isinstance(corpus, RecordedCorpus)
    return corpus


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_layout_is_found_read_trained_on_and_evaluated(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    folder = folders[kind]
    assert corpus_kind(folder) == kind
    corpus = open_corpus(folder, kind, tmp_path / "cache")
    speakers = 3 * TRAIN if kind == "librispeech" else TRAIN
    assert corpus.train_speakers == speakers
    assert corpus.held_out_speakers == 2
    rng = np.random.default_rng(0)
    for utterance in (u for s in range(speakers) for u in corpus.train(s, rng)):
        assert len(utterance.audio) == pytest.approx(0.6 * 16_000, rel=0.02)
        assert np.abs(utterance.audio).max() == pytest.approx(0.3, rel=0.2)
        assert utterance.language == "en"
    assert sum(len(corpus.held_out(s)) for s in range(2)) == 2 * EACH
    assert corpus.train_seconds(0) == pytest.approx(EACH * 0.6, rel=0.1)

    keys = ["run.engine=process", f'task.cache_dir="{tmp_path / "cache"}"', "task.model.dim=16", "task.model.convolutions=1"]
    keys += ["task.model.mlp_dim=32", "task.features.n_mels=20", "local.steps=1", "evaluation.every=0"]
    arguments = ["run", str(EXPERIMENT), "--data-dir", str(folder), "--out", str(tmp_path / "run"), "--rounds", "2"]
    result = CliRunner().invoke(app, arguments + [part for key in keys for part in ("--set", key)])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["population"], summary["failed_users_total"], summary["eval_utterances"]) == (speakers, 0, 2 * EACH)


def texts(corpus: RecordedCorpus) -> list[str]:
    rng = np.random.default_rng(0)
    return [u.text for s in range(corpus.train_speakers) for u in corpus.train(s, rng)]


def test_texts_are_handed_out_as_published(folders: dict[str, Path], tmp_path: Path) -> None:
    assert texts(open_corpus(folders["common_voice"], "common_voice", tmp_path))[0] == '"Yes, I do!'
    assert texts(open_corpus(folders["librispeech"], "librispeech", tmp_path))[0] == "YES, I DO!"
    # Marks are no text, and endings are not apart.
    assert texts(open_corpus(folders["tedlium"], "tedlium", tmp_path))[0] == "it's yes, i do!"


def test_recordings_read_on_threads_are_those_read_one_after_another(folders: dict[str, Path], tmp_path: Path) -> None:
    shelf = open_corpus(folders["common_voice"], "common_voice", tmp_path).trained
    recordings = shelf.recordings(shelf.chosen)
    assert len(recordings) == TRAIN * EACH
    for utterance, recording in zip(utterances(recordings), recordings, strict=True):
        np.testing.assert_array_equal(utterance.audio, read(recording))


# Who trains and who is held out


@pytest.mark.parametrize("kind", FOLDERS)
def test_seed_federation_and_held_out_share_no_speaker(folders: dict[str, Path], kind: str, tmp_path: Path) -> None:
    parts = {name: open_corpus(folders[kind], kind, tmp_path, speakers=name, seed_fraction=0.4) for name in ("all", "seed", "federated")}
    names = {name: {*corpus.trained.names} for name, corpus in parts.items()}
    assert names["seed"]
    assert names["federated"]
    assert not names["seed"] & names["federated"]
    assert names["seed"] | names["federated"] == names["all"]
    held_out = {corpus.reserved.names for corpus in parts.values()}
    assert len(held_out) == 1
    assert not {*held_out.pop()} & names["all"]
    assert len({corpus.content for corpus in parts.values()}) == 1  # one index for all of them
    assert len({corpus.recipe for corpus in parts.values()}) == 3  # and features that are not mixed up


def test_sets_are_chosen_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    seed = open_corpus(folders["librispeech"], "librispeech", tmp_path, subsets=["train-clean-100"])
    rest = open_corpus(folders["librispeech"], "librispeech", tmp_path, subsets=["train-clean-360", "train-other-500"])
    test = open_corpus(folders["librispeech"], "librispeech", tmp_path, held_out=["test-clean"])
    assert (seed.train_speakers, rest.train_speakers, test.train_speakers) == (TRAIN, 2 * TRAIN, 3 * TRAIN)
    assert not {*seed.trained.names} & {*rest.trained.names}
    assert seed.reserved.names == rest.reserved.names == ("50", "51")
    assert test.reserved.names == ("80", "81")


def test_mini_librispeech_is_known_by_its_own_sets(tmp_path: Path) -> None:
    folder = FOLDERS["librispeech"](tmp_path / "data")
    for name, mini in (("train-clean-100", "train-clean-5"), ("dev-clean", "dev-clean-2")):
        (folder / name).rename(folder / mini)
    for name in ("train-clean-360", "train-other-500", "test-clean"):
        shutil.rmtree(folder / name)
    speakers = folder / "SPEAKERS.TXT"
    speakers.write_text(speakers.read_text().replace("train-clean-100", "train-clean-5").replace("dev-clean", "dev-clean-2"))
    (tmp_path / "unpacked").mkdir()
    folder = folder.rename(tmp_path / "unpacked" / "LibriSpeech")
    assert corpus_kind(folder) == corpus_kind(folder.parent) == "librispeech"
    corpus = open_corpus(folder.parent, "librispeech", tmp_path / "cache")
    assert (corpus.train_speakers, corpus.reserved.names) == (TRAIN, ("50", "51"))


@pytest.mark.parametrize(
    ("kind", "key", "values"),
    [
        ("librispeech", "subsets", ["train-clean-100", "train-clean-100"]),
        ("tedlium", "held_out", ["dev", "dev"]),
        ("tuxpaint_stamps", "languages", ["fr", "ru", "fr"]),
    ],
)
def test_a_set_or_a_language_that_is_named_twice_is_refused(kind: str, key: str, values: list[str]) -> None:
    with pytest.raises(ValueError, match=f"Expected each of {key} once, got {', '.join(values)}"):
        AsrOptions.model_validate({"languages": ["fr", "ru"], "corpus": {"kind": kind, key: values}})


def test_without_sets_a_share_of_the_speakers_is_held_out(tmp_path: Path) -> None:
    folder = FOLDERS["librispeech"](tmp_path / "data")
    for name in ("dev-clean", "test-clean"):
        shutil.rmtree(folder / name)
    corpus = open_corpus(folder, "librispeech", tmp_path / "cache", held_out_fraction=0.3)
    assert corpus.reserved.names
    assert not {*corpus.trained.names} & {*corpus.reserved.names}
    assert corpus.train_speakers + corpus.held_out_speakers == 3 * TRAIN
    shutil.rmtree(folder / "train-other-500")
    fewer = open_corpus(folder, "librispeech", tmp_path / "cache", held_out_fraction=0.3)
    assert {*fewer.trained.names} < {*corpus.trained.names}  # nobody changed sides


def test_a_person_is_one_user_whatever_the_talk_or_the_language(tmp_path: Path) -> None:
    talks = FOLDERS["tedlium"](tmp_path / "talks") / "legacy" / "train"
    for part, ending in (("stm", "stm"), ("sph", "sph")):
        shutil.copy(talks / part / f"Speaker1_2010X.{ending}", talks / part / f"Speaker1_2014.{ending}")
    stm = talks / "stm" / "Speaker1_2014.stm"
    stm.write_text(stm.read_text().replace("Speaker1_2010X", "Speaker1_2014"))
    corpus = open_corpus(tmp_path / "talks", "tedlium", tmp_path / "cache")
    assert corpus.train_speakers == TRAIN
    assert [len(corpus.trained.numbers(n)) for n in range(TRAIN)] == [EACH, 2 * EACH, EACH, EACH]

    release = FOLDERS["common_voice"](tmp_path / "release")
    shutil.copytree(release / "en", release / "fr")
    for listing in (release / "fr").glob("*.tsv"):
        listing.write_text(listing.read_text().replace("\ten\t", "\t\t").replace(".mp3", ""))  # as old releases have it
    (release / "fr" / "clip_durations.tsv").write_text("clip\tduration[ms]\ncommon_voice_en_000.mp3\t50000\n")
    both = open_corpus(release, "common_voice", tmp_path / "cache")
    french = open_corpus(release, "common_voice", tmp_path / "cache", languages=["fr"])
    assert both.train_speakers == french.train_speakers == TRAIN
    assert {u.language for u in both.train(0, np.random.default_rng(0))} == {"en", "fr"}
    assert {u.language for u in french.train(0, np.random.default_rng(0))} == {"fr"}
    assert french.train_seconds(0) == pytest.approx(50 + (EACH - 1) * 0.6, rel=0.1)


# Languages


def renamed(folder: Path, kind: str, name: str) -> Path:
    """Write a corpus whose one folder of a language has another name and no column that tells the language; return that folder."""
    place = FOLDERS[kind](folder) / ("en" if kind == "common_voice" else "transcribed_data/en")
    for listing in place.glob("*.tsv"):
        listing.write_text(listing.read_text().replace("locale", "x"))
    return place.rename(place.with_name(name))


@pytest.mark.parametrize("kind", ["common_voice", "voxpopuli"])
@pytest.mark.parametrize(
    ("name", "within", "told", "spoken"),
    [
        ("fr", False, "fr", ("fr",)),
        ("fr", True, "fr", ("fr",)),
        ("sv-SE", True, "sv-SE", ("sv",)),
        ("my-recordings", True, "", ("en",)),
        ("it-recordings", True, "", ("en",)),
        ("rm-sursilv", False, "rm-sursilv", ("en",)),
    ],
)
def test_the_folder_of_a_language_tells_it(tmp_path: Path, kind: str, name: str, within: bool, told: str, spoken: tuple[str, ...]) -> None:
    folder = renamed(tmp_path / "data", kind, name)
    folder = folder if within else tmp_path / "data"
    corpus = open_corpus(folder, kind, tmp_path / "cache")
    assert corpus.languages == ((told,) if told else ())
    assert {u.language for u in (*corpus.train(0, np.random.default_rng(0)), *corpus.held_out(0))} == {told}
    task = read_experiment(EXPERIMENT, [], folder).task
    assert isinstance(task, AsrOptions)
    assert task.languages == spoken
    both = read_experiment(EXPERIMENT, ['task.languages=["fr", "sv", "en"]'], folder).task
    assert isinstance(both, AsrOptions)
    assert both.languages == ("fr", "sv", "en")  # what is spoken is among them


def test_a_held_out_recording_that_cannot_be_read_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = FOLDERS["librispeech"](tmp_path / "data")
    for name in ("50/7/50-7-0001", "51/7/51-7-0000"):
        (folder / "dev-clean" / f"{name}.flac").write_bytes(b"no sound")
    sizes = {"dim": 16, "convolutions": 1, "mlp_dim": 32}
    section = {"corpus": {"kind": "librispeech"}, "features": {"n_mels": 20}, "model": sizes, "cache_dir": tmp_path / "cache"}
    task = build_asr(AsrOptions.model_validate(section), population=None, data_dir=folder, seed=1)
    counts = [task.evaluate(task.make_model().eval(), unit) for unit in (0, 1, 0)]
    assert [c["left_out"] for c in counts] == [1, 1, 1]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "50-7-0001.flac is no readable recording" in said


@pytest.mark.parametrize("name", ["train", "dev"])
def test_a_language_that_the_model_does_not_spell_is_refused_before_a_run(tmp_path: Path, name: str) -> None:
    folder = FOLDERS["common_voice"](tmp_path / "release")
    listing = folder / "en" / f"{name}.tsv"
    text = listing.read_text()
    listing.write_text(text.replace("\ten\t", "\tfr-CA\t", 1).replace("\ten\t", "\trm-sursilv\t", 1))
    options = AsrOptions.model_validate({"corpus": {"kind": "common_voice"}, "cache_dir": tmp_path / "cache"})
    with pytest.raises(CorpusError, match=r"in fr-CA, rm-sursilv.*add fr to task\.languages, and leave out rm-sursilv.*corpus\.languages"):
        build_asr(options, population=None, data_dir=folder, seed=1)
    listing.write_text(text.replace("\ten\t", "\tfr-CA\t", 1))
    with pytest.raises(CorpusError, match=r"in fr-CA, and the model spells en only; add fr to task\.languages\.$"):
        build_asr(options, population=None, data_dir=folder, seed=1)
    spelt = options.model_copy(update={"languages": ("en", "fr")})
    assert build_asr(spelt, population=None, data_dir=folder, seed=1).users == TRAIN


# The index


def opened(folder: Path, cache: Path, index: str = "") -> tuple[RecordedCorpus, set[str]]:
    done: dict[str, int] = {}
    corpus = build_corpus(
        LibriSpeechOptions(), population=None, data_dir=folder, seed=1, cache_dir=cache, index=index, watch=done.__setitem__
    )
    assert isinstance(corpus, RecordedCorpus)
    return corpus, {*done}


NEW, KEPT, TRUSTED = {"looking at files", "indexing utterances"}, {"looking at files"}, set[str]()


def rewritten(path: Path) -> None:
    write(path, tone(9, 9))


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [rewritten, touched, Path.unlink])
@pytest.mark.parametrize("name", ["train-clean-100/2/7/2-7-0001.flac", "train-clean-100/2/7/2-7.trans.txt"])
def test_the_index_is_kept_until_a_file_changes(tmp_path: Path, change: Callable[[Path], None], name: str) -> None:
    folder, cache = FOLDERS["librispeech"](tmp_path / "data"), tmp_path / "cache"
    first, how = opened(folder, cache)
    assert how == NEW
    again, how = opened(folder, cache)
    assert how == KEPT
    assert (again.recipe, texts(again)) == (first.recipe, texts(first))
    assert not opened(folder, cache, first.content)[1]
    (folder / "README.TXT").write_text("of no importance")
    assert opened(folder, cache)[1] == KEPT
    if change is rewritten and name.endswith(".txt"):
        (folder / name).write_text("2-7-0001 OTHER\n")
    else:
        change(folder / name)
    changed, how = opened(folder, cache)
    assert how == NEW
    assert changed.recipe != first.recipe
    # A process of the run that was prepared before finds its own index still.
    assert texts(opened(folder, cache, first.content)[0])[:3] == texts(first)[:3]


def test_a_recording_that_comes_back_is_seen(tmp_path: Path) -> None:
    folder, cache = FOLDERS["librispeech"](tmp_path / "data"), tmp_path / "cache"
    path = folder / "train-clean-100/2/7/2-7-0001.flac"
    content = path.read_bytes()
    path.unlink()
    assert opened(folder, cache)[0].skipped == {"there is no such file": (1, "train-clean-100/2/7/2-7-0001.flac")}
    assert opened(folder, cache)[0].skipped
    path.write_bytes(content)
    assert not opened(folder, cache)[0].skipped


def test_workers_refuse_other_data_than_the_run_was_prepared_with(tmp_path: Path) -> None:
    folder = FOLDERS["librispeech"](tmp_path / "data")
    content = opened(folder, tmp_path / "cache")[0].content
    # Another machine has another cache, and the same data with other times.
    for path in folder.rglob("*.flac"):
        touched(path)
    assert opened(folder, tmp_path / "other", content)[0].content == content
    shutil.rmtree(tmp_path / "other")
    (folder / "train-clean-100/2/7/2-7-0001.flac").unlink()
    with pytest.raises(CorpusError, match="not as it was when the run was prepared"):
        opened(folder, tmp_path / "other", content)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_damaged_index_is_made_anew(tmp_path: Path, keep: float) -> None:
    folder, cache = FOLDERS["librispeech"](tmp_path / "data"), tmp_path / "cache"
    first, _ = opened(folder, cache)
    (file,) = (cache / "indexes").glob("*.index")
    content = file.read_bytes()
    for damaged in (content[: int(keep * len(content))], content[:-9] + b"\x07" + content[-8:], b"\xff" * 100):
        file.write_bytes(damaged)
        again, how = opened(folder, cache)
        assert (how, again.content) == (NEW, first.content)


def test_old_indexes_go(tmp_path: Path) -> None:
    folder, cache = FOLDERS["librispeech"](tmp_path / "data"), tmp_path / "cache"
    for n in range(5):
        (folder / "train-clean-100/2/7/2-7.trans.txt").write_text(f"2-7-0001 {'X' * n}Y\n")
        opened(folder, cache)
    assert len([*(cache / "indexes").glob("*.index")]) == 3


def test_an_index_that_cannot_be_kept_is_made_by_each_process(tmp_path: Path) -> None:
    folder, cache = FOLDERS["librispeech"](tmp_path / "data"), tmp_path / "file"
    cache.write_text("no folder")
    with pytest.warns(RuntimeWarning, match="isn't kept"):
        corpus, how = opened(folder, cache)
    assert (corpus.train_speakers, how) == (3 * TRAIN, NEW)


def test_a_run_says_what_it_leaves_out_and_names_what_it_cannot_read(tmp_path: Path) -> None:
    folder = FOLDERS["librispeech"](tmp_path / "data")
    chapter = folder / "train-clean-100/2/7"
    (chapter / "2-7-0000.flac").unlink()
    (chapter / "2-7-0001.flac").write_bytes(b"no sound")
    keys = ["run.engine=process", f'task.cache_dir="{tmp_path / "cache"}"', "task.model.dim=16", "task.model.mlp_dim=32"]
    keys += ["task.features.n_mels=20", "local.steps=1", "evaluation.every=0", "sampler.cohort=100"]
    arguments = ["run", str(EXPERIMENT), "--data-dir", str(folder), "--out", str(tmp_path / "run"), "--rounds", "2"]
    result = CliRunner().invoke(app, arguments + [part for key in keys for part in ("--set", key)])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "left out: 1 utterances: there is no such file (train-clean-100/2/7/2-7-0000.flac)" in output
    assert output.count("2-7-0001.flac is no readable recording") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_utterances"] == {"there is no such file": 1}
    assert (summary["examples_left_out"], summary["failed_users_total"]) == (1, 0)
