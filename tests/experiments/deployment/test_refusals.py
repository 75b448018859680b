"""Refused connections are counted from lines that a SuperLink of Flower 1.41 wrote (`test_strangers.py`)."""

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


def test_refusals_are_counted_by_kind(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    log.write_bytes(LOG.encode() + b"\xff\n")
    kinds = {"key not registered": 1, "no registered key": 1, "not authenticated": 2, "/nowhere 404": 1}
    assert refused_connections(log) == Counter(kinds)


def test_a_log_without_refusals_counts_none(tmp_path: Path) -> None:
    log = tmp_path / "superlink.log"
    log.write_text(LOG.splitlines()[1], encoding="utf-8")
    assert not refused_connections(log)
