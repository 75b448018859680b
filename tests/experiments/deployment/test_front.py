"""The front as it is: nginx before a server that answers all, and says what came through."""

import http.client
import re
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from experiments.certificates import make_server
from experiments.deployment import loopback
from experiments.deployment.front import CONFIGURATION, configuration, nginx
from experiments.deployment.loopback import HOST, Loopback, LoopbackError, free_port
from experiments.deployment.refusals import refused_connections

DAYS = 2
PIECE = 5 << 20  # of an array, as Flower sends it

needs_nginx = pytest.mark.skipif(nginx() is None, reason="nginx is not installed")


@contextmanager
def upstream(keys: Path) -> Iterator[tuple[int, list[tuple[str, str, int]]]]:
    """Serve over TLS; yield the port, and the path, the sender and the size of each request that came."""
    came = list[tuple[str, str, int]]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = len(self.rfile.read(int(self.headers["content-length"])))
            came.append((self.path, self.headers["x-forwarded-for"], size))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "server.pem", keys / "server.key")
    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.handle_error = lambda request, client_address: None
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, came
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def front(folder: Path, link: int) -> Iterator[int]:
    """Run nginx on the certificates of a folder; yield its port."""
    port, program = free_port(), nginx()
    assert program is not None
    (folder / "nginx.conf").write_text(configuration(f"{HOST}:{port}", f"{HOST}:{link}"), encoding="utf-8")
    process = subprocess.Popen([program, "-e", "stderr", "-p", str(folder), "-c", "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not ((folder / "front.pid").exists() and (folder / "front.pid").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def post(port: int, ca: Path, path: str, size: int = 0) -> int:
    connection = http.client.HTTPSConnection("localhost", port, context=ssl.create_default_context(cafile=ca), timeout=20)
    connection.request("POST", path, b"x" * size, {"X-Forwarded-For": "192.0.2.1"})
    status = connection.getresponse().status
    connection.close()
    return status


@needs_nginx
def test_what_is_for_nodes_gets_through_whole_and_nothing_else(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    make_server(keys, ["localhost"], DAYS)
    ca = keys / "ca.crt"
    inside = ("/v1/fleet/pull-messages", "/v1/control/../fleet/pull-messages")
    outside = ("/v1/control/start-run", "/v1/runtime/x", "/v1/fleetx", "/health", "/", "//v1/control/x")
    sideways = ("/v1/fleet/../control/x", "/v1/fleet/%2e%2e/control/x", "/v1/fleet/..%2fcontrol/x", "/v1/fleet/x/../../control/x")
    with upstream(keys) as (link, came), front(tmp_path, link) as port:
        assert [post(port, ca, path) for path in inside] == [200, 200]
        assert post(port, ca, "/v1/fleet/push-object", PIECE + (1 << 16)) == 200
        assert [post(port, ca, path) for path in (*outside, *sideways)] == [403] * 10
        assert post(port, ca, "/v1/fleet/push-object", (16 << 20) + 1) == 413
        assert post(link, ca, "/v1/control/start-run") == 200
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection("localhost", port, context=ssl.create_default_context()).connect()
        plain = http.client.HTTPConnection(HOST, port)
        plain.request("POST", inside[0])
        assert plain.getresponse().status == 400
        plain.close()
    pulled = (inside[0], "127.0.0.1", 0)
    pushed = ("/v1/fleet/push-object", "127.0.0.1", PIECE + (1 << 16))
    assert came == [pulled, pulled, pushed, ("/v1/control/start-run", "192.0.2.1", 0)]
    assert refused_connections(tmp_path / "front.log") == {"not for nodes": 10, "too large": 1, "TLS refused": 1, "plain HTTP": 1}


@needs_nginx
def test_a_link_that_another_authority_speaks_for_gets_nothing(tmp_path: Path) -> None:
    for keys in (tmp_path / "keys", tmp_path / "others"):
        make_server(keys, ["localhost"], DAYS)
    with upstream(tmp_path / "others") as (link, came), front(tmp_path, link) as port:
        assert post(port, tmp_path / "keys" / "ca.crt", "/v1/fleet/pull-messages") == 502
    assert not came
    assert "upstream SSL certificate verify error" in (tmp_path / "front.log").read_text(encoding="utf-8")
    assert not refused_connections(tmp_path / "front.log")


def test_the_page_shows_the_configuration_as_it_is() -> None:
    page = (Path(__file__).parents[3] / "docs/devices.md").read_text(encoding="utf-8")
    assert re.findall(r"```nginx\n(.*?)```", page, re.DOTALL) == [CONFIGURATION.read_text(encoding="utf-8")]
    changed = configuration("127.0.0.1:1", "127.0.0.1:2").splitlines()
    assert [line for line in changed if "127.0.0.1:" in line][1:] == [
        "        listen 127.0.0.1:1 ssl;",
        next(line for line in changed if line.strip().startswith("proxy_pass https://127.0.0.1:2/v1/fleet/;")),
    ]


def test_a_front_without_nginx_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopback, "nginx", lambda: None)
    with pytest.raises(LoopbackError, match="apt install nginx"):
        Loopback(tmp_path, [], front=True)
