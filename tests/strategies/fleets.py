"""What tests of fleets share: a fleet over a grid of devices in this process, the same in one process, and what is said in tests."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict

from experiments.engines import account_of, secret_of
from experiments.prepare import Prepared, prepare, read_experiment
from fedclip.simulation import InProcess
from fedclip.user_states import StatesInFolder
from strategies.fleet import Fleet, Rejection
from strategies.naming import run_digest
from strategies.privacy import rates_of_devices
from tests.strategies.devices import (
    EXPERIMENT,
    Device,
    Devices,
    enrolled,
    together,
)


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


QUIET = ("privacy={}", "strategy.client=[{ clip_per_layer = { max_norm = 0.5 } }]")


def make(devices: list[Device], folder: Path, *settings: str, seeded: bool = True, text: str = EXPERIMENT) -> Site:
    file = folder / "experiment.toml"
    file.write_text(text, encoding="utf-8")
    data, roster = together(devices, folder / "together"), enrolled(devices, folder / "roster.toml")
    said = [f'deployment.roster="{roster}"', f"deployment.seeded={str(seeded).lower()}", "deployment.deadline_seconds=5", *settings]
    prepared = prepare(read_experiment(file, said, data))
    options = prepared.experiment.deployment
    assert options is not None
    rates = rates_of_devices(prepared.experiment)
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


def without_records(request: Message, reply: Message) -> list[Message]:
    reply.content = RecordDict()
    return [reply]
