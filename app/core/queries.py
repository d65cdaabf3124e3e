"""Reads that one command cannot do: pages of jobs, groups, all queues and workers, a job's messages to a webhook."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from redis import Redis

from app.core.scripts import TIME_BOUNDS, owner_argument, run_script, to_text


class Cursor(NamedTuple):
    """The last job of a page, where the next page begins: its creation, in microseconds since 1970, and its id."""

    created: str
    job_id: str


class Page(NamedTuple):
    """A page of jobs, newest first: the id and the fields of each; and the cursor of the next page, if there is one."""

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
    """A page of jobs, newest first. An empty filter lets all jobs through.

    Args:
        connection: the Redis that has the jobs.
        owner: name of the owner; None for all owners.
        fields: fields of the job's hash. They begin with status, function, origin, owner, created_at.
        status: RQ's word for it.
        queue: name of the queue.
        function: name of the job function.
        limit: most jobs of the page.
        most: most jobs to look at. If too few of them match, the page is short and has a `next`.
        cursor: the last job of the page before.
    """
    created, job_id, *rows = run_script(
        connection, "list", owner or "", owner_argument(owner), status, queue, function, limit, most,
        *(cursor or ("", "")), *fields,
    )  # fmt: skip
    return Page(
        [(to_text(row[0]), row[1]) for row in rows], Cursor(to_text(created), to_text(job_id)) if created else None
    )


class Group(NamedTuple):
    """The jobs of a group."""

    #: how many jobs it had at first; None if RQ's own code made the group
    total: int | None
    #: the status of each job; None if the job is no longer kept
    statuses: list[str | None]


def read_group(connection: Redis, group_id: str) -> Group:
    """Read the statuses of a group's jobs, in one round trip, without their payloads."""
    total, statuses = run_script(connection, "group", group_id)
    return Group(int(total) if total else None, [to_text(status) or None for status in statuses])


#: The statuses by which the jobs of a queue are counted. Stopped jobs count as failed: RQ keeps both in one registry.
COUNTED = ("queued", "started", "scheduled", "deferred", "finished", "failed", "canceled")


class QueueOverview(NamedTuple):
    """A queue at one moment, and the runs that ended in the present minute and the one before."""

    name: str
    #: number of jobs by status, for each of `COUNTED`
    jobs: dict[str, int]
    #: age of the oldest waiting job, in seconds; None if no job waits
    oldest: float | None
    #: how many runs ended
    runs: int
    #: how long they took together, in seconds
    run_seconds: float
    #: how many seconds ago the first of these minutes began
    since: float


class WorkerOverview(NamedTuple):
    """A live worker, with the jobs that it holds: the job that runs, and maybe the next one."""

    name: str
    state: str
    queues: list[str]
    job_ids: list[str]


class Count(NamedTuple):
    """How often an event (`finished`, `crashed`, …) happened to the jobs of a queue and a function."""

    event: str
    queue: str
    function: str
    number: int


class Times(NamedTuple):
    """How long the jobs of a function waited (`wait`), or how long their runs took (`run`)."""

    what: str
    function: str
    #: how many took at most as long as each of TIME_BOUNDS; the last number counts all
    counts: list[int]
    #: sum of all of them, in seconds
    total: float


class Overview(NamedTuple):
    """All queues and workers at one moment, and the counts since Redis was new."""

    queues: list[QueueOverview]
    workers: list[WorkerOverview]
    counts: list[Count]
    times: list[Times]


def read_overview(connection: Redis, queues: Sequence[str]) -> Overview:
    """Read the overview of these queues, in one round trip."""
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
    """The numbers by event, queue (or bucket) and function. Skip what the scripts cannot have written."""
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
    """A message to a webhook about a job's end."""

    webhook_id: str
    #: status of the message itself, which is a job; empty if it is no longer kept
    status: str
    #: the status that it reports: how the job ended
    ended_as: str
    #: time of its next try, in seconds since 1970, if there is one
    due: float | None
    #: its tries, each with the members `at`, `status_code`, `error`, `seconds`
    tries: list[dict[str, Any]]


def read_deliveries(connection: Redis, job_id: str) -> list[Delivery]:
    """Read the messages about a job's ends, the oldest first."""
    return [
        Delivery(
            to_text(webhook_id),
            to_text(status),
            to_text(ended_as),
            float(due) if due else None,
            list(_read_tries(tries)),
        )
        for webhook_id, status, ended_as, due, tries in run_script(connection, "deliveries", job_id)
    ]


def _read_tries(entries: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The tries from their log. Skip entries that are not JSON objects: other programs may write to Redis, too."""
    for entry in entries:
        try:
            found = json.loads(entry)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield {name: found.get(name) for name in ("at", "status_code", "error", "seconds")}
