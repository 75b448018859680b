"""Rounds on real devices, without the network: the bits of a simulation, and nothing taken of what is not as it must be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from clients import messages
from experiments.folder import stamp_of
from fedclip.account import BudgetSpent
from fedclip.round import WorkerError
from tests.strategies.devices import (
    Device,
    Devices,
    revoked,
)
from tests.strategies.fleets import QUIET, VISION, make, simulated, without_records


def test_with_the_same_streams_the_bits_are_those_of_one_process(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path)
    for _ in range(3):
        site.fleet.round()
    assert torch.equal(site.fleet.state.params, simulated(site, tmp_path, 3).state.params)
    assert not site.warned
    assert site.fleet.remembered == [[user, 3, 0] for user in range(3)]


def test_devices_draw_from_their_own_generators_and_no_key_leaves_the_server(devices: list[Device], tmp_path: Path) -> None:
    seen: list[messages.TrainRequest] = []

    def hook(request: Message, reply: Message) -> list[Message]:
        seen.append(messages.read_train_request(request.content))
        return [reply]

    after = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        site = make(devices, tmp_path / name, seeded=False)
        for device in devices:
            device.hook = hook
        after.append(site.fleet.round().state.params)
    assert not torch.equal(*after)
    assert {request.spec.streams.secret for request in seen} == {""}
    assert len({request.errand.nonce for request in seen if request.errand}) == len(seen) == 6


def test_a_node_that_was_away_is_asked_again_when_it_is_back_and_counts_once(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path)
    away = [True]

    def hook(request: Message, reply: Message) -> list[Message]:
        return [Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=request)] if away and away.pop() else [reply]

    devices[1].hook = hook
    site.fleet.round()
    assert not site.warned
    assert torch.equal(site.fleet.state.params, simulated(site, tmp_path, 1).state.params)
    site.grid.silent = {devices[1].name}
    site.fleet._asking._deadline = 0.3
    away.append(True)
    site.fleet.round()
    assert site.fleet.remembered[1] == [1, 1, 0]


def test_without_noise_too_few_answers_are_no_round(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, *QUIET, "deployment.least_users=3", "deployment.deadline_seconds=0.3")
    site.grid.silent = {devices[0].name}
    with pytest.raises(WorkerError, match=r"no 3 users have answered within 0\.3 s"):
        site.fleet.round()
    assert site.fleet.state.round == 0
    site.grid.silent = set()
    site.fleet.round()
    assert site.fleet.state.round == 1
    assert {r.cause for r in site.warned} == {"late"}


def test_without_noise_a_round_ends_when_answers_enough_have_come(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, *QUIET, "sampler.cohort=2", "sampler.over_selection=2", "deployment.deadline_seconds=60")
    site.grid.silent = {devices[2].name}
    tally = site.fleet.round().tally
    assert (tally["users"], tally["unanswered_users"]) == (2, 1)
    site.grid.silent = set()
    site.fleet.round()
    assert [(r.node, r.cause) for r in site.warned] == [(devices[2].name, "late")]


def test_under_noise_who_answers_late_counts_too_also_when_more_were_asked_than_are_needed(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, "sampler.cohort=1.5", "sampler.over_selection=2.0", "deployment.diagnostics=true")
    assert site.fleet.round().tally["users"] == 3


def test_a_node_that_is_revoked_or_not_enrolled_is_not_asked(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path)
    site.fleet.round()
    revoked(site.roster, devices[1].name)
    stranger = Device("stranger", devices[0].folder, tmp_path / "stranger.key")
    site.grid.devices[200] = stranger
    site.fleet.round()
    assert [(r.node, r.cause) for r in site.warned] == [(devices[1].name, "revoked"), ("200", "unregistered")]
    assert site.fleet.remembered == [[0, 2, 0], [1, 1, 0], [2, 2, 0]]


def test_in_insecure_mode_nodes_are_taken_at_their_word(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, "deployment.insecure=true")
    site.grid.get_nodes = lambda: []  # such a SuperLink knows no keys
    for device in devices:
        device.keyless = True
    try:
        site.fleet.round()
    finally:
        for device in devices:
            device.keyless = False
    assert [user for user, *_ in site.fleet.remembered] == [0, 1, 2]
    assert "insecure" in stamp_of(site.prepared.experiment)


def test_images_are_dealt_to_as_many_users_as_a_node_has(devices: list[Device], tmp_path: Path) -> None:
    two = Device("two", devices[1].folder, devices[1].key, users=2)
    site = make([devices[0], two, devices[2]], tmp_path, text=VISION)
    assert site.fleet.round().tally["users"] == 4
    assert site.fleet.remembered == [[user, 1, 0] for user in range(4)]
    assert 0 <= site.prepared.task.summarise(site.fleet.evaluate_units(), 0)["accuracy"] <= 1


def test_a_budget_that_is_spent_ends_the_run_also_when_nobody_is_there(devices: list[Device], tmp_path: Path, monkeypatch: Any) -> None:
    site = make(devices, tmp_path, "privacy.epsilon_budget=1e3")
    account = site.fleet.account
    assert account is not None
    account._affordable = 0
    monkeypatch.setattr(site.fleet, "_wait_for_users", lambda: pytest.fail("waited for users"))
    with pytest.raises(BudgetSpent):
        site.fleet.round()


def test_a_round_that_is_done_again_is_another_attempt_for_the_devices(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, *QUIET, "deployment.least_users=3", "deployment.deadline_seconds=0.3")
    site.grid.silent = {devices[0].name}
    site.fleet.say = lambda text: site.grid.silent.clear()
    site.fleet.round()
    assert site.fleet.remembered == [[user, 1, 1] for user in range(3)]
    site.fleet.round()
    assert site.fleet.remembered == [[user, 2, 0] for user in range(3)]


def test_who_may_not_take_part_is_logged_once_however_long_is_waited(devices: list[Device], tmp_path: Path, monkeypatch: Any) -> None:
    site = make(devices, tmp_path)
    revoked(site.roster, devices[1].name)
    site.fleet._options = site.fleet._options.model_copy(update={"least_users": 3})
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            site.fleet._options = site.fleet._options.model_copy(update={"least_users": 2})

    monkeypatch.setattr("strategies.fleet.time.sleep", sleep)
    site.fleet._wait_for_users()
    assert [r.cause for r in site.warned] == ["revoked"]


@pytest.mark.parametrize("lie", ["no name", "another's name"])
def test_in_insecure_mode_too_a_user_counts_once(devices: list[Device], tmp_path: Path, lie: str) -> None:
    site = make(devices, tmp_path, "deployment.insecure=true")
    stranger = Device(devices[2].name, devices[2].folder, tmp_path / "stranger.key")
    if lie == "no name":
        stranger.hook = without_records
    site.grid.devices[200] = stranger
    tally = site.fleet.round().tally
    assert tally["users"] == 3
    assert torch.equal(site.fleet.state.params, simulated(site, tmp_path, 1).state.params)


def flaky(grid: Devices, *calls: str) -> list[str]:
    """Let each of some calls fail the first time, after the SuperLink has done what was asked; return what has failed."""
    failed: list[str] = []

    def once(name: str) -> Callable[..., Any]:
        call = getattr(grid, name)

        def failing(*arguments: Any) -> Any:
            if name in failed:
                return call(*arguments)
            failed.append(name)
            if name != "pull_messages":  # which gives a reply away
                call(*arguments)
            raise httpx.ReadTimeout("the proxy is started anew")

        return failing

    for name in calls:
        setattr(grid, name, once(name))
    return failed


def test_a_superlink_that_fails_for_a_moment_costs_nothing(devices: list[Device], tmp_path: Path) -> None:
    site, trained = make(devices, tmp_path), list[str]()
    calls = ("get_nodes", "push_messages", "pull_messages", "get_node_ids")
    failed = flaky(site.grid, *calls)
    away = [True]

    def hook(request: Message, reply: Message) -> list[Message]:
        if away and away.pop():
            return [Message(Error(ErrorCode.NODE_UNAVAILABLE), reply_to=request)]
        trained.append(request.metadata.message_id)
        return [reply]

    for device in devices:
        device.hook = hook
    assert site.fleet.round().tally["users"] == 3
    assert {*failed} == {*calls}
    assert not site.warned
    assert len({*trained}) == len(trained) == 3
    assert torch.equal(site.fleet.state.params, simulated(site, tmp_path, 1).state.params)


def test_a_device_keeps_what_chains_remember_of_the_last_runs(devices: list[Device], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("clients.kept.KEPT_RUNS", 2)
    runs = []
    for n in range(3):
        site = make(devices, tmp_path, f"local.lr={0.1 + n / 10}")
        runs.append(site.fleet.run)
        site.fleet.round()
    assert len({*runs}) == 3
    for device in devices:
        kept = device.folder / ".fedclip"
        assert {path.name for path in kept.iterdir()} == {*runs[1:]}
        assert [len([*(kept / run).rglob("*.state")]) for run in runs[1:]] == [1, 1]
