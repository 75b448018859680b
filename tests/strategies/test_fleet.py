"""Rounds on real devices, without the network: the bits of a simulation, and nothing taken of what is not as it must be."""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from rich.console import Console

from clients import messages
from clients.gate import Asked, Gate, Rejected
from clients.signing import read_private, sign
from experiments.engines import account_of, secret_of
from experiments.folder import read_metrics, stamp_of
from experiments.live import Reporter
from experiments.prepare import Prepared, prepare, read_experiment
from experiments.run import Run, run_rounds
from experiments.server_app import RATES
from fedclip.account import BudgetSpent, read_ledger
from fedclip.round import WorkerError
from fedclip.simulation import InProcess
from fedclip.update import Dense
from fedclip.user_states import StatesInFolder
from strategies.fleet import Fleet, Rejection
from strategies.naming import run_digest
from strategies.privacy import releases
from tests.strategies.devices import (
    EXPERIMENT,
    Device,
    Devices,
    Hook,
    enrolled,
    revoked,
    said_otherwise,
    sent_otherwise,
    speakers_apart,
    together,
)


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> list[Device]:
    return speakers_apart(tmp_path_factory.mktemp("devices"))


@pytest.fixture(autouse=True)
def _fresh(devices: list[Device]) -> Iterator[None]:
    yield
    for device in devices:
        device.hook = None
        device.forget()


@dataclasses.dataclass
class Site:
    """A fleet, its grid, its roster, and what it has said."""

    fleet: Fleet
    grid: Devices
    roster: Path
    prepared: Prepared
    warned: list[Rejection]


VISION = """
[run]
rounds = 1

[task]
name = "vision"

[sampler]
name = "available"
cohort = 4

[local]
lr = 0.1
steps = 1

[strategy]
client = [{ clip_per_layer = { max_norm = 0.5 } }]
server = [{ sgd = { lr = 0.1 } }]
"""


def make(devices: list[Device], folder: Path, *settings: str, seeded: bool = True, text: str = EXPERIMENT) -> Site:
    file = folder / "experiment.toml"
    file.write_text(text, encoding="utf-8")
    data, roster = together(devices, folder / "together"), enrolled(devices, folder / "roster.toml")
    said = [f'deployment.roster="{roster}"', f"deployment.seeded={str(seeded).lower()}", "deployment.deadline_seconds=5", *settings]
    prepared = prepare(read_experiment(file, said, data))
    options = prepared.experiment.deployment
    assert options is not None
    rates = RATES["asr"] if prepared.experiment.evaluation.on == "devices" else ()
    grid, warned = Devices(devices), list[Rejection]()
    names = (secret_of(prepared) if seeded else "", run_digest(prepared.experiment))
    account = account_of(prepared)
    fleet = Fleet(prepared.method, prepared.task, prepared.recipe, *names, grid, options, account=account, rates=rates)
    fleet.warn = warned.append
    return Site(fleet, grid, roster, prepared, warned)


def simulated(site: Site, folder: Path, rounds: int) -> InProcess:
    """Run the same experiment in one process, on the folder that has all the speakers."""
    experiment = site.prepared.experiment.model_copy(update={"deployment": None})
    prepared = prepare(experiment)
    states = StatesInFolder(folder / "states")
    engine = InProcess(prepared.method, prepared.task, secret_of(prepared), run_digest(experiment), "cpu", account_of(prepared), states)
    for _ in range(rounds):
        engine.round()
    return engine


def test_with_the_same_streams_the_bits_are_those_of_one_process(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path)
    for _ in range(3):
        site.fleet.round()
    assert torch.equal(site.fleet.state.params, simulated(site, tmp_path, 3).state.params)
    assert not site.warned
    assert site.fleet.remembered == [[user, 3, 0] for user in range(3)]


def without(devices: list[Device], folder: Path, name: str, rounds: int, *settings: str, **made: Any) -> Site:
    """Return a site of so many rounds in which a device never answered in the last one."""
    folder.mkdir()
    site = make(devices, folder, "deployment.deadline_seconds=0.3", *settings, **made)
    for round in range(rounds):
        site.grid.silent = {name} if round == rounds - 1 else set()
        site.fleet.round()
    return site


def payload_of(text: str) -> Callable[[bytes], bytes]:
    return lambda payload: text.encode()


def set_to(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said.update({key: value})


def twice(said: dict[str, Any]) -> None:
    said["users"] *= 2


def of_another(said: dict[str, Any]) -> None:
    said["users"][0]["user"] += 1


def unlike(said: dict[str, Any]) -> None:
    said["users"][0]["payload"] = "0" * 64


def raising(request: Message, reply: Message) -> list[Message]:
    return [Message(Error(0, "<class 'OSError'>: gone"), reply_to=request)]


def from_another_node(request: Message, reply: Message) -> list[Message]:
    reply.metadata.__dict__["_src_node_id"] = 100
    return [reply]


def without_records(request: Message, reply: Message) -> list[Message]:
    reply.content = RecordDict()
    return [reply]


def deeply_nested(device: Device) -> Hook:
    def hook(request: Message, reply: Message) -> list[Message]:
        text = "[" * 100_000
        reply.content.config_records["reply"]["said"] = text
        reply.content.config_records["reply"]["signature"] = sign(read_private(device.key), text.encode())
        return [reply]

    return hook


LIES: dict[str, tuple[str, Callable[[Device], Hook]]] = {
    "raises": ("failed", lambda d: raising),
    "of another node": ("unknown node", lambda d: from_another_node),
    "no records": ("malformed", lambda d: without_records),
    "deep": ("malformed", deeply_nested),
    "more than is asked": ("malformed", lambda d: said_otherwise(d, set_to("more", 1))),
    "another run": ("wrong run", lambda d: said_otherwise(d, set_to("run", "another"))),
    "the round before": ("wrong round", lambda d: said_otherwise(d, set_to("round", 1))),
    "another attempt": ("wrong attempt", lambda d: said_otherwise(d, set_to("attempt", 1))),
    "another message": ("wrong nonce", lambda d: said_otherwise(d, set_to("nonce", "00"))),
    "another model": ("wrong spec", lambda d: said_otherwise(d, set_to("spec", "00"))),
    "signed before": ("bad signature", lambda d: said_otherwise(d, lambda said: said["users"][0].update(weight=0.5), sign_again=False)),
    "another payload": ("bad signature", lambda d: said_otherwise(d, unlike)),
    "a user twice": ("wrong users", lambda d: said_otherwise(d, twice)),
    "another's user": ("wrong users", lambda d: said_otherwise(d, of_another)),
    "an infinite weight": ("malformed", lambda d: said_otherwise(d, lambda said: said["users"][0].update(weight=float("inf")))),
    "no update": ("undecodable", lambda d: sent_otherwise(d, payload_of("no update"))),
    "a cut update": ("undecodable", lambda d: sent_otherwise(d, lambda payload: payload[:-1])),
    "a long update": ("oversized", lambda d: sent_otherwise(d, lambda payload: payload + bytes(10**7))),
    "clip bits": ("undecodable", lambda d: said_otherwise(d, lambda said: said["users"][0].update(clip_bits="ff"))),
}


@pytest.fixture(scope="module")
def absent(devices: list[Device], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Return the model after two rounds, in the second of which the last device was silent."""
    return without(devices, tmp_path_factory.mktemp("absent") / "site", devices[2].name, 2).fleet.state.params


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_is_not_as_it_must_be_moves_nothing_and_is_counted(
    devices: list[Device], absent: torch.Tensor, tmp_path: Path, lie: str
) -> None:
    cause, hook = LIES[lie]
    site = make(devices, tmp_path)
    site.fleet.round()
    devices[2].hook = hook(devices[2])
    site.fleet.round()
    assert [(r.node, r.round, r.cause) for r in site.warned] == [(devices[2].name, 2, cause)]
    assert site.fleet.rejected == {cause: 1}
    assert torch.equal(site.fleet.state.params, absent)
    assert site.fleet.remembered[2] == [2, 1, 0]  # what its device keeps of the second round does not count


def test_what_a_device_remembers_counts_only_where_its_update_was_taken(devices: list[Device], tmp_path: Path) -> None:
    (tmp_path / "lied").mkdir()
    lied = make(devices, tmp_path / "lied")
    for round in range(3):
        devices[2].hook = said_otherwise(devices[2], set_to("run", "another")) if round == 1 else None
        lied.fleet.round()
    for device in devices:
        device.forget()
    silent = without(devices, tmp_path / "silent", devices[2].name, 2)
    silent.grid.silent = set()
    silent.fleet.round()
    assert torch.equal(lied.fleet.state.params, silent.fleet.state.params)


def test_the_same_reply_counts_once(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, "deployment.users_per_message=1")
    reply: list[Message] = []
    devices[2].hook = lambda request, honest: [reply.append(honest) or honest]
    site.fleet.round()
    gate = Gate(site.fleet.run, 1, 0, json.loads(str(reply[0].content.config_records["reply"]["said"]))["spec"], site.fleet.layout.size)
    said = json.loads(str(reply[0].content.config_records["reply"]["said"]))
    asked = Asked(102, devices[2].name, devices[2].public, said["nonce"], (2,))
    assert len(gate.updates(reply[0], asked, heaviest=None, measured=False)) == 1
    with pytest.raises(Rejected, match="duplicate"):
        gate.updates(reply[0], asked, heaviest=None, measured=False)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_malicious_device_moves_the_mean_by_at_most_its_bound(
    devices: list[Device], absent: torch.Tensor, tmp_path: Path, value: float
) -> None:
    site = make(devices, tmp_path)
    site.fleet.round()
    layout = site.fleet.layout
    payload = site.prepared.method.codec.encode(Dense(torch.full((layout.size,), value)), layout)
    devices[2].hook = sent_otherwise(devices[2], lambda honest: payload)
    before = site.fleet.state
    site.fleet.round()
    assert not site.warned
    bound = site.prepared.method.bound(layout).total
    moved = float((site.fleet.state.params - absent).norm()) / 0.1  # the server's learning rate
    assert moved <= bound / 3 * (1 + 1e-5)
    assert moved == (0 if math.isnan(value) else pytest.approx(bound / 3, rel=1e-3))
    assert before.round == 1


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


def test_under_noise_no_metric_leaves_a_device_nor_the_server_unless_it_is_asked_for(devices: list[Device], tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []

    def hook(request: Message, reply: Message) -> list[Message]:
        said.append(json.loads(str(reply.content.config_records["reply"]["said"])))
        return [reply]

    for diagnostics in (False, True):
        folder = tmp_path / str(diagnostics)
        folder.mkdir()
        site = make(devices, folder, f"deployment.diagnostics={str(diagnostics).lower()}", "run.rounds=1")
        for device in devices:
            device.hook = hook
        path = folder / "run"
        with Reporter(1, quiet=True, console=Console(file=io.StringIO())) as reporter:
            assert run_rounds(site.prepared, site.fleet, path, reporter) == 0
        (row,), summary = read_metrics(path), json.loads((path / "summary.json").read_text())
        told = {"users", "failed_users", "train_loss", "uplink_bytes", "downlink_bytes", "users_per_second", "clipped", "update_norm"}
        assert (told <= {*row}) == diagnostics
        assert ("tally" in said[-1]["users"][0]) == diagnostics
        assert {"round", "attempt", "epsilon", "delta", "wer", "layer_snr"} <= {*row}
        assert ("users_total" in summary) == diagnostics
        assert summary["privacy"] == "seeded: epsilon is nominal" + "; diagnostics of its cohorts are not private" * diagnostics
        assert summary["measured"]["epsilon"] == row["epsilon"]
        if not diagnostics:
            assert not told & {*row}
            assert not {"train_seconds", "trainer_busy", "unanswered_users"} & {*row}


def test_a_run_on_devices_is_gone_on_with_where_it_stopped(devices: list[Device], tmp_path: Path) -> None:
    straight = make(devices, tmp_path)
    for _ in range(3):
        straight.fleet.round()
    for device in devices:
        device.forget()
    path = tmp_path / "run"
    with Reporter(3, quiet=True, console=Console(file=io.StringIO())) as reporter:
        site = make(devices, tmp_path, "run.rounds=3")
        path.mkdir()
        site.fleet.account = account_of(site.prepared, path)
        run = Run(site.prepared, site.fleet, path)
        run.folder.record(run._round())
        site.fleet._done = crash  # after the release of the second round, before its checkpoint
        with pytest.raises(CrashError):
            run._round()
        run.folder.close()
        again = make(devices, tmp_path, "run.rounds=3")
        again.fleet.account = account_of(again.prepared, path)
        assert run_rounds(again.prepared, again.fleet, path, reporter, resume=True) == 0
    assert torch.equal(again.fleet.state.params, straight.fleet.state.params)
    assert [(c.round, c.attempt) for c in read_ledger(path / "ledger.jsonl")] == [(1, 0), (2, 0), (3, 0)]
    assert again.fleet.remembered == straight.fleet.remembered


class CrashError(Exception):
    pass


def crash(*arguments: Any) -> None:
    raise CrashError


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
    site.fleet._options = site.fleet._options.model_copy(update={"deadline_seconds": 0.3})
    away.append(True)
    site.fleet.round()
    assert site.fleet.remembered[1] == [1, 1, 0]


QUIET = ("privacy={}", "strategy.client=[{ clip_per_layer = { max_norm = 0.5 } }]")


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


def test_devices_evaluate_what_they_hold_out(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, *QUIET, 'evaluation.on="devices"')
    measured = site.fleet.measure()
    here = site.prepared.task.summarise(site.fleet.evaluate_units(), 0)
    assert (measured["wer"], measured["eval_words"] > 0) == (pytest.approx(here["wer"], abs=0.2), True)
    devices[0].hook = said_otherwise(devices[0], lambda said: said["counts"][0].update(words=-1.0))
    devices[1].hook = said_otherwise(devices[1], lambda said: said["counts"][0].pop("words"))
    assert site.fleet.measure()["eval_utterances"] < measured["eval_utterances"]
    assert [r.cause for r in site.warned] == ["malformed", "malformed"]


def test_images_are_dealt_to_as_many_users_as_a_node_has(devices: list[Device], tmp_path: Path) -> None:
    two = Device("two", devices[1].folder, devices[1].key, users=2)
    site = make([devices[0], two, devices[2]], tmp_path, text=VISION)
    assert site.fleet.round().tally["users"] == 4
    assert site.fleet.remembered == [[user, 1, 0] for user in range(4)]
    assert 0 <= site.prepared.task.summarise(site.fleet.evaluate_units(), 0)["accuracy"] <= 1


def test_what_devices_measure_under_noise_is_noised_and_charged(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, 'evaluation.on="devices"')
    account = site.fleet.account
    assert account is not None
    site.fleet.round()
    before = account.spent()
    devices[0].hook = said_otherwise(devices[0], lambda said: said["rates"].update(wer=1e9))
    measured = site.fleet.measure()
    assert {*measured} == {f"{rate}{end}" for rate in ("wer", "cer") for end in ("", "_low", "_high")}
    assert account.spent().epsilon > before.epsilon
    assert [(c.round, c.of, c.bound) for c in account.charges] == [(1, "updates", ANY), (1, "evaluation", pytest.approx(3**0.5))]
    assert account.attempts(1) == 1
    assert releases(site.prepared.experiment) == 5 + 1  # in the last round
    again = site.fleet.measure()
    assert again != measured  # other noise, and another charge
    assert len(account.charges) == 3


@pytest.mark.parametrize("reason", [" ", "\n", ""])
def test_a_device_that_fails_and_does_not_say_why_costs_the_round_its_update_alone(
    devices: list[Device], absent: torch.Tensor, tmp_path: Path, reason: str
) -> None:
    site = make(devices, tmp_path)
    site.fleet.round()
    devices[2].hook = lambda request, reply: [Message(Error(0, reason), reply_to=request)]
    site.fleet.round()
    assert [r.cause for r in site.warned] == ["failed"]
    assert torch.equal(site.fleet.state.params, absent)


@pytest.mark.parametrize("name", ["failed_users", "chain.round", "chain.users", "chain.made_up"])
def test_what_a_device_says_that_it_measured_ends_no_run_and_names_nothing_new(devices: list[Device], tmp_path: Path, name: str) -> None:
    site = make(devices, tmp_path, *QUIET, "run.rounds=2", "evaluation.every=0")
    for device in devices[:2]:
        device.hook = said_otherwise(device, lambda said: said["users"][0]["tally"].update({name: 1e99}))
    path = tmp_path / "run"
    with Reporter(2, quiet=True, console=Console(file=io.StringIO())) as reporter:
        assert run_rounds(site.prepared, site.fleet, path, reporter) == 0
    rows = read_metrics(path)
    assert [(row["round"], row["users"], row["failed_users"]) for row in rows] == [(1, 3, 0), (2, 3, 0)]
    assert "made_up" not in rows[0]
    assert json.loads((path / "summary.json").read_text())["status"] == "done"


def test_under_noise_not_even_the_end_of_a_run_tells_how_many_failed(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, "run.rounds=10", "evaluation.every=0")
    devices[1].hook = sent_otherwise(devices[1], payload_of("no update"))
    devices[2].hook = sent_otherwise(devices[2], payload_of("no update"))
    path, said = tmp_path / "run", io.StringIO()
    with Reporter(10, quiet=True, console=Console(file=said)) as reporter:
        assert run_rounds(site.prepared, site.fleet, path, reporter) == 0
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["status"], "error" in summary) == ("done", False)
    assert "user 1" not in said.getvalue()


def test_a_device_that_holds_nothing_out_is_no_device_whose_rates_are_zero(devices: list[Device], tmp_path: Path) -> None:
    measured = []
    for silent in (True, False):
        (tmp_path / str(silent)).mkdir()
        site = make(
            devices, tmp_path / str(silent), 'evaluation.on="devices"', "deployment.deadline_seconds=1", "privacy.noise_multiplier=0.01"
        )
        devices[2].hook = None if silent else said_otherwise(devices[2], lambda said: said.update(rates={}))
        site.grid.silent = {devices[2].name} if silent else set()
        measured.append(site.fleet.measure())
    assert measured[0] == measured[1]


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
        stranger.hook = without_records_of
    site.grid.devices[200] = stranger
    tally = site.fleet.round().tally
    assert tally["users"] == 3
    assert torch.equal(site.fleet.state.params, simulated(site, tmp_path, 1).state.params)


def without_records_of(request: Message, reply: Message) -> list[Message]:
    reply.content = RecordDict()
    return [reply]


def test_without_noise_a_weight_is_at_most_what_a_user_can_have(devices: list[Device], tmp_path: Path) -> None:
    site = make(devices, tmp_path, *QUIET, 'strategy.weighting="examples"', "strategy.max_examples=2")
    devices[2].hook = said_otherwise(devices[2], lambda said: said["users"][0].update(weight=60000.0))
    assert site.fleet.round().tally["weight"] <= 3
