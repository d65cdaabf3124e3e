"""The Lua scripts and the keys in Redis: how a script runs, what the keys are called, what a failure looks like."""

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import NoScriptError
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import NoSuchJobError, TimeoutFormatError

#: The stream of all changes of jobs.
EVENTS_KEY = f"{RQ_KEY_PREFIX}:api:events"
#: The stream that wakes idle workers.
DOORBELL_KEY = f"{RQ_KEY_PREFIX}:api:doorbell"
#: The secret that signs job ids.
SECRET_KEY = f"{RQ_KEY_PREFIX}:api:secret"
#: `/readyz` writes it, to see whether Redis takes writes.
PROBE_KEY = f"{RQ_KEY_PREFIX}:api:probe"
#: Upper bounds of the buckets that count how long jobs wait and run, in seconds.
TIME_BOUNDS = (0.005, 0.025, 0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200)
#: The queue of the messages to webhooks.
WEBHOOKS = "webhooks"
#: The function that delivers a message, as its job names it.
DELIVER = "app.webhooks.deliver"
#: Seconds that one try to deliver a message may take.
DELIVERY_TIMEOUT = 30
#: Seconds that the log of an undelivered message is kept: the time of all its tries, and a week as for any failure.
MESSAGES_KEPT = 11 * 24 * 3600
#: The statuses after which nothing happens to a job by itself (rq.job.JobStatus).
TERMINAL = frozenset({"finished", "failed", "stopped", "canceled"})
#: What RQ's `Job.fetch` raises if the job is gone or corrupt. AssertionError: its timeout is not a number.
UNREADABLE = (NoSuchJobError, ValueError, TimeoutFormatError, AssertionError)


class Failure(NamedTuple):
    """Why a run did not finish, as Redis stores it: for RQ the exception's text (base64 of zlib), for the API JSON."""

    exception: str = ""
    error: str = ""


def describe_failure(kind: str, message: str, trace: str | None = None) -> Failure:
    """Make the failure of an exception.

    Args:
        kind: name of its class.
        message: its text.
        trace: its traceback, for RQ; if there is none, RQ gets class and text.
    """
    text = trace if trace is not None else f"{kind}: {message}\n"
    compressed = base64.b64encode(zlib.compress(text.encode(errors="backslashreplace"))).decode()
    return Failure(compressed, json.dumps({"type": kind, "message": message}))


#: The failure of a job that was canceled while it ran.
STOPPED = describe_failure("JobStopped", "The job was stopped on request.")

_LUA = Path(__file__).parent / "lua"


def _read_common() -> str:
    """The text in front of each script, with the words in braces replaced."""
    text = (_LUA / "common.lua").read_text()
    for name, value in {
        "RQ": RQ_KEY_PREFIX,
        "BOUNDS": ", ".join(map(str, TIME_BOUNDS)),
        "STOPPED_EXCEPTION": STOPPED.exception,
        "STOPPED_ERROR": STOPPED.error,
        "WEBHOOKS": WEBHOOKS,
        "DELIVER": DELIVER,
        "RUN_LIMIT": DELIVERY_TIMEOUT,
        "MESSAGES_KEPT": MESSAGES_KEPT,
    }.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


_COMMON = _read_common()
#: The text of each script, by its name.
SCRIPTS = {path.stem: _COMMON + path.read_text() for path in _LUA.glob("*.lua") if path.stem != "common"}
#: The digest by which Redis knows the script.
DIGESTS = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in SCRIPTS.items()}

#: One of a script's ARGV.
Argument = str | bytes | int | float


def encode_arguments(arguments: Iterable[Argument]) -> list[Argument]:
    """The arguments as redis-py sends them. Ids that are not UTF-8 keep their bytes."""
    return [part.encode(errors="surrogateescape") if isinstance(part, str) else part for part in arguments]


def run_script(connection: Redis, script: str, *arguments: Argument) -> Any:
    """Run the script of this name, and return its answer.

    Raises:
        ResponseError: Redis refused, or the script raised.
        RedisError: no answer arrived. The script may have run or not.
    """
    raw = encode_arguments(arguments)
    try:
        return connection.evalsha(DIGESTS[script], 0, *raw)
    except NoScriptError:  # Redis does not know the script yet, or has restarted since
        return connection.eval(SCRIPTS[script], 0, *raw)


def to_text(value: bytes | str) -> str:
    """Redis' bytes as text. An id that is not UTF-8 keeps its bytes, so that `run_script` can send it back."""
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def job_key(job_id: str) -> str:
    """The key of the job's hash."""
    return f"{RQ_KEY_PREFIX}:job:{job_id}"


def results_key(job_id: str) -> str:
    """The key of the stream of the job's results."""
    return f"{RQ_KEY_PREFIX}:results:{job_id}"


def deliveries_key(job_id: str) -> str:
    """The key of the list of the messages to webhooks about the job's ends."""
    return f"{RQ_KEY_PREFIX}:api:webhooks:{job_id}"


def tries_key(webhook_id: str) -> str:
    """The key of the log of a message's tries."""
    return f"{RQ_KEY_PREFIX}:api:tries:{webhook_id}"


def workers_key(queue: str) -> str:
    """The key of the set of the queue's workers."""
    return f"{RQ_KEY_PREFIX}:workers:{queue}"


def flatten(fields: Mapping[str, Argument]) -> list[Argument]:
    """Names and values in turn: how a script takes the fields of a hash."""
    return [part for field in fields.items() for part in field]


def owner_argument(owner: str | None) -> str:
    """The owner as the scripts take it: `*` for all owners (None)."""
    return "*" if owner is None else owner
