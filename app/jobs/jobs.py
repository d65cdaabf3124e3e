"""The jobs of one Redis: read their status, result and payload, cancel, retry, list. `enqueue.py` makes new ones.

This module knows no Flask and reads no environment: it takes settings and a connection, and raises `problems`.
"""

import base64
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
    decode_fields,
    make_status,
    read_return_value,
    read_stored_payload,
)

#: Most jobs that a list looks at for one page, to find those that match its filters.
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

    def __init__(self, settings: Settings, connection: Redis, ids: JobIds) -> None:
        self.settings = settings
        self.connection = connection
        self.ids = ids

    # Control

    def cancel(self, job_id: str, owner: str | None = "") -> tuple[bool, StatusObject]:
        """Cancel a job that has not ended. A job that waits never runs; a job that runs is stopped.

        Returns:
            Whether the job has ended now (False: its worker will stop it), and its status.

        Raises:
            JobAlreadyEnded: it had finished or failed.
            JobNotFound, ResultExpired: as `read_status`.
        """
        status = self._control(transitions.cancel, job_id, owner, self.settings.failure_ttl)
        if status in ("finished", "failed"):
            raise problems.JobAlreadyEnded(f"The job had {status} already.", job_id=job_id, job_status=status)
        return status != "started", self.read_status(job_id, owner)

    def retry(self, job_id: str, owner: str | None = "") -> StatusObject:
        """Run a failed, stopped or canceled job again, with all its retries.

        Raises:
            JobNotRetryable: the job waits, runs or has finished.
            QueueFull: the job stays as it was.
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
            self.read_status(job_id, owner)  # raises the problem, unless the job was created in between
        return status

    # Webhooks

    def read_webhooks(self, job_id: str, owner: str | None = "") -> dict[str, Any]:
        """Read the messages to webhooks about the job's ends, and the tries to deliver each of them.

        Raises:
            JobNotFound, ResultExpired: as `read_status`. But messages can outlive their job: then they are the answer.
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
                "type": f"job.{found.ended_as}",
                "status": found.status or None,
                "next_try_at": found.due and datetime.fromtimestamp(found.due, UTC).isoformat().replace("+00:00", "Z"),
                "tries": found.tries,
            }
            for found in deliveries
        ]
        return {"job_id": job_id, "messages": messages}

    def redeliver(self, job_id: str, owner: str | None = "") -> dict[str, Any]:
        """Deliver the message about the job's last end once more, with the same id; then return `read_webhooks`.

        Raises:
            WebhookNotFound: there is no such message.
            QueueFull: the queue of messages is full.
            JobNotFound, ResultExpired: as `read_webhooks`.
        """
        self.read_webhooks(job_id, owner)
        match transitions.redeliver(self.connection, job_id, self.settings.max_queue_length):
            case "":
                raise problems.WebhookNotFound(f"There is no message about an end of the job {job_id}.", job_id=job_id)
            case "full":
                raise problems.QueueFull.of(scripts.WEBHOOKS, self.settings.max_queue_length)
        return self.read_webhooks(job_id, owner)

    # Lists

    def read_group(self, group_id: str, owner: str | None = "") -> dict[str, Any]:
        """Count the jobs of a group by status. Jobs that are no longer kept count as `expired`.

        Raises:
            GroupNotFound: there is no such group, or it belongs to another owner.
            ResultExpired: the group existed, but it is no longer kept.
        """
        total, statuses = queries.read_group(self.connection, group_id)
        # An admin sees every group that is kept, even if its owner's key is gone from the settings.
        is_visible = owner is None and total is not None
        if not is_visible and not any(self.ids.is_ours(group_id, f"group:{name}") for name in self._owners(owner)):
            if total is not None or not statuses or owner not in (None, ""):
                raise problems.GroupNotFound(f"No group has the id {group_id!r}.", group_id=group_id)
            total = len(statuses)  # RQ's own Group made it
        if total is None:
            raise problems.ResultExpired(f"The group {group_id} is no longer kept.", group_id=group_id)
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
            cursor: the cursor that the page before gave.
            owner: name of the owner; None for all owners.

        Raises:
            InvalidRequest: the cursor is not valid.
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
        """Read the status of the job. One round trip; payload and result are not read.

        Args:
            job_id: what `enqueue` returned.
            owner: name of the owner that the job must have; None for any owner.

        Raises:
            JobNotFound: there is no such job, or it belongs to another owner.
            ResultExpired: the job existed, but it is no longer kept.
        """
        values: Any = self.connection.hmget(scripts.job_key(job_id), STATUS_FIELDS)
        return make_status(self.connection, job_id, self._decode(job_id, owner, values))

    def _owners(self, owner: str | None) -> list[str]:
        """The owners whose ids to accept; for None all owners that the settings know."""
        return ["", *(key.name for key in self.settings.api_keys)] if owner is None else [owner]

    def _decode(self, job_id: str, owner: str | None, values: list[bytes | None]) -> dict[str, str | None]:
        """The fields of the job's hash by name, if the job exists and belongs to the owner.

        Raises:
            JobNotFound, ResultExpired: as `read_status`.
        """
        fields = decode_fields(values)
        # A stock worker's late heartbeat can leave a hash with nothing else in it (rq#1450).
        exists = fields["status"] is not None and fields["created_at"] is not None
        if exists and owner in (None, fields["owner"] or ""):
            return fields
        if not exists and any(self.ids.is_ours(job_id, name) for name in self._owners(owner)):
            raise problems.ResultExpired(f"The job {job_id} is no longer kept.", job_id=job_id)
        raise problems.JobNotFound(f"No job has the id {job_id!r}.", job_id=job_id)

    # Result

    def read_payload(self, job_id: str, owner: str | None = "") -> bytes:
        """Read the job's payload, as JSON text.

        Raises:
            PayloadNotFound: the job was enqueued with RQ itself, and its arguments are not one JSON value.
            JobNotFound, ResultExpired: as `read_status`.
        """
        self.read_status(job_id, owner)
        with self.connection.pipeline(transaction=False) as pipeline:
            for name in ("data", "owner"):
                pipeline.hget(scripts.job_key(job_id), name)
            data, stored_owner = pipeline.execute()
        # The stored text may be longer than the payload was: JSON may escape characters, and there is a call around it.
        most = 6 * self.settings.max_payload_bytes + 10_000
        text = read_stored_payload(data, most, is_ours=stored_owner is not None)
        if text is None:
            raise problems.PayloadNotFound(f"The job {job_id} has no payload that is JSON.", job_id=job_id)
        return text

    def read_result(self, job_id: str, owner: str | None = "") -> bytes:
        """Read the job's return value, as JSON text.

        Raises:
            ResultNotReady: the job has not ended.
            JobFailed, JobStopped, JobCanceled: it ended without a result.
            JobNotFound, ResultExpired: as `read_status`.
        """
        fields, text = self._read_result(job_id, owner)
        if text is not None:
            return text
        status = fields["status"]
        members: dict[str, Any] = {"job_id": job_id, "job_status": status}
        if status == "finished":  # the result expired before the hash
            raise problems.ResultExpired(f"The result of the job {job_id} is no longer kept.", job_id=job_id)
        if status not in TERMINAL:
            raise problems.ResultNotReady(f"The job is {status}.", retry_after=POLL_AGAIN, **members)
        error = make_status(self.connection, job_id, fields).error
        members["error"] = error and error.model_dump()
        problem = {"failed": problems.JobFailed, "stopped": problems.JobStopped, "canceled": problems.JobCanceled}
        raise problem[status or ""](f"The job was {status}." if status != "failed" else "The job failed.", **members)

    def _read_result(self, job_id: str, owner: str | None) -> tuple[dict[str, str | None], bytes | None]:
        """The fields of STATUS_FIELDS, and the return value if the job has finished. One round trip."""
        with self.connection.pipeline(transaction=False) as pipeline:
            pipeline.hmget(scripts.job_key(job_id), STATUS_FIELDS)
            pipeline.xrevrange(scripts.results_key(job_id), count=1)
            values, results = pipeline.execute()
        fields = self._decode(job_id, owner, values)
        if fields["status"] == "finished" and results:
            return fields, read_return_value(job_id, results[0][1])
        return fields, None

    def read_status_and_result(self, job_id: str, owner: str | None) -> tuple[StatusObject, bytes | None]:
        """The status of the job; and its return value as JSON text, if it has finished.

        Raises:
            JobFailed, ResultExpired: it finished, but there is no result to return.
            JobNotFound: as `read_status`.
        """
        fields, text = self._read_result(job_id, owner)
        if fields["status"] == "finished" and text is None:
            text = self.read_result(job_id, owner)
        return make_status(self.connection, job_id, fields), text
