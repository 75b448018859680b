"""Who takes part in a round: cohorts drawn without enumerating the population, each sampler with the privacy event of its round."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Adjacency = Literal["add-or-remove-one", "replace-one"]
"""Which two populations the guarantee compares: one unit is there or not, or one unit's data are others."""


@runtime_checkable
class Sampler(Protocol):
    """Draws cohorts, and says what a round of noise on their sum is to privacy. Nothing else says so."""

    stage_name: ClassVar[str]

    @property
    def population(self) -> int:
        """How many ids there are, 0 .. population - 1."""
        ...

    @property
    def rate(self) -> float:
        """The probability q that an id takes part in a round."""
        ...

    @property
    def expected_cohort(self) -> float:
        """The public expected number of ids a round, S = q K."""
        ...

    @property
    def adjacency(self) -> Adjacency:
        """The neighbouring relation that `event` is stated in."""
        ...

    @property
    def unit(self) -> str:
        """Whose presence or data the guarantee hides."""
        ...

    @property
    def name(self) -> str:
        """The sampler's name for people."""
        ...

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the ids of one cohort in ascending order."""
        ...

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Return the privacy event of one round whose sum gets noise of `noise_multiplier` times the bound C on an id's update."""
        ...


@dataclass(frozen=True)
class Poisson:
    """Each user takes part independently with probability `q = cohort / population`.

    The size is drawn from Binomial(population, q), then that many distinct ids: the same law as one coin a user, in time and memory
    that grow with the cohort only. An empty cohort is possible, and is still a round.

    With a cap, a uniformly random subset of those who came takes part (arXiv 2508.15089): when the cap binds, a user who comes
    displaces another, so that two updates change. With several devices a user, the ids are devices and the guarantee is for all the
    devices of a user together: a round holds Binomial(k, q) of them, and the sum of their updates is a mixture of Gaussians
    (arXiv 2310.15526).

    Attributes:
        population: ids K, 0 .. K - 1: users, or devices where `devices_per_user` is over 1.
        cohort: expected ids a round S, over 0 and at most K. S = K takes everyone: no sampling, and none is claimed.
        max_cohort: at most so many ids a round; None: no cap.
        devices_per_user: how many ids one user holds at most, k.
    """

    stage_name: ClassVar[str] = "poisson"
    adjacency: ClassVar[Adjacency] = "add-or-remove-one"
    unit: ClassVar[str] = "user"
    population: int
    cohort: float
    max_cohort: int | None = None
    devices_per_user: int = 1

    def __post_init__(self) -> None:
        _check_population(self.population)
        if not 0 < self.cohort <= self.population:
            raise ValueError(
                f"Expected 0 < cohort <= population = {self.population}, got {self.cohort}; q = cohort / population is a probability."
            )
        if self.max_cohort is not None and (not self.max_cohort >= self.cohort or self.max_cohort % 1):
            raise ValueError(
                f"Expected a whole max_cohort of at least the expected cohort, {self.cohort:g}, got {self.max_cohort}: the sum is divided "
                "by the expected cohort; lower the cohort too."
            )
        if not 1 <= self.devices_per_user <= self.population or self.devices_per_user % 1:
            raise ValueError(f"Expected whole devices_per_user from 1 to the population, {self.population}, got {self.devices_per_user}.")
        if self.max_cohort is not None and self.devices_per_user > 1:
            raise ValueError(
                f"Expected max_cohort or devices_per_user, got {self.max_cohort} and {self.devices_per_user}: no accountant knows what "
                "both together cost; leave the cap away, which costs time only."
            )

    @property
    def rate(self) -> float:
        """The probability q that an id takes part in a round."""
        return self.cohort / self.population

    @property
    def expected_cohort(self) -> float:
        """The public expected number of ids a round, S = q K, before any cap."""
        return self.cohort

    @property
    def name(self) -> str:
        """The sampler's name for people."""
        if self.max_cohort is not None:
            return f"Poisson, at most {self.max_cohort} a round"
        return "Poisson" if self.devices_per_user == 1 else f"Poisson, up to {self.devices_per_user} devices a user"

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the ids of one cohort in ascending order."""
        size = int(rng.binomial(self.population, self.rate))
        # The first max_cohort of a uniformly random subset are a uniformly random subset of that size.
        return _distinct(self.population, size if self.max_cohort is None else min(size, self.max_cohort), rng)

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Return the privacy event of one round for a sum with noise of `noise_multiplier` times the bound C on an id's update."""
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, TruncatedSubsampledGaussianDpEvent
        from dp_accounting.dp_event import MixtureOfGaussiansDpEvent

        k = self.devices_per_user
        if self.max_cohort is not None and self.max_cohort < self.population:
            return TruncatedSubsampledGaussianDpEvent(self.population, self.rate, self.max_cohort, noise_multiplier)
        if self.cohort == self.population:
            return GaussianDpEvent(noise_multiplier / k)
        if k > 1:
            from scipy.stats import binom

            weights = tuple(float(p) for p in binom.pmf(range(k + 1), k, self.rate))
            return MixtureOfGaussiansDpEvent(noise_multiplier, tuple(float(j) for j in range(k + 1)), weights)
        return PoissonSampledDpEvent(self.rate, GaussianDpEvent(noise_multiplier))


@dataclass(frozen=True)
class FixedSize:
    """Exactly `cohort` distinct users a round, every set of that size equally likely.

    Who comes depends on who else is there, so the guarantee is for replacing one user's data by others: up to 2C on the sum. What it
    costs is known as an upper bound only (arXiv 1808.00087, Theorem 27), and is never what Poisson sampling at the same rate costs:
    the worst case can be ten times as much (arXiv 2405.20769).

    Attributes:
        population: users K, with ids 0 .. K - 1.
        cohort: users a round S, from 1 to K. S = K takes everyone: no sampling, and none is claimed.
    """

    stage_name: ClassVar[str] = "fixed_size"
    adjacency: ClassVar[Adjacency] = "replace-one"
    unit: ClassVar[str] = "user"
    name: ClassVar[str] = "fixed size"
    population: int
    cohort: int

    def __post_init__(self) -> None:
        _check_population(self.population)
        if not (1 <= self.cohort <= self.population and self.cohort == int(self.cohort)):
            raise ValueError(f"Expected a whole cohort from 1 to the population, {self.population}, got {self.cohort}.")

    @property
    def rate(self) -> float:
        """The probability q that a user takes part in a round."""
        return self.cohort / self.population

    @property
    def expected_cohort(self) -> float:
        """The public number of users a round, S."""
        return float(self.cohort)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the ids of one cohort in ascending order."""
        return _distinct(self.population, int(self.cohort), rng)

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Return the privacy event of one round for a sum with noise of `noise_multiplier` times the bound C on a user's update."""
        from dp_accounting import GaussianDpEvent, SampledWithoutReplacementDpEvent

        replaced = GaussianDpEvent(noise_multiplier / 2)
        return replaced if self.cohort == self.population else SampledWithoutReplacementDpEvent(self.population, self.cohort, replaced)


@dataclass(frozen=True)
class Available:
    """Whoever happens to be there, each asked with probability `cohort / population` at most: real devices.

    Who is there depends on the hour, the network and the owner, and is no coin that privacy could rest on, so that nothing is claimed of
    it: each round counts as a release on everybody (a Gaussian mechanism without sampling). Each one who is there is asked by a coin of
    its own, which no other's presence moves: leaving one user out changes one update, by at most C.

    Attributes:
        population: users K, with ids 0 .. K - 1: those that there is room for.
        cohort: the public number of users S that a sum is divided by, over 0 and at most K.
        over_selection: so many times as many are asked, at most all, since some do not answer.
    """

    stage_name: ClassVar[str] = "available"
    adjacency: ClassVar[Adjacency] = "add-or-remove-one"
    unit: ClassVar[str] = "user"
    name: ClassVar[str] = "whoever is there (no sampling claimed)"
    rate: ClassVar[float] = 1.0
    population: int
    cohort: float
    over_selection: float = 1.0

    def __post_init__(self) -> None:
        _check_population(self.population)
        if not 0 < self.cohort <= self.population:
            raise ValueError(f"Expected 0 < cohort <= population = {self.population}, got {self.cohort}.")
        if not self.over_selection >= 1:
            raise ValueError(f"Expected over_selection of at least 1, got {self.over_selection}.")

    @property
    def expected_cohort(self) -> float:
        """The public number of users that a sum is divided by, S."""
        return self.cohort

    def draw(self, rng: np.random.Generator, present: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the ids that are asked in a round, in ascending order, of those who are there; by default everybody is."""
        there = np.arange(self.population) if present is None else np.sort(np.asarray(present, dtype=np.int64))
        asked = rng.random(self.population) < min(1.0, self.over_selection * self.cohort / self.population)
        return tuple(there[asked[there]].tolist())

    def event(self, noise_multiplier: float) -> "DpEvent":
        """Return the privacy event of one round for a sum with noise of `noise_multiplier` times the bound C on a user's update."""
        from dp_accounting import GaussianDpEvent

        return GaussianDpEvent(noise_multiplier)


def _distinct(population: int, size: int, rng: np.random.Generator) -> tuple[int, ...]:
    return tuple(np.sort(rng.choice(population, size=size, replace=False, shuffle=False)).tolist())


def _check_population(population: int) -> None:
    if not population >= 1 or population % 1:
        raise ValueError(f"Expected a whole population of at least 1, got {population}.")
