"""The job functions of the fault suite; its workers and web processes have them beside those of the other tests.

They validate their payloads themselves, too: RQ's own worker (`--stock`) hands over what JSON holds.
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

#: Run twice with the same second key (its answer was lost), it leaves one trace.
_LEAVE_TRACE = """
if not redis.call('SET', KEYS[2], '', 'NX', 'EX', 120) then return 0 end
local now = redis.call('TIME')
redis.call('RPUSH', KEYS[1], string.format('%s %d.%06d %s', ARGV[1], now[1], now[2], ARGV[2]))
return 1
"""


class Trace(BaseModel):
    """Where the trace is left, how long the job takes after that, for which file it waits, and whether it raises."""

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
        except RedisError:  # the run is to be known though Redis is away as it begins, or full
            time.sleep(0.1)


@job_function()
def leave_trace(payload: Trace) -> int:
    """Write into a list in Redis which job runs, when by Redis' clock, and in which process; return the process."""
    payload = Trace.model_validate(payload)
    _write_trace(payload)
    end = time.monotonic() + payload.seconds
    while (left := end - time.monotonic()) > 0:
        select.select([], [], [], min(left, 0.02))  # time.sleep fails under libfaketime 0.9.10
    while payload.until and not Path(payload.until).exists():
        time.sleep(0.02)
    if payload.fails:
        raise ValueError("as it was told to")
    return os.getpid()


class Misdeed(Trace):
    """What the job does that no job should, after it left its trace."""

    how: Literal["exit", "sys.exit", "segfault", "kill", "swallow the timeout", "ignore SIGTERM"]


@job_function()
def misbehave(payload: Misdeed) -> None:
    """Do it."""
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
    """How many bytes the job wants, and whether its process is killed when there are no more for it."""

    size: int
    is_killed: bool = False


@job_function()
def devour_memory(payload: Appetite) -> None:
    """Use more and more memory, and keep it for so many seconds."""
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
    """What the job returns: something that JSON has not, or a string of so many characters."""

    kind: str | int


@job_function()
def return_badly(payload: BadReturn) -> Any:
    """Return it."""
    payload = BadReturn.model_validate(payload)
    _write_trace(payload)
    if isinstance(payload.kind, int):
        return return_bytes_of(payload.kind)
    return return_unjsonable(payload.kind)
