"""The job function of the fault suite; its workers and web processes have it beside those of the other tests."""

import os
import time

from pydantic import BaseModel
from rq import get_current_job

from app.job_function import job_function

_LEAVE_TRACE = """
local now = redis.call('TIME')
redis.call('RPUSH', KEYS[1], string.format('%s %d.%06d %s', ARGV[1], now[1], now[2], ARGV[2]))
return 1
"""


class Trace(BaseModel):
    """Where the trace is left, how long the job takes after that, and whether it raises in the end."""

    trace_to: str
    seconds: float = 0
    fails: bool = False


@job_function()
def leave_trace(payload: Trace) -> None:
    """Write into a list in Redis which job runs, when by Redis' clock, and in which process."""
    job = get_current_job()
    assert job
    job.connection.eval(_LEAVE_TRACE, 1, payload.trace_to, job.id, str(os.getpid()))
    end = time.monotonic() + payload.seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.02))
    if payload.fails:
        raise ValueError("as it was told to")
