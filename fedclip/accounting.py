"""What noise costs: epsilon of a sampler, a noise multiplier and a number of rounds, and the noise or rounds that an epsilon allows.

The arithmetic of single rounds is the library dp-accounting's; nothing here knows what is trained. Imports no PyTorch.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np

from fedclip.sampling import Adjacency, FixedSize, Poisson, Sampler

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp", "closed_form"]
"""Numerical composition of privacy loss distributions (arXiv 2207.04380); Renyi divergences (1702.07476, 1908.10530); the exact
epsilon of the Gaussian mechanism (1805.06530), where there is no sampling. All three are upper bounds."""

S = TypeVar("S", bound=Sampler)

LEAST_NOISE_FOR_PLD = 0.3
"""Below this noise multiplier the privacy loss distribution is wide and costly: Renyi divergences only, unless it is asked for."""

LEAST_DELTA_FOR_PLD = 1e-12
"""Below this delta the rounding of the Fourier transforms shows."""

MOST_ROUNDS = 10_000_000
"""What `affordable_rounds` returns at most."""

CLOSE = 1e-3
"""How far under its target a calibrated epsilon may stay, and how much a finer grid may change an epsilon, relatively."""


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
    adjacency = adjacency or sampler.adjacency
    event = _event(sampler, noise_multiplier, adjacency)
    found = {}
    for accountant in _chosen(event, adjacency, noise_multiplier, delta, accountants, sampler.name):
        found[accountant] = Guarantee(
            epsilon=0.0 if rounds == 0 else float(_COMPUTED_BY[accountant](event, adjacency, rounds, delta)),
            delta=delta,
            adjacency=adjacency,
            unit=sampler.unit,
            sampler=sampler.name,
            accountant=accountant,
            sampling_rate=sampler.rate,
            noise_multiplier=noise_multiplier,
            rounds=rounds,
        )
    return found


def guarantee(
    sampler: Sampler, noise_multiplier: float, rounds: int, delta: float, *, adjacency: Adjacency | None = None
) -> Guarantee:
    """Return the smallest of the valid upper bounds on epsilon; see `epsilons`."""
    return min(epsilons(sampler, noise_multiplier, rounds, delta, adjacency=adjacency).values(), key=lambda g: g.epsilon)


def calibrate_noise(
    sampler: Sampler, target_epsilon: float, rounds: int, delta: float, *, adjacency: Adjacency | None = None
) -> float:
    """Return the smallest noise multiplier, up to a thousandth of epsilon, whose `guarantee` is at most the target.

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

    def excess(noise_multiplier: float) -> float:
        return _excess(guarantee(sampler, noise_multiplier, rounds, delta, adjacency=adjacency).epsilon, target_epsilon)

    low = high = LEAST_NOISE_FOR_PLD
    above = below = excess(high)
    while below > 0:
        low, above = high, below
        high *= 2
        below = excess(high)
    while above <= 0:
        high, below = low, above
        low /= 2
        above = excess(low)
    while below < -CLOSE and high / low > 1 + 1e-6:
        tried = math.exp(_between(math.log(low), above, math.log(high), below))
        found = excess(tried)
        low, above, high, below = (low, above, tried, found) if found <= 0 else (tried, found, high, below)
    return high


def affordable_rounds(
    sampler: Sampler, noise_multiplier: float, target_epsilon: float, delta: float, *, adjacency: Adjacency | None = None
) -> int:
    """Return the most rounds, up to `MOST_ROUNDS`, whose `guarantee` is at most the target: 0 where one is too many.

    Raises:
        ValueError: as `epsilons`; a target out of range.
    """
    _check_target(target_epsilon)

    def excess(rounds: int) -> float:
        return _excess(guarantee(sampler, noise_multiplier, rounds, delta, adjacency=adjacency).epsilon, target_epsilon)

    low, below, high, above = 0, -math.inf, 1, excess(1)
    while above <= 0:
        if high == MOST_ROUNDS:
            return MOST_ROUNDS
        low, below, high = high, above, min(4 * high, MOST_ROUNDS)
        above = excess(high)
    while high > low + 1:
        tried = round(math.exp(_between(math.log(max(low, 0.5)), below, math.log(high), above)))
        tried = min(max(tried, low + 1), high - 1)
        found = excess(tried)
        low, below, high, above = (tried, found, high, above) if found <= 0 else (low, below, tried, found)
    return low


def extrapolate(sampler: S, noise_multiplier: float, population: int, cohort: float) -> tuple[S, float]:
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
        larger = dataclasses.replace(sampler, population=population, cohort=int(cohort) if cohort == int(cohort) else cohort)
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


def _excess(epsilon: float, target: float) -> float:
    """Return by how much an epsilon is over its target, on a scale on which it is nearly a power law of noise and rounds."""
    return -math.inf if epsilon == 0 else math.log(epsilon / target)


def _between(low: float, at_low: float, high: float, at_high: float) -> float:
    """Return where to look next for a root: a little on the private side of a straight line, in the middle where there is none."""
    if not (math.isfinite(at_low) and math.isfinite(at_high)):
        return (low + high) / 2
    share = (at_low + CLOSE / 2) / (at_low - at_high)
    return low + min(max(share, 0.05), 0.95) * (high - low)


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


def _chosen(
    event: "DpEvent", adjacency: Adjacency, noise_multiplier: float, delta: float, asked: Sequence[Accountant] | None, name: str
) -> list[Accountant]:
    possible = _possible(event, adjacency)
    if "pld" in possible and delta < LEAST_DELTA_FOR_PLD:
        possible.remove("pld")
    if not possible:
        raise ValueError(
            f"No accountant knows the sampler {name} under {adjacency} at delta {delta:g}; take the sampler's own adjacency, and a "
            f"delta of at least {LEAST_DELTA_FOR_PLD:g}."
        )
    if asked is None:
        cheap = noise_multiplier >= LEAST_NOISE_FOR_PLD or "rdp" not in possible
        return possible if cheap else [a for a in possible if a != "pld"]
    wrong = [a for a in asked if a not in possible]
    if wrong or not asked:
        raise ValueError(
            f"Expected accountants among {', '.join(possible)} for the sampler {name} under {adjacency} at delta {delta:g}, got "
            f"{', '.join(wrong) or 'none'}."
        )
    return list(dict.fromkeys(asked))


def _relation(adjacency: Adjacency) -> "NeighboringRelation":
    from dp_accounting import NeighboringRelation

    return NeighboringRelation.REPLACE_ONE if adjacency == "replace-one" else NeighboringRelation.ADD_OR_REMOVE_ONE


def _closed_form(event: Any, adjacency: Adjacency, rounds: int, delta: float) -> float:
    from dp_accounting import get_epsilon_gaussian

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

    orders = [1 + 10.0 ** (k / 25) for k in range(-150, 25)] + [math.floor(11 * 2 ** (k / 6)) for k in range(46)]
    with _silent():
        accountant = RdpAccountant(orders, _relation(adjacency)).compose(event)
    return accountant.orders, np.maximum(accountant.rdp, 0.0)


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


def _pld(event: "DpEvent", adjacency: Adjacency, rounds: int, delta: float) -> float:
    """Return epsilon by composing losses on finer and finer grids, each of which gives an upper bound, until it moves no more."""
    span, best = _span(event, adjacency), math.inf
    level = math.ceil(math.log(4096 / span, 4))
    while True:
        step = 4.0**-level
        composed = _losses(event, adjacency, step).self_compose(rounds)
        # The library's search for epsilon overflows below 0.
        found = 0.0 if composed.get_delta_for_epsilon(0.0) <= delta else float(composed.get_epsilon_for_delta(delta))
        moved, best = best - found, min(best, found)
        finest = span / step > 2**18 or best / step > 2**20 or step < 4e-6
        if best == 0 or moved < CLOSE / 2 * best or finest:
            return best
        level += 1


_COMPUTED_BY: dict[str, Callable[["DpEvent", Adjacency, int, float], float]] = {"closed_form": _closed_form, "rdp": _rdp, "pld": _pld}
