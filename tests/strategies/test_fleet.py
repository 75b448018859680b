"""Rounds on real devices, without the network: the bits of a simulation, and nothing taken of what is not as it must be."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.engines import account_of, secret_of
from experiments.prepare import Prepared, prepare, read_experiment
from experiments.server_app import RATES
from fedclip.simulation import InProcess
from fedclip.user_states import StatesInFolder
from strategies.fleet import Fleet, Rejection
from strategies.naming import run_digest
from tests.strategies.devices import Device, Devices, enrolled, speakers_apart, together

EXPERIMENT = """
[run]
name = "devices"
rounds = 5

[task]
name = "asr"

[task.corpus]
kind = "spoken_digits"
utterances = 3

[task.model]
dim = 16
convolutions = 2
layers = 1
kernel = 7

[sampler]
name = "available"
cohort = 3

[local]
lr = 0.1
steps = 2
batch_size = 2

[strategy]
client = [{ dgc = { density = 0.05, momentum = 0.9 } }, { clip_per_layer = { max_norm = 0.5 } }]
server = [{ sgd = { lr = 0.1 } }]

[codec]
name = "packed"

[privacy]
noise_multiplier = 1.5
"""


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> list[Device]:
    return speakers_apart(tmp_path_factory.mktemp("devices"))


@pytest.fixture(autouse=True)
def _fresh(devices: list[Device]) -> Iterator[None]:
    yield
    for device in devices:
        device.hook = None


@dataclasses.dataclass
class Site:
    """A fleet, its grid, its roster, and what it has said."""

    fleet: Fleet
    grid: Devices
    roster: Path
    prepared: Prepared
    warned: list[Rejection]


def make(devices: list[Device], folder: Path, *settings: str, seeded: bool = True) -> Site:
    file = folder / "experiment.toml"
    file.write_text(EXPERIMENT, encoding="utf-8")
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
