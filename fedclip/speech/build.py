"""From configuration to a corpus: the one place that knows all kinds."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedclip.speech.corpus import Corpus
from fedclip.speech.embedded import EmbeddedCorpus
from fedclip.speech.errors import CorpusError, SynthesizerError
from fedclip.speech.espeak import library_version
from fedclip.speech.options import CorpusOptions, EmbeddedOptions, ListedOptions, SpokenDigitsOptions, StampsOptions

if TYPE_CHECKING:
    from fedclip.speech.index_file import Watch

INDEXES = "indexes"
"""The folder of indexes in the cache folder."""


def build_corpus(
    options: CorpusOptions,
    *,
    population: int | None,
    data_dir: Path | None,
    seed: int,
    cache_dir: Path | None = None,
    index: str = "",
    watch: "Watch | None" = None,
) -> Corpus:
    """Return the corpus that the options describe.

    Args:
        options: The corpus section of a configuration.
        population: How many training speakers there are to be: of recorded speech the first so many by name, or all (None).
        data_dir: The folder of recorded speech; the embedded corpus reads nothing.
        seed: Decides the virtual speakers, or how held-out digits are joined.
        cache_dir: Where the index of recorded speech is kept; None: the default folder.
        index: The digest of the index that a run was prepared with: a worker takes it as it is kept, without a look at the files.
        watch: Is told how far the making of an index is.

    Raises:
        CorpusError: the folder is not given or not as it should be, a listing is damaged, or there are too few speakers.
    """
    if isinstance(options, EmbeddedOptions):
        if population is None:
            raise CorpusError("The embedded corpus has any number of speakers, but no population is set; set it, to 1000 say.")
        try:
            library_version()
        except SynthesizerError as error:
            raise CorpusError(f"The embedded corpus needs a speech synthesiser. {error}") from error
        return EmbeddedCorpus(options, population, seed)
    if data_dir is None:
        raise CorpusError(f"The corpus '{options.kind}' reads recordings, but data_dir is not set; set it to their folder.")
    return _open_recorded(options, population, data_dir, seed, cache_dir, index, watch or (lambda *_: None))


def _open_recorded(
    options: SpokenDigitsOptions | StampsOptions | ListedOptions,
    population: int | None,
    data_dir: Path,
    seed: int,
    cache_dir: Path | None,
    index: str,
    watch: "Watch",
) -> Corpus:
    try:
        # Reading files needs packages that the embedded corpus does without.
        from fedclip.asr.cache import default_folder
        from fedclip.speech.digits import SpokenDigitsCorpus
        from fedclip.speech.recorded import RecordedCorpus
        from fedclip.speech.stamps import StampsCorpus
    except ModuleNotFoundError as error:
        raise CorpusError(f"Reading recordings needs the package {error.name}; install it with: pip install {error.name}") from error
    corpus: RecordedCorpus | SpokenDigitsCorpus | StampsCorpus
    if isinstance(options, SpokenDigitsOptions):
        corpus = SpokenDigitsCorpus.open(options, data_dir, seed)
    elif isinstance(options, StampsOptions):
        corpus = StampsCorpus.open(options, data_dir)
    else:
        corpus = RecordedCorpus.open(options, data_dir, cache=(cache_dir or default_folder()) / INDEXES, content=index, watch=watch)
    if not index:
        corpus.check()
    speakers = corpus.train_speakers
    if population is None or population == speakers:
        return corpus
    if not 1 <= population <= speakers:
        raise CorpusError(
            f"The population is {population}, but {data_dir} has {speakers} training speakers; set the population to {speakers} or less, "
            "or take the embedded corpus, which has any number."
        )
    return replace(corpus, trained=replace(corpus.trained, count=population))
