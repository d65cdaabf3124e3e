"""The job function of the fault suite; its workers and web processes have it beside those of the other tests."""

import os
import time
import uuid
from pathlib import Path

from pydantic import BaseModel
from redis.exceptions import RedisError
from rq import get_current_job

from app.job_function import job_function

#: Run twice with the same second key (its answer was lost), it leaves one trace.
_LEAVE_TRACE = """
if not redis.call('SET', KEYS[2], '', 'NX', 'EX', 600) then return 0 end
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


@job_function()
def leave_trace(payload: Trace) -> int:
    """Write into a list in Redis which job runs, when by Redis' clock, and in which process; return the process."""
    job = get_current_job()
    assert job
    mark = f"{payload.trace_to}:{uuid.uuid4().hex}"
    while True:
        try:
            job.connection.eval(_LEAVE_TRACE, 2, payload.trace_to, mark, job.id, str(os.getpid()))
            break
        except RedisError:  # the run is to be known though Redis is away as it begins, or full
            time.sleep(0.1)
    end = time.monotonic() + payload.seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.02))
    while payload.until and not Path(payload.until).exists():
        time.sleep(0.02)
    if payload.fails:
        raise ValueError("as it was told to")
    return os.getpid()
