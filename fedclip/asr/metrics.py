"""Word and character error rates: counts by held-out unit, pooled over the corpus or a group, and how they differ over units."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jiwer
import numpy as np
from numpy.typing import NDArray

QUARTILES: Final = {"q25": 0.25, "median": 0.5, "q75": 0.75}

WORST: Final = 0.1
"""The share of the speakers whose pooled word error rate is that of the worst decile, rounded up to a whole speaker."""

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


def count_errors_by_group(references: Sequence[str], hypotheses: Sequence[str], groups: Sequence[str]) -> dict[str, float]:
    """Return the counts of `count_errors`, and beside them those of each named group: `words.fr` of the group "fr".

    Args:
        references: What was said.
        hypotheses: What was heard, one a reference.
        groups: The group of each reference; those of the group "" count in the totals only.
    """
    counts = count_errors(references, hypotheses)
    for group in sorted({*groups} - {""}):
        pairs = [(r, h) for r, h, g in zip(references, hypotheses, groups, strict=True) if g == group]
        counts |= {f"{key}.{group}": value for key, value in count_errors(*zip(*pairs, strict=True)).items()}
    return counts


def rates_by_group(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return `wer.fr`, `cer.fr` and `eval_words.fr` of each group "fr" where there are several groups, else nothing."""
    groups = sorted({group for c in counts for group in groups_of(c)})
    rates: dict[str, float] = {}
    for group in groups if len(groups) > 1 else ():
        own = [_of_group(c, group) for c in counts]
        rates[f"wer.{group}"], rates[f"cer.{group}"] = error_rate(own, "word"), error_rate(own, "character")
        rates[f"eval_words.{group}"] = sum(c["words"] for c in own)
    return rates


def rates_over_speakers(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return how word error rates differ over the units that have words, each unit (a speaker) counting one.

    `wer_speakers_sd` is the standard deviation (of these speakers, not an estimate for others), `wer_speakers_q25`, `_median` and
    `_q75` are the quartiles, and `wer_worst_decile` is the pooled rate of the tenth of the speakers, at least one, with the
    highest rates. NaN where there is no word.
    """
    spoken = [c for c in counts if c["words"] > 0]
    if not spoken:
        return dict.fromkeys(("wer_speakers_sd", *(f"wer_speakers_{name}" for name in QUARTILES), "wer_worst_decile"), float("nan"))
    # Among equal rates the one over more words first, so that the order of the units alters nothing.
    worst = sorted(spoken, key=lambda c: (c["word_errors"] / c["words"], c["words"]), reverse=True)
    rates = np.array([c["word_errors"] / c["words"] for c in worst])
    return {
        "wer_speakers_sd": float(rates.std()),
        **{f"wer_speakers_{name}": float(np.quantile(rates, share)) for name, share in QUARTILES.items()},
        "wer_worst_decile": error_rate(worst[: math.ceil(WORST * len(worst))], "word"),
    }


def speaker_rows(counts: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return a row for each unit: its number, its groups, and its counts and rates; none where the counts are not of words."""
    return [
        {
            "unit": unit,
            "group": "+".join(groups_of(c)),
            "words": int(c["words"]),
            "word_errors": int(c["word_errors"]),
            "wer": error_rate([c], "word"),
            "characters": int(c["characters"]),
            "character_errors": int(c["character_errors"]),
            "cer": error_rate([c], "character"),
        }
        for unit, c in enumerate(counts)
        if "words" in c
    ]


def groups_of(counts: Mapping[str, float]) -> list[str]:
    """Return the groups that a unit has counts of, sorted."""
    return sorted(key.removeprefix("words.") for key in counts if key.startswith("words."))


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


def _of_group(counts: Mapping[str, float], group: str) -> dict[str, float]:
    keys = ("word_errors", "words", "character_errors", "characters")
    return {key: counts.get(f"{key}.{group}", 0.0) for key in keys}


def _columns(counts: Sequence[Mapping[str, float]], unit: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    errors = np.array([c[f"{unit}_errors"] for c in counts], dtype=np.float64)
    return errors, np.array([c[f"{unit}s"] for c in counts], dtype=np.float64)
