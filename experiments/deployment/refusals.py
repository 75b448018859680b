"""`refused_connections`: whom a SuperLink or the front before it has turned away, counted by kind from its log."""

import re
from collections import Counter
from pathlib import Path

ACCESS = re.compile(r'\[uvicorn\.access\] \S+ - "(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[0-9.]+" (?P<status>\d{3})')

KINDS = {
    ("/v1/fleet/activate-node", 412): "key not registered",
    ("/v1/fleet/register-node", 412): "no registered key",
    ("/v1/fleet", 401): "not authenticated",
}
"""What an answer of a SuperLink under a path means; the first that fits counts."""

FRONT = re.compile(r"\d{4}/\d\d/\d\d \S+ \[\w+\] \d+#\d+: (\*\d+ )?(?P<said>.*)")

FRONT_KINDS = {
    re.compile(r"access forbidden by rule"): "not for nodes",
    re.compile(r"client sent plain HTTP request"): "plain HTTP",
    re.compile(r"client intended to send too large"): "too large",
    re.compile(r"client sent "): "malformed",
    # Whoever only looks whether the port is open is not refused. What a client says of itself stands in quotes, further on.
    re.compile(r'(?!client closed connection)[^"]* while SSL handshaking, client: '): "TLS refused",
}
"""What nginx says of those that it turns away itself; the first that fits counts."""


def refused_connections(log: Path) -> Counter[str]:
    """Count what a SuperLink, or nginx before it, has refused, by kind; a client that tries again counts again.

    A SuperLink: `key not registered`: a node signs with a key that is not registered. `no registered key`: a node without one, which asks
    to be let in. `not authenticated`: no signature, an old or a wrong one, or another node's name. All else: path and status.

    nginx, of what it does not pass on: `plain HTTP`, without TLS. `TLS refused`: no handshake, mostly since the client does not trust the
    certificate. `not for nodes`: a path outside `/v1/fleet/`. `too large`: a body over its limit. `malformed`: no HTTP that it knows.

    Args:
        log: what `flower-superlink` prints, or its `--log-file`; or the `error_log` of nginx at the level `info`.
    """
    with log.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        return Counter(kind for line in lines if (kind := _refused(line)))


def _refused(line: str) -> str | None:
    if front := FRONT.match(line):
        return next((kind for pattern, kind in FRONT_KINDS.items() if pattern.match(front["said"])), None)
    if (found := ACCESS.search(line)) and int(found["status"]) >= 400:
        return _kind(found["path"].partition("?")[0], int(found["status"]))
    return None


def _kind(path: str, status: int) -> str:
    for (start, of), kind in KINDS.items():
        if status == of and (path == start or path.startswith(f"{start}/")):
            return kind
    return f"{path} {status}"
