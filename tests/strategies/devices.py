"""Real devices without the network: a Flower grid in this process whose nodes run the app on folders and keys of their own."""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from clients import messages
from clients.app import app
from clients.device import KEPT_IN, digest_of
from clients.identity import Identity, assume
from clients.roster import Roster
from clients.signing import public_of, read_private, sign
from tests.speech_folder import spoken_digits

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
"""Recorded digits on three devices: a chain with a state, clips, noise."""

RUN = 1

Hook = Callable[[Message, Message], Iterable[Message]]
"""What a device makes of a request and of the honest reply to it."""


@dataclass
class Device:
    """A node: the folder of its data, its key, and what it does with its replies."""

    name: str
    folder: Path
    key: Path
    users: int = 1
    hook: Hook | None = None
    keyless: bool = False
    public: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.key.exists():
            new = ec.generate_private_key(ec.SECP384R1())
            none = serialization.NoEncryption()
            self.key.write_bytes(new.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, none))
            self.key.chmod(0o600)
        private: Any = serialization.load_ssh_private_key(self.key.read_bytes(), None)
        self.public = public_of(private)

    def forget(self) -> None:
        """Take away what it keeps between rounds."""
        shutil.rmtree(self.folder / KEPT_IN, ignore_errors=True)


class Devices(Grid):
    """A grid of devices, which answer when they are asked for the reply; those of `silent` never do."""

    def __init__(self, devices: Iterable[Device]) -> None:
        self.devices = {100 + n: device for n, device in enumerate(devices)}
        self.silent: set[str] = set()
        self.held: list[Message] = []
        self._out: dict[str, Message] = {}
        self._replies: dict[str, list[Message]] = {}
        assume(Identity(RUN, 1))

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.devices)

    def get_nodes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(node_id=node, public_key=device.public.encode()) for node, device in self.devices.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            self._out[message.object_id] = message
            ids.append(message.object_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for id in message_ids:
            request = self._out.get(id)
            if request is not None and self.devices[request.metadata.dst_node_id].name not in self.silent:
                del self._out[id]
                self._replies[id] = self._answers(request)
            if self._replies.get(id):
                found.append(self._replies[id].pop(0))
        return found

    def _answers(self, request: Message) -> list[Message]:
        node = request.metadata.dst_node_id
        device = self.devices[node]
        config: dict[str, Any] = {"data-dir": str(device.folder), "name": device.name}
        config |= {} if device.keyless else {"key": str(device.key)}
        before = assume(Identity(RUN, node))
        try:
            reply = app(request, Context(RUN, node, config, RecordDict(), {}))
            answers = [reply] if device.hook is None else list(device.hook(request, reply))
        finally:
            assume(before)
        for answer in answers:
            answer.metadata.__dict__["_reply_to_message_id"] = request.metadata.message_id
        return answers


def speakers_apart(folder: Path, count: int = 3) -> list[Device]:
    """Return devices with a recorded speaker each, the first so many by name."""
    recordings = spoken_digits(folder / "all") / "recordings"
    names = sorted({path.stem.split("_")[1] for path in recordings.glob("*.wav")})[:count]
    devices = []
    for name in names:
        own = folder / name / "recordings"
        own.mkdir(parents=True, exist_ok=True)
        for path in recordings.glob(f"*_{name}_*.wav"):
            shutil.copyfile(path, own / path.name)
        devices.append(Device(name, own.parent, folder / f"{name}.key"))
    return devices


def together(devices: Iterable[Device], folder: Path) -> Path:
    """Return one folder with the recordings of all the devices: what a simulation of them reads."""
    recordings = folder / "recordings"
    recordings.mkdir(parents=True, exist_ok=True)
    for device in devices:
        for path in (device.folder / "recordings").glob("*.wav"):
            shutil.copyfile(path, recordings / path.name)
    return folder


def enrolled(devices: Iterable[Device], path: Path) -> Path:
    """Write the roster of devices."""
    roster = Roster()
    for device in devices:
        roster = roster.enroll(device.name, device.public, device.users)
    roster.write(path)
    return path


def revoked(path: Path, name: str) -> None:
    """Revoke a node of a roster."""
    Roster.read(path).revoke(name).write(path)


def said_otherwise(device: Device, change: Callable[[dict[str, Any]], Any], *, sign_again: bool = True) -> Hook:
    """Return a hook that changes what a reply says, and signs it again with the device's key."""

    def hook(request: Message, reply: Message) -> list[Message]:
        config = reply.content.config_records["reply"]
        said = json.loads(str(config["said"]))
        change(said)
        config["said"] = json.dumps(said)
        if sign_again:
            config["signature"] = sign(read_private(device.key), str(config["said"]).encode())
        return [reply]

    return hook


def sent_otherwise(device: Device, payload: Callable[[bytes], bytes]) -> Hook:
    """Return a hook that sends other updates than were trained, rightly signed."""

    def hook(request: Message, reply: Message) -> list[Message]:
        arrays = reply.content.array_records["updates"]
        sent = {int(user): payload(array.data) for user, array in arrays.items()}
        said = json.loads(str(reply.content.config_records["reply"]["said"]))
        for of in said["users"]:
            of["payload"] = digest_of(sent[of["user"]]) if of["user"] in sent else None
        reply.content = messages.device_reply(said, sent, lambda text: sign(read_private(device.key), text))
        return [reply]

    return hook
