"""The front of a deployment: nginx, which lets nodes reach `/v1/fleet/` of a SuperLink alone, and logs whom it turns away."""

import os
import shutil
from pathlib import Path

CONFIGURATION = Path(__file__).with_name("nginx.conf")
NOT_ON_PATH = ("/usr/sbin", "/usr/local/sbin")


def nginx() -> str | None:
    """Return where nginx is, also where packages put it off the PATH of most users; None: it is not installed."""
    return shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *NOT_ON_PATH]))


def configuration(listen: str, link: str) -> str:
    """Return `nginx.conf` with other addresses (host:port): where the front listens, and where the SuperLink does."""
    text = CONFIGURATION.read_text(encoding="utf-8")
    return text.replace("127.0.0.1:8001", link).replace("listen 8000 ", f"listen {listen} ")
