"""A real device's side of a message: its own data, its own users, its own key. The rest is the code that simulations run.

What a device is told of itself stands in its node configuration: `data-dir`, the folder of its data; `key`, the file of its private key.
What its users' chains remember lies in the folder `.fedclip` of its data.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from clients import messages
from clients.kept import in_use
from clients.signing import read_private, sign
from fedclip.client import Client
from fedclip.codec import DenseCodec
from fedclip.collector import Contribution
from fedclip.options import ConfigError
from fedclip.replica import Replica
from fedclip.site import Site, evaluate_units
from fedclip.tasks.base import Task
from fedclip.tasks.build import TaskRecipe
from fedclip.update import to_dense
from fedclip.user_states import StatesOnDevice

KEPT_IN = ".fedclip"
"""The folder, in that of the data, of what is kept between rounds."""

RATES = ("wer", "cer", "accuracy")
"""The metrics that are shares of something, in the order in which users' own evaluations are released with noise."""


class OwnUsers:
    """A task whose users are those of this device: the first of them has the id `first` in the run."""

    def __init__(self, task: Task, first: int) -> None:
        self._task, self._first = task, first

    def load_user(self, user: int, rng: np.random.Generator) -> Sequence[Any]:
        """Return the training examples of a user of this device.

        Raises:
            ValueError: it has no such user.
        """
        if not 0 <= user - self._first < self._task.users:
            raise ValueError(f"user {user} is not here: the data are of {self._task.users} users, the first of them {self._first}")
        return self._task.load_user(user - self._first, rng)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)


def train(request: messages.TrainRequest, config: Mapping[str, Any]) -> RecordDict:
    """Train the users that a request names on this device's data, and return the signed reply.

    Raises:
        ConfigError: the node configuration does not say where data or key are, or they cannot be used.
    """
    errand, signer = _errand(request), _signer(config)  # a wrong key is found before the work is done
    folder, site = _site(config, request.task, request.device, errand)
    states = StatesOnDevice(folder / KEPT_IN / errand.run, errand.taken)
    client = Client(site, request.spec, states)
    with in_use(folder / KEPT_IN, errand.run) if client.states is not None else nullcontext():
        done = [contribution for _, contribution in client.contributions(request.blocks)]
        client.sync()
    said = {"users": [_said_of(contribution, errand) for contribution in done]}
    payloads = {c.user: c.payload for c in done if c.payload is not None}
    return _reply(errand, request.spec.digest, said, payloads, signer)


def evaluate(request: messages.EvaluateRequest, config: Mapping[str, Any]) -> RecordDict:
    """Evaluate a model on what this device holds out of its data, and return the signed reply.

    Raises:
        ConfigError: as `train`.
    """
    errand, signer = _errand(request), _signer(config)
    _, site = _site(config, request.task, request.device, errand)
    layout = site.replica.layout
    params = to_dense(DenseCodec().decode(request.params, layout), layout)
    counts = [dict(count) for _, count in evaluate_units(site, params, range(site.task.held_out_units))]
    # Under noise no more leaves the device than what is bounded on the server, and noised.
    said = {"rates": _rates(site.task, counts)} if errand.private else {"counts": counts}
    return _reply(errand, digest_of(request.params), said, {}, signer)


def digest_of(payload: bytes) -> str:
    """Return the hash by which a signed text names a payload."""
    return hashlib.blake2b(payload, digest_size=32).hexdigest()


def _errand(request: messages.TrainRequest | messages.EvaluateRequest) -> messages.Errand:
    if request.errand is None:
        raise ValueError("Expected a message to a real device, got one of a simulation.")
    return request.errand


def _site(config: Mapping[str, Any], task: str, device: str, errand: messages.Errand) -> tuple[Path, Site]:
    folder = Path(_of(config, "data-dir", "the folder of this node's data")).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"data-dir: there is no folder {folder}; correct the node configuration.")
    recipe = dataclasses.replace(TaskRecipe.from_json(task), data_dir=str(folder), population=errand.users, index="")
    own: Any = OwnUsers(recipe.build(), errand.first)
    return folder, Site(own, Replica.of(own, device), group=1)  # the process ends with this message


def _signer(config: Mapping[str, Any]) -> Callable[[bytes], bytes]:
    """Return what signs replies; where the configuration names no key, nothing does, which the server takes if it is told to."""
    if "key" not in config:
        return lambda text: b""
    key = read_private(Path(_of(config, "key", "the file of this node's private key")).expanduser())
    return lambda text: sign(key, text)


def _of(config: Mapping[str, Any], name: str, what: str) -> str:
    value = config.get(name)
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name}: the node configuration does not say {what}; start it with --node-config '{name}=\"...\"'.")
    return value


def _said_of(contribution: Contribution, errand: messages.Errand) -> dict[str, Any]:
    payload = contribution.payload
    said: dict[str, Any] = {
        "user": contribution.user,
        "payload": None if payload is None else digest_of(payload),
        "clip_bits": contribution.clip_bits.hex(),
        "weight": contribution.weight,
    }
    if errand.diagnostics or not errand.private:  # else neither a loss nor what is wrong with a user's data leaves the device
        numbers = {name: value for name, value in contribution.tally.items() if isinstance(value, float | int)}
        said |= {"tally": numbers, "error": contribution.error}
    return said


def _rates(task: Task, counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    if not counts:
        return {}
    measured = task.summarise(counts, 0)
    return {name: measured[name] for name in RATES if name in measured and np.isfinite(measured[name])}


def _reply(
    errand: messages.Errand, spec: str, said: Mapping[str, Any], payloads: Mapping[int, bytes], signer: Callable[[bytes], bytes]
) -> RecordDict:
    named = {"run": errand.run, "round": errand.round, "attempt": errand.attempt, "nonce": errand.nonce, "spec": spec}
    return messages.device_reply(named | dict(said), payloads, signer)
