"""States of users on a machine that others have no disk of: the files of the folder itself, and copies that nothing depends on."""

import importlib
import os
import shutil
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from clients import states as states_module
from clients.lanes import MessageLost
from clients.states import StatesElsewhere, clear, copies_in, lent, near, states_at
from fedclip.sealed import SealedFileError
from fedclip.user_states import StatesInFolder, UserStates

STATE = (torch.tensor([1.0, -0.0, float("inf")]), 3)
FRESH = (torch.zeros(3), 0)


class Keeper:
    """Stands in for the actor, in this process, and counts what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.states, self.asked = StatesInFolder(folder), Counter[str]()

    def __getattr__(self, operation: str) -> Any:
        def remote(*arguments: Any) -> Any:
            self.asked[operation] += 1
            return ray.put(getattr(self.states, operation)(*arguments))

        return SimpleNamespace(remote=remote)


@pytest.fixture
def keeper(ray_session: None, tmp_path: Path) -> Keeper:
    return Keeper(tmp_path / "there")


def a_few_rounds(states: UserStates) -> list[object]:
    seen = []
    for round in range(1, 6):
        for user in (3, 1003):
            before = states.load(user, round, FRESH)
            seen.append((before[0].tolist(), before[1]))
            states.stage(user, round, 0, (STATE[0] * round, round))
        states.sync()
    return seen


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("ray_session")
def test_by_way_of_an_actor_the_files_are_the_same(tmp_path: Path) -> None:
    keeper: Any = ray.remote(StatesInFolder).options(num_cpus=0).remote(tmp_path / "there")
    elsewhere = StatesElsewhere(tmp_path / "there", keeper, tmp_path / "near")
    assert a_few_rounds(elsewhere) == a_few_rounds(StatesInFolder(tmp_path / "here"))
    with pytest.raises(FileNotFoundError):
        elsewhere.read(tmp_path / "missing")
    ray.kill(keeper)
    with suppress(ray.exceptions.RayActorError):  # it may answer once more before it is gone
        while True:
            ray.get(keeper.newest_digest.remote(3, 6))
    assert files(tmp_path / "there") == files(tmp_path / "here")
    copies = files(tmp_path / "near")
    with pytest.raises(MessageLost, match="states of users cannot be reached"):
        elsewhere.load(3, 6, FRESH)
    with pytest.raises(MessageLost):
        elsewhere.stage(8, 1, 0, STATE)
    assert files(tmp_path / "near") == copies, "there is no copy of what is not there"


def test_states_that_were_written_here_are_read_here(keeper: Keeper, tmp_path: Path) -> None:
    a_few_rounds(StatesElsewhere(tmp_path / "there", keeper, tmp_path / "near"))
    there, copies = files(tmp_path / "there"), files(tmp_path / "near")
    assert keeper.asked == {"newest_digest": 10, "put": 10, "settle": 5}
    assert copies.items() <= there.items()
    assert (len(there), len(copies)) == (6, 4), "of each of two users three are kept, and copies of two"
    assert (tmp_path / "near").stat().st_mode & 0o777 == 0o700, "states are of users"


@pytest.mark.parametrize(
    "harm", ["missing", "cut", "changed", "of another user", "older", "other bits", "open to others", "of others", "a link"]
)
def test_what_is_not_whole_and_ours_here_comes_from_there(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    elsewhere = StatesElsewhere(tmp_path / "there", keeper, tmp_path / "near")
    elsewhere.stage(7, 1, 0, STATE)
    (copy,) = (tmp_path / "near").rglob("*.state")
    if harm == "missing":
        copy.unlink()
    elif harm == "cut":
        copy.write_bytes(copy.read_bytes()[:9])
    elif harm == "changed":
        copy.write_bytes(copy.read_bytes().replace(b"7", b"8"))
    elif harm == "of another user":
        elsewhere.stage(8, 1, 0, (STATE[0] * 2, 9))
        copy.write_bytes((tmp_path / "near" / "0" / "8" / copy.name).read_bytes())
    elif harm == "open to others":
        (tmp_path / "near").chmod(0o710)
    elif harm == "of others":
        monkeypatch.setattr(os, "geteuid", lambda: (tmp_path / "near").stat().st_uid + 1)
    elif harm == "a link":
        (tmp_path / "near").rename(tmp_path / "moved")
        (tmp_path / "near").symlink_to(tmp_path / "moved")
    else:  # the user was trained on another machine: since, or again
        again = 2 if harm == "older" else 1
        StatesElsewhere(tmp_path / "there", keeper, tmp_path / "other").stage(7, again, 0, (STATE[0], 9))
    assert elsewhere.load(7, 3, FRESH)[1] == (9 if harm in ("older", "other bits") else 3)
    assert keeper.asked["read"] == 1
    if harm in ("open to others", "of others", "a link"):
        elsewhere.stage(8, 1, 0, STATE)
        assert not (tmp_path / "near" / "0" / "8").exists()


def test_copies_stay_in_the_folder_that_was_looked_at(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir(mode=0o700)
    with copies_in(tmp_path / "near") as copies:
        (tmp_path / "near").rename(tmp_path / "moved")
        (tmp_path / "near").mkdir()
        copies.put(7, 1, 0, [b"state"])
        assert len(files(tmp_path / "moved")) == 1
        assert files(tmp_path / "near") == {}
        shutil.rmtree(tmp_path / "near")
        shutil.rmtree(tmp_path / "moved")
        with pytest.raises(FileNotFoundError):
            copies.put(7, 1, 0, [b"state"])
    assert list(tmp_path.iterdir()) == [], "the folder of all users is not made along with that of one"


def test_what_is_damaged_there_is_refused(keeper: Keeper, tmp_path: Path) -> None:
    StatesElsewhere(tmp_path / "there", keeper, tmp_path / "near").stage(7, 1, 0, STATE)
    (path,) = (tmp_path / "there").rglob("*.state")
    path.write_bytes(path.read_bytes()[:-5])
    elsewhere = StatesElsewhere(tmp_path / "there", keeper, tmp_path / "other")
    with pytest.raises(SealedFileError, match="damaged"):
        elsewhere.load(7, 2, FRESH)
    path.unlink()
    assert elsewhere.load(7, 2, FRESH) is FRESH


@pytest.mark.parametrize("why", ["full", "no folder", "no rights"])
def test_where_no_copies_can_be_written_states_are_kept_all_the_same(
    keeper: Keeper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    place = tmp_path / "none" / "near" if why == "no folder" else tmp_path / "near"
    if why == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**6, free=10**5 + 100))
    elif why == "no rights":
        place.mkdir(mode=0o700)
        (place / "0").write_bytes(b"not a folder")
    assert a_few_rounds(StatesElsewhere(tmp_path / "there", keeper, place)) == a_few_rounds(StatesInFolder(tmp_path / "here"))
    assert files(tmp_path / "there") == files(tmp_path / "here")
    assert keeper.asked["read"] == (8 if why != "no rights" else 4)


@pytest.mark.usefixtures("ray_session")
def test_a_lent_folder_is_used_directly_on_its_own_machine_and_by_its_keeper_on_another(tmp_path: Path) -> None:
    folder, orphan = tmp_path / "a:b", near("states-of-a-run-that-was-killed")

    def copies() -> list[str]:
        return sorted(path.name for path in orphan.parent.iterdir() if path.name.startswith(orphan.name.partition("states")[0]))

    orphan.mkdir()
    with lent(folder) as place, lent(tmp_path / "other") as other:
        here = states_at(place)
        assert isinstance(here, StatesInFolder)
        assert here.folder == folder
        for at in (place, other):
            kind, name, _, path = at.split(":", 3)
            elsewhere = states_at(f"{kind}:{name}:{'0' * 56}:{path}")
            assert isinstance(elsewhere, StatesElsewhere)
            elsewhere.stage(7, 1, 0, STATE)
            elsewhere.sync()
            assert elsewhere.load(7, 2, FRESH)[1] == 3
        assert here.load(7, 2, FRESH)[1] == 3
        assert len(copies()) == 3
        clear("states-of-nobody")
        assert copies() == sorted(near(at.split(":")[1]).name for at in (place, other)), "those whose keepers are there stay"
    assert copies() == []
    assert states_at("") is None


ONLY_HERE = """
from pathlib import Path
from fedclip.user_states import StatesInFolder

class Kept(StatesInFolder):
    pass

def clear(gone):
    Path(__file__).with_name("cleared").touch()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_who_keeps_and_who_clears_find_the_code_where_this_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text(ONLY_HERE)
    monkeypatch.syspath_prepend(tmp_path)
    only_here = importlib.import_module("only_here")
    monkeypatch.setattr(states_module, "clear", only_here.clear)
    monkeypatch.setattr(states_module, "StatesInFolder", only_here.Kept)
    with lent(tmp_path / "there") as place:
        keeper = ray.get_actor(place.split(":")[1], states_module.NAMESPACE)
        assert StatesElsewhere(tmp_path / "there", keeper, tmp_path / "near").load(7, 1, FRESH) is FRESH
    assert (tmp_path / "cleared").exists()


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("trouble", ["fails", "mute"])
def test_nodes_where_copies_may_be_left_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    place = near("states-of-a-run-that-was-killed")
    if trouble == "fails":
        place.symlink_to(tmp_path)  # which `shutil.rmtree` refuses
    else:
        monkeypatch.setattr(states_module, "CLEAR_SECONDS", 0.1)
        monkeypatch.setattr(states_module, "clear", lambda gone: time.sleep(1))
    with lent(tmp_path / "there"):
        pass
    place.unlink(missing_ok=True)
    (message,) = caplog.messages
    assert ray.get_runtime_context().get_node_id() in message
    assert ("no answer in 0.1 s" if trouble == "mute" else f"{place} cannot be removed") in message
