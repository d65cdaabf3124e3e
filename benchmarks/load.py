"""Load by wrk, which sends as many requests as a server answers. It also measures how busy wrk itself was."""

import json
import os
import resource
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

#: Connections that are kept alive. Each has one request under way.
CONNECTIONS = 16

_SCRIPT = Path(__file__).with_suffix(".lua")


class Load(NamedTuple):
    """The result of a load."""

    requests: int
    seconds: float
    #: processor time of wrk in seconds
    own_cpu: float


@cache
def find_wrk() -> str:
    """The path of wrk. If it is missing and we are root, install Debian's package.

    Raises:
        SystemExit: it is missing and cannot be installed.
    """
    if not shutil.which("wrk") and shutil.which("apt-get") and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", "wrk"], check=False)
    if path := shutil.which("wrk"):
        return path
    raise SystemExit("This benchmark sends its requests with wrk, and there is none: `apt-get install wrk`.")


def _used_by_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def send_load(url: str, seconds: int, body: str | None = None) -> Load:
    """Send GETs, or POSTs of this JSON, for `seconds`.

    Raises:
        AssertionError: an answer was an error, or missing.
    """
    command = [find_wrk(), "--threads", "1", "--connections", str(CONNECTIONS), "--duration", str(seconds)]
    command += ["--script", str(_SCRIPT), url, "--", *(["GET"] if body is None else ["POST", body])]
    before = _used_by_children()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    own_cpu = _used_by_children() - before
    found = json.loads(output.splitlines()[-1])
    assert found["requests"] > 0, output
    assert found["errors"] == 0, output
    return Load(found["requests"], found["microseconds"] / 1e6, own_cpu)
