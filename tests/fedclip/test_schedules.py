"""Schedules against their closed forms."""

import pytest

from fedclip.options import ConfigError, validate
from fedclip.schedules import Schedule


def test_constant_and_number_are_the_same():
    assert {Schedule.of(0.3)(t) for t in (1, 10, 10_000)} == {0.3}
    schedule = Schedule(value=0.3)
    assert Schedule.of(schedule) is schedule


# arXiv 2310.00098, recipe: server rate 0.002, times 0.6 per 750 rounds from round 750, continuously; numbers by that formula.
@pytest.mark.parametrize(("t", "rate"), [(1, 0.002), (750, 0.002), (1125, 0.002 * 0.6**0.5), (1500, 0.0012), (2250, 0.00072)])
def test_the_schedule_of_the_paper(t, rate):
    schedule = Schedule(value=0.002, decay="exponential", factor=0.6, start=750, every=750)
    assert schedule(t) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(("t", "rate"), [(1, 0.25), (4, 1.0), (10, 1.0), (14, 1.0), (15, 0.5), (19, 0.5), (20, 0.25)])
def test_warm_up_is_linear_and_steps_fall_at_once(t, rate):
    assert Schedule(value=1.0, warmup=4, decay="step", factor=0.5, start=10, every=5)(t) == pytest.approx(rate)


@pytest.mark.parametrize("bad", [{"value": 0}, {"value": 1, "factor": 1.5}, {"value": 1, "every": 0}, {"value": float("inf")}])
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ConfigError):
        validate(Schedule, bad)
