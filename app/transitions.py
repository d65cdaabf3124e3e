"""The atomic transitions of a job: one Lua script each (`app/lua`), and the typed functions that call them.

The only place that knows RQ's keys. Redis runs a script as a whole, so a transition happens or does not; each checks
the state it expects, and one that comes too late changes nothing. All of them may be sent twice: a network write that
is tried again does no harm.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from redis import Redis
from redis.exceptions import NoScriptError
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import NoSuchJobError, TimeoutFormatError

EVENTS_KEY = f"{RQ_KEY_PREFIX}:api:events"
DOORBELL_KEY = f"{RQ_KEY_PREFIX}:api:doorbell"
SECRET_KEY = f"{RQ_KEY_PREFIX}:api:secret"
#: Written by `/readyz`, to see whether Redis takes writes.
PROBE_KEY = f"{RQ_KEY_PREFIX}:api:probe"

#: The statuses after which nothing happens to a job by itself (rq.job.JobStatus).
TERMINAL = frozenset({"finished", "failed", "stopped", "canceled"})

#: What RQ's `Job.fetch` raises for a job that is gone or corrupt; AssertionError for a timeout that is no number.
UNREADABLE = (NoSuchJobError, ValueError, TimeoutFormatError, AssertionError)

_LUA = Path(__file__).parent / "lua"
_COMMON = (_LUA / "common.lua").read_text().replace("{RQ}", RQ_KEY_PREFIX)
_SCRIPTS = {path.stem: _COMMON + path.read_text() for path in _LUA.glob("*.lua") if path.stem != "common"}
# One trip to Redis instead of two at the end of each job: `finish`, then `take`, each as it is. The first argument
# says how many of the rest are for `finish`.
_SCRIPTS["finish_and_take"] = f"""{_COMMON}
local function finish(ARGV) {(_LUA / "finish.lua").read_text()} end
local function take(ARGV) {(_LUA / "take.lua").read_text()} end
local split = ARGV[1] + 1
return {{finish({{unpack(ARGV, 2, split)}}), take({{unpack(ARGV, split + 1)}})}}
"""
_DIGESTS = {name: hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest() for name, text in _SCRIPTS.items()}

Argument = str | bytes | int | float


def _run(connection: Redis, script: str, *arguments: Argument) -> Any:
    raw = [part.encode(errors="surrogateescape") if isinstance(part, str) else part for part in arguments]
    try:
        return connection.evalsha(_DIGESTS[script], 0, *raw)
    except NoScriptError:  # Redis was restarted, or never saw it
        return connection.eval(_SCRIPTS[script], 0, *raw)


def _text(value: bytes | str) -> str:
    # An id that is not UTF-8 goes back to Redis as it came (`_run`).
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def job_key(job_id: str) -> str:
    """The key of the job's hash."""
    return f"{RQ_KEY_PREFIX}:job:{job_id}"


def results_key(job_id: str) -> str:
    """The key of the stream of the job's results."""
    return f"{RQ_KEY_PREFIX}:results:{job_id}"


def workers_key(queue: str) -> str:
    """The key of the set of the queue's workers."""
    return f"{RQ_KEY_PREFIX}:workers:{queue}"


class Enqueued(NamedTuple):
    """What came of an enqueue; `enqueued_at` is Redis' time, if the job was created by this call."""

    outcome: Literal["created", "exists", "full"]
    enqueued_at: str | None = None


def enqueue(
    connection: Redis,
    queue: str,
    job_id: str,
    fields: Mapping[str, Argument],
    *,
    at_front: bool = False,
    ttl: int | None = None,
    limit: int,
) -> Enqueued:
    """Create a waiting job, unless one with this id is there or the queue is full.

    Args:
        connection: the Redis to write to.
        queue: name of the queue.
        job_id: id of the new job.
        fields: the job's hash, as `rq.job.Job.to_dict` makes it; its times are overwritten with Redis' own.
        at_front: whether it goes ahead of what waits.
        ttl: seconds after which it is dropped if no worker took it.
        limit: how many jobs may wait in the queue.
    """
    flat = [part for field in fields.items() for part in field]
    answer = _run(connection, "enqueue", queue, job_id, int(at_front), limit, "" if ttl is None else ttl, *flat)
    return Enqueued(*map(_text, answer))  # type: ignore[arg-type]  # the script answers with these words


class Fields(NamedTuple):
    """What a worker needs of a job's hash, as it was before the take; None where there is no such field."""

    status: bytes | None
    data: bytes | None
    timeout: bytes | None
    enqueued_at: bytes | None
    crashes: bytes | None
    function: bytes | None
    #: RQ's own hooks: the callbacks for success, failure and stop, and its webhooks.
    callbacks: tuple[bytes | None, ...]


class Taken(NamedTuple):
    """A job that is this worker's to run."""

    queue: str
    job_id: str
    started_at: str
    fields: Fields


class Skipped(NamedTuple):
    """An entry of a queue that cannot be a job."""

    queue: str
    job_id: str
    reason: str


class Nothing(NamedTuple):
    """No job is waiting; `rung` is the doorbell's last id, from which the worker listens."""

    rung: str


class Suspended(NamedTuple):
    """Somebody ran `rq suspend`."""


TakeAnswer = Taken | Skipped | Nothing | Suspended


def take(connection: Redis, worker: str, execution: str, lease: int, queues: Iterable[str]) -> TakeAnswer:
    """Take the first waiting job of the queues, in their order, under a lease of so many seconds."""
    return _read_taken(_run(connection, "take", worker, execution, lease, *queues))


def _read_taken(answer: list[Any]) -> TakeAnswer:
    word, *rest = answer
    match _text(word):
        case "taken":
            queue, job_id, started_at, (status, data, timeout, enqueued_at, crashes, function, *callbacks) = rest
            fields = Fields(status, data, timeout, enqueued_at, crashes, function, tuple(callbacks))
            return Taken(_text(queue), _text(job_id), _text(started_at), fields)
        case "skipped":
            return Skipped(*map(_text, rest))
        case "suspended":
            return Suspended()
        case _:
            return Nothing(_text(rest[0]))


class Run(NamedTuple):
    """One execution of a job by a worker: what `renew`, `finish` and `release` name to show that it is theirs."""

    job_id: str
    execution: str
    queue: str
    worker: str


def renew(connection: Redis, run: Run, lease: int, progress: str = "") -> bool:
    """Extend the run's lease and pass its progress (JSON) on; False if the job is not this run's any more."""
    return bool(_text(_run(connection, "renew", *run, lease, progress)) == "held")


class Failure(NamedTuple):
    """How a run ended badly: RQ's exception text (base64 of zlib) and our `error` (JSON)."""

    exception: str = ""
    error: str = ""


class Ending(NamedTuple):
    """How a run ended, with the TTLs for a job that has none of its own."""

    outcome: Literal["finished", "failed", "stopped"]
    result_ttl: int
    failure_ttl: int
    #: base64 of JSON; empty for null
    return_value: str = ""
    failure: Failure = Failure()
    progress: str = ""
    #: end the job also if it has what only RQ's own code handles
    force: bool = False

    def arguments(self, run: Run) -> tuple[Argument, ...]:
        """What the script is called with."""
        ttls = self.result_ttl, self.failure_ttl
        return (*run, self.outcome, self.return_value, *self.failure, *ttls, self.progress, int(self.force))


def finish(connection: Redis, run: Run, ending: Ending) -> str:
    """End the run.

    Returns:
        The job's new status; `lost` if the job is not this run's any more (nothing is written then); or `rq` if it
        has dependents, repeats, a rate limit or RQ's webhooks, which RQ's own code is to handle (nothing is written).
    """
    return _text(_run(connection, "finish", *ending.arguments(run)))


def finish_and_take(
    connection: Redis, run: Run, ending: Ending, execution: str, lease: int, queues: Iterable[str]
) -> tuple[str, TakeAnswer]:
    """`finish`, then `take` for the same worker, in one round trip."""
    arguments = ending.arguments(run)
    status, taken = _run(
        connection, "finish_and_take", len(arguments), *arguments, run.worker, execution, lease, *queues
    )
    return _text(status), _read_taken(taken)


def release(
    connection: Redis, run: Run, *, crashed: bool, limit: int, failure: Failure, failure_ttl: int
) -> Literal["queued", "failed", "lost", "rq"]:
    """Put the job back in front of its queue; or fail it, if its runs crashed more often than `limit`."""
    answer = _run(connection, "release", *run, int(crashed), limit, *failure, failure_ttl)
    return cast('Literal["queued", "failed", "lost", "rq"]', _text(answer))


class Abandoned(NamedTuple):
    """A run whose worker let the lease run out, and how often the job's runs crashed before."""

    run: Run
    crashes: int


def recover(connection: Redis, queues: Sequence[str]) -> list[Abandoned]:
    """Name the runs whose lease ran out, and put back what a stock worker popped but never started."""
    return [
        Abandoned(Run(_text(job_id), _text(execution), _text(queue), _text(worker)), crashes)
        for queue, job_id, execution, worker, crashes in _run(connection, "recover", *queues)
    ]


def promote(connection: Redis, queues: Sequence[str]) -> int:
    """Let the delayed jobs and retries whose time has come wait in their queues; returns how many there were."""
    return int(_run(connection, "promote", *queues))
