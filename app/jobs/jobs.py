"""What can be done with jobs: enqueue, cancel, retry, list, read their status, read their result.

Knows neither Flask nor the environment: it takes the settings and the connection, and raises the `problems`.
"""

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic_core import from_json
from redis import Redis

from app.config import MAX_SECONDS, Settings
from app.core import queries as overviews
from app.core import transitions
from app.core.job_ids import JobIds
from app.core.transitions import TERMINAL
from app.job_function import JobFunction
from app.jobs import problems
from app.jobs.enqueue import (
    MOST_ERRORS,
    NOBODY,
    Options,
    Origin,
    choose_options,
    find_errors,
    make_fingerprint,
    own_fields,
    shared_fields,
)
from app.jobs.status import (
    STATUS_FIELDS,
    StatusObject,
    decode_fields,
    make_status_object,
    read_return_value,
    read_stored_payload,
)
from app.web.json_bodies import dump_json
from app.webhooks import delivery as webhooks

#: Seconds after which a client should ask again for a job that has not ended.
POLL_AGAIN = 1
#: Seconds after which a client should try again when the service could not do what it was asked.
TRY_AGAIN = 5
#: Seconds that an idempotency key is remembered at least.
KEY_TTL = 24 * 3600
#: Seconds that a group is kept, whatever becomes of its jobs: the longest delay and the longest TTL.
GROUP_TTL = 2 * MAX_SECONDS
#: Jobs that one page of a list looks at, at most, to find those that fit.
MOST_LOOKED_AT = 1000


def _encode_cursor(cursor: overviews.Cursor) -> str:
    text = " ".join(cursor).encode(errors="surrogateescape")
    return base64.urlsafe_b64encode(text).decode().rstrip("=")


def _decode_cursor(text: str) -> overviews.Cursor:
    with suppress(ValueError):
        decoded = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode(errors="surrogateescape")
        created, _, job_id = decoded.partition(" ")
        if re.fullmatch(r"[0-9]{1,17}", created) and job_id:
            return overviews.Cursor(created, job_id)
    error: problems.ErrorItem = {"loc": ["query", "cursor"], "msg": "It does not come from `next` of a page."}
    raise problems.InvalidRequest("The cursor is none of ours.", errors=[error])


class Receipt(NamedTuple):
    """What came of an enqueue: the status is None if it has to be looked up, since the job was there already."""

    job_id: str
    status: StatusObject | None
    #: the same request came before, with the same idempotency key
    is_replay: bool


class GroupReceipt(NamedTuple):
    """The jobs of a batch, in the order of its payloads."""

    group_id: str
    job_ids: list[str]
    is_replay: bool


class Jobs:
    """The jobs of one Redis."""

    def __init__(self, settings: Settings, connection: Redis, functions: Mapping[str, JobFunction]) -> None:
        self.settings = settings
        self.connection = connection
        self.functions = functions
        self.ids = JobIds(connection)

    # Enqueue

    def find_function(self, name: str) -> JobFunction:
        """The job function of this name.

        Raises:
            FunctionNotFound: there is none.
        """
        if name not in self.functions:
            known = sorted(self.functions)
            raise problems.FunctionNotFound(f"There is no job function {name!r}.", known=known)
        return self.functions[name]

    def enqueue(self, function: JobFunction, payload: bytes, asked: Options, origin: Origin = NOBODY) -> Receipt:
        """Enqueue a job.

        Args:
            function: what is to run.
            payload: JSON text, as strict as `want_json` wants it.
            asked: options of the request; those missing are the function's own defaults, or the settings'.
            origin: who asks. The same request again, with the same idempotency key, gets the job of the first one,
                whatever became of it.

        Raises:
            InvalidRequest: the payload does not fit the function.
            IdempotencyKeyReused: the key stands for another request.
            QueueFull: nothing was enqueued.
        """
        self._want_no_errors(function, find_errors(function, payload, ["body"]))
        self._want_webhook(asked)
        owner, key, _ = origin
        job_id = self.ids.derive(owner, key) if key else self.ids.new(owner)
        fingerprint = make_fingerprint(function, [payload], asked) if key else None
        options = choose_options(function, asked, self.settings)
        shared = shared_fields(function, options, origin, group=None)
        own = own_fields(function, payload, options)
        if fingerprint:
            own["fingerprint"] = fingerprint
        created = self._enqueue(options, {job_id: own}, shared, fingerprint, key_id=key and job_id, key_ttl=KEY_TTL)
        if created is None:
            # Without a key: this very request was sent to Redis twice, and did it the first time.
            return Receipt(job_id, None, is_replay=key is not None)
        enqueued_at = created.at if created.status == "queued" else None
        fields = {**shared, **own, "status": created.status, "enqueued_at": enqueued_at}
        return Receipt(job_id, make_status_object(self.connection, job_id, fields), is_replay=False)

    def enqueue_many(
        self, function: JobFunction, batch: bytes, asked: Options, origin: Origin = NOBODY
    ) -> GroupReceipt:
        """Enqueue a job for each payload of a batch, an array as JSON text; all or none, in one round trip.

        Raises:
            InvalidRequest: there is no payload, or there are too many, or some do not fit the function.
            IdempotencyKeyReused, QueueFull: as `enqueue`.
        """
        most = self.settings.max_batch
        values = from_json(batch)
        if not isinstance(values, list) or not 1 <= len(values) <= most:
            error: problems.ErrorItem = {"loc": ["body"], "msg": f"An array of 1 to {most} payloads is wanted."}
            raise problems.InvalidRequest("The body is no array of payloads, or of too many.", errors=[error])
        payloads = [dump_json(value) for value in values]
        del values  # which may take ten times as much memory as their text
        errors = [
            error for index, payload in enumerate(payloads) for error in find_errors(function, payload, ["body", index])
        ]
        self._want_no_errors(function, errors)
        self._want_webhook(asked)
        owner, key, _ = origin
        # An owner's name has no colon: a group's id is never taken for a job's.
        group_owner = f"group:{owner}"
        group = self.ids.derive(group_owner, key) if key else self.ids.new(group_owner)
        key_id = self.ids.derive(owner, key) if key else None  # as for a single job: a key stands for one request
        fingerprint = make_fingerprint(function, payloads, asked, is_batch=True) if key else None
        options = choose_options(function, asked, self.settings)
        job_ids = [
            self.ids.derive(owner, group, str(index)) if key else self.ids.new(owner) for index in range(len(payloads))
        ]
        own = {
            job_id: own_fields(function, payload, options) for job_id, payload in zip(job_ids, payloads, strict=True)
        }
        if fingerprint:
            own[job_ids[0]]["fingerprint"] = fingerprint
        shared = shared_fields(function, options, origin, group)
        kept = {"key_id": key_id, "key_ttl": GROUP_TTL, "group": group, "group_ttl": GROUP_TTL}
        created = self._enqueue(options, own, shared, fingerprint, **kept)
        return GroupReceipt(group, job_ids, is_replay=created is None and key is not None)

    def _want_webhook(self, asked: Options) -> None:
        """Let the request name a webhook, if it does; the delivery looks at its address once more."""
        if "webhook" not in asked:
            return
        try:
            if not self.settings.webhook_secrets:
                raise webhooks.Refused("this service has no webhooks: WEBHOOK_SECRETS is not set")
            webhooks.check_url(asked["webhook"], allow_private=self.settings.webhook_allow_private)
        except webhooks.Refused as refused:
            error: problems.ErrorItem = {"loc": ["query", "webhook"], "msg": f"{refused}"}
            raise problems.InvalidRequest("The webhook is not allowed.", errors=[error]) from None

    @staticmethod
    def _want_no_errors(function: JobFunction, errors: list[problems.ErrorItem]) -> None:
        if errors:
            raise problems.InvalidRequest(f"The payload does not fit {function.name}.", errors=errors[:MOST_ERRORS])

    def _enqueue(
        self,
        options: Options,
        jobs: Mapping[str, Mapping[str, transitions.Argument]],
        shared: Mapping[str, transitions.Argument],
        fingerprint: str | None,
        **kept: Any,
    ) -> transitions.Created | None:
        """Create the jobs; None if they are there already, and come from the same request."""
        enqueued = transitions.enqueue(
            self.connection,
            options["queue"],
            jobs,
            shared,
            limit=self.settings.max_queue_length,
            at_front=options.get("at_front", False),
            ttl=options.get("ttl"),
            delay=options.get("delay"),
            at=options["at"].timestamp() if "at" in options else None,
            fingerprint=fingerprint,
            **kept,
        )
        match enqueued:
            case transitions.Full():
                raise self._full(options["queue"])
            case transitions.Exists(known) if fingerprint is not None and known != fingerprint:
                raise problems.IdempotencyKeyReused("This Idempotency-Key was used for another request.")
            case transitions.Exists():
                return None
        return enqueued

    def _full(self, queue: str | None) -> problems.QueueFull:
        detail = f"{self.settings.max_queue_length} jobs wait in the queue {queue}, or almost."
        return problems.QueueFull(detail, queue=queue, retry_after=TRY_AGAIN)

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
            raise self._full(self.read_status(job_id, owner)["queue"])
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
        deliveries = overviews.read_deliveries(self.connection, job_id)
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
                "tries": list(webhooks.read_tries(found.tries)),
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
                raise self._full(transitions.WEBHOOKS)
        return self.read_webhooks(job_id, owner)

    # Lists

    def read_group(self, group_id: str, owner: str | None = "") -> dict[str, Any]:
        """How many jobs of a group there are in each status; `expired` are those that are not kept any more.

        Raises:
            GroupNotFound: there is no such group, or it is somebody else's.
            ResultExpired: it existed, and is not kept any more.
        """
        total, statuses = overviews.read_group(self.connection, group_id)
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
        page = overviews.list_jobs(
            self.connection,
            owner,
            STATUS_FIELDS,
            **filters,
            limit=limit,
            most=MOST_LOOKED_AT,
            cursor=_decode_cursor(cursor) if cursor else None,
        )
        listed = [
            make_status_object(self.connection, job_id, decode_fields(values), is_listed=True)
            for job_id, values in page.jobs
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
        values: Any = self.connection.hmget(transitions.job_key(job_id), STATUS_FIELDS)
        return make_status_object(self.connection, job_id, self._decode(job_id, owner, values))

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
                pipeline.hget(transitions.job_key(job_id), name)
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
        members["error"] = make_status_object(self.connection, job_id, fields)["error"]
        problem = {"failed": problems.JobFailed, "stopped": problems.JobStopped, "canceled": problems.JobCanceled}
        raise problem[status or ""](f"The job was {status}." if status != "failed" else "The job failed.", **members)

    def _read_result(self, job_id: str, owner: str | None) -> tuple[dict[str, str | None], bytes | None]:
        """The fields of the job's hash for its status, and its return value if it has finished; in one round trip."""
        with self.connection.pipeline(transaction=False) as pipeline:
            pipeline.hmget(transitions.job_key(job_id), STATUS_FIELDS)
            pipeline.xrevrange(transitions.results_key(job_id), count=1)
            values, results = pipeline.execute()
        fields = self._decode(job_id, owner, values)
        if fields["status"] == "finished" and results:
            return fields, read_return_value(job_id, results[0][1])
        return fields, None

    def read_status_and_result(self, job_id: str, owner: str | None) -> StatusObject:
        """The status, with `result`, as JSON data, if the job has finished.

        Raises:
            JobFailed, ResultExpired: it finished, but there is no result to be told.
            JobNotFound: as `read_status`.
        """
        fields, text = self._read_result(job_id, owner)
        status = make_status_object(self.connection, job_id, fields)
        if fields["status"] == "finished":
            status["result"] = json.loads(text if text is not None else self.read_result(job_id, owner))
        return status
