"""States of users on a machine that others have no disk of: the same files as with the folder itself."""

from pathlib import Path

import pytest
import ray
import torch

from clients.lanes import MessageLost
from clients.states import Elsewhere, lent, states_at
from fedclip.storage import Storage
from fedclip.user_states import StatesInFolder

STATE = (torch.tensor([1.0, -0.0, float("inf")]), 3)
FRESH = (torch.zeros(3), 0)


def a_few_rounds(states: StatesInFolder) -> list[object]:
    seen = []
    for round in range(1, 6):
        for user in (3, 1003):
            before = states.load(user, round, FRESH)
            seen.append((before[0].tolist(), before[1]))
            states.stage(user, round, 0, (STATE[0] * round, round))
        states.sync()
    states.roll_back(4)
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("ray_session")
def test_by_way_of_an_actor_the_files_are_the_same(tmp_path: Path) -> None:
    keeper = ray.remote(Storage).options(num_cpus=0).remote()
    try:
        there = a_few_rounds(StatesInFolder(tmp_path / "there", Elsewhere(keeper)))
        with pytest.raises(FileNotFoundError):
            Elsewhere(keeper).read(tmp_path / "missing")
        with pytest.raises(NotImplementedError, match="written whole"):
            Elsewhere(keeper).append(tmp_path / "log", b"x")
        Elsewhere(keeper).remove(tmp_path / "gone already")
    finally:
        ray.kill(keeper)
    with pytest.raises(MessageLost, match="states of users cannot be reached"):
        Elsewhere(keeper).names(tmp_path)
    assert there == a_few_rounds(StatesInFolder(tmp_path / "here"))
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert len(files(tmp_path / "here")) == 4, "two states of each of two users are left"


@pytest.mark.usefixtures("ray_session")
def test_a_lent_folder_is_used_directly_on_its_own_machine_and_by_its_keeper_on_another(tmp_path: Path) -> None:
    folder = tmp_path / "a:b"
    with lent(folder) as place:
        here = states_at(place)
        assert isinstance(here, StatesInFolder)
        assert (here.folder, type(here._storage)) == (folder, Storage)
        kind, name, _, path = place.split(":", 3)
        elsewhere = states_at(f"{kind}:{name}:{'0' * 56}:{path}")
        assert isinstance(elsewhere, StatesInFolder)
        assert isinstance(elsewhere._storage, Elsewhere)
        elsewhere.stage(7, 1, 0, STATE)
        elsewhere.sync()
        assert here.load(7, 2, FRESH)[1] == 3
    assert states_at("") is None
