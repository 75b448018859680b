"""Every audit of a method in a row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedclip.accounting import guarantee
from fedclip.audit.bench import Bench, System, capped, compact, unmasked
from fedclip.audit.bits import audit_bits
from fedclip.audit.claims import claim_of
from fedclip.audit.cohorts import audit_cohorts, audit_denominator
from fedclip.audit.distinguish import audit_distinguishing, audit_retry, fit_for_counting
from fedclip.audit.findings import Finding
from fedclip.audit.noise import audit_noise
from fedclip.audit.one_shot import audit_one_shot
from fedclip.audit.replay import audit_contributions, audit_hostile, audit_replay
from fedclip.layout import Layout
from fedclip.method import Method
from fedclip.sampling import Sampler
from fedclip.tasks.base import Task

FALSE_ALARM = 0.01
"""How likely the whole audit finds fault with a right method: the levels of its parts, which are exact or bounds, add up to so much."""

MOST_COORDINATES = 400_000
"""The noise is looked at on the model's own tensors, each cut where there would be more of them than about so many."""


@dataclass(frozen=True)
class Effort:
    """How much work an audit is.

    Attributes:
        rounds: rounds that are replayed on the real task.
        users: users who take part in them.
        removed: how many of those are taken out, each in a world of its own.
        trials: observations of each world that a canary is told by.
        samples: numbers of the noise to look at.
        contributions: hostile contributions, each looked at.
        hostile_rounds: rounds with hostile users.
        cohorts: cohorts that are drawn, at most.
        canaries: users who are followed from one attempt to the next.
    """

    rounds: int = 3
    users: int = 6
    removed: int = 2
    trials: int = 50_000
    samples: int = 50_000
    contributions: int = 60_000
    hostile_rounds: int = 20
    cohorts: int = 2000
    canaries: int = 1500


def audit(
    method: Method,
    layout: Layout,
    *,
    rounds: int,
    delta: float,
    task: Task | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    system: System | None = None,
) -> tuple[Finding, ...]:
    """Return all the findings on a method under noise.

    Args:
        method: the method.
        layout: of the model.
        rounds: how many releases the claim is about.
        delta: delta of the claim.
        task: a real task to replay on; None: hostile users only.
        effort: how much work.
        seed: of the audit's own randomness.
        system: the functions of a round; by default the real ones.

    Raises:
        ValueError: the method has no noise.
    """
    return tuple(finding for part in parts(method, layout, rounds, delta, task, effort, seed, system) for finding in part())


def parts(
    method: Method,
    layout: Layout,
    rounds: int,
    delta: float,
    task: Task | None = None,
    effort: Effort | None = None,
    seed: int = 0,
    system: System | None = None,
) -> Iterator[Callable[[], tuple[Finding, ...]]]:
    """Yield the audits one by one, for who wants to show them as they end; arguments as of `audit`."""
    effort, system, secret = effort or Effort(), system or System(), f"audit:{seed}"
    whole = cut(layout, MOST_COORDINATES)
    bench, small = Bench(method, whole, system, secret), Bench(method, narrow(method, layout), system, secret)
    # A common mask is looked at where noise and contributions are; what is told from a release is told from all coordinates.
    everywhere = unmasked(method)
    one_each = Bench(everywhere, compact(layout, 1), system, secret)
    claim = claim_of(bench.method, whole)
    counted = fit_for_counting(everywhere, layout)

    def epsilon(sampler: Sampler, z: float, releases: int) -> float:
        return guarantee(sampler, z, releases, delta).epsilon

    yield lambda: audit_noise(bench, claim, samples=effort.samples, level=0.4 * FALSE_ALARM, support=bench.support)
    yield lambda: audit_bits(one_each, claim_of(one_each.method, one_each.layout), level=0.1 * FALSE_ALARM)
    yield lambda: (audit_denominator(one_each, claim_of(one_each.method, one_each.layout)),)
    yield lambda: audit_cohorts(small, rounds=effort.cohorts, level=0.2 * FALSE_ALARM)
    yield lambda: (audit_contributions(small, count=effort.contributions, seed=seed, support=small.support),)
    yield lambda: audit_hostile(method, capped(layout, 4), rounds=effort.hostile_rounds, system=system)
    if task is not None:
        yield lambda: audit_replay(
            method, task, rounds=effort.rounds, users=effort.users, removed=effort.removed, system=system, secret=secret
        )
    yield lambda: (
        audit_distinguishing(
            counted,
            layout,
            lambda z: epsilon(counted.sampler, z, rounds),
            trials=effort.trials,
            level=0.2 * FALSE_ALARM,
            system=system,
            secret=secret,
        ),
    )
    yield lambda: audit_retry(counted, layout, canaries=effort.canaries, level=0.1 * FALSE_ALARM, system=system, secret=secret)
    yield lambda: (
        audit_one_shot(counted, layout, epsilon, lambda mu: gaussian_epsilon(mu, delta), seed=seed, system=system, secret=secret),
    )


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon at a delta of telling N(0, 1) from N(mu, 1) (arXiv 1805.06530)."""
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / mu, delta)) if mu > 0 else 0.0


def cut(layout: Layout, coordinates: int) -> Layout:
    """Return the layout with its tensors cut so that there are about so many coordinates at most."""
    elements = max(layout.sizes, default=0)
    while layout.size > coordinates and elements > 1:
        elements //= 2
        layout = capped(layout, elements)
    return layout


def narrow(method: Method, layout: Layout) -> Layout:
    """Return the first three tensors, two elements each, where the method has nothing to say of single layers; else all of them."""
    there = [t for t, size in enumerate(layout.sizes) if size][:3]
    names, shapes, layers = layout.names, layout.shapes, layout.layers
    few = Layout(tuple(names[t] for t in there), tuple(shapes[t] for t in there), tuple(layers[t] for t in there))
    try:
        method.check(compact(few, 2))
    except ValueError:
        return compact(layout, 2)
    return compact(few, 2)
