"""`refused_connections`: whom a SuperLink has turned away, counted by kind from its log."""

import re
from collections import Counter
from pathlib import Path

ACCESS = re.compile(r'\[uvicorn\.access\] \S+ - "(?P<method>[A-Z]+) (?P<path>\S+) HTTP/[0-9.]+" (?P<status>\d{3})')

KINDS = {
    ("/v1/fleet/activate-node", 412): "key not registered",
    ("/v1/fleet/register-node", 412): "no registered key",
    ("/v1/fleet", 401): "not authenticated",
}
"""What an answer under a path means; the first that fits counts."""


def refused_connections(log: Path) -> Counter[str]:
    """Count the requests that a SuperLink has refused, by kind.

    `key not registered`: a node signs with a key that is not registered. `no registered key`: a node without one, which asks to be let in.
    `not authenticated`: no signature, an old or a wrong one, or another node's name. All else: path and status.

    Whoever does not get through TLS is in no log of a SuperLink: such connections are the firewall's to count.

    Args:
        log: what `flower-superlink` prints, or its `--log-file`.
    """
    with log.open(encoding="utf-8", errors="replace") as lines:
        found = (ACCESS.search(line) for line in lines)
        return Counter(
            _kind(match["path"].partition("?")[0], int(match["status"])) for match in found if match and int(match["status"]) >= 400
        )


def _kind(path: str, status: int) -> str:
    for (start, of), kind in KINDS.items():
        if status == of and (path == start or path.startswith(f"{start}/")):
            return kind
    return f"{path} {status}"
