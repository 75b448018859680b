"""Refused connections are counted from lines that a SuperLink of Flower 1.41 and nginx 1.22 wrote (`test_strangers.py`)."""

from collections import Counter
from pathlib import Path

from experiments.deployment.refusals import refused_connections

LOG = """\x1b[92mINFO \x1b[0m:      Starting Flower SuperLink
2026-11-24T15:55:28.158Z INFO [uvicorn.access] 127.0.0.1:48159 - "POST /v1/fleet/activate-node HTTP/1.1" 200
\x1b[91mERROR \x1b[0m:     [/v1/fleet/activate-node][ApiError:2004] Attempted to register SuperNode with public key: b'x\\n', exception: y.
2026-11-24T15:55:29.158Z INFO [uvicorn.access] 127.0.0.1:48160 - "POST /v1/fleet/activate-node HTTP/1.1" 412
2026-11-24T15:55:55.541Z INFO [uvicorn.access] 127.0.0.1:35964 - "POST /v1/fleet/register-node HTTP/1.1" 412
2026-11-24T15:55:56.541Z INFO [uvicorn.access] 127.0.0.1:35964 - "POST /v1/fleet/pull-messages HTTP/1.1" 401
2026-11-24T15:55:57.541Z INFO [uvicorn.access] 127.0.0.1:35964 - "POST /v1/fleet/push-object HTTP/1.1" 401
2026-11-24T15:56:04.948Z INFO [uvicorn.access] 127.0.0.1:33576 - "GET /nowhere?a=b HTTP/1.1" 404
"""

CLIENT = "client: 127.0.0.1, server: 127.0.0.1:8000"
REQUEST = 'client: 127.0.0.1, server: , request: "POST /v1/fleet/x HTTP/1.1"'

FRONT = f"""nginx: [warn] 4096 worker_connections exceed open file resource limit: 1024
2026/11/24 18:19:09 [notice] 5385#5385: start worker processes
2026/11/24 18:20:30 [info] 5387#5387: *1 client 127.0.0.1 closed keepalive connection
2026/11/24 18:20:30 [error] 5387#5387: *3 access forbidden by rule, client: 127.0.0.1, server: , request: "POST /v1/control/list-nodes HTTP/1.1"
2026/11/24 18:20:37 [info] 5387#5387: *17 client sent plain HTTP request to HTTPS port while reading client request headers, {REQUEST}
2026/11/24 18:20:37 [info] 5387#5387: *18 SSL_do_handshake() failed (SSL: error:0A000418:SSL routines::tlsv1 alert unknown ca:SSL alert number 48) while SSL handshaking, {CLIENT}
2026/11/24 18:20:39 [info] 5387#5387: *21 client closed connection while waiting for request, {CLIENT}
2026/11/24 18:20:40 [info] 5387#5387: *22 SSL_do_handshake() failed (SSL: error:0A000102:SSL routines::unsupported protocol) while SSL handshaking, {CLIENT}
2026/11/24 18:20:42 [info] 5387#5387: *23 client closed connection while SSL handshaking, {CLIENT}
2026/11/24 18:20:42 [info] 5387#5387: *24 peer closed connection in SSL handshake while SSL handshaking, {CLIENT}
2026/11/24 18:20:43 [info] 5387#5387: *25 recv() failed (104: Connection reset by peer) while SSL handshaking, {CLIENT}
2026/11/24 18:20:44 [error] 5387#5387: *27 client intended to send too large body: 17000000 bytes, {REQUEST}
2026/11/24 18:22:05 [info] 5387#5387: *40 client sent invalid request while reading client request line, {CLIENT}, request: "PRI * HTTP/2.0"
2026/11/24 18:22:06 [info] 5387#5387: *43 client sent invalid request while reading client request line, {CLIENT}, request: "GET /x" while SSL handshaking, client: HTTP/1.1"
2026/11/24 18:23:12 [error] 5387#5387: *59 connect() failed (111: Connection refused) while connecting to upstream, {REQUEST}, upstream: "https://127.0.0.1:8001"
2026/11/24 18:23:13 [error] 5387#5387: *60 upstream SSL certificate does not match "localhost" while SSL handshaking to upstream, {REQUEST}
"""  # noqa: E501


def test_what_a_front_turns_away_is_counted_by_kind(tmp_path: Path) -> None:
    log = tmp_path / "front.log"
    log.write_text(FRONT, encoding="utf-8")
    kinds = {"not for nodes": 1, "plain HTTP": 1, "TLS refused": 4, "too large": 1, "malformed": 2}
    assert refused_connections(log) == Counter(kinds)


def test_what_a_client_says_of_itself_is_no_line_of_the_log(tmp_path: Path) -> None:
    said = (
        '[uvicorn.access] x - "POST /v1/fleet/activate-node HTTP/1.1" 412',
        "x while SSL handshaking, client: x",
        "\r" + FRONT.splitlines()[3],
    )
    lines = [f'2026/11/24 18:23:12 [error] 1#1: *1 upstream prematurely closed connection, client: 127.0.0.1, request: "{x}"' for x in said]
    log = tmp_path / "front.log"
    log.write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert not refused_connections(log)


def test_refusals_are_counted_by_kind(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    log.write_bytes(LOG.encode() + b"\xff\n")
    kinds = {"key not registered": 1, "no registered key": 1, "not authenticated": 2, "/nowhere 404": 1}
    assert refused_connections(log) == Counter(kinds)


def test_a_log_without_refusals_counts_none(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    log.write_text(LOG.splitlines()[1], encoding="utf-8")
    assert not refused_connections(log)
