"""Word and character error rates: counts by held-out unit, pooled over the corpus, with an interval over units."""

from collections.abc import Mapping, Sequence
from typing import Final

import jiwer
import numpy as np
from numpy.typing import NDArray

REPLICATES: Final = 1000
"""How many times the units are drawn again for an interval: its ends then move by well under its width."""


def count_errors(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Return `word_errors`, `words`, `character_errors` and `characters`: the last two of each count the references.

    Substitutions, deletions and insertions count one each. Two empty texts are no error; an empty reference makes every
    word of its hypothesis an insertion.
    """
    counts = {"word_errors": 0.0, "words": 0.0, "character_errors": 0.0, "characters": 0.0}
    if len(references) != len(hypotheses):
        raise ValueError(f"Expected one hypothesis a reference, got {len(hypotheses)} for {len(references)}.")
    if not references:
        return counts
    by_word = jiwer.process_words(list(references), list(hypotheses))
    by_character = jiwer.process_characters(list(references), list(hypotheses))
    for unit, output in (("word", by_word), ("character", by_character)):
        counts[f"{unit}_errors"] = float(output.substitutions + output.deletions + output.insertions)
        counts[f"{unit}s"] = float(output.hits + output.substitutions + output.deletions)
    return counts


def error_rate(counts: Sequence[Mapping[str, float]], unit: str) -> float:
    """Return the errors of all units over their words (`unit="word"`) or characters; NaN where there is none.

    A ratio of sums and not a mean of ratios: a speaker of one word weighs one word.
    """
    errors, total = _columns(counts, unit)
    return float(errors.sum() / total.sum()) if total.sum() > 0 else float("nan")


def bootstrap_interval(counts: Sequence[Mapping[str, float]], unit: str, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of `error_rate` when held-out units, not utterances, are drawn again.

    Utterances of one speaker err together, so drawing utterances would give too narrow an interval.

    Args:
        counts: The counts of each unit.
        unit: "word" or "character".
        seed: Fixes the draws: the same counts and seed give the same interval.
        level: The share of the draws inside the interval, in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"Expected 0 < level < 1, got {level}: 0.95 is customary.")
    errors, total = _columns(counts, unit)
    spoken = total > 0
    if not spoken.any():
        return float("nan"), float("nan")
    errors, total = errors[spoken], total[spoken]
    rng = np.random.Generator(np.random.Philox(seed))
    rates = np.empty(REPLICATES)
    for i in range(REPLICATES):
        # One draw at a time: all at once would hold replicates x units indices.
        drawn = rng.integers(len(total), size=len(total))
        rates[i] = errors[drawn].sum() / total[drawn].sum()
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _columns(counts: Sequence[Mapping[str, float]], unit: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    errors = np.array([c[f"{unit}_errors"] for c in counts], dtype=np.float64)
    return errors, np.array([c[f"{unit}s"] for c in counts], dtype=np.float64)
