"""`fedclip keys`: the keys and certificates of a deployment on devices, and who is enrolled in it. Imports no PyTorch and no Flower."""

import fcntl
import json as json_format
import os
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from clients.roster import Enrolled, Roster, check_name
from clients.signing import fingerprint, public_line, public_of
from experiments.exits import guarded
from fedclip.options import ConfigError

keys = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Keys and certificates for runs on devices, and the roster of who takes part: "
    "`keys server`, `node`, `enroll`, `revoke`, `rotate`, `list`.",
)

Out = Annotated[Path, typer.Argument(metavar="OUT", help="the folder; it is made where it is not there", show_default=False)]
RosterFile = Annotated[Path, typer.Argument(metavar="ROSTER", help="the roster, a TOML file that the operator keeps", show_default=False)]
Name = Annotated[str, typer.Argument(metavar="NAME", help="the node", show_default=False)]


@keys.command()
def server(
    out: Out,
    host: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="a name or address by which nodes reach the server; may be repeated", show_default=False),
    ],
    days: Annotated[int, typer.Option(min=1, max=36_500, help="how long the certificate holds")] = 365,
) -> None:
    """Make a certificate for the server, and the authority that signs it: `ca.crt`, `ca.key`, `server.pem`, `server.key`.

    In a folder that has them it renews the certificate, and the nodes' `ca.crt` stays valid.

    Example: `fedclip keys server certificates --host fl.example.org --host 10.0.0.1`
    """

    def answer() -> None:
        from experiments.certificates import make_server

        ends = make_server(out, host, days)
        _say(
            f"{out / 'server.pem'}: for {', '.join(host)}, until {ends:%Y-%m-%d}; the same command renews it.",
            f"{out / 'ca.crt'} goes to every node. {out / 'ca.key'} signs certificates: the server does not need it, keep it elsewhere.",
            f"Next: flower-superlink --ssl-ca-certfile {_quoted(out / 'ca.crt')} --ssl-certfile {_quoted(out / 'server.pem')} "
            f"--ssl-keyfile {_quoted(out / 'server.key')} --enable-supernode-auth",
        )

    _answered(answer)


@keys.command()
def node(name: Name, out: Out) -> None:
    """Make the keys of a node, on the node itself: `OUT/NAME`, which stays there, and `OUT/NAME.pub` for the operator.

    Example: `fedclip keys node clinic-7 keys`
    """

    def answer() -> None:
        public = _make_node(name, out)
        _say(
            f"{out / name}: the private key, {fingerprint(public)}. It never leaves this node.",
            f"Next, where the roster is: fedclip keys enroll ROSTER {_quoted(out / f'{name}.pub')}",
            "Then here: flower-supernode --superlink HOST:PORT --root-certificates ca.crt "
            f"--auth-supernode-private-key {_quoted(out / name)}",
        )

    _answered(answer)


@keys.command()
def enroll(
    roster: RosterFile,
    public: Annotated[Path, typer.Argument(metavar="NAME.pub", help="the node's public key", show_default=False)],
    name: Annotated[str | None, typer.Option(help="the node; by default the name of the file", show_default=False)] = None,
    users: Annotated[int, typer.Option(min=1, help="how many users it has")] = 1,
) -> None:
    """Let a node take part. Its users get the next free ids, which stay theirs for ever. The roster is made where there is none.

    Compare the fingerprint with the one that `fedclip keys node` printed on the node.

    Example: `fedclip keys enroll roster.toml clinic-7.pub --users 20`
    """

    def answer() -> None:
        called, key = name or public.name.removesuffix(".pub"), _read_public(public)
        added = _changed(roster, lambda r: r.enroll(called, key, users), made=True).nodes[-1]
        _say(
            f"{called}: {_ids(added)}, {fingerprint(added.key)}, in {roster}.",
            f"Next: flwr supernode register {_quoted(public)} SUPERLINK --name {called}",
        )

    _answered(answer)


@keys.command()
def revoke(roster: RosterFile, name: Name) -> None:
    """Let a node no longer take part. Its ids are never given again.

    Example: `fedclip keys revoke roster.toml clinic-7`
    """

    def answer() -> None:
        _changed(roster, lambda r: r.revoke(name))
        _say(
            f"{name}: revoked in {roster}.",
            "Next: flwr supernode unregister NODE-ID SUPERLINK; `flwr supernode list SUPERLINK` shows the ids.",
        )

    _answered(answer)


@keys.command()
def rotate(
    roster: RosterFile,
    name: Name,
    public: Annotated[Path, typer.Argument(metavar="NEW.pub", help="its new public key", show_default=False)],
) -> None:
    """Give a node another key. It keeps its ids, and the old key is worth nothing.

    Example: `fedclip keys rotate roster.toml clinic-7 new/clinic-7.pub`
    """

    def answer() -> None:
        key = _read_public(public)
        _changed(roster, lambda r: r.rotate(name, key))
        _say(
            f"{name}: now {fingerprint(key)}, in {roster}.",
            f"Next: flwr supernode unregister NODE-ID SUPERLINK, then flwr supernode register {_quoted(public)} SUPERLINK --name {name}",
        )

    _answered(answer)


@keys.command("list")
def list_(roster: RosterFile, json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """Say who is in a roster: names, ids of their users, fingerprints, and who is revoked.

    Example: `fedclip keys list roster.toml --json`
    """

    def answer() -> None:
        read = Roster.read(roster)
        if json:
            rows = [
                {"name": n.name, "first": n.first, "users": n.users, "fingerprint": fingerprint(n.key), "revoked": n.revoked}
                for n in read.nodes
            ]
            _say(json_format.dumps({"users": read.users, "nodes": rows}))
            return
        width = max((len(n.name) for n in read.nodes), default=0)
        _say(*(f"{n.name:{width}}  {fingerprint(n.key)}  {_ids(n)}{', revoked' if n.revoked else ''}" for n in read.nodes))
        _say(f"{len(read.nodes)} nodes, {sum(n.revoked for n in read.nodes)} of them revoked; {read.users} ids given.")

    _answered(answer)


def _answered(answer: Callable[[], None]) -> None:
    """Run a command's answer, and end as all commands do; files that cannot be read or written are said by name."""

    def call() -> None:
        try:
            answer()
        except OSError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}; look at the path and at who may write there.") from None

    guarded(call)


def _make_node(name: str, out: Path) -> str:
    """Write the two files of a node's keys, and return the public one's line."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from experiments.certificates import write_secret

    check_name(name)
    public = out / f"{name}.pub"
    if public.exists():
        raise ConfigError(f"{public}: it is there already; take another name or folder.")
    out.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    write_secret(out / name, key.private_bytes(*form))
    line = public_of(key)
    public.write_text(f"{line} {name}\n", encoding="ascii")
    return line


def _read_public(path: Path) -> str:
    try:
        return public_line(path.read_bytes())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _changed(path: Path, change: Callable[[Roster], Roster], made: bool = False) -> Roster:
    """Read a roster, change it and write it, while no other command does; with `made` one that is not there is empty."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # two nodes never get the same ids
        roster = change(Roster() if made and not path.exists() else Roster.read(path))
        roster.write(path)
    finally:
        os.close(folder)
    return roster


def _ids(node: Enrolled) -> str:
    return f"user {node.first}" if node.users == 1 else f"users {node.first} to {node.ids[-1]}"


def _quoted(path: Path) -> str:
    return quote(str(path))


def _say(*lines: str) -> None:
    for line in lines:
        print(line)
