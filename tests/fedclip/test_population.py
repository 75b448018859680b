"""What users have, in numbers: against hand-made users."""

import numpy as np
import pytest

from fedclip.population import Labels, Spread, sample


def test_a_spread_counts_everybody_once():
    spread = Spread.of([3, 1, 1, 7])
    assert (spread.users, spread.minimum, spread.median, spread.maximum, spread.mean, spread.total) == (4, 1, 2, 7, 3, 12)
    assert (spread.lower_quartile, spread.upper_quartile) == (1, 4)
    assert spread.edges == (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5)
    assert spread.counts == (2, 0, 1, 0, 0, 0, 1)
    for values in ([5], [0.25, 0.5], np.arange(1000), np.linspace(0, 1, 77), [0, 10**9]):
        spread = Spread.of(values)
        assert sum(spread.counts) == len(values)
        assert len(spread.edges) == len(spread.counts) + 1 <= 22
        assert spread.edges[0] <= spread.minimum
        assert spread.edges[-1] >= spread.maximum
    with pytest.raises(ValueError, match="at least one user"):
        Spread.of([])


def test_labels_of_users_by_hand():
    # All together: 4 of label 2, 2 of label 5, 2 of label 9.
    labels = Labels.of([np.array([2, 2, 5, 5]), np.array([9, 9]), np.array([], int), np.array([2, 2])])
    assert labels.names.tolist() == [2, 5, 9]
    assert labels.counts.tolist() == [[2, 2, 0], [0, 0, 2], [0, 0, 0], [2, 0, 0]]
    assert labels.overall.tolist() == [0.5, 0.25, 0.25]
    assert labels.distinct().tolist() == [2, 1, 0, 1]
    # Without the user that has nothing. Half the sum of absolute differences to (1/2, 1/4, 1/4).
    assert labels.entropy().tolist() == [1.0, 0.0, 0.0]
    assert labels.total_variation().tolist() == [0.25, 0.75, 0.5]


def test_a_sample_is_everybody_or_distinct_and_never_enumerates():
    assert sample(5, 10, np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]
    drawn = sample(100_000_000, 500, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == 500
    assert (np.diff(drawn) > 0).all()
    assert 0.4e8 < drawn.mean() < 0.6e8
