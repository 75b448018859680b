"""Who takes part in a round: cohorts drawn without enumerating the population."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Poisson:
    """Each user takes part independently with probability `q = cohort / population`.

    The size is drawn from Binomial(population, q), then that many distinct ids: the same law as one coin a user, in time and memory
    that grow with the cohort only. An empty cohort is possible, and is still a round.

    Attributes:
        population: users K, with ids 0 .. K - 1.
        cohort: expected users a round S, over 0 and at most K.
    """

    stage_name: ClassVar[str] = "poisson"
    population: int
    cohort: float

    def __post_init__(self) -> None:
        if self.population < 1:
            raise ValueError(f"Expected a population of at least 1, got {self.population}.")
        if not 0 < self.cohort <= self.population:
            raise ValueError(
                f"Expected 0 < cohort <= population = {self.population}, got {self.cohort}; q = cohort / population is a probability."
            )

    @property
    def rate(self) -> float:
        """The probability q that a user takes part in a round."""
        return self.cohort / self.population

    @property
    def expected_cohort(self) -> float:
        """The public expected number of users a round, S = q K."""
        return self.cohort

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Return the ids of one cohort in ascending order."""
        size = int(rng.binomial(self.population, self.rate))
        return tuple(int(i) for i in np.sort(rng.choice(self.population, size=size, replace=False, shuffle=False)))
