"""What an experiment's `[sampler]` and `[privacy]` sections come to: its sampler, its noise, its account.

Imports no PyTorch.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from fedclip.config import Experiment
from fedclip.options import ConfigError
from fedclip.stages import available, fixed_size, poisson

if TYPE_CHECKING:
    from fedclip.account import Account
    from fedclip.sampling import Sampler

RATES = {"asr": ("wer", "cer"), "vision": ("accuracy",)}
"""The metrics of a task that are between 0 and 1."""


def noise_multiplier(experiment: Experiment) -> float | None:
    """Return the noise multiplier of the sum that is really formed; None without noise, or where it is yet to be calibrated.

    With `noise_cohort_size` S' the file's z is that of a cohort of S': the noise on the mean is `z C / S'`, so that the noise on this
    run's sum over S users has the multiplier `z S / S'`.
    """
    z, larger = experiment.privacy.noise_multiplier, experiment.privacy.noise_cohort_size
    return z if z is None or larger is None else z * experiment.sampler.cohort / larger


def build_sampler(experiment: Experiment, users: int) -> "Sampler":
    """Return the sampler of an experiment over that many users.

    Raises:
        ConfigError: a cohort larger than the population, or one that is not a whole number where its size is fixed.
    """
    options = experiment.sampler
    if options.cohort > users:
        raise ConfigError(f"sampler.cohort: expected at most {users}, the users there are, got {options.cohort:g}.")
    if options.name == "poisson":
        return poisson(users, options.cohort, options.max_cohort, options.devices_per_user)
    if options.name == "available":
        return available(users, options.cohort, options.over_selection)
    return fixed_size(users, int(options.cohort))


def build_account(experiment: Experiment, users: int, path: Path | None = None) -> "Account | None":
    """Return the account of a run under noise, its ledger at `path`; None for a run without noise."""
    z, privacy = noise_multiplier(experiment), experiment.privacy
    if z is None:
        return None
    from fedclip.account import Account

    larger = None
    if privacy.noise_cohort_size is not None and privacy.noise_multiplier is not None:
        larger = larger_sampler(experiment, users), privacy.noise_multiplier
    return Account(build_sampler(experiment, users), z, privacy.delta, privacy.epsilon_budget, path, larger)


def larger_sampler(experiment: Experiment, users: int) -> "Sampler":
    """Return the sampler of the larger cohort that the noise is meant for, out of `noise_population`, else of the same population.

    Raises:
        ConfigError: a cohort larger than that population, or one that is not a whole number where its size is fixed.
    """
    from fedclip.accounting import extrapolate

    privacy = experiment.privacy
    cohort, population = cast(float, privacy.noise_cohort_size), privacy.noise_population or users
    if cohort > population:
        raise ConfigError(
            f"privacy.noise_cohort_size: expected at most {population}, the users there are, got {cohort:g}; say with "
            "privacy.noise_population how many there would be."
        )
    try:
        return extrapolate(build_sampler(experiment, users), 1.0, population, cohort)[0]
    except ValueError as error:
        raise ConfigError(f"privacy.noise_cohort_size: {error}") from error


def rates_of_devices(experiment: Experiment) -> tuple[str, ...]:
    """Return what devices measure of themselves where they evaluate, all between 0 and 1, so that it can be released with noise."""
    return RATES.get(experiment.task.name, ("accuracy",)) if experiment.evaluation.on == "devices" else ()


def releases(experiment: Experiment) -> int:
    """Return how many releases all the rounds of an experiment make: one each, and one for each evaluation that devices do."""
    rounds, every = experiment.run.rounds, experiment.evaluation.every
    if experiment.evaluation.on != "devices":
        return rounds
    return rounds + (rounds // every + (rounds % every > 0) if every else 1)


def calibrated(experiment: Experiment, users: int) -> Experiment:
    """Return the experiment with the noise multiplier that its target epsilon takes over its releases, and the target as its budget.

    With `noise_cohort_size` the target is that of the larger cohort, and this run, which costs more, has no budget from it.
    """
    privacy = experiment.privacy
    if privacy.target_epsilon is None:
        return experiment
    from fedclip.accounting import calibrate_noise

    larger = privacy.noise_cohort_size is not None
    sampler = larger_sampler(experiment, users) if larger else build_sampler(experiment, users)
    z = calibrate_noise(sampler, privacy.target_epsilon, releases(experiment), privacy.delta)
    budget = privacy.epsilon_budget if larger else privacy.epsilon_budget or privacy.target_epsilon
    options = privacy.model_copy(update={"noise_multiplier": z, "target_epsilon": None, "epsilon_budget": budget})
    return experiment.model_copy(update={"privacy": options})
