"""How the losses of many rounds add up, by each accountant: an upper bound on epsilon of a privacy event repeated.

The arithmetic of single rounds is the library dp-accounting's; what the bounds mean and which to take is `fedclip.accounting`.
Imports no PyTorch.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedclip.sampling import Adjacency

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp", "closed_form"]
"""Numerical composition of privacy loss distributions (arXiv 2207.04380); Renyi divergences (1702.07476, 1908.10530); the exact
epsilon of the Gaussian mechanism (1805.06530), where there is no sampling. All three are upper bounds."""

COARSEST, FINEST = 4096, {"PoissonSampledDpEvent": 2**19, "TruncatedSubsampledGaussianDpEvent": 2**17, "MixtureOfGaussiansDpEvent": 2**16}
"""Points of the coarsest grid of losses that is tried, and the limit of the finest, by what a point costs."""

CLOSE = 3e-3
"""How little a finer grid must lower an epsilon, relatively, to be the last: what a still finer one would change is a third to a
fifteenth of that."""


def possible_accountants(event: "DpEvent", adjacency: Adjacency) -> list[Accountant]:
    """Return which accountants know an event under an adjacency, the tighter first."""
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
    spared = delta - set_aside(rounds)
    # The library's search for epsilon overflows where epsilon is 0.
    return 0.0 if losses.get_delta_for_epsilon(0.0) <= spared else float(losses.get_epsilon_for_delta(spared))


def set_aside(rounds: int) -> float:
    """Return how much of delta is set aside for the rounding of the Fourier transforms, a multiple of the largest error seen."""
    return 2e-14 * math.pow(rounds, 0.7)


def _pld(event: "DpEvent", adjacency: Adjacency, rounds: int, delta: float) -> float:
    # One grid for all numbers of rounds up to the next power of two, so that a run may ask after every round.
    return _composed(event, adjacency, _level(event, adjacency, 1 << (rounds - 1).bit_length(), delta), rounds, delta)


COMPUTED_BY: dict[str, Callable[["DpEvent", Adjacency, int, float], float]] = {"closed_form": _closed_form, "rdp": _rdp, "pld": _pld}
"""Each accountant as a function of the event of a round, the adjacency, the rounds (at least 1) and delta."""
