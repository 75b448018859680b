"""What tests of several folders share: one Ray for all of them, which every grid joins as it would a cluster."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A busy machine is no failure.
settings.register_profile("fedclip", deadline=None)
settings.load_profile("fedclip")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Start Ray once, with room for the grids that tests keep open and one more."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of a change to come
    ray.init(address="local", num_cpus=6, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """One thread, as in the workers: the tests' models are too small to share out, and bits depend on it."""
    torch.set_num_threads(1)
