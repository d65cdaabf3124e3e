"""What Redis tells of many jobs at once: pages of them, groups, and the queues and workers as a whole."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from redis import Redis

from app.core.scripts import TIME_BOUNDS, owner_argument, run_script, to_text


def read_tries(entries: list[bytes]) -> Iterator[dict[str, Any]]:
    """The log of tries, without what we did not write."""
    for entry in entries:
        try:
            found = json.loads(entry)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield {name: found.get(name) for name in ("at", "status_code", "error", "seconds")}


class Cursor(NamedTuple):
    """Where a page of jobs ended: when its last job was created, in microseconds since 1970, and its id."""

    created: str
    job_id: str


class Page(NamedTuple):
    """Jobs by their id, with the fields that were asked for, newest first; and where to go on, if there are more."""

    jobs: list[tuple[str, list[bytes | None]]]
    next: Cursor | None


def list_jobs(
    connection: Redis,
    owner: str | None,
    fields: Sequence[str],
    *,
    status: str = "",
    queue: str = "",
    function: str = "",
    limit: int,
    most: int,
    cursor: Cursor | None = None,
) -> Page:
    """A page of jobs, newest first. Empty filters let everything through.

    Args:
        connection: the Redis that they are in.
        owner: whose jobs; None for everybody's.
        fields: of the job's hash; they begin with status, function, origin, owner, created_at.
        status: one of RQ's.
        queue: name of the queue.
        function: name of the job function.
        limit: most jobs of the page.
        most: most jobs to look at. A page is short if too few of these fit; it has a `next` then.
        cursor: where the last page ended.
    """
    created, job_id, *rows = run_script(
        connection, "list", owner or "", owner_argument(owner), status, queue, function, limit, most,
        *(cursor or ("", "")), *fields,
    )  # fmt: skip
    return Page(
        [(to_text(row[0]), row[1]) for row in rows], Cursor(to_text(created), to_text(job_id)) if created else None
    )


class Group(NamedTuple):
    """The statuses of a group's jobs, None for those that are not kept any more; `total` is None for one of RQ's."""

    total: int | None
    statuses: list[str | None]


def read_group(connection: Redis, group_id: str) -> Group:
    """The statuses of a group's jobs, in one round trip, whatever their payloads."""
    total, statuses = run_script(connection, "group", group_id)
    return Group(int(total) if total else None, [to_text(status) or None for status in statuses])


#: The statuses by which the jobs of a queue are counted. RQ keeps those that were stopped with the failed ones.
COUNTED = ("queued", "started", "scheduled", "deferred", "finished", "failed", "canceled")


class QueueOverview(NamedTuple):
    """A queue at one moment."""

    name: str
    #: how many jobs there are, by the statuses of `COUNTED`
    jobs: dict[str, int]
    #: age of the oldest waiting job in seconds, None if none waits
    oldest: float | None
    #: runs that ended in the last one to two minutes, how many seconds they took, and how many seconds ago that began
    runs: int
    run_seconds: float
    since: float


class WorkerOverview(NamedTuple):
    """A live worker, with the jobs that it holds: the one that runs, and maybe the next one."""

    name: str
    state: str
    queues: list[str]
    job_ids: list[str]


class Count(NamedTuple):
    """How often something happened to jobs of a queue and a function."""

    event: str
    queue: str
    function: str
    number: int


class Times(NamedTuple):
    """How long the jobs of a function waited, or ran."""

    what: str
    function: str
    #: by the bounds of TIME_BOUNDS, and one for those above all of them: how many took no longer
    counts: list[int]
    #: of all of them, in seconds
    total: float


class Overview(NamedTuple):
    """All queues and workers at one moment, and what was counted since Redis was new."""

    queues: list[QueueOverview]
    workers: list[WorkerOverview]
    counts: list[Count]
    times: list[Times]


def read_overview(connection: Redis, queues: Sequence[str]) -> Overview:
    """The overview, in one round trip."""
    counted, workers, found = run_script(connection, "overview", *queues)
    numbers = dict(_read_numbers(counted))
    return Overview(
        [
            QueueOverview(
                name,
                dict(zip(COUNTED, values, strict=False)),
                float(oldest) if oldest else None,
                runs,
                microseconds / 1e6,
                float(since),
            )
            for name, (*values, oldest, runs, microseconds, since) in zip(queues, found, strict=True)
        ],
        [
            WorkerOverview(
                to_text(name), to_text(state), to_text(names).split(","), [to_text(job_id) for job_id in ids]
            )
            for name, state, names, ids in workers
        ],
        [
            Count(event, queue, function, number)
            for (event, queue, function), number in numbers.items()
            if event not in ("wait", "run")
        ],
        list(_read_times(numbers)),
    )


def _read_numbers(flat: Sequence[bytes]) -> Iterator[tuple[tuple[str, str, str], int]]:
    """The numbers by their names, without what our scripts did not write."""
    for name, value in zip(flat[::2], flat[1::2], strict=True):
        parts = to_text(name).split(":", 2)
        if len(parts) == 3 and re.fullmatch(rb"[0-9]{1,18}", value):
            yield (parts[0], parts[1], parts[2]), int(value)


def _read_times(numbers: Mapping[tuple[str, str, str], int]) -> Iterator[Times]:
    for (what, bound, function), total in numbers.items():
        if what in ("wait", "run") and bound == "0":
            each = [numbers.get((what, str(number), function), 0) for number in range(1, len(TIME_BOUNDS) + 2)]
            yield Times(what, function, list(accumulate(each)), total / 1e6)


class Delivery(NamedTuple):
    """A message that tells of a job's end: which end, where it is itself, when it is tried next, and its tries."""

    webhook_id: str
    status: str
    tells: str
    due: float | None
    tries: list[bytes]


def read_deliveries(connection: Redis, job_id: str) -> list[Delivery]:
    """The messages that tell of a job's ends, the first one first."""
    return [
        Delivery(to_text(webhook_id), to_text(status), to_text(tells), float(due) if due else None, tries)
        for webhook_id, status, tells, due, tries in run_script(connection, "deliveries", job_id)
    ]
