"""The stamps' phrases: which are taken, which are held out, and how the others are dealt to pseudo-users."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from experiments.prepare import corpus_kind, read_experiment
from fedclip.asr.options import AsrOptions
from fedclip.options import ConfigError
from fedclip.speech.build import build_corpus
from fedclip.speech.corpus import SAMPLE_RATE, Utterance
from fedclip.speech.errors import CorpusError
from fedclip.speech.options import StampsOptions
from fedclip.speech.stamps import StampsCorpus
from tests.stamps_folder import write_stamp, write_stamps

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
FRENCH = StampsOptions(languages=("fr",), users_per_language=3, held_out_fraction=0.3)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stamps(tmp_path_factory.mktemp("stamps"), each=40)


def said(corpus: StampsCorpus) -> tuple[list[list[Utterance]], list[list[Utterance]]]:
    rng = np.random.default_rng(0)
    return [corpus.train(i, rng) for i in range(corpus.train_speakers)], [corpus.held_out(i) for i in range(corpus.held_out_speakers)]


def test_phrases_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    write_stamp(tmp_path, "a/frog", {"fr": "Une grenouille.", "ca": "Una granota."})
    write_stamp(tmp_path, "a/frog-1", {"fr": "une GRENOUILLE"})  # said twice
    write_stamp(tmp_path, "a/toad", {"fr": "Un crapaud."})
    (tmp_path / "a/toad_desc_fr.ogg").write_bytes((tmp_path / "a/frog_desc_fr.ogg").read_bytes())
    write_stamp(tmp_path, "a/coin", {"fr": "Une pièce de 25 cents."})
    write_stamp(tmp_path, "a/sign", {"fr": "La lettre ж."})
    write_stamp(tmp_path, "b/chess", {"fr": "Un cavalier, la seule pièce qui saute par-dessus les autres."})  # in 0.6 s
    write_stamp(tmp_path, "b/other", {"fr_CA": "Un traversier."})
    write_stamp(tmp_path, "b/silent", {"fr": "..."})
    write_stamp(tmp_path, "b/hen", {"fr": "L\u2019œuf, déjà"})
    for i, text in enumerate(("Une oie", "Un bœuf", "Une poule", "Un âne")):
        write_stamp(tmp_path, f"c/{i}", {"fr": text})
    write_stamp(tmp_path, "b/goat", {"ru": "Коза"})
    for missing in ("b/goat_desc_fr.ogg", "b/text_desc_fr.ogg"):  # no line of the language, no file of texts
        (tmp_path / missing).write_bytes((tmp_path / "a/frog_desc_fr.ogg").read_bytes())
    corpus = StampsCorpus.open(FRENCH.model_copy(update={"held_out_fraction": 0.5}), tmp_path)
    train, held_out = said(corpus)
    heard = [u for unit in (*train, *held_out) for u in unit]
    assert sorted(u.text for u in heard) == ["l'œuf déjà", "un bœuf", "un âne", "une grenouille", "une oie", "une poule"]
    assert all(u.language == "fr" and u.audio.dtype == np.float32 and len(u.audio) == round(0.6 * SAMPLE_RATE) for u in heard)
    with pytest.raises(CorpusError, match="has no recordings"):
        StampsCorpus.open(StampsOptions(languages=("es",)), tmp_path)


@pytest.mark.parametrize("deal", ["random", "topic"])
def test_each_phrase_is_heard_once_and_users_of_a_language_share_it_evenly(stamps: Path, deal: str) -> None:
    options = FRENCH.model_copy(update={"languages": ("fr", "ru"), "deal": deal})
    corpus = build_corpus(options, population=None, data_dir=stamps, seed=1)
    assert isinstance(corpus, StampsCorpus)
    assert (corpus.train_speakers, corpus.held_out_speakers, corpus.cacheable) == (6, 2, True)
    train, held_out = said(corpus)
    for unit, language in enumerate(("fr", "ru")):
        own = [[u.text for u in train[i]] for i in (3 * unit, 3 * unit + 1, 3 * unit + 2)]
        apart = [u.text for u in held_out[unit]]
        texts = [t for user in own for t in user] + apart
        assert {u.language for u in (*train[3 * unit], *held_out[unit])} == {language}
        assert len(texts) == len(set(texts)) == 40
        assert 4 <= len(apart) <= 20
        assert max(map(len, own)) - min(map(len, own)) <= 1
        if deal == "topic":
            in_order = texts_of(stamps, language)
            assert texts[: -len(apart)] == sorted(texts[: -len(apart)], key=in_order.index)
    assert pickle.loads(pickle.dumps(corpus)).recipe == corpus.recipe
    assert "2 voices, one a language (fr, ru); the 6 users are parts of what they read, not different people" in corpus.note
    first = build_corpus(options, population=4, data_dir=stamps, seed=1)
    assert (first.train_speakers, first.held_out_speakers) == (4, 2)
    assert 0 < first.train_seconds(0) < 40


def texts_of(stamps: Path, language: str) -> list[str]:
    paths = sorted(stamps.rglob("*.txt"))
    return [line.partition("=")[2] for p in paths for line in p.read_text().splitlines() if line.startswith(f"{language}.")]


def test_users_who_would_have_no_phrase_are_refused(stamps: Path) -> None:
    phrases = sum(len(user) for user in said(StampsCorpus.open(FRENCH, stamps))[0])
    everyone = FRENCH.model_copy(update={"users_per_language": phrases})
    assert StampsCorpus.open(everyone, stamps).train_speakers == phrases
    with pytest.raises(CorpusError, match=rf"users_per_language: expected at most {phrases}, .*'fr'.*got {phrases + 1}; lower it"):
        StampsCorpus.open(everyone.model_copy(update={"users_per_language": phrases + 1}), stamps)


def test_who_is_held_out_stays_from_version_to_version(stamps: Path) -> None:
    train, held_out = said(StampsCorpus.open(FRENCH, stamps))
    assert [u.text for u in held_out[0]][:4] == ["ac j", "ba j", "dc j", "df j"]
    assert [u.text for u in train[0]][:4] == ["ab j", "aé j", "ai j", "bé j"]


def test_what_is_held_out_and_dealt_does_not_depend_on_what_else_there_is(stamps: Path, tmp_path: Path) -> None:
    whole = {u.text for unit in said(StampsCorpus.open(FRENCH, stamps))[1] for u in unit}
    for path in stamps.rglob("n[01]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    train, held_out = said(StampsCorpus.open(FRENCH, tmp_path))
    apart = {u.text for unit in held_out for u in unit}
    there = apart | {u.text for unit in train for u in unit}
    assert apart == whole & there
    assert len(there) == 20


def test_a_folder_of_stamps_is_known_from_above_and_from_within(stamps: Path, tmp_path: Path) -> None:
    assert corpus_kind(stamps) == corpus_kind(stamps / "usr/share/tuxpaint/stamps") == "tuxpaint_stamps"
    within = StampsCorpus.open(FRENCH, stamps / "usr/share/tuxpaint/stamps")
    assert within.recipe == StampsCorpus.open(FRENCH, stamps).recipe
    experiment = read_experiment(EXPERIMENTS / "quickstart.toml", [], stamps)
    assert isinstance(experiment.task, AsrOptions)
    assert experiment.task.corpus == StampsOptions()
    assert experiment.task.languages == StampsOptions().languages
    with pytest.raises(ConfigError, match=r"expected task\.languages to have all of task\.corpus\.languages"):
        read_experiment(EXPERIMENTS / "languages.toml", ['task.languages=["fr"]'])
    (tmp_path / "manifest.csv").write_text("speaker,path,text\n")
    assert corpus_kind(tmp_path, "tuxpaint_stamps") == "manifest"


def test_a_text_that_is_not_utf_8_is_refused_by_its_file(tmp_path: Path) -> None:
    write_stamp(tmp_path, "cow", {"fr": "Une vache"})
    (tmp_path / "cow.txt").write_bytes("fr.utf8=Une b\u00eate".encode("latin-1"))
    with pytest.raises(CorpusError, match=r"cow\.txt is not UTF-8"):
        StampsCorpus.open(FRENCH, tmp_path)
