"""The transitions of a job: a typed function for each Lua script that changes jobs (`app/core/lua`).

Redis runs a script as a whole, so a transition happens completely or not at all. Each script checks first that the job
is in the state that it expects; a transition that comes too late changes nothing. Each may be sent twice, so a caller
may send it again if the answer was lost.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, cast

from redis import Redis
from redis.connection import Connection
from redis.exceptions import ResponseError

from app.core.scripts import DIGESTS, Argument, Failure, encode_arguments, flatten, owner_argument, run_script, to_text


class Created(NamedTuple):
    """The jobs were created, at this time of Redis' clock (RFC 3339)."""

    at: str
    status: Literal["queued", "scheduled"]


class Exists(NamedTuple):
    """A job or group with this id exists, or did not long ago; with the fingerprint of the request that made it."""

    fingerprint: str


class Full(NamedTuple):
    """The queue would hold more jobs than its limit; nothing was enqueued."""


class EnqueueOptions(TypedDict, total=False):
    """The options of new jobs. None means the same as a missing option."""

    #: whether they go in front of the jobs that wait
    at_front: bool
    #: seconds after which Redis drops a job that no worker took
    ttl: int | None
    #: run them this many seconds from now
    delay: float | None
    #: run them at this time, in seconds since 1970; it wins over `delay`
    at: float | None
    #: id of their group
    group: str
    #: seconds that the group is kept
    group_ttl: int
    #: id that was derived from the request's idempotency key, if it has one
    key_id: str | None
    #: fingerprint of the request, with `key_id`; one of the jobs also has it among its fields
    fingerprint: str | None
    #: seconds that the idempotency key is remembered, or longer if the job is kept longer
    key_ttl: int


def enqueue(
    connection: Redis,
    queue: str,
    jobs: Mapping[str, Mapping[str, Argument]],
    shared: Mapping[str, Argument],
    *,
    limit: int,
    **options: Unpack[EnqueueOptions],
) -> Created | Exists | Full:
    """Create new jobs, all or none. If a job or the group with such an id exists already, create none.

    Args:
        connection: the Redis to write to.
        queue: name of the queue.
        jobs: the own fields of each job's hash, by the job's id; one job, unless the jobs are a group.
        shared: the fields that all jobs have, as `rq.job.Job.to_dict` makes them; the script adds the times.
        limit: most jobs that the queue may hold, waiting and scheduled.
        options: EnqueueOptions.
    """
    common = {"count": len(jobs), "queue": queue, "limit": limit, **options}
    common |= {"owner": shared.get("owner"), "fn": shared.get("function")}
    flat = flatten(shared)
    own = [part for job_id, fields in jobs.items() for part in (job_id, 2 * len(fields), *flatten(fields))]
    given = json.dumps({name: value for name, value in common.items() if value is not None})
    word, *rest = map(to_text, run_script(connection, "enqueue", given, len(flat), *flat, *own))
    if word == "created":
        return Created(*rest)  # type: ignore[arg-type]  # the script answers with a status
    return Exists(*rest) if word == "exists" else Full()


class Fields(NamedTuple):
    """The fields of a job's hash that a worker needs, as they were before the take; None if a field is missing."""

    status: bytes | None
    data: bytes | None
    timeout: bytes | None
    enqueued_at: bytes | None
    crashes: bytes | None
    function: bytes | None
    request_id: bytes | None
    #: what RQ's own code would call: the callbacks for success, failure and stop, and RQ's webhooks
    callbacks: tuple[bytes | None, ...]


class Taken(NamedTuple):
    """The worker took this job, and holds its lease."""

    queue: str
    job_id: str
    started_at: str
    fields: Fields


class Skipped(NamedTuple):
    """The script dropped an entry of a queue: the key of such a job is no hash. `reason` is Redis' error."""

    queue: str
    job_id: str
    reason: str


class Nothing(NamedTuple):
    """No job waits. The worker blocks on the doorbell from this id on, so that it misses no new job."""

    doorbell_id: str


class Again(NamedTuple):
    """The script skipped its limit of entries that need no run (canceled jobs, for example): call it again."""


class Suspended(NamedTuple):
    """Somebody ran `rq suspend`: no job is given out."""


TakeAnswer = Taken | Skipped | Nothing | Again | Suspended


def take(connection: Redis, worker: str, execution: str, lease: int, queues: Iterable[str]) -> TakeAnswer:
    """Take the first waiting job of the queues, in their order, under a lease of `lease` seconds.

    `worker` is the name of the worker, `execution` a new id for the run.
    """
    return _read_taken(run_script(connection, "take", worker, execution, lease, *queues))


def _read_taken(answer: list[Any]) -> TakeAnswer:
    word, *rest = answer
    match to_text(word):
        case "taken":
            queue, job_id, started_at, (status, data, timeout, enqueued_at, crashes, function, request, *hooks) = rest
            fields = Fields(status, data, timeout, enqueued_at, crashes, function, request, tuple(hooks))
            return Taken(to_text(queue), to_text(job_id), to_text(started_at), fields)
        case "skipped":
            return Skipped(*map(to_text, rest))
        case "again":
            return Again()
        case "suspended":
            return Suspended()
        case _:
            return Nothing(to_text(rest[0]))


class Run(NamedTuple):
    """One run of a job by a worker. `renew`, `finish` and `release` name it, and write only if it holds the lease."""

    job_id: str
    execution: str
    queue: str
    worker: str
    #: id of the request that made the job, for the log only
    request_id: str = ""

    @property
    def fence(self) -> tuple[str, str, str, str]:
        """The four parts by which a script knows the run."""
        return self[:4]

    def __str__(self) -> str:
        """The run in the text of a log line."""
        return f"{self.queue}: job {self.job_id}"

    def log_members(self) -> dict[str, str]:
        """The members of a log line about this run."""
        return {"job_id": self.job_id, "queue": self.queue, "request_id": self.request_id}


#: Whether a run holds its lease; `stop` if it does, and the job was canceled.
Held = Literal["held", "lost", "stop"]


def renew(connection: Redis, run: Run, lease: int, progress: str = "", max_crashes: int | None = None) -> Held:
    """Extend the lease of a run, and store its progress.

    Args:
        connection: the Redis that has the job.
        run: the run.
        lease: seconds of the new lease.
        progress: JSON; empty to store none.
        max_crashes: the function's own crash limit. Another worker, which may not know the function, reads it there.

    Returns:
        `held`; `lost` if the run does not hold the lease any more; `stop` if the job was canceled.
    """
    limit = "" if max_crashes is None else max_crashes
    return cast("Held", to_text(run_script(connection, "renew", *run.fence, lease, progress, limit)))


class Ending(NamedTuple):
    """How a run ended, as `finish` stores it. The TTLs are for a job that has none of its own."""

    outcome: Literal["finished", "failed", "stopped"]
    result_ttl: int
    failure_ttl: int
    #: base64 of JSON; empty for null
    return_value: str = ""
    failure: Failure = Failure()
    progress: str = ""
    #: end the job even if only RQ's own code can handle all that it has (see `finish`)
    force: bool = False
    #: least seconds before a failed job is tried again; -1: never; None: after the job's own pause
    after: float | None = None

    def arguments(self, run: Run) -> tuple[Argument, ...]:
        """The ARGV of the script."""
        ttls = self.result_ttl, self.failure_ttl
        last = self.progress, int(self.force), "" if self.after is None else self.after
        return (*run.fence, self.outcome, self.return_value, *self.failure, *ttls, *last)


def finish(connection: Redis, run: Run, ending: Ending) -> str:
    """End the run.

    Returns:
        The job's new status (`stopped` if it was canceled meanwhile); or `lost` if the run does not hold the lease any
        more; or `rq` if only RQ's own code can end the job, because it has dependents, repeats, a rate limit or RQ's
        webhooks. With `lost` and `rq` nothing is written.
    """
    return to_text(run_script(connection, "finish", *ending.arguments(run)))


def take_and_finish(
    connection: Redis, run: Run, ending: Ending, execution: str, lease: int, queues: Iterable[str]
) -> TakeAnswer | None:
    """Send a `take` for the worker's next job and, right behind it, the `finish` of its last one.

    Redis answers the `take` before it begins with the `finish`. So the next job runs while Redis writes down the end of
    the last one. Call `read_finish` for the second answer before anything else is sent on this connection.

    Args:
        connection: a client with a connection of its own, as `Redis.client()` makes it.
        run: the last run.
        ending: how it ended.
        execution: a new id for the next run.
        lease: seconds of its lease.
        queues: names of the queues, in the order in which to look.

    Returns:
        As `take`; None if Redis refused. The next plain `take` then shows the reason.
    """
    wire = _own_connection(connection)
    wire.send_command("EVALSHA", DIGESTS["take"], 0, *encode_arguments((run.worker, execution, lease, *queues)))
    wire.send_command("EVALSHA", DIGESTS["finish"], 0, *encode_arguments(ending.arguments(run)))
    try:
        return _read_taken(wire.read_response())
    except ResponseError:
        return None


def read_finish(connection: Redis) -> str:
    """The answer to the `finish` that `take_and_finish` sent.

    Raises:
        ResponseError: Redis refused.
        RedisError: no answer arrived. The end may be written or not.
    """
    return to_text(_own_connection(connection).read_response())


def _own_connection(connection: Redis) -> Connection:
    wire = connection.connection
    assert wire, "the client has no connection of its own"
    return wire


def release(
    connection: Redis, run: Run, *, crashed: bool, limit: int, failure: Failure, failure_ttl: int
) -> Literal["queued", "failed", "stopped", "lost", "rq"]:
    """End a run without an outcome: put the job back in front of its queue.

    Args:
        connection: the Redis that has the job.
        run: the run.
        crashed: whether to count a crash. With more crashes than `limit` the job fails.
        limit: how often the job may crash.
        failure: stored if the job fails.
        failure_ttl: seconds that a failed job is kept, if it has no TTL of its own.

    Returns:
        `queued` or `failed`; `stopped` if the job was canceled while it ran; `lost` or `rq` as `finish`.
    """
    answer = run_script(connection, "release", *run.fence, int(crashed), limit, *failure, failure_ttl)
    return cast('Literal["queued", "failed", "stopped", "lost", "rq"]', to_text(answer))


class Abandoned(NamedTuple):
    """A run whose lease ran out, how often the job crashed before, and the function's own crash limit."""

    run: Run
    crashes: int
    max_crashes: int | None


def recover(connection: Redis, queues: Sequence[str]) -> list[Abandoned]:
    """Find the runs whose lease ran out; the caller releases them.

    It also puts jobs back that a stock worker popped but never started.
    """
    return [
        Abandoned(Run(*map(to_text, run)), crashes, int(limit) if limit.isdigit() else None)
        for *run, crashes, limit in run_script(connection, "recover", *queues)
    ]


class Promoted(NamedTuple):
    """How many jobs were put into their queues, and seconds until the next one is due; None if none is scheduled."""

    jobs: int
    due: float | None


def promote(connection: Redis, queues: Sequence[str]) -> Promoted:
    """Put the delayed jobs and the retries that are due into their queues."""
    jobs, due = run_script(connection, "promote", *queues)
    return Promoted(jobs, float(due) if due else None)


def cancel(connection: Redis, job_id: str, owner: str | None, failure_ttl: int) -> str:
    """Cancel a job.

    Args:
        connection: the Redis that has the job.
        job_id: its id.
        owner: name of the owner that the job must have; None for any owner.
        failure_ttl: seconds that the job is kept, if it has no TTL of its own.

    Returns:
        The job's status: `canceled` or `stopped`; `started` if its worker will stop it; `finished` or `failed` if it
        had ended before; empty if there is no such job.
    """
    return to_text(run_script(connection, "cancel", job_id, owner_argument(owner), failure_ttl))


def retry(connection: Redis, job_id: str, owner: str | None, limit: int) -> str:
    """Put a failed, stopped or canceled job back into its queue, with all its retries, and its crashes forgotten.

    Args:
        connection: the Redis that has the job.
        job_id: its id.
        owner: name of the owner that the job must have; None for any owner.
        limit: most jobs that the queue may hold.

    Returns:
        `queued`; `full`; empty if there is no such job; `not STATUS` if a job with this status cannot be retried. If it
        is sent twice, the second answer is `not queued`.
    """
    return to_text(run_script(connection, "retry", job_id, owner_argument(owner), limit))


def sweep(connection: Redis) -> int:
    """Clean a part of the index of `/jobs`, at most once a second: remove expired jobs, correct statuses.

    Returns:
        How many entries changed.
    """
    return int(run_script(connection, "sweep"))


def notify(connection: Redis, job_id: str) -> None:
    """Enqueue the message to the job's webhook, if it has one, after RQ's own code has ended the job.

    The other transitions that end a job do this themselves.
    """
    run_script(connection, "notify", job_id)


def redeliver(connection: Redis, job_id: str, limit: int) -> Literal["queued", "full", ""]:
    """Deliver the message about the job's last end once more. Empty if there is no message."""
    return cast('Literal["queued", "full", ""]', to_text(run_script(connection, "redeliver", job_id, limit)))
