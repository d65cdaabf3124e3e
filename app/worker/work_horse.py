"""The work-horse: the process that runs job functions, and nothing else.

It receives a job over a socket pair, runs it if its function is one of `FUNCTIONS`, and sends back progress and the
return value as strict JSON. The process lives on between jobs, so what a function loaded once stays loaded. It does not
speak to Redis, unless a function does, as through `rq.get_current_job()`.
"""

import copy
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rq.job import Job, _current_job
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException, UnixSignalDeathPenalty

from app.config import get_settings
from app.core.scripts import DELIVER
from app.job_function import ForeseenFailure, GiveUp, JobFunction, Progress, TryAgain, load_functions, send_progress_to
from app.logs import configure_logs, process_members, report_to_sentry, start_sentry
from app.redis_resc import redis_conn
from app.worker.channel import Channel, Header
from app.worker.results import dump_result

#: Characters of an exception's text that are kept.
LONGEST_MESSAGE = 2000
#: Characters of a progress message that are kept.
LONGEST_PROGRESS = 500
#: Bytes of a traceback's end that are kept; an exception may carry its whole payload in its text.
LONGEST_TRACE = 64 * 1024


_BLANK_JOB = Job("blank", connection=redis_conn, serializer=JSONSerializer)


class UnknownFunction(Exception):
    """The job names a function that is not one of the job functions. It was not imported."""


class UnreadablePayload(Exception):
    """The job's data is not as RQ's JSON serializer writes it."""


class _RunLimit(UnixSignalDeathPenalty):
    def handle_death_penalty(self, signum: Any, frame: Any) -> None:
        raise self._exception(f"The job ran longer than its limit of {self._timeout} s.")


def _cut(text: str, length: int) -> str:
    """The beginning of a text, in characters that UTF-8 has."""
    return str(text)[:length].encode(errors="backslashreplace").decode()


def _describe(error: BaseException) -> dict[str, str]:
    try:
        message = str(error)
    except Exception:  # noqa: BLE001  # a job's own exception class may do anything
        message = "(its text cannot be read)"
    return {"type": type(error).__qualname__, "message": _cut(message, LONGEST_MESSAGE)}


def _pause_after(error: BaseException) -> float | None:
    """Least seconds before another try; -1 for no other."""
    if isinstance(error, TryAgain) and isinstance(error.after, int | float):
        return max(0, error.after)
    return -1 if isinstance(error, GiveUp) else None


def _make_job(header: Header) -> Job:
    """The job as `rq.get_current_job()` shows it to the function."""
    job = copy.copy(_BLANK_JOB)  # several times as fast as RQ's constructor
    job.meta, job.webhooks = {}, []
    job.id = header["job_id"]
    job.origin, job.timeout, job.worker_name = header["queue"], header["timeout"], header["worker"]
    job.enqueued_at = datetime.fromisoformat(header["enqueued_at"]) if header["enqueued_at"] else None
    job.started_at = datetime.fromisoformat(header["started_at"])
    return job


def _run(header: Header, data: bytes, functions: Mapping[str, JobFunction], channel: Channel) -> bytes:
    def send(progress: Progress) -> None:
        if not (math.isfinite(progress["done"]) and math.isfinite(progress["total"])):
            raise ValueError(f"Progress must be finite numbers, not {progress['done']} of {progress['total']}.")
        report = {**progress, "message": _cut(progress["message"], LONGEST_PROGRESS)}
        channel.send({"progress": report, "job_id": header["job_id"]})

    try:
        path, _instance, args, kwargs = json.loads(data)
    except (ValueError, TypeError) as error:
        raise UnreadablePayload(f"The job's data cannot be read: {error}.") from None
    if path not in functions:
        raise UnknownFunction(f"{path!r} is not a job function here.")
    job = _make_job(header)
    job._func_name, job._args, job._kwargs = path, args, kwargs
    token, pid = _current_job.set(job), os.getpid()
    try:
        with send_progress_to(send):
            if header["timeout"] < 0:  # RQ's -1 is no limit
                value = functions[path].run(args, kwargs)
            else:
                with _RunLimit(header["timeout"], JobTimeoutException):
                    value = functions[path].run(args, kwargs)
    finally:
        if os.getpid() != pid:  # the function forked, and this is the child, which must not send an outcome
            raised = sys.exc_info()[1]
            code = raised.code if isinstance(raised, SystemExit) else raised and 1
            os._exit(code if isinstance(code, int) else code is not None)
        _current_job.reset(token)
    return dump_result(value, get_settings().max_result_bytes)


def run_job(header: Header, data: bytes, functions: Mapping[str, JobFunction], channel: Channel) -> None:
    """Run one job, and send its outcome: `finished` with the return value, or `failed` with error and traceback."""
    process_members.update({name: header[name] for name in ("job_id", "queue", "request_id")})
    try:
        text = _run(header, data, functions, channel)
    except BaseException as error:  # noqa: BLE001  # sys.exit() in a job ends the job, not the work-horse
        is_foreseen = isinstance(error, ForeseenFailure)
        if not is_foreseen:
            report_to_sentry(error)
        lines = traceback.format_exception_only(error) if is_foreseen else traceback.format_exception(error)
        trace = "".join(lines).encode(errors="backslashreplace")
        outcome = {
            "outcome": "failed",
            "error": _describe(error),
            "is_foreseen": is_foreseen,
            "after": _pause_after(error),
        }
        channel.send(outcome, trace[-LONGEST_TRACE:])
    else:
        channel.send({"outcome": "finished"}, text)
    finally:
        process_members.clear()


def _die_with_worker(channel: Channel) -> None:
    """End this process, and its group, when the worker's end of the socket is closed, also in the middle of a job."""
    poll = select.poll()
    poll.register(channel.fileno(), 0)  # a hang-up is reported always; data is for the main thread
    poll.poll()
    os.killpg(0, signal.SIGKILL)  # with what the job started: another worker may run it again


def main(end: socket.socket) -> None:
    """Load the job functions, say so, and run jobs until the worker closes its end of the socket."""
    configure_logs()
    start_sentry(get_settings())
    channel = Channel(end)
    threading.Thread(target=_die_with_worker, args=(channel,), daemon=True).start()
    # The worker handles Ctrl-C in a terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    functions = {function.path: function for function in load_functions(get_settings().function_modules).values()}
    if get_settings().webhook_secrets:
        from app.webhooks.delivery import DELIVERY  # without webhooks a work-horse need not load its imports

        functions[DELIVER] = DELIVERY
    limits = {path: each.max_crashes for path, each in functions.items() if each.max_crashes is not None}
    fresh = [path for path, each in functions.items() if each.fresh_process]
    channel.send({"crash_limits": limits, "fresh": fresh})
    while True:
        try:
            frame = channel.receive()
        except EOFError:
            return
        assert frame
        run_job(*frame, functions, channel)
        try:
            sys.stdout.flush()
        except (AttributeError, OSError, ValueError):  # the job broke or closed it, and the next one may print
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # it stays open
