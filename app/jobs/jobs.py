"""The jobs of one Redis: read their status, result and payload, cancel, retry, list. `enqueue.py` makes new ones.

Knows neither Flask nor the environment: it takes settings and connection, and raises the `problems`.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from redis import Redis

from app.config import Settings
from app.core import queries, scripts, transitions
from app.core.job_ids import JobIds
from app.core.scripts import TERMINAL
from app.jobs import problems
from app.jobs.problems import POLL_AGAIN
from app.jobs.status import (
    STATUS_FIELDS,
    StatusObject,
    StatusWithResult,
    decode_fields,
    make_status,
    read_return_value,
    read_stored_payload,
)

#: Jobs that one page of a list looks at, at most, to find those that fit its filters.
MOST_LOOKED_AT = 1000


def _encode_cursor(cursor: queries.Cursor) -> str:
    text = " ".join(cursor).encode(errors="surrogateescape")
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def _decode_cursor(text: str) -> queries.Cursor:
    with suppress(ValueError):
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode(errors="surrogateescape")
        created, _, job_id = decoded.partition(" ")
        if re.fullmatch(r"[0-9]{1,17}", created) and job_id:
            return queries.Cursor(created, job_id)
    error: problems.ErrorItem = {"loc": ["query", "cursor"], "msg": "It does not come from `next` of a page."}
    raise problems.InvalidRequest("This cursor is not valid. Use the `next` link of a page.", errors=[error])


class Jobs:
    """The jobs of one Redis. An `owner` is the name of an API key; None means the jobs of all owners."""

    def __init__(self, settings: Settings, connection: Redis) -> None:
        self.settings = settings
        self.connection = connection
        self.ids = JobIds(connection)

    # Control

    def cancel(self, job_id: str, owner: str | None = "") -> tuple[bool, StatusObject]:
        """Cancel a job that has not ended: one that waits never runs, one that runs is stopped.

        Returns:
            Whether it has ended by that (its worker has still to stop it otherwise), and its status.

        Raises:
            JobAlreadyEnded: it had finished or failed.
            JobNotFound, ResultExpired: as `read_status`.
        """
        status = self._control(transitions.cancel, job_id, owner, self.settings.failure_ttl)
        if status in ("finished", "failed"):
            raise problems.JobAlreadyEnded(f"The job had {status} before.", job_id=job_id, job_status=status)
        return status != "started", self.read_status(job_id, owner)

    def retry(self, job_id: str, owner: str | None = "") -> StatusObject:
        """Run a job again that failed, was stopped or canceled, with its retries renewed.

        Raises:
            JobNotRetryable: it waits, runs or finished.
            QueueFull: it stays as it was.
            JobNotFound, ResultExpired: as `read_status`.
        """
        status = self._control(transitions.retry, job_id, owner, self.settings.max_queue_length)
        if status == "full":
            raise problems.QueueFull.of(self.read_status(job_id, owner).queue, self.settings.max_queue_length)
        if status != "queued":
            status = status.removeprefix("not ")
            raise problems.JobNotRetryable(f"The job is {status}.", job_id=job_id, job_status=status)
        return self.read_status(job_id, owner)

    def _control(self, act: Callable[..., str], job_id: str, owner: str | None, bound: int) -> str:
        while not (status := act(self.connection, job_id, owner, bound)):
            self.read_status(job_id, owner)  # says what is wrong; unless the job came to be in between
        return status

    # Webhooks

    def read_webhooks(self, job_id: str, owner: str | None = "") -> dict[str, Any]:
        """The messages that told of the job's ends, with the tries to deliver each.

        Raises:
            JobNotFound, ResultExpired: as `read_status`; but a message outlives its job.
        """
        deliveries = queries.read_deliveries(self.connection, job_id)
        try:
            self.read_status(job_id, owner)
        except problems.ResultExpired:
            if not deliveries:
                raise
        messages = [
            {
                "webhook_id": found.webhook_id,
                "type": f"job.{found.tells}",
                "status": found.status or None,
                "next_try_at": found.due and datetime.fromtimestamp(found.due, UTC).isoformat().replace("+00:00", "Z"),
                "tries": list(queries.read_tries(found.tries)),
            }
            for found in deliveries
        ]
        return {"job_id": job_id, "messages": messages}

    def redeliver(self, job_id: str, owner: str | None = "") -> dict[str, Any]:
        """Deliver what tells of the job's last end once more, as the same message; what `read_webhooks` says then.

        Raises:
            WebhookNotFound: there is no such message.
            QueueFull: as many messages wait as may.
            JobNotFound, ResultExpired: as `read_webhooks`.
        """
        self.read_webhooks(job_id, owner)
        match transitions.redeliver(self.connection, job_id, self.settings.max_queue_length):
            case "":
                raise problems.WebhookNotFound(f"No message tells of the job {job_id}.", job_id=job_id)
            case "full":
                raise problems.QueueFull.of(scripts.WEBHOOKS, self.settings.max_queue_length)
        return self.read_webhooks(job_id, owner)

    # Lists

    def read_group(self, group_id: str, owner: str | None = "") -> dict[str, Any]:
        """How many jobs of a group there are in each status; `expired` are those that are not kept any more.

        Raises:
            GroupNotFound: there is no such group, or it is somebody else's.
            ResultExpired: it existed, and is not kept any more.
        """
        total, statuses = queries.read_group(self.connection, group_id)
        is_admins = owner is None and total is not None  # its owner's key may be gone
        if not is_admins and not any(self.ids.is_ours(group_id, f"group:{name}") for name in self._owners(owner)):
            if total is not None or not statuses or owner not in (None, ""):
                raise problems.GroupNotFound(f"No group has the id {group_id!r}.", group_id=group_id)
            total = len(statuses)  # made by RQ's own Group
        if total is None:
            raise problems.ResultExpired(f"The group {group_id} is not kept any more.", group_id=group_id)
        counts = Counter(status for status in statuses if status is not None)
        if expired := total - counts.total():
            counts["expired"] = expired
        return {"group_id": group_id, "total": total, "counts": dict(sorted(counts.items()))}

    def list_jobs(
        self, filters: Mapping[str, str], limit: int, cursor: str | None, owner: str | None = ""
    ) -> tuple[list[StatusObject], str | None]:
        """A page of jobs, newest first, and the cursor of the next page if there may be one. One round trip.

        Args:
            filters: any of `status`, `queue`, `function`.
            limit: most jobs of the page.
            cursor: where the last page ended.
            owner: whose jobs; None for everybody's.

        Raises:
            InvalidRequest: the cursor is none of ours.
        """
        page = queries.list_jobs(
            self.connection,
            owner,
            STATUS_FIELDS,
            **filters,
            limit=limit,
            most=MOST_LOOKED_AT,
            cursor=_decode_cursor(cursor) if cursor else None,
        )
        listed = [
            make_status(self.connection, job_id, decode_fields(values), is_listed=True) for job_id, values in page.jobs
        ]
        return listed, _encode_cursor(page.next) if page.next else None

    # Status

    def read_status(self, job_id: str, owner: str | None = "") -> StatusObject:
        """Where the job is. One round trip, whatever the size of its payload and result.

        Args:
            job_id: what `enqueue` returned.
            owner: whose job it must be; None for anybody's.

        Raises:
            JobNotFound: there is no such job, or it is somebody else's.
            ResultExpired: it existed, and is not kept any more.
        """
        values: Any = self.connection.hmget(scripts.job_key(job_id), STATUS_FIELDS)
        return make_status(self.connection, job_id, self._decode(job_id, owner, values))

    def _owners(self, owner: str | None) -> list[str]:
        return ["", *(key.name for key in self.settings.api_keys)] if owner is None else [owner]

    def _decode(self, job_id: str, owner: str | None, values: list[bytes | None]) -> dict[str, str | None]:
        fields = decode_fields(values)
        # A stock worker's late heartbeat can leave a hash with nothing else in it (rq#1450).
        exists = fields["status"] is not None and fields["created_at"] is not None
        if exists and owner in (None, fields["owner"] or ""):
            return fields
        if not exists and any(self.ids.is_ours(job_id, name) for name in self._owners(owner)):
            raise problems.ResultExpired(f"The job {job_id} is not kept any more.", job_id=job_id)
        raise problems.JobNotFound(f"No job has the id {job_id!r}.", job_id=job_id)

    # Result

    def read_payload(self, job_id: str, owner: str | None = "") -> bytes:
        """The job's payload, as JSON text.

        Raises:
            PayloadNotFound: RQ itself enqueued it, in another form.
            JobNotFound, ResultExpired: as `read_status`.
        """
        self.read_status(job_id, owner)
        with self.connection.pipeline(transaction=False) as pipeline:
            for name in ("data", "owner"):
                pipeline.hget(scripts.job_key(job_id), name)
            data, ours = pipeline.execute()
        # Room for what JSON's escapes and the call around it may add.
        most = 6 * self.settings.max_payload_bytes + 10_000
        text = read_stored_payload(data, most, is_ours=ours is not None)
        if text is None:
            raise problems.PayloadNotFound(f"The job {job_id} has no payload that is JSON.", job_id=job_id)
        return text

    def read_result(self, job_id: str, owner: str | None = "") -> bytes:
        """The job's return value, as JSON text.

        Raises:
            ResultNotReady: the job has not ended.
            JobFailed, JobStopped, JobCanceled: it ended without a result.
            ResultExpired, JobNotFound: as `read_status`.
        """
        fields, text = self._read_result(job_id, owner)
        if text is not None:
            return text
        status = fields["status"]
        members: dict[str, Any] = {"job_id": job_id, "job_status": status}
        if status == "finished":  # its hash outlived its result
            raise problems.ResultExpired(f"The result of the job {job_id} is not kept any more.", job_id=job_id)
        if status not in TERMINAL:
            raise problems.ResultNotReady(f"The job is {status}.", retry_after=POLL_AGAIN, **members)
        error = make_status(self.connection, job_id, fields).error
        members["error"] = error and error.model_dump()
        problem = {"failed": problems.JobFailed, "stopped": problems.JobStopped, "canceled": problems.JobCanceled}
        raise problem[status or ""](f"The job was {status}." if status != "failed" else "The job failed.", **members)

    def _read_result(self, job_id: str, owner: str | None) -> tuple[dict[str, str | None], bytes | None]:
        """The fields of the job's hash for its status, and its return value if it has finished; in one round trip."""
        with self.connection.pipeline(transaction=False) as pipeline:
            pipeline.hmget(scripts.job_key(job_id), STATUS_FIELDS)
            pipeline.xrevrange(scripts.results_key(job_id), count=1)
            values, results = pipeline.execute()
        fields = self._decode(job_id, owner, values)
        if fields["status"] == "finished" and results:
            return fields, read_return_value(job_id, results[0][1])
        return fields, None

    def read_status_and_result(self, job_id: str, owner: str | None) -> StatusObject:
        """The status of the job; with its result if it has finished (StatusWithResult).

        Raises:
            JobFailed, ResultExpired: it finished, but there is no result to be told.
            JobNotFound: as `read_status`.
        """
        fields, text = self._read_result(job_id, owner)
        status = make_status(self.connection, job_id, fields)
        if fields["status"] != "finished":
            return status
        result = json.loads(text if text is not None else self.read_result(job_id, owner))
        return StatusWithResult(**dict(status), result=result)
