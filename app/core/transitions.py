"""The atomic transitions of a job: one Lua script each (`app/lua`), and the typed functions that call them.

The only place that knows RQ's keys. Redis runs a script as a whole, so a transition happens or does not; each checks
the state it expects, and one that comes too late changes nothing. All of them may be sent twice: a network write that
is tried again does no harm.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, cast

from redis import Redis
from redis.connection import Connection
from redis.exceptions import ResponseError

from app.core.scripts import DIGESTS, Argument, Failure, encode_arguments, flatten, owner_argument, run_script, to_text


class Created(NamedTuple):
    """New jobs are there, since Redis' time `at`."""

    at: str
    status: Literal["queued", "scheduled"]


class Exists(NamedTuple):
    """Something with this id is there, or was not long ago; the fingerprint is that of the request that made it."""

    fingerprint: str


class Full(NamedTuple):
    """The queue holds as many jobs as it may; nothing was enqueued."""


class EnqueueOptions(TypedDict, total=False):
    """What may hold for new jobs; None is as none."""

    #: whether they go ahead of what waits
    at_front: bool
    #: seconds after which a job is dropped if no worker took it
    ttl: int | None
    #: seconds before which they do not run, or seconds since 1970, which win
    delay: float | None
    at: float | None
    #: id of the group that they are to be, and the seconds that it is kept
    group: str
    group_ttl: int
    #: what stands for the request's idempotency key, if it has one; the ids are derived from it then
    key_id: str | None
    #: of the request, with `key_id`. One of the jobs has it among its fields, too
    fingerprint: str | None
    #: seconds that the key is remembered, if the job is not kept longer
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
    """Create new jobs, all or none, unless there is one with this id (a group with the group's id) already.

    Args:
        connection: the Redis to write to.
        queue: name of the queue.
        jobs: by its id, each one's own fields of the job's hash; one job, unless they are a group.
        shared: the fields that all of them have, as `rq.job.Job.to_dict` makes them; the times are Redis' own.
        limit: how many jobs the queue may hold, waiting and scheduled.
        options: see there.
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
    """What a worker needs of a job's hash, as it was before the take; None where there is no such field."""

    status: bytes | None
    data: bytes | None
    timeout: bytes | None
    enqueued_at: bytes | None
    crashes: bytes | None
    function: bytes | None
    request_id: bytes | None
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


class Again(NamedTuple):
    """So many entries of the queues are no jobs any more that one call was not enough to pass them."""


class Suspended(NamedTuple):
    """Somebody ran `rq suspend`."""


TakeAnswer = Taken | Skipped | Nothing | Again | Suspended


def take(connection: Redis, worker: str, execution: str, lease: int, queues: Iterable[str]) -> TakeAnswer:
    """Take the first waiting job of the queues, in their order, under a lease of so many seconds."""
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
    """One execution of a job by a worker: what `renew`, `finish` and `release` name to show that it is theirs."""

    job_id: str
    execution: str
    queue: str
    worker: str
    #: of the request that made the job; for the log only
    request_id: str = ""

    @property
    def fence(self) -> tuple[str, str, str, str]:
        """What the scripts want to see."""
        return self[:4]

    def __str__(self) -> str:
        """As it stands in the text of a log."""
        return f"{self.queue}: job {self.job_id}"

    def log_members(self) -> dict[str, str]:
        """What a line in a log that names it is about."""
        return {"job_id": self.job_id, "queue": self.queue, "request_id": self.request_id}


def renew(
    connection: Redis, run: Run, lease: int, progress: str = "", max_crashes: int | None = None
) -> Literal["held", "lost", "stop"]:
    """Extend the run's lease and pass its progress (JSON) on; note the job's own crash limit, if it has one.

    Returns:
        `held`; `lost` if the job is not this run's any more; `stop` if somebody canceled it.
    """
    limit = "" if max_crashes is None else max_crashes
    return cast(
        'Literal["held", "lost", "stop"]', to_text(run_script(connection, "renew", *run.fence, lease, progress, limit))
    )


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
    #: least seconds before a job that failed is tried again, -1 for never; None for the job's own pause
    after: float | None = None

    def arguments(self, run: Run) -> tuple[Argument, ...]:
        """What the script is called with."""
        ttls = self.result_ttl, self.failure_ttl
        last = self.progress, int(self.force), "" if self.after is None else self.after
        return (*run.fence, self.outcome, self.return_value, *self.failure, *ttls, *last)


def finish(connection: Redis, run: Run, ending: Ending) -> str:
    """End the run.

    Returns:
        The job's new status, `stopped` if somebody canceled it meanwhile; `lost` if the job is not this run's any more
        (nothing is written then); or `rq` if it has dependents, repeats, a rate limit or RQ's webhooks, which RQ's own
        code is to handle (nothing is written).
    """
    return to_text(run_script(connection, "finish", *ending.arguments(run)))


def take_and_finish(
    connection: Redis, run: Run, ending: Ending, execution: str, lease: int, queues: Iterable[str]
) -> TakeAnswer | None:
    """Take the worker's next job, with the end of its last one sent right behind.

    Redis answers the first before it begins with the second: the next job runs while the last one's end is written
    down. `read_finish` gives the answer to that, before anything else is sent on this connection.

    Args:
        connection: a client with a connection of its own, as `Redis.client()` makes it.
        run: the last one.
        ending: how it ended.
        execution: id for the next one.
        lease: seconds of its lease.
        queues: where to look, in this order.

    Returns:
        As `take`; None if Redis refused, for a reason that a `take` by itself will learn.
    """
    wire = _wire_of(connection)
    wire.send_command("EVALSHA", DIGESTS["take"], 0, *encode_arguments((run.worker, execution, lease, *queues)))
    wire.send_command("EVALSHA", DIGESTS["finish"], 0, *encode_arguments(ending.arguments(run)))
    try:
        return _read_taken(wire.read_response())
    except ResponseError:
        return None


def read_finish(connection: Redis) -> str:
    """What `finish` says, as the second part of `take_and_finish`.

    Raises:
        RedisError: it is not known whether the end was written; or Redis refused.
    """
    return to_text(_wire_of(connection).read_response())


def _wire_of(connection: Redis) -> Connection:
    wire = connection.connection
    assert wire, "not a client with a connection of its own"
    return wire


def release(
    connection: Redis, run: Run, *, crashed: bool, limit: int, failure: Failure, failure_ttl: int
) -> Literal["queued", "failed", "stopped", "lost", "rq"]:
    """Put the job back in front of its queue; fail it if its runs crashed more often than `limit`; or stop it.

    It is stopped if somebody canceled it while it ran.
    """
    answer = run_script(connection, "release", *run.fence, int(crashed), limit, *failure, failure_ttl)
    return cast('Literal["queued", "failed", "stopped", "lost", "rq"]', to_text(answer))


class Abandoned(NamedTuple):
    """A run whose worker let the lease run out, how often the job's runs crashed before, and its own limit of that."""

    run: Run
    crashes: int
    max_crashes: int | None


def recover(connection: Redis, queues: Sequence[str]) -> list[Abandoned]:
    """Name the runs whose lease ran out, and put back what a stock worker popped but never started."""
    return [
        Abandoned(
            Run(*map(to_text, run)),
            crashes,
            int(limit) if limit.isdigit() else None,
        )
        for *run, crashes, limit in run_script(connection, "recover", *queues)
    ]


class Promoted(NamedTuple):
    """How many jobs wait since now, and in how many seconds the next one is due, if there is one."""

    jobs: int
    due: float | None


def promote(connection: Redis, queues: Sequence[str]) -> Promoted:
    """Let the delayed jobs and retries whose time has come wait in their queues."""
    jobs, due = run_script(connection, "promote", *queues)
    return Promoted(jobs, float(due) if due else None)


def cancel(connection: Redis, job_id: str, owner: str | None, failure_ttl: int) -> str:
    """Cancel a job.

    Args:
        connection: the Redis that it is in.
        job_id: its id.
        owner: whose job it must be; None for anybody's.
        failure_ttl: seconds that it is kept, unless it says so itself.

    Returns:
        The job's status: `canceled` or `stopped`; `started` if its worker was told to stop it; `finished` or `failed`
        if it had ended before; an empty one if there is no such job.
    """
    return to_text(run_script(connection, "cancel", job_id, owner_argument(owner), failure_ttl))


def retry(connection: Redis, job_id: str, owner: str | None, limit: int) -> str:
    """Let a job that failed, was stopped or canceled wait again, with its retries renewed and its crashes forgotten.

    Args:
        connection: the Redis that it is in.
        job_id: its id.
        owner: whose job it must be; None for anybody's.
        limit: how many jobs the queue may hold.

    Returns:
        `queued`; `full`; an empty string if there is no such job; else `not` and the status that is in the way. Sent
        twice, the second one answers `not queued`.
    """
    return to_text(run_script(connection, "retry", job_id, owner_argument(owner), limit))


def sweep(connection: Redis) -> int:
    """Take jobs that are not kept any more out of the index of `/jobs`, a part of it a second; how many there were."""
    return int(run_script(connection, "sweep"))


def notify(connection: Redis, job_id: str) -> None:
    """Tell of the job's end that RQ's own code wrote, if somebody is to be told: other transitions do it themselves."""
    run_script(connection, "notify", job_id)


def redeliver(connection: Redis, job_id: str, limit: int) -> Literal["queued", "full", ""]:
    """Deliver once more what tells of the job's last end; an empty string if there is no such message."""
    return cast('Literal["queued", "full", ""]', to_text(run_script(connection, "redeliver", job_id, limit)))
