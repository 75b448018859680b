"""Runs on real devices in their folder: what it shows under noise, how they end, and that they are gone on with."""

import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from flwr.app import Message
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import experiments.audit
from experiments.audit import audit_command
from experiments.engines import account_of
from experiments.folder import read_metrics
from experiments.live import Reporter
from experiments.report.read import curves_of
from experiments.run import Run, run_rounds
from fedclip.account import read_ledger
from tests.strategies.devices import Device, said_otherwise, sent_otherwise
from tests.strategies.fleets import QUIET, make, payload_of


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
        told |= {"round_seconds"}
        assert (told <= {*row}) == diagnostics
        assert ("tally" in said[-1]["users"][0]) == diagnostics
        assert {"round", "attempt", "epsilon", "delta", "wer", "layer_snr"} <= {*row}
        assert ("users_total" in summary) == diagnostics
        assert summary["privacy"] == "seeded: epsilon is nominal" + "; diagnostics of its cohorts are not private" * diagnostics
        assert summary["measured"]["epsilon"] == row["epsilon"]
        if not diagnostics:
            assert not told & {*row}
            assert not {"train_seconds", "trainer_busy", "unanswered_users"} & {*row}


def shown(path: Path) -> dict[str, Any]:
    """Return what the files of a run that others may see say, but for the process and what it ran on."""
    said: dict[str, Any] = {"metrics": (path / "metrics.jsonl").read_text()}
    for name, own in (("heartbeat", "pid"), ("summary", "startup_memory_bytes")):
        said[name] = json.loads((path / f"{name}.json").read_text())
        del said[name][own]
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    said["curves"] = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    said["report"] = curves_of(read_metrics(path), 100)
    return said


def test_under_noise_nothing_that_is_shown_tells_how_long_a_round_was_waited_for(devices: list[Device], tmp_path: Path) -> None:
    told = []
    for wait in (0.1, 1.0):
        folder = tmp_path / str(wait)
        folder.mkdir()
        site = make(devices, folder, f"deployment.deadline_seconds={wait}", "run.rounds=1")
        site.grid.silent, screen = {devices[2].name}, io.StringIO()
        with Reporter(1, quiet=True, console=Console(file=screen)) as reporter:
            assert run_rounds(site.prepared, site.fleet, folder / "run", reporter) == 0
        assert "done: 1 rounds, WER" in screen.getvalue()
        told.append(shown(folder / "run"))
        for device in devices:
            device.forget()
    assert told[0] == told[1]
    assert told[0]["curves"]["epsilon"][0].wall_time == 1
    assert told[0]["report"]["seconds"] == [None]


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
        run._round(reporter)
        site.fleet._done = crash  # after the release of the second round, before its checkpoint
        with pytest.raises(CrashError):
            run._round(reporter)
        run.folder.close()
        again = make(devices, tmp_path, "run.rounds=3")
        again.fleet.account = account_of(again.prepared, path)
        assert run_rounds(again.prepared, again.fleet, path, reporter, resume=True) == 0
    assert torch.equal(again.fleet.state.params, straight.fleet.state.params)
    assert [(c.round, c.attempt) for c in read_ledger(path / "ledger.jsonl")] == [(1, 0), (2, 0), (3, 0)]
    assert again.fleet.remembered == straight.fleet.remembered


def test_the_ledger_of_a_run_on_devices_passes_the_audit(devices: list[Device], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(experiments.audit, "parts", lambda *arguments: [])
    site = make(devices, tmp_path, "run.rounds=2", 'evaluation.on="devices"', "evaluation.every=1", seeded=False)
    path = tmp_path / "run"
    path.mkdir()
    site.fleet.account = account_of(site.prepared, path)
    site.fleet.run += "-drawn-for-it"
    with Reporter(2, quiet=True, console=Console(file=io.StringIO())) as reporter:
        assert run_rounds(site.prepared, site.fleet, path, reporter) == 0
    assert [charge.of for charge in read_ledger(path / "ledger.jsonl")] == ["updates", "evaluation"] * 2
    assert audit_command(path, [], None, 1, 100, as_json=False) == 0, capsys.readouterr()
    output = capsys.readouterr().out
    assert "whoever is there (no sampling claimed) q = 1, z = 1.5, 4 rounds" in output
    assert "all within the claim" in output
    rows = read_metrics(path)
    lines = (path / "ledger.jsonl").read_text().splitlines(True)
    (path / "ledger.jsonl").write_text("".join(lines[:3]))
    assert len(rows) == 2
    assert audit_command(path, [], None, 1, 100, as_json=False) == 1
    assert "evaluation of 2" in capsys.readouterr().out


class CrashError(Exception):
    pass


def crash(*arguments: Any) -> None:
    raise CrashError


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


def test_a_superlink_that_stays_away_ends_the_run_which_is_gone_on_with_and_counts_nothing_twice(
    devices: list[Device], tmp_path: Path
) -> None:
    straight = make(devices, tmp_path)
    for _ in range(2):
        straight.fleet.round()
    for device in devices:
        device.forget()
    path, screen = tmp_path / "run", io.StringIO()
    settings = ("run.rounds=2", "deployment.deadline_seconds=0.3", "evaluation.every=0")
    with Reporter(2, quiet=True, console=Console(file=screen, width=200)) as reporter:
        site = make(devices, tmp_path, *settings)
        path.mkdir()
        site.fleet.account = account_of(site.prepared, path)
        push, rounds = site.grid.push_messages, list[int]()

        def pushed(messages: Any) -> Any:
            rounds.append(1)
            if len(rounds) > 1:
                raise httpx.ConnectError("down")
            return push(messages)

        site.grid.push_messages = pushed
        assert run_rounds(site.prepared, site.fleet, path, reporter) == 1
        summary = json.loads((path / "summary.json").read_text())
        assert (summary["status"], summary["rounds"]) == ("failed", 1)
        assert "start it again" in summary["error"]
        assert f"to go on: flwr run . --run-config 'resume=\"{path}\"'" in screen.getvalue()
        again = make(devices, tmp_path, *settings)
        again.fleet.account = account_of(again.prepared, path)
        assert run_rounds(again.prepared, again.fleet, path, reporter, resume=True) == 0
    assert [(c.round, c.attempt) for c in read_ledger(path / "ledger.jsonl")] == [(1, 0), (2, 0)]
    assert torch.equal(again.fleet.state.params, straight.fleet.state.params)
