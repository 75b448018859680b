"""`fedclip keys`: certificates that TLS accepts, keys that OpenSSH reads, a roster, and nothing secret said or overwritten."""

import http.server
import json
import re
import shutil
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from clients.roster import Roster
from clients.signing import fingerprint, public_line, public_of, read_private
from experiments.cli import app
from fedclip.options import ConfigError

runner = CliRunner()
SSH_KEYGEN = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed")


def keys(*arguments: str | Path) -> str:
    """Run the command, which must succeed, and return what it said."""
    result = runner.invoke(app, ["keys", *(str(a) for a in arguments)])
    assert result.exit_code == 0, result.output
    assert "PRIVATE" not in result.output
    return result.output


def refused(*arguments: str | Path) -> str:
    result = runner.invoke(app, ["keys", *(str(a) for a in arguments)])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.output


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class Quiet(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class Server(http.server.HTTPServer):
    def handle_error(self, *arguments: object) -> None:
        """Say nothing of clients that do not trust the certificate: the tests are about them."""


@contextmanager
def serving(folder: Path) -> Iterator[int]:
    """Serve HTTPS on 127.0.0.1 with the certificate in a folder; gives the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    with Server(("127.0.0.1", 0), Quiet) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def trusting(folder: Path) -> ssl.SSLContext:
    """Return what a node has, as strict as Python is from 3.13 on."""
    context = ssl.create_default_context(cafile=folder / "ca.crt")
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    return context


def test_tls_accepts_the_certificate_for_its_hosts_and_from_its_authority_alone(tmp_path: Path) -> None:
    ours, theirs, elsewhere = tmp_path / "made" / "ours", tmp_path / "theirs", tmp_path / "elsewhere"
    said = keys("server", ours, "--host", "localhost", "--host", "127.0.0.1")
    assert f"--ssl-ca-certfile {ours}/ca.crt --ssl-certfile {ours}/server.pem --ssl-keyfile {ours}/server.key" in said
    keys("server", theirs, "--host", "127.0.0.1")
    shutil.copytree(ours, elsewhere)
    keys("server", elsewhere, "--host", "fl.example.org", "--host", "10.0.0.1")
    with serving(ours) as port:
        for host in ("localhost", "127.0.0.1"):
            assert httpx.get(f"https://{host}:{port}", verify=trusting(ours), trust_env=False).status_code == 200
        with pytest.raises(httpx.ConnectError, match=r"CERTIFICATE_VERIFY_FAILED.*unable to get local issuer"):
            httpx.get(f"https://127.0.0.1:{port}", verify=trusting(theirs), trust_env=False)
    with serving(elsewhere) as port, pytest.raises(httpx.ConnectError, match=r"not valid for '127\.0\.0\.1'"):
        httpx.get(f"https://127.0.0.1:{port}", verify=trusting(ours), trust_env=False)


def test_the_same_command_renews_the_certificate_alone(tmp_path: Path) -> None:
    keys("server", tmp_path, "--host", "fl.example.org", "--days", "3")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert before.keys() == {"ca.crt", "ca.key", "server.pem", "server.key"}
    assert mode(tmp_path / "ca.key") == mode(tmp_path / "server.key") == 0o600
    keys("server", tmp_path, "--host", "*.example.org", "--host", "::1")
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"server.pem"}
    old, new = (x509.load_pem_x509_certificate(files["server.pem"]) for files in (before, after))
    for certificate, days in ((old, 3), (new, 365)):
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=days, minutes=-5) < left <= timedelta(days=days)
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(before["ca.crt"]))
    hosts = new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in hosts] == ["*.example.org", "::1"]


@pytest.mark.parametrize(
    "host", ["", "https://example.org", "example.org:9092", "10.0.0", "10.0.0.256", "[::1]", "müller.de", "-a", "a..b", "a b", "*"]
)
def test_what_is_no_host_is_refused_and_nothing_is_made(tmp_path: Path, host: str) -> None:
    assert "--host: expected a name or an address without port" in refused("server", tmp_path / "out", "--host", "good", "--host", host)
    assert not (tmp_path / "out").exists()


def test_an_authority_that_does_not_go_together_is_refused_and_kept(tmp_path: Path) -> None:
    folder, other = tmp_path / "a", tmp_path / "b"
    for path in (folder, other):
        keys("server", path, "--host", "localhost")

    def said(*more: str) -> str:
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        output = refused("server", folder, "--host", "localhost", *more)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        return output

    assert "before a certificate of 4000 days would" in said("--days", "4000")
    shutil.copy(other / "ca.crt", folder / "ca.crt")
    assert "not the certificate of an authority whose key is ca.key" in said()
    shutil.copy(folder / "server.pem", folder / "ca.crt")
    shutil.copy(folder / "server.key", folder / "ca.key")
    assert "not the certificate of an authority whose key is ca.key" in said()
    (folder / "ca.key").write_text("no key")
    assert "ca.key: this is no private key" in said()
    (folder / "ca.key").unlink()
    assert "of ca.crt and ca.key one is missing" in said()


def test_a_node_has_keys_that_are_never_overwritten(tmp_path: Path) -> None:
    private, public = tmp_path / "keys" / "node-1", tmp_path / "keys" / "node-1.pub"
    said = keys("node", "node-1", tmp_path / "keys")
    assert mode(private) == 0o600
    assert public_of(read_private(private)) == public_line(public.read_bytes())
    assert fingerprint(public.read_text()) in said
    assert f"fedclip keys enroll ROSTER {public}" in said
    secrets = private.read_text().splitlines()[1:-1]
    assert not [line for line in secrets if line in said]
    before = private.read_bytes()
    assert "it is there already" in refused("node", "node-1", tmp_path / "keys")
    public.unlink()
    assert "never overwritten" in refused("node", "node-1", tmp_path / "keys")
    assert private.read_bytes() == before
    assert not public.exists()


def test_flower_reads_the_keys_of_a_node(tmp_path: Path) -> None:
    """By what `flower-supernode` and `flwr supernode register` call."""
    keys("node", "n", tmp_path)
    assert isinstance(serialization.load_ssh_private_key((tmp_path / "n").read_bytes(), None), ec.EllipticCurvePrivateKey)
    from flwr.cli.supernode.register import try_load_public_key

    assert public_line(try_load_public_key(tmp_path / "n.pub")) == public_line((tmp_path / "n.pub").read_bytes())


@SSH_KEYGEN
def test_openssh_agrees(tmp_path: Path) -> None:
    said = keys("node", "n", tmp_path)

    def ssh_keygen(*arguments: str | Path) -> str:
        return subprocess.run(["ssh-keygen", *arguments], check=True, capture_output=True, text=True).stdout

    assert public_line(ssh_keygen("-y", "-P", "", "-f", tmp_path / "n")) == public_line((tmp_path / "n.pub").read_bytes())
    size, printed, *_ = ssh_keygen("-l", "-f", tmp_path / "n.pub").split()
    assert size == "384"
    assert printed in said


def test_a_name_with_a_path_in_it_is_refused(tmp_path: Path) -> None:
    assert "Expected the name of a node" in refused("node", "../n", tmp_path / "keys")
    assert list(tmp_path.iterdir()) == []


def test_a_node_is_enrolled_rotated_and_revoked(tmp_path: Path) -> None:
    roster = tmp_path / "roster.toml"
    for name in ("a", "b", "c"):
        keys("node", name, tmp_path)
    lines = {name: public_line((tmp_path / f"{name}.pub").read_bytes()) for name in "abc"}
    said = keys("enroll", roster, tmp_path / "a.pub", "--users", "3")
    assert "a: users 0 to 2, " + fingerprint(lines["a"]) in said
    assert f"flwr supernode register {tmp_path}/a.pub" in said
    keys("enroll", roster, tmp_path / "b.pub", "--name", "clinic-7")
    assert "flwr supernode unregister" in keys("rotate", roster, "clinic-7", tmp_path / "c.pub")
    assert "flwr supernode unregister" in keys("revoke", roster, "a")
    assert "private key" in refused("enroll", roster, tmp_path / "b", "--name", "d")
    assert "it is revoked" in refused("rotate", roster, "a", tmp_path / "b.pub")
    assert "no such node" in refused("revoke", roster, "d")
    assert "none.pub: No such file" in refused("enroll", roster, tmp_path / "none.pub")
    rows = [
        {"name": "a", "first": 0, "users": 3, "fingerprint": fingerprint(lines["a"]), "revoked": True},
        {"name": "clinic-7", "first": 3, "users": 1, "fingerprint": fingerprint(lines["c"]), "revoked": False},
    ]
    assert json.loads(keys("list", roster, "--json")) == {"users": 4, "nodes": rows}
    first, second, total = keys("list", roster).splitlines()
    assert first.split() == ["a", fingerprint(lines["a"]), "users", "0", "to", "2,", "revoked"]
    assert second.split() == ["clinic-7", fingerprint(lines["c"]), "user", "3"]
    assert total == "2 nodes, 1 of them revoked; 4 ids given."
    assert {p.name for p in tmp_path.iterdir()} == {"roster.toml", *"abc", "a.pub", "b.pub", "c.pub"}


def test_only_enrolling_makes_a_roster(tmp_path: Path) -> None:
    keys("node", "a", tmp_path)
    for arguments in (
        ("revoke", tmp_path / "r.toml", "a"),
        ("rotate", tmp_path / "r.toml", "a", tmp_path / "a.pub"),
        ("list", tmp_path / "r.toml"),
    ):
        assert "`fedclip keys enroll` makes one" in refused(*arguments)
    assert "No such file" in refused("enroll", tmp_path / "none" / "r.toml", tmp_path / "a.pub")
    with pytest.raises(ConfigError):
        Roster.read(tmp_path / "r.toml")


def test_nodes_that_are_enrolled_at_once_get_ids_of_their_own(tmp_path: Path) -> None:
    """Without the lock the last to write would drop the others."""
    from experiments.keys import _changed

    lines = [public_of(ec.generate_private_key(ec.SECP384R1())) for _ in range(8)]
    roster, begin = tmp_path / "roster.toml", threading.Barrier(len(lines))

    def enroll(number: int) -> None:
        begin.wait()
        _changed(roster, lambda r: r.enroll(f"n{number}", lines[number], 2), made=True)

    threads = [threading.Thread(target=enroll, args=(n,)) for n in range(len(lines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n.first for n in Roster.read(roster).nodes) == list(range(0, 16, 2))


@pytest.mark.parametrize("command", ["server", "node", "enroll", "revoke", "rotate", "list"])
def test_help_shows_an_example(command: str) -> None:
    said = re.sub(r"\s+", " ", keys(command, "--help"))
    assert f"Example: fedclip keys {command} " in said


def test_keys_are_made_without_torch_and_flower(tmp_path: Path) -> None:
    code = f"""
import sys
from experiments.cli import app
for arguments in (["node", "a", {str(tmp_path)!r}], ["enroll", {str(tmp_path / "r.toml")!r}, {str(tmp_path / "a.pub")!r}]):
    app(["keys", *arguments], standalone_mode=False)
assert not {{"torch", "flwr", "ray"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    assert (tmp_path / "r.toml").exists()
