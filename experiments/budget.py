"""`fedclip budget`: what noise costs, before anything is trained; the noise or the rounds that an epsilon allows. Imports no PyTorch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from fedclip.accounting import Accountant, Guarantee, affordable_rounds, calibrate_noise, epsilons, extrapolate, rounded_up
from fedclip.options import ConfigError
from fedclip.sampling import Adjacency, FixedSize, Poisson, Sampler

ANY_POPULATION = 10**9
"""The population behind a bare sampling rate: with Poisson sampling only the rate counts."""


@dataclass(frozen=True)
class Question:
    """What is asked. Of noise multiplier, target epsilon and rounds two are given, and the third is solved for.

    Attributes:
        sampler: how cohorts are drawn.
        delta: delta.
        noise_multiplier: z.
        target_epsilon: epsilon to stay within.
        rounds: releases.
        adjacency: None: the sampler's own.
        accountants: which ones; none: all that are valid and cheap.
        larger: pairs of population and cohort to extrapolate to.
    """

    sampler: Sampler
    delta: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    rounds: int | None = None
    adjacency: Adjacency | None = None
    accountants: tuple[Accountant, ...] = ()
    larger: tuple[tuple[int, float], ...] = ()


def make_sampler(
    population: int | None, cohort: float | None, rate: float | None, kind: str, max_cohort: int | None, devices_per_user: int
) -> Sampler:
    """Return the sampler that the options describe.

    Raises:
        ConfigError: cohort and rate do not fit together, or the sampler refuses its numbers.
    """
    if (cohort is None) == (rate is None):
        raise ConfigError("Give --cohort with --population, or --sampling-rate.")
    if cohort is not None and population is None:
        raise ConfigError(f"--cohort {cohort:g} needs --population: privacy depends on the rate at which a user is drawn.")
    if rate is not None and not 0 < rate <= 1:
        raise ConfigError(f"--sampling-rate: expected over 0 and at most 1, got {rate}.")
    if rate is not None and population is None and (kind == "fixed" or max_cohort is not None):
        raise ConfigError("A cohort of a fixed or a limited size needs --population.")
    size = population or ANY_POPULATION
    expected = cohort if cohort is not None else (rate or 1.0) * size
    try:
        if kind == "fixed":
            if max_cohort is not None or devices_per_user > 1:
                raise ConfigError("--max-cohort and --devices-per-user go with --sampler poisson.")
            return FixedSize(size, int(expected) if expected == int(expected) else expected)  # type: ignore[arg-type]  # it refuses a fraction
        return Poisson(size, expected, max_cohort, devices_per_user)
    except ValueError as error:
        raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class Answer:
    """What one sampler costs: the guarantee by each accountant, the smallest first."""

    sampler: Sampler
    guarantees: tuple[Guarantee, ...]

    def plain(self) -> dict[str, Any]:
        """Return what it is about, and epsilon by accountant; an infinite one is null."""
        data = self.guarantees[0].plain()
        found = {g.accountant: g.epsilon if math.isfinite(g.epsilon) else None for g in self.guarantees}
        return data | {"epsilon": found, "population": self.sampler.population, "cohort": self.sampler.expected_cohort}


def budget_command(question: Question, as_json: bool) -> int:
    """Answer a question, print it, and return the exit status.

    Raises:
        ConfigError: the numbers are refused, or no accountant knows the combination.
    """
    try:
        solved, z, rounds = solve(question)
        measured = _answer(question, question.sampler, z, rounds)
        larger = [_extrapolated(question, z, rounds, *size) for size in question.larger]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if as_json:
        data = measured.plain() | {"solved_for": solved}
        print(json.dumps(data | ({"larger": [answer.plain() for answer in larger]} if larger else {}), indent=2))
        return 0
    if solved is not None:
        print(f"noise multiplier {z:.6g}" if solved == "noise_multiplier" else f"{rounds} rounds")
    for guarantee in measured.guarantees:
        print(guarantee.describe())
    if larger:
        print("\nThe same noise on the mean at a larger cohort, which is another run:")
        Console().print(_table([measured, *larger]))
    return 0


def solve(question: Question) -> tuple[str | None, float, int]:
    """Return what was solved for, the noise multiplier and the rounds.

    Raises:
        ConfigError: not two of the three were given.
        ValueError: a number is out of range.
    """
    z, target, rounds, sampler, delta = (
        question.noise_multiplier,
        question.target_epsilon,
        question.rounds,
        question.sampler,
        question.delta,
    )
    if z is not None and rounds is not None and target is None:
        return None, z, rounds
    if target is not None and rounds is not None and z is None:
        return "noise_multiplier", calibrate_noise(sampler, target, rounds, delta, adjacency=question.adjacency), rounds
    if target is not None and z is not None and rounds is None:
        return "rounds", z, affordable_rounds(sampler, z, target, delta, adjacency=question.adjacency)
    raise ConfigError("Give two of --noise-multiplier, --target-epsilon and --rounds; the third is the answer.")


def _answer(question: Question, sampler: Sampler, z: float, rounds: int) -> Answer:
    found = epsilons(sampler, z, rounds, question.delta, question.accountants or None, adjacency=question.adjacency)
    return Answer(sampler, tuple(sorted(found.values(), key=lambda g: g.epsilon)))


def _extrapolated(question: Question, z: float, rounds: int, population: int, cohort: float) -> Answer:
    sampler, larger_z = extrapolate(question.sampler, z, population, cohort)
    answer = _answer(question, sampler, larger_z, rounds)
    return Answer(sampler, tuple(replace(g, extrapolated=True) for g in answer.guarantees))


def _table(answers: Sequence[Answer]) -> Table:
    table = Table("", "population", "cohort", "z", "epsilon", box=None, pad_edge=False)
    for answer in answers:
        best = answer.guarantees[0]
        sizes = f"{answer.sampler.population:,}", f"{answer.sampler.expected_cohort:,.6g}"
        kind = "extrapolated" if best.extrapolated else "measured"
        table.add_row(kind, *sizes, f"{best.noise_multiplier:.4g}", rounded_up(best.epsilon))
    return table
