"""What noise costs: epsilon of a sampler, a noise multiplier and a number of rounds, and the noise or rounds that an epsilon allows.

The arithmetic of single rounds is the library dp-accounting's; nothing here knows what is trained. Imports no PyTorch.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from fedclip.sampling import Adjacency, FixedSize, Poisson, Sampler

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp", "closed_form"]
"""Numerical composition of privacy loss distributions (arXiv 2207.04380); Renyi divergences (1702.07476, 1908.10530); the exact
epsilon of the Gaussian mechanism (1805.06530), where there is no sampling. All three are upper bounds."""

AnySampler = TypeVar("AnySampler", bound=Sampler)

LEAST_NOISE_FOR_PLD = 0.3
"""Below this noise multiplier the privacy loss distribution is wide and costly: Renyi divergences only, unless it is asked for."""

COARSEST, FINEST = 4096, {"PoissonSampledDpEvent": 2**19, "TruncatedSubsampledGaussianDpEvent": 2**17, "MixtureOfGaussiansDpEvent": 2**16}
"""Points of the coarsest grid of losses that is tried, and the limit of the finest, by what a point costs."""

MOST_ROUNDS = 10_000_000
"""What `affordable_rounds` returns at most."""

MOST_NOISE = 1e6
"""The largest noise multiplier that `calibrate_noise` tries."""

CLOSE = 3e-3
"""How far under its target a calibrated epsilon may stay, relatively, and how little a finer grid must lower an epsilon to be the last:
what a still finer one would change is a third to a fifteenth of that."""


@dataclass(frozen=True)
class Guarantee:
    """An epsilon with all that it means, which it never travels without.

    Attributes:
        epsilon: the upper bound; infinite where none is known.
        delta: delta.
        adjacency: which two populations it compares.
        unit: whose presence or data it hides.
        sampler: how cohorts are drawn, for people.
        accountant: how it was computed.
        sampling_rate: q, the probability that an id takes part in a round.
        noise_multiplier: z, the noise on the sum in units of the bound C on an id's update.
        rounds: releases.
        extrapolated: whether it is about a larger population and cohort than those that took part.
    """

    epsilon: float
    delta: float
    adjacency: str
    unit: str
    sampler: str
    accountant: str
    sampling_rate: float
    noise_multiplier: float
    rounds: int
    extrapolated: bool = False

    def describe(self) -> str:
        """Return the guarantee in a line for people; the epsilon is rounded up."""
        return (
            f"epsilon {rounded_up(self.epsilon)} at delta {self.delta:g} ({'extrapolated' if self.extrapolated else 'measured'}; "
            f"{self.adjacency} {self.unit}, {self.sampler} q = {self.sampling_rate:.3g}, z = {self.noise_multiplier:.4g}, "
            f"{self.rounds} round{'' if self.rounds == 1 else 's'}, {ACCOUNTANTS[self.accountant]})"
        )

    def plain(self) -> dict[str, Any]:
        """Return the guarantee as plain data; an infinite epsilon stays an infinite float."""
        return dataclasses.asdict(self)


ACCOUNTANTS = {"pld": "PLD", "rdp": "RDP", "closed_form": "closed form"}
"""The names of the accountants for people."""


def rounded_up(epsilon: float) -> str:
    """Return an epsilon with four digits, never less than it is."""
    if epsilon == 0 or not math.isfinite(epsilon):
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
    return f"{math.ceil(epsilon / unit * (1 - 1e-12)) * unit:.4g}"


def epsilons(
    sampler: Sampler,
    noise_multiplier: float,
    rounds: int,
    delta: float,
    accountants: Sequence[Accountant] | None = None,
    *,
    adjacency: Adjacency | None = None,
) -> dict[str, Guarantee]:
    """Return an upper bound on epsilon by each accountant that can tell. Each is valid, so the smallest is.

    Args:
        sampler: carries the privacy event of a round.
        noise_multiplier: z, over 0.
        rounds: releases, at least 0; each with the same sampler and noise, the later ones chosen freely in view of the earlier ones.
        delta: between 0 and 1.
        accountants: which ones; by default all that are valid and cheap: `"pld"` and `"rdp"` for Poisson sampling, `"rdp"` alone
            below z = 0.3; `"rdp"` for a fixed size; `"pld"` with a cap or several devices a user; `"closed_form"` and `"rdp"`
            without sampling.
        adjacency: by default the sampler's own; Poisson sampling is known for replacing one user too.

    Raises:
        ValueError: a number out of range, or an accountant or adjacency that is not known for this sampler.
    """
    _check(noise_multiplier, rounds, delta)
    question = Guarantee(
        epsilon=0.0,
        delta=delta,
        adjacency=adjacency or sampler.adjacency,
        unit=sampler.unit,
        sampler=sampler.name,
        accountant="",
        sampling_rate=sampler.rate,
        noise_multiplier=noise_multiplier,
        rounds=rounds,
    )
    event = _event(sampler, noise_multiplier, adjacency or sampler.adjacency)
    found = dict[str, Guarantee]()
    for accountant in _chosen(event, accountants, question):
        epsilon = _COMPUTED_BY[accountant](event, adjacency or sampler.adjacency, rounds, delta) if rounds else 0.0
        found[accountant] = dataclasses.replace(question, epsilon=float(epsilon), accountant=accountant)
    return found


def guarantee(sampler: Sampler, noise_multiplier: float, rounds: int, delta: float, *, adjacency: Adjacency | None = None) -> Guarantee:
    """Return the smallest of the valid upper bounds on epsilon; see `epsilons`."""
    return min(epsilons(sampler, noise_multiplier, rounds, delta, adjacency=adjacency).values(), key=lambda g: g.epsilon)


def calibrate_noise(sampler: Sampler, target_epsilon: float, rounds: int, delta: float, *, adjacency: Adjacency | None = None) -> float:
    """Return the smallest noise multiplier, up to three thousandths of epsilon, whose `guarantee` is at most the target.

    Args:
        sampler: carries the privacy event of a round.
        target_epsilon: over 0 and finite.
        rounds: releases, at least 1.
        delta: between 0 and 1.
        adjacency: by default the sampler's own.

    Raises:
        ValueError: as `epsilons`; a target out of range.
    """
    _check_target(target_epsilon)
    if rounds < 1:
        raise ValueError(f"Expected at least 1 round to calibrate the noise for, got {rounds}; no round needs no noise.")

    @cache
    def excess(noise_multiplier: float, cheap: bool = False) -> float:
        return _excess(sampler, noise_multiplier, rounds, delta, adjacency, target_epsilon, cheap)

    high = LEAST_NOISE_FOR_PLD
    while excess(high, cheap=high < 100) > 0:
        high *= 2
        if high > MOST_NOISE:
            raise ValueError(
                f"No noise multiplier up to {MOST_NOISE:g} is known to keep epsilon under {target_epsilon:g}; take a larger one."
            )
    while excess(high / 2, cheap=True) <= 0:
        high /= 2
    # First where the cheap bound meets the target, then from there down: steps that are a little too long for the power law there.
    high = _smallest(lambda z: excess(z, cheap=True), high / 2, high, close=0.1)
    below, power = excess(high), max(0.5, (excess(high / 1.1, cheap=True) - excess(high, cheap=True)) / math.log(1.1))
    while below < -CLOSE:
        low = high * math.exp(max(1.2 * below / power, -math.log(2)))
        above = excess(low)
        if above > 0:
            return _smallest(excess, low, high, CLOSE)
        high, below = low, above
    return high


def affordable_rounds(
    sampler: Sampler, noise_multiplier: float, target_epsilon: float, delta: float, *, adjacency: Adjacency | None = None
) -> int:
    """Return the most rounds, up to `MOST_ROUNDS`, whose `guarantee` is at most the target: 0 where one is too many.

    Raises:
        ValueError: as `epsilons`; a target out of range.
    """
    _check_target(target_epsilon)

    @cache
    def excess(rounds: int, cheap: bool = False) -> float:
        return _excess(sampler, noise_multiplier, rounds, delta, adjacency, target_epsilon, cheap)

    low = 1
    while low < MOST_ROUNDS and excess(low, cheap=True) <= 0:
        low = min(4 * low, MOST_ROUNDS)
    low = max(1, low // 4)
    high, below, above = low, excess(low), -math.inf
    if below > 0:
        return 0
    while above <= 0:
        if high == MOST_ROUNDS:
            return MOST_ROUNDS
        low, below, high = high, above if math.isfinite(above) else below, min(4 * high, MOST_ROUNDS)
        above = excess(high)
    search = _Search(math.log(low), below, math.log(high), above)
    while high > low + 1:
        tried = min(max(round(math.exp(search.next(0.0))), low + 1), high - 1)
        found = excess(tried)
        search.narrow(math.log(tried), found)
        low, high = (tried, high) if found <= 0 else (low, tried)
    return low


def extrapolate(sampler: AnySampler, noise_multiplier: float, population: int, cohort: float) -> tuple[AnySampler, float]:
    """Return the sampler and the noise multiplier of a larger population and cohort with the same noise on the mean, `sigma = z / S`.

    A model that was trained with `sigma` behaves as it would have with the larger cohort, whose epsilon is that of `z' = sigma S'` and
    `q' = S' / K'` (arXiv 2310.00098). A cap grows with the cohort. What comes of it is to be called extrapolated.

    Raises:
        ValueError: the cohort does not fit in the population, or the sampler is not one of this package.
    """
    scale = cohort / sampler.expected_cohort
    larger: Any
    if isinstance(sampler, Poisson):
        cap = None if sampler.max_cohort is None else math.ceil(sampler.max_cohort * scale)
        larger = dataclasses.replace(sampler, population=population, cohort=cohort, max_cohort=cap)
    elif isinstance(sampler, FixedSize):
        if cohort != int(cohort):
            raise ValueError(f"Expected a whole cohort for a fixed size, got {cohort}.")
        larger = dataclasses.replace(sampler, population=population, cohort=int(cohort))
    else:
        raise ValueError(f"Expected a Poisson or FixedSize sampler to extrapolate from, got {type(sampler).__name__}.")
    return larger, noise_multiplier * scale


def _check(noise_multiplier: float, rounds: int, delta: float) -> None:
    if not (noise_multiplier > 0 and math.isfinite(noise_multiplier)):
        raise ValueError(f"Expected a finite noise multiplier over 0, got {noise_multiplier}; without noise no epsilon holds.")
    if rounds != int(rounds) or rounds < 0:
        raise ValueError(f"Expected a whole number of rounds, at least 0, got {rounds}.")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got {delta}; take it well under one over the population.")


def _check_target(target_epsilon: float) -> None:
    if not (target_epsilon > 0 and math.isfinite(target_epsilon)):
        raise ValueError(f"Expected a finite target epsilon over 0, got {target_epsilon}.")


def _excess(
    sampler: Sampler, noise_multiplier: float, rounds: int, delta: float, adjacency: Adjacency | None, target: float, cheap: bool
) -> float:
    """Return by how much epsilon is over a target, on a scale on which it is nearly a power law; `cheap`: an upper bound of that."""
    names = None
    if cheap:
        relation = adjacency or sampler.adjacency
        names = [a for a in _possible(_event(sampler, noise_multiplier, relation), relation) if a != "pld"] or None
    epsilon = min(g.epsilon for g in epsilons(sampler, noise_multiplier, rounds, delta, names, adjacency=adjacency).values())
    return -math.inf if epsilon == 0 else math.log(epsilon / target)


def _smallest(excess: Callable[[float], float], low: float, high: float, close: float) -> float:
    """Return a value between two others where `excess` is not over zero, and at most `close` under it if it gets there steadily."""
    search, below = _Search(math.log(low), excess(low), math.log(high), excess(high)), -math.inf
    while below < -close and search.width > 1e-6:
        tried = search.next(-close / 2)
        found = excess(math.exp(tried))
        search.narrow(tried, found)
        if found <= 0:
            high, below = math.exp(tried), found
    return high


class _Search:
    """A bracketed root: the false position with the Illinois rule, the middle where a value is infinite."""

    def __init__(self, low: float, at_low: float, high: float, at_high: float) -> None:
        self._ends, self._last = [(low, at_low), (high, at_high)], 0

    @property
    def width(self) -> float:
        """How far the two ends lie apart."""
        return self._ends[1][0] - self._ends[0][0]

    def next(self, aim: float) -> float:
        """Return where to look for the value `aim`."""
        (low, at_low), (high, at_high) = self._ends
        if not (math.isfinite(at_low) and math.isfinite(at_high)):
            return (low + high) / 2
        share = (at_low - aim) / (at_low - at_high)
        return low + min(max(share, 0.01), 0.99) * (high - low)

    def narrow(self, tried: float, found: float) -> None:
        """Replace the end on whose side of zero the value is."""
        side = 0 if (found <= 0) == (self._ends[0][1] <= 0) else 1
        self._ends[side] = (tried, found)
        other, value = self._ends[1 - side]
        if self._last == side + 1:
            self._ends[1 - side] = (other, value / 2)
        self._last = side + 1


def _event(sampler: Sampler, noise_multiplier: float, adjacency: Adjacency) -> "DpEvent":
    from dp_accounting import GaussianDpEvent

    event = sampler.event(noise_multiplier)
    if adjacency == sampler.adjacency:
        return event
    if adjacency not in get_args(Adjacency) or sampler.adjacency == "replace-one":
        raise ValueError(f"Expected the adjacency {sampler.adjacency} for the sampler {sampler.name}, got {adjacency}; no other is known.")
    # Replacing one user is taking one away and adding another, up to 2C. Sampled events say so themselves, by the relation.
    return GaussianDpEvent(event.noise_multiplier / 2) if isinstance(event, GaussianDpEvent) else event


def _possible(event: "DpEvent", adjacency: Adjacency) -> list[Accountant]:
    import dp_accounting as dp
    from dp_accounting.dp_event import MixtureOfGaussiansDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    if isinstance(event, dp.GaussianDpEvent):  # a distribution of its losses takes gigabytes, and the closed form is exact
        return ["closed_form", "rdp"]
    composed = (dp.PoissonSampledDpEvent, MixtureOfGaussiansDpEvent, dp.TruncatedSubsampledGaussianDpEvent)
    relation, found = _relation(adjacency), list[Accountant]()
    if isinstance(event, composed) and PLDAccountant(relation).supports(event):
        found.append("pld")
    if RdpAccountant(neighboring_relation=relation).supports(event):
        found.append("rdp")
    return found


def _chosen(event: "DpEvent", asked: Sequence[Accountant] | None, question: Guarantee) -> list[Accountant]:
    adjacency: Any = question.adjacency
    possible = _possible(event, adjacency)
    if 2 * _rounding(question.rounds) > question.delta:
        possible = [a for a in possible if a != "pld"]
    what = f"the sampler {question.sampler} under {adjacency} at delta {question.delta:g} after {question.rounds} rounds"
    if not possible:
        raise ValueError(f"No accountant knows {what}; take the sampler's own adjacency, a larger delta or fewer rounds.")
    if asked is None:
        cheap = question.noise_multiplier >= LEAST_NOISE_FOR_PLD or "rdp" not in possible
        return possible if cheap else [a for a in possible if a != "pld"]
    wrong = [a for a in asked if a not in possible]
    if wrong or not asked:
        raise ValueError(f"Expected accountants among {', '.join(possible)} for {what}, got {', '.join(wrong) or 'none'}.")
    return list(dict.fromkeys(asked))


def _relation(adjacency: Adjacency) -> "NeighboringRelation":
    from dp_accounting import NeighboringRelation

    return NeighboringRelation.REPLACE_ONE if adjacency == "replace-one" else NeighboringRelation.ADD_OR_REMOVE_ONE


def _closed_form(event: Any, adjacency: Adjacency, rounds: int, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

    with np.errstate(divide="ignore"):  # the logarithm of a delta of zero
        return float(get_epsilon_gaussian(event.noise_multiplier / math.sqrt(rounds), delta))


@contextmanager
def _silent() -> Iterator[None]:
    """Hold back what the library logs when it leaves an order out: fewer orders only loosen a bound."""

    def keep(record: logging.LogRecord) -> bool:
        return "_compute_log_a_frac failed" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@lru_cache(maxsize=64)
def _renyi(event: "DpEvent", adjacency: Adjacency) -> tuple[np.ndarray, np.ndarray]:
    """Return orders and the Renyi divergences of one round.

    The orders lie dense down to just over 1: the smaller the noise, the nearer to 1 is the best one.
    """
    from dp_accounting.rdp import RdpAccountant

    orders = [1 + 10.0 ** (k / 30) for k in range(-180, 30)] + [*range(2, 11), *(math.floor(11 * 2 ** (k / 6)) for k in range(46))]
    with _silent():
        accountant = RdpAccountant(orders, _relation(adjacency)).compose(event)
    return np.asarray(accountant.orders), np.maximum(accountant.rdp, 0.0)


def _rdp(event: "DpEvent", adjacency: Adjacency, rounds: int, delta: float) -> float:
    orders, divergences = _renyi(event, adjacency)
    # Proposition 12 of arXiv 2004.00010; the library's own conversion leaves out orders under 1.01, which little noise needs.
    bounds = rounds * divergences + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(bounds.min()))


@lru_cache(maxsize=16)
def _losses(event: Any, adjacency: Adjacency, step: float) -> "PrivacyLossDistribution":
    """Return the distribution of the privacy loss of one round, rounded pessimistically to multiples of `step`."""
    import dp_accounting as dp
    from dp_accounting.pld import privacy_loss_distribution as pld

    if isinstance(event, dp.PoissonSampledDpEvent):
        return pld.from_gaussian_mechanism(
            event.event.noise_multiplier,
            value_discretization_interval=step,
            sampling_prob=event.sampling_probability,
            neighboring_relation=_relation(adjacency),
        )
    if isinstance(event, dp.TruncatedSubsampledGaussianDpEvent):
        return pld.from_truncated_subsampled_gaussian_mechanism(
            event.dataset_size,
            event.sampling_probability,
            event.truncated_batch_size,
            event.noise_multiplier,
            value_discretization_interval=step,
            neighboring_relation=_relation(adjacency),
        )
    return pld.from_mixture_gaussian_mechanism(
        event.standard_deviation, event.sensitivities, event.sampling_probs, value_discretization_interval=step
    )


def _span(event: Any, adjacency: Adjacency) -> float:
    """Return about how far the privacy losses of one round lie apart, but for a negligible part of them."""
    import dp_accounting as dp

    if isinstance(event, dp.PoissonSampledDpEvent):
        q, z, most = event.sampling_probability, event.event.noise_multiplier, 1.0
    elif isinstance(event, dp.TruncatedSubsampledGaussianDpEvent):
        q, z, most = event.sampling_probability, event.noise_multiplier, 2.0
    else:
        q, z, most = 1 - event.sampling_probs[0], event.standard_deviation, event.sensitivities[-1]
    unsampled = 10 * most / z + (most / z) ** 2 / 2
    top = float(np.logaddexp(math.log1p(-q), math.log(q) + unsampled)) if q < 1 else unsampled
    return (top - math.log1p(-q) if q < 1 else 2 * top) * (2 if adjacency == "replace-one" else 1)


@lru_cache(maxsize=64)
def _level(event: "DpEvent", adjacency: Adjacency, rounds: int, delta: float) -> int:
    """Return how fine a grid of losses must be: every grid gives an upper bound, and a finer one than this gives the same or worse."""
    span = _span(event, adjacency)
    level = math.ceil(math.log(COARSEST / span, 4))
    best = _composed(event, adjacency, level, rounds, delta)
    while best > 0 and max(span, best / 4) * 4.0 ** (level + 1) < FINEST[type(event).__name__]:
        found = _composed(event, adjacency, level + 1, rounds, delta)
        if found < best:
            level += 1
        if found > best * (1 - CLOSE):
            break
        best = found
    return level


def _composed(event: "DpEvent", adjacency: Adjacency, level: int, rounds: int, delta: float) -> float:
    losses = _losses(event, adjacency, 4.0**-level).self_compose(rounds)
    spared = delta - _rounding(rounds)
    # The library's search for epsilon overflows where epsilon is 0.
    return 0.0 if losses.get_delta_for_epsilon(0.0) <= spared else float(losses.get_epsilon_for_delta(spared))


def _rounding(rounds: int) -> float:
    """Return how much of delta is set aside for the rounding of the Fourier transforms, a multiple of the largest error seen."""
    return 2e-14 * math.pow(rounds, 0.7)


def _pld(event: "DpEvent", adjacency: Adjacency, rounds: int, delta: float) -> float:
    # One grid for all numbers of rounds up to the next power of two, so that a run may ask after every round.
    return _composed(event, adjacency, _level(event, adjacency, 1 << (rounds - 1).bit_length(), delta), rounds, delta)


_COMPUTED_BY: dict[str, Callable[["DpEvent", Adjacency, int, float], float]] = {"closed_form": _closed_form, "rdp": _rdp, "pld": _pld}
