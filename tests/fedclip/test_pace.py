"""The speeds of workers, as rounds teach them."""

import math

from fedclip.pace import Pace


def test_speeds_are_learned_by_halves_and_a_new_worker_has_the_mean() -> None:
    pace = Pace()
    assert pace.of([1, 2]) is None
    pace.learn(1, cost=10.0, seconds=5.0)
    pace.learn(2, cost=10.0, seconds=2.5)
    assert pace.of([2, 1]) == [4.0, 2.0]
    pace.learn(1, cost=30.0, seconds=5.0)
    assert pace.of([1, 2, 3]) == [4.0, 4.0, 4.0]
    pace.learn(2, cost=0.0, seconds=1.0)  # it had nothing to do
    pace.learn(2, cost=1.0, seconds=0.0)  # too fast to be measured
    for cost, seconds in ((1.0, math.inf), (math.inf, 1.0), (math.inf, math.inf), (1.0, math.nan), (1.0, -1.0), (1.0, 5e-324)):
        pace.learn(2, cost, seconds)  # what a node says may be anything
    assert pace.of([2]) == [4.0]
    assert pace.of([3]) is None
