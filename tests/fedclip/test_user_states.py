"""States of users: the newest of a round that is over, nothing of one that is not, nobody's but the user's own."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedclip.dgc import DGC
from fedclip.local import LocalSGD
from fedclip.method import Method
from fedclip.optimizers import SGD
from fedclip.sampling import Poisson
from fedclip.schedules import Schedule
from fedclip.sealed import SealedFileError
from fedclip.shapes import tensor_bytes
from fedclip.transform import chain
from fedclip.user_states import KEPT_VERSIONS, Forecast, StatesInFolder, StatesInMemory, halved, restored
from tests.strategies_of_data import flat

FRESH = (torch.zeros(3), None)


def state(value):
    return torch.full((3,), float(value)), None


def value(found):
    return float(found[0][0])


@pytest.fixture(params=["memory", "folder"])
def states(request, tmp_path):
    return StatesInMemory() if request.param == "memory" else StatesInFolder(tmp_path / "states")


def test_of_a_hundred_million_users_only_those_who_took_part_cost_anything(tmp_path):
    users = [0, 7, 99_999_999, 2**40]
    states = StatesInFolder(tmp_path / "states")
    for user in range(0, 10**8, 10**6 // 2):
        assert states.load(user, 2, FRESH) is FRESH
    assert not list(tmp_path.iterdir())  # who is only looked for leaves nothing
    for user in users:
        states.stage(user, 1, 0, state(user % 1000))
    states.sync()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(users)
    assert [value(states.load(user, 2, FRESH)) for user in users] == [user % 1000 for user in users]


def test_a_user_that_was_never_seen_has_the_fresh_state(states):
    assert states.load(7, 1, FRESH) is FRESH


def test_a_round_sees_the_newest_state_before_it(states):
    for round in (2, 5, 9):
        states.stage(7, round, 0, state(round))
    states.sync()
    assert [value(states.load(7, r, FRESH)) for r in (10, 9, 6, 5, 3)] == [9, 5, 5, 2, 2]
    assert value(states.load(7, 2, FRESH)) == 0
    assert states.load(8, 10, FRESH) is FRESH


def test_few_states_are_kept_of_each_user(states, tmp_path):
    for round in range(1, 20):
        states.stage(1_234_567, round, 0, state(round))
    assert [value(states.load(1_234_567, r, FRESH)) for r in (20, 19, 18)] == [19, 18, 17]
    assert len(list(tmp_path.rglob("*.state"))) in (0, KEPT_VERSIONS)


def test_a_round_that_did_not_end_is_rolled_back(tmp_path):
    states = StatesInFolder(tmp_path)
    for round, attempt in ((1, 0), (2, 0), (3, 0), (3, 1)):
        states.stage(7, round, attempt, state(10 * round + attempt))
    StatesInFolder(tmp_path).roll_back(2)
    assert value(StatesInFolder(tmp_path).load(7, 9, FRESH)) == 20


def test_a_later_attempt_counts(tmp_path):
    states = StatesInFolder(tmp_path)
    for attempt in (0, 1):
        states.stage(7, 3, attempt, state(attempt))
    assert value(states.load(7, 4, FRESH)) == 1


def test_a_damaged_a_foreign_and_a_swapped_state_are_refused(tmp_path: Path):
    states = StatesInFolder(tmp_path)
    states.stage(7, 1, 0, state(1))
    states.stage(8, 1, 0, state(2))
    (seven,), (eight,) = (list((tmp_path / "0" / user).iterdir()) for user in "78")
    with pytest.raises(ValueError, match="another chain"):
        states.load(7, 2, (torch.zeros(4), None))
    with pytest.raises(ValueError, match="fewer parts"):
        states.load(7, 2, (None, None))
    whole = seven.read_bytes()
    seven.write_bytes(eight.read_bytes())
    with pytest.raises(ValueError, match="files were swapped"):
        states.load(7, 2, FRESH)
    seven.write_bytes(whole[:-5])
    with pytest.raises(SealedFileError, match="damaged"):
        states.load(7, 2, FRESH)


@given(st.integers(0, 2**31), st.sampled_from([1e-30, 1e-6, 1.0, 1e30, 3e38]))
def test_half_of_the_room_keeps_eleven_bits(seed, size):
    u = torch.randn(50, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1) * size
    state = (None, (u, torch.zeros(0)), torch.tensor([3]))
    half = halved(state)
    back = restored(half, state)
    assert tensor_bytes(half) * 2 == tensor_bytes(state) + 8
    assert tensor_bytes(half) == tensor_bytes(state, half=True)
    assert back[0] is None
    assert torch.equal(back[2], state[2])
    assert back[1][1].numel() == 0
    top = float(u.abs().max())
    assert float((back[1][0] - u).abs().max()) <= top * 2**-11
    large = u.abs() > top * 2**-20
    assert torch.all((back[1][0] - u).abs()[large] <= u.abs()[large] * 2**-11)
    assert restored(halved(back), state)[1][0].tolist() == back[1][0].tolist(), "what was rounded once stays"


@pytest.mark.parametrize("size", [0.0, 1e-44])
def test_what_is_next_to_nothing_is_kept_as_that(size):
    state = torch.full((3,), size)
    assert restored(halved(state), state).abs().max() <= size


def test_half_states_are_read_back_from_files(tmp_path):
    state, states = (torch.linspace(-3, 3, 7), torch.zeros(2)), StatesInFolder(tmp_path)
    states.stage(4, 1, 0, halved(state))
    states.sync()
    template = tuple(torch.zeros_like(t) for t in state)
    back = restored(StatesInFolder(tmp_path).load(4, 2, halved(template)), template)
    assert torch.allclose(back[0], state[0], rtol=2**-11)
    with pytest.raises(ValueError, match="another chain's"):
        StatesInFolder(tmp_path).load(4, 2, template)


@pytest.mark.parametrize(
    ("population", "cohort", "rounds", "users", "times"), [(4, 4, 60, 4, 60), (40, 10, 100, 40, 25), (10**6, 10, 520, 5186, 0.0052)]
)
@pytest.mark.parametrize("half", [False, True])
def test_the_forecast_of_a_run(population, cohort, rounds, users, times, half):
    method = Method(
        Poisson(population, cohort), LocalSGD(1.0, steps=1), chain(DGC()), chain(SGD(Schedule.of(1.0), momentum_1d=0.9)), half_states=half
    )
    forecast = Forecast.of(method, flat(1000, 50), rounds)
    assert forecast.each == 2 * 1050 * (2 if half else 4)
    assert forecast.users == pytest.approx(users, rel=1e-3)
    assert forecast.participations == pytest.approx(times)
    assert forecast.total == pytest.approx(forecast.users * min(3, population * times / users) * forecast.each, rel=1e-2)
