"""What noise costs: epsilon of a sampler, a noise multiplier and a number of rounds, and the noise or rounds that an epsilon allows.

The arithmetic of rounds is in `fedclip.accountants`; nothing here knows what is trained. Imports no PyTorch.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from fedclip.accountants import COMPUTED_BY, possible_accountants, set_aside
from fedclip.accountants import Accountant as Accountant
from fedclip.sampling import Adjacency, Available, FixedSize, Poisson, Sampler

if TYPE_CHECKING:
    from dp_accounting import DpEvent

AnySampler = TypeVar("AnySampler", bound=Sampler)

LEAST_NOISE_FOR_PLD = 0.3
"""Below this noise multiplier the privacy loss distribution is wide and costly: Renyi divergences only, unless it is asked for."""

MOST_ROUNDS = 10_000_000
"""What `affordable_rounds` returns at most."""

MOST_NOISE = 1e6
"""The largest noise multiplier that `calibrate_noise` tries."""

CLOSE = 3e-3
"""How far under its target a calibrated epsilon may stay, relatively."""


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
            f"{self._relation}, z = {self.noise_multiplier:.4g}, {self.rounds} round{'' if self.rounds == 1 else 's'}, "
            f"{ACCOUNTANTS[self.accountant]})"
        )

    def describe_kind(self) -> str:
        """Return what the epsilon means without its value, the noise and the rounds, which may differ between runs that are compared."""
        kind = "extrapolated epsilon" if self.extrapolated else "epsilon"
        return f"{kind}: at delta {self.delta:g}, {self._relation}, {ACCOUNTANTS[self.accountant]}"

    @property
    def _relation(self) -> str:
        return f"{self.adjacency} {self.unit}, {self.sampler} q = {self.sampling_rate:.3g}"

    def plain(self) -> dict[str, Any]:
        """Return the guarantee as plain data; an infinite epsilon stays an infinite float."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> "Guarantee":
        """Return the guarantee from plain data, in which JSON has null for an infinite epsilon."""
        return cls(**{**plain, "epsilon": math.inf if plain["epsilon"] is None else plain["epsilon"]})


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
        epsilon = COMPUTED_BY[accountant](event, adjacency or sampler.adjacency, rounds, delta) if rounds else 0.0
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
    elif isinstance(sampler, Available):
        larger = dataclasses.replace(sampler, population=population, cohort=cohort)
    else:
        raise ValueError(f"Expected a sampler of this package to extrapolate from, got {type(sampler).__name__}.")
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
        names = [a for a in possible_accountants(_event(sampler, noise_multiplier, relation), relation) if a != "pld"] or None
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


def _chosen(event: "DpEvent", asked: Sequence[Accountant] | None, question: Guarantee) -> list[Accountant]:
    adjacency: Any = question.adjacency
    possible = possible_accountants(event, adjacency)
    if 2 * set_aside(question.rounds) > question.delta:
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
