"""A whole deployment on this machine: certificates, a SuperLink with TLS that lets in registered keys alone, SuperNodes, and runs on it.

    python -m experiments.deployment.loopback EXPERIMENT.toml --out FOLDER --node NAME=DATA [--node ...] [--data-dir DATA] [--set A.B=C]

Everything is the real thing but for the network: each node is a process with its own key and the folder of its own data, and trains in a
new process for each message, as Flower has it. All files are in FOLDER, also what the programs say; the run is FOLDER/run. With --front
nodes come through nginx, which lets them reach nothing else of the SuperLink than what is for them.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import tomli_w

from clients.roster import Roster
from experiments.deployment.front import configuration, nginx
from experiments.deployment.relay import Relay

FRONT, SUBMISSION = "front", "submission"
PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
HOST = "127.0.0.1"
SECONDS_TO_START, SECONDS_TO_END, SECONDS_TO_WRITE = 120.0, 20.0, 5.0


class LoopbackError(RuntimeError):
    """Something of the deployment did not start, or ended. The message names its log."""


@dataclass
class Node:
    """A SuperNode: its name, the folder of its data, how many users it has, and whether it is enrolled and registered."""

    name: str
    data: Path
    users: int = 1
    enroll: bool = True
    register: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)


class Loopback:
    """A SuperLink and SuperNodes on this machine.

    Args:
        folder: everything that is written; made here.
        nodes: who takes part.
        front: nodes reach the SuperLink through nginx, and nothing of it that is not for nodes.

    Attributes:
        port: the SuperLink's.
        entry: the port that is for nodes: the front's, else the SuperLink's.
        relay: counts the bytes between the nodes and their entry.
        roster: the file of who is enrolled.

    Raises:
        LoopbackError: there is to be a front, and nginx is not installed.
    """

    def __init__(self, folder: Path, nodes: Sequence[Node], front: bool = False) -> None:
        if front and nginx() is None:
            raise LoopbackError("The front needs nginx, which is not installed. `apt install nginx`, or leave the front out.")
        self.folder, self.nodes = folder.absolute(), {node.name: node for node in nodes}
        self.roster, self._keys = self.folder / "roster.toml", self.folder / "keys"
        self.port, self._node_ports = free_port(), {node.name: free_port() for node in nodes}
        self.entry = free_port() if front else self.port
        self.relay = Relay(self.entry)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        """Make keys, start the SuperLink, register and enroll the nodes, and start them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._make_keys()
            self.relay.__enter__()
            self.start_link()
            if self.entry != self.port:
                self._start_front()
            for node in self.nodes.values():
                if node.register:
                    self.start(node.name)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End what was started."""
        for name in list(self._processes):
            self.end(name)
        self.relay.__exit__(None, None, None)

    def start_link(self) -> None:
        """Start the SuperLink, which remembers the nodes that are registered, and wait until it answers."""
        keys = self._keys
        files: list[str | Path] = [
            "--ssl-ca-certfile",
            keys / "ca.crt",
            "--ssl-certfile",
            keys / "server.pem",
            "--ssl-keyfile",
            keys / "server.key",
        ]
        address: list[str | Path] = ["--host", HOST, "--port", str(self.port), "--database", self.folder / "link.db"]
        flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        self._start("superlink", ["flower-superlink", *files, *address, *flags])
        self._wait(lambda: _answers(self.port), "superlink")
        for node in self.nodes.values():
            if node.register and not (self.folder / f"{node.name}.registered").exists():
                self.flwr("supernode", "register", keys / f"{node.name}.pub", "loopback", "--name", node.name)
                (self.folder / f"{node.name}.registered").touch()

    def _start_front(self) -> None:
        """Start nginx; `log("front")` is of what it turns away, and of what else it says."""
        file = self.folder / "nginx.conf"
        file.write_text(configuration(f"{HOST}:{self.entry}", f"{HOST}:{self.port}"), encoding="utf-8")
        self._start(FRONT, [nginx() or "nginx", "-e", "stderr", "-p", self.folder, "-c", file])
        self._wait(lambda: _answers(self.entry), FRONT)

    def start(self, name: str, seconds: float = SECONDS_TO_START) -> None:
        """Start a node and wait until the SuperLink has let it in.

        A SuperLink refuses a node as long as it takes it for connected, which is a minute after it was killed: it is then tried again.

        Raises:
            LoopbackError: it is not let in.
        """
        deadline = time.monotonic() + seconds
        while True:
            self._start_node(name)
            said = self.log(name).stat().st_size
            while self.alive(name):
                if b"SuperNode ID" in self.log(name).read_bytes()[said:]:
                    return
                time.sleep(0.2)
            if time.monotonic() > deadline:
                raise LoopbackError(f"{name} was not let in; see {self.log(name)}.")
            time.sleep(3)

    def _start_node(self, name: str) -> None:
        node, key = self.nodes[name], self._keys / name
        address = ["--superlink", f"{HOST}:{self.relay.port}", "--host", HOST, "--port", str(self._node_ports[name])]
        config = f'data-dir="{node.data.absolute()}" key="{key}"'
        trust: list[str | Path] = ["--root-certificates", self._keys / "ca.crt", "--auth-supernode-private-key", key]
        self._start(name, ["flower-supernode", *trust, *address, "--node-config", config], node.environment)

    def kill(self, name: str) -> None:
        """End a node, or the SuperLink, by SIGKILL, as a power cut would."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def end(self, name: str) -> None:
        """End a node, or the SuperLink, in order."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def alive(self, name: str) -> bool:
        """Return whether a node, or the SuperLink, is there."""
        return name in self._processes and self._processes[name].poll() is None

    def log(self, name: str) -> Path:
        """Return the file of what a node, or the SuperLink, says."""
        return self.folder / f"{name}.log"

    def submit(self, **config: str | int) -> None:
        """Submit a run to the SuperLink; what it says goes to the log of `submission`, until it ends."""
        said = self.folder / "submitted.toml"
        said.write_text(tomli_w.dumps({name.replace("_", "-"): value for name, value in config.items()}), encoding="utf-8")
        if SUBMISSION in self._processes:
            self.end(SUBMISSION)
        self._start(SUBMISSION, ["flwr", "run", PROJECT, "loopback", "--stream", "--run-config", said], self._environment())

    def wait(self, run: Path, *, rounds: int | None = None, seconds: float = 600.0) -> dict[str, Any]:
        """Wait until a run has ended, or has done so many rounds, and return its summary, or its heartbeat.

        Raises:
            LoopbackError: it takes longer, or the SuperLink is gone.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            now = _read(run / "summary.json") if rounds is None else _read(run / "heartbeat.json")
            if now is not None and (rounds is None or now["round"] >= rounds):
                return now
            for name in ("superlink", SUBMISSION):
                if not self.alive(name):
                    time.sleep(SECONDS_TO_WRITE)
                    if _read(run / "summary.json") is None:
                        raise LoopbackError(f"{name} has ended; see {self.log(name)}: {self.log(name).read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        raise LoopbackError(f"{run} has not come so far in {seconds:g} s; see the logs in {self.folder}.")

    def flwr(self, *arguments: str | Path) -> str:
        """Run a command of Flower and return what it says.

        Raises:
            LoopbackError: it failed.
        """
        command = [str(BIN / "flwr"), *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, env=self._environment(), capture_output=True, text=True, timeout=180, check=False)
        if done.returncode:
            raise LoopbackError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def _make_keys(self) -> None:
        keys, roster = self._keys, Roster()
        fedclip("keys", "server", str(keys), "--host", HOST, "--host", "localhost")
        for node in self.nodes.values():
            if not (keys / node.name).exists():
                fedclip("keys", "node", node.name, str(keys))
            if node.enroll:
                roster = roster.enroll(node.name, (keys / f"{node.name}.pub").read_text(encoding="utf-8"), node.users)
        if not self.roster.exists():
            roster.write(self.roster)
        home = self.folder / "flwr"
        home.mkdir(exist_ok=True)
        connection = f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "{HOST}:{self.port}"\n'
        (home / "config.toml").write_text(f'{connection}root-certificates = "{keys / "ca.crt"}"\n', encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        off = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")
        on = ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "OMP_NUM_THREADS")
        path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FLWR_HOME": str(self.folder / "flwr")}
        return dict(os.environ) | dict.fromkeys(off, "0") | dict.fromkeys(on, "1") | path

    def _start(self, name: str, command: Sequence[str | Path], more: Mapping[str, str] | None = None) -> None:
        home = self.folder / name  # a node keeps its copy of the app apart from the others'
        home.mkdir(exist_ok=True)
        environment = self._environment() | {"FLWR_HOME": str(home)} | dict(more or {})
        with self.log(name).open("ab") as log:
            program = [str(BIN / command[0]), *map(str, command[1:])]
            self._processes[name] = subprocess.Popen(program, cwd=home, env=environment, stdout=log, stderr=log)

    def _wait(self, there: Any, name: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not there():
            if not self.alive(name) or time.monotonic() > deadline:
                raise LoopbackError(f"{name} did not start; see {self.log(name)}.")
            time.sleep(0.2)


def fedclip(*arguments: str) -> None:
    """Run a command of fedclip in a process of its own.

    Raises:
        LoopbackError: it failed.
    """
    command = [sys.executable, "-m", "experiments.cli", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoopbackError(f"fedclip {' '.join(arguments)} failed: {done.stdout}{done.stderr}")


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values


def main() -> None:
    """Run an experiment on a loopback deployment and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--node", action="append", required=True, metavar="NAME=DATA[:USERS]")
    parser.add_argument("--data-dir", type=Path, help="the server's own data, to evaluate on")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--front", action="store_true", help="nodes come through nginx")
    arguments = parser.parse_args()
    nodes = [_node(text) for text in arguments.node]
    with Loopback(arguments.out, nodes, arguments.front) as loopback:
        run = loopback.folder / "run"
        settings = "; ".join([f'deployment.roster="{loopback.roster}"', *arguments.set])
        data = str(arguments.data_dir.absolute()) if arguments.data_dir else ""
        loopback.submit(experiment=str(arguments.experiment.absolute()), out=str(run), data_dir=data, set=settings)
        summary = loopback.wait(run)
        relay = loopback.relay
        sockets = {"socket_bytes_up": relay.up, "socket_bytes_down": relay.down, "connections": relay.connections}
    print(json.dumps(summary | sockets, indent=2))


def _node(text: str) -> Node:
    name, _, data = text.partition("=")
    folder, _, users = data.partition(":")
    return Node(name, Path(folder), int(users or 1))


if __name__ == "__main__":
    main()
