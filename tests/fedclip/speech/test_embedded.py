"""Tests of the embedded corpus of virtual speakers."""

import pickle
from collections.abc import Iterator

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from fedclip.speech import acoustics
from fedclip.speech.build import build_corpus
from fedclip.speech.corpus import SAMPLE_RATE, Corpus, Utterance
from fedclip.speech.embedded import MAX_POPULATION, EmbeddedCorpus, draw_speaker, is_reserved
from fedclip.speech.errors import CorpusError
from fedclip.speech.espeak import ACCENTS, VARIANTS
from fedclip.speech.options import CorpusOptions, EmbeddedOptions

OPTIONS = EmbeddedOptions()


@pytest.fixture(scope="module")
def corpus() -> Iterator[EmbeddedCorpus]:
    shared = EmbeddedCorpus(OPTIONS, MAX_POPULATION, seed=1)
    yield shared
    shared.close()


def unused() -> np.random.Generator:
    """The generator of a round, which this corpus does not draw from."""
    return np.random.default_rng(0)


def assert_same(one: list[Utterance], two: list[Utterance]) -> None:
    assert [u.text for u in one] == [u.text for u in two]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.audio, b.audio)


def test_audio_is_16_khz_float32_neither_clipped_nor_silent(corpus: EmbeddedCorpus) -> None:
    for speaker in (0, 1, 77, MAX_POPULATION - 1):
        utterances = corpus.train(speaker, unused())
        assert 6 <= len(utterances) <= 10
        for utterance in utterances:
            assert utterance.audio.dtype == np.float32
            assert utterance.audio.ndim == 1
            assert 0.24 < np.abs(utterance.audio).max() < 0.96
            assert 0.5 < len(utterance.audio) / SAMPLE_RATE < 6
            assert np.sqrt(np.mean(np.square(utterance.audio))) > 0.01


def test_reading_a_speaker_is_a_pure_function(corpus: EmbeddedCorpus) -> None:
    first = [corpus.train(speaker, unused()) for speaker in (5, 6)]
    held_out = corpus.held_out(3)
    small = EmbeddedCorpus(OPTIONS, 10, seed=1)
    assert_same(small.held_out(3), held_out)
    for speaker in (6, 5):
        assert_same(small.train(speaker, np.random.default_rng(9)), first[speaker - 5])
    small.close()


def test_seeds_and_splits_give_other_speakers() -> None:
    drawn = [draw_speaker(OPTIONS, seed, split, 5) for seed in (1, 2) for split in ("train", "held_out")]
    assert len(set(drawn)) == 4


def test_it_survives_pickling_with_a_running_process(corpus: EmbeddedCorpus) -> None:
    expected = corpus.train(2, unused())
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy == corpus
    assert copy.recipe == corpus.recipe
    assert copy.synthesizer.pid is None
    assert_same(copy.train(2, unused()), expected)
    copy.close()
    assert copy.synthesizer.pid is None


def test_held_out_speakers_share_no_voice_in_a_room_with_training_speakers() -> None:
    train = {(s.voice, s.room) for s in (draw_speaker(OPTIONS, 1, "train", i) for i in range(3000))}
    held_out = {(s.voice, s.room) for s in (draw_speaker(OPTIONS, 1, "held_out", MAX_POPULATION + i) for i in range(500))}
    assert not train & held_out
    assert all(is_reserved(*combination) for combination in held_out)
    assert not any(is_reserved(*combination) for combination in train)
    # Every room and nearly every voice is heard in both: it is the combinations that are new.
    assert {room for _, room in held_out} == {room for _, room in train} == set(range(acoustics.ROOMS))


def test_a_tenth_of_all_combinations_is_reserved() -> None:
    voices = [f"{accent}+{variant}" for accent in ACCENTS for variant in VARIANTS]
    reserved = [is_reserved(voice, room) for voice in voices for room in range(acoustics.ROOMS)]
    # Five standard deviations of a binomial share.
    assert np.mean(reserved) == pytest.approx(0.1, abs=5 * (0.09 / len(reserved)) ** 0.5)


def test_a_hundred_held_out_speakers_say_at_least_two_thousand_words() -> None:
    words = [sum(len(s.split()) for s in draw_speaker(OPTIONS, 1, "held_out", MAX_POPULATION + i).sentences) for i in range(120)]
    assert sum(words[:100]) >= 2000
    assert np.mean(words) >= 25


def test_speakers_lie_in_the_ranges_of_the_options() -> None:
    options = EmbeddedOptions(utterances=(2, 3), snr_db=(10, 12), speed=(0.95, 1.0))
    for number in range(300):
        speaker = draw_speaker(options, 0, "train", number)
        assert 2 <= len(speaker.sentences) <= 3
        assert 10 <= speaker.snr_db <= 12
        assert 0.95 <= speaker.speed <= 1
        assert len(speaker.silences) == len(speaker.sentences)


def test_seconds_are_predicted_without_synthesis(corpus: EmbeddedCorpus) -> None:
    predicted = np.array([corpus.train_seconds(speaker) for speaker in range(20)])
    actual = np.array([sum(len(u.audio) for u in corpus.train(speaker, unused())) / SAMPLE_RATE for speaker in range(20)])
    assert predicted.sum() == pytest.approx(actual.sum(), rel=0.1)
    # Over 80 speakers the error had a standard deviation of 6 % and was 20 % at most, for the slowest and fastest voices.
    np.testing.assert_allclose(predicted, actual, rtol=0.3)
    idle = EmbeddedCorpus(OPTIONS, 10, seed=1)
    idle.train_seconds(3)
    assert idle.synthesizer.pid is None


def test_without_reverberation_and_noise_the_background_is_silent() -> None:
    clean = EmbeddedCorpus(EmbeddedOptions(reverb=False, snr_db=(100, 100), utterances=(1, 1)), 5, seed=1)
    audio = clean.train(0, unused())[0].audio
    clean.close()
    # 1,500 samples are less than the 0.1 s of background that every utterance has at both ends.
    assert np.abs(audio[-1500:]).max() < 1e-3 * np.abs(audio).max()


def test_the_recipe_depends_on_what_the_samples_depend_on_only() -> None:
    recipe = EmbeddedCorpus(OPTIONS, 10, seed=1).recipe
    assert EmbeddedCorpus(OPTIONS, 20, seed=1).recipe == recipe
    assert EmbeddedCorpus(EmbeddedOptions(held_out_speakers=3), 10, seed=1).recipe == recipe
    assert EmbeddedCorpus(OPTIONS, 10, seed=2).recipe != recipe
    assert EmbeddedCorpus(EmbeddedOptions(reverb=False), 10, seed=1).recipe != recipe


def test_speakers_that_do_not_exist_are_refused(corpus: EmbeddedCorpus) -> None:
    with pytest.raises(IndexError, match="training speaker"):
        corpus.train(MAX_POPULATION, unused())
    with pytest.raises(IndexError, match="from 0 to 119, got 120"):
        corpus.held_out(120)
    with pytest.raises(IndexError, match="got -1"):
        corpus.train_seconds(-1)
    for population in (0, MAX_POPULATION + 1):
        with pytest.raises(CorpusError, match="population from 1 to 100,000,000"):
            EmbeddedCorpus(OPTIONS, population, seed=1)


def test_it_is_built_from_options() -> None:
    built: Corpus = build_corpus(OPTIONS, population=50, data_dir=None, seed=3)
    assert (built.train_speakers, built.held_out_speakers, built.cacheable) == (50, 120, True)
    with pytest.raises(CorpusError, match="no population is set"):
        build_corpus(OPTIONS, population=None, data_dir=None, seed=3)


@pytest.mark.parametrize(
    "section", [{"snr_db": [9, 3]}, {"utterances": [3, 2]}, {"speed": [1.2, 1.1]}, {"held_out_speakers": 0}, {"sped": [1, 1]}]
)
def test_senseless_options_are_refused(section: dict[str, object]) -> None:
    adapter: TypeAdapter[CorpusOptions] = TypeAdapter(CorpusOptions)
    assert isinstance(adapter.validate_python({"kind": "embedded"}), EmbeddedOptions)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "embedded", **section})


def test_speakers_have_the_accents_and_rooms_they_are_given() -> None:
    options = EmbeddedOptions(accents=("en-us", "en"), rooms=(8, 15))
    for split, first in (("train", 0), ("held_out", MAX_POPULATION)):
        drawn = [draw_speaker(options, 1, split, first + i) for i in range(200)]  # type: ignore[arg-type]
        assert {s.voice.partition("+")[0] for s in drawn} == {"en-us", "en"}
        assert {s.room for s in drawn} == set(range(8, 16))
        assert {is_reserved(s.voice, s.room) for s in drawn} == {split == "held_out"}
    every = EmbeddedOptions(accents=ACCENTS, rooms=(0, 47))  # type: ignore[arg-type]
    assert draw_speaker(every, 1, "train", 7) == draw_speaker(EmbeddedOptions(), 1, "train", 7)
    alone = next(room for room in range(48) if not any(is_reserved(f"en-us+{v}", room) for v in VARIANTS))
    with pytest.raises(CorpusError, match="none are held out; give more accents or rooms"):
        EmbeddedCorpus(EmbeddedOptions(accents=("en-us",), rooms=(alone, alone)), 10, 1)
    for wrong in ({"accents": ()}, {"accents": ("en", "en")}, {"accents": ("fr",)}, {"rooms": (5, 4)}, {"rooms": (0, 48)}):
        with pytest.raises(ValueError, match=r"accents|rooms"):
            EmbeddedOptions(**wrong)  # type: ignore[arg-type]
