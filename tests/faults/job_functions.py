"""The job functions of the fault suite. Its workers and web processes load them beside those of the other tests.

They validate their payloads themselves, too: RQ's own worker (`--stock`) hands over plain JSON values.
"""

import ctypes
import os
import select
import signal
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from redis.exceptions import RedisError
from rq import get_current_job

from app.job_function import job_function
from tests.job_functions import die, return_bytes_of, return_unjsonable, swallow_timeout

#: The script leaves one trace, even if it runs twice with the same second key after a lost answer.
_LEAVE_TRACE = """
if not redis.call('SET', KEYS[2], '', 'NX', 'EX', 120) then return 0 end
local now = redis.call('TIME')
redis.call('RPUSH', KEYS[1], string.format('%s %d.%06d %s', ARGV[1], now[1], now[2], ARGV[2]))
return 1
"""


class Trace(BaseModel):
    """Where the job leaves its trace, how long it runs after that, the file it waits for, and whether it raises."""

    trace_to: str
    seconds: float = 0
    until: str = ""
    fails: bool = False


def _write_trace(payload: Trace) -> None:
    job = get_current_job()
    assert job
    mark = f"{payload.trace_to}:{uuid.uuid4().hex}"
    while True:
        try:
            job.connection.eval(_LEAVE_TRACE, 2, payload.trace_to, mark, job.id, str(os.getpid()))
            break
        except RedisError:  # the run has to be known even if Redis is away or full when it begins
            time.sleep(0.1)


@job_function()
def leave_trace(payload: Trace) -> int:
    """Write into a list in Redis the job, the time by Redis' clock and the process; return the process."""
    payload = Trace.model_validate(payload)
    _write_trace(payload)
    end = time.monotonic() + payload.seconds
    while (left := end - time.monotonic()) > 0:
        select.select([], [], [], min(left, 0.02))  # time.sleep fails under libfaketime 0.9.10
    while payload.until and not Path(payload.until).exists():
        time.sleep(0.02)
    if payload.fails:
        raise ValueError("as the payload says")
    return os.getpid()


class Misdeed(Trace):
    """The harm that the job does after it left its trace."""

    how: Literal["exit", "sys.exit", "segfault", "kill", "swallow the timeout", "ignore SIGTERM"]


@job_function()
def misbehave(payload: Misdeed) -> None:
    """Do the harm that the payload names."""
    payload = Misdeed.model_validate(payload)
    _write_trace(payload)
    match payload.how:
        case "segfault":
            ctypes.string_at(0)
        case "swallow the timeout":
            swallow_timeout(payload.seconds)
        case "ignore SIGTERM":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(payload.seconds)
        case how:
            die({"how": how})


class Appetite(Trace):
    """How many bytes the job allocates, and whether its process is killed when it gets no more."""

    size: int
    is_killed: bool = False


@job_function()
def devour_memory(payload: Appetite) -> None:
    """Allocate more and more memory, and keep it for the payload's seconds."""
    payload = Appetite.model_validate(payload)
    _write_trace(payload)
    hoard: list[bytes] = []
    chunk = 8 * 2**20
    try:
        while len(hoard) * chunk < payload.size:
            hoard.append(b"x" * chunk)
    except MemoryError:
        if payload.is_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        raise
    time.sleep(payload.seconds)


class BadReturn(Trace):
    """The return value: something that is not JSON, or the length of a string."""

    kind: str | int


@job_function()
def return_badly(payload: BadReturn) -> Any:
    """Return the value that the payload names."""
    payload = BadReturn.model_validate(payload)
    _write_trace(payload)
    if isinstance(payload.kind, int):
        return return_bytes_of(payload.kind)
    return return_unjsonable(payload.kind)
