"""Three recorded speakers on devices of their own, which forget after each test what they kept."""

from collections.abc import Iterator

import pytest
import torch

from tests.strategies.devices import (
    Device,
    speakers_apart,
)
from tests.strategies.fleets import without


@pytest.fixture(scope="session")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> list[Device]:
    return speakers_apart(tmp_path_factory.mktemp("devices"))


@pytest.fixture
def devices(speakers: list[Device]) -> Iterator[list[Device]]:
    yield speakers
    for device in speakers:
        device.hook = None
        device.forget()


@pytest.fixture(scope="session")
def absent(speakers: list[Device], tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Return the model after two rounds, in the second of which the last device was silent."""
    model = without(speakers, tmp_path_factory.mktemp("absent") / "site", speakers[2].name, 2).fleet.state.params
    for device in speakers:
        device.forget()
    return model
