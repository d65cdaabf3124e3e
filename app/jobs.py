"""What can be done with a job: enqueue it, read its status, wait for its end, read its result.

Knows neither Flask nor the environment: it takes the settings and the connection, and raises the `problems`.
"""

import base64
import binascii
import json
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from queue import Empty
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from redis import Redis
from rq.exceptions import DeserializationError
from rq.job import Job, Retry
from rq.serializers import JSONSerializer

from app import problems, schemas, transitions
from app.config import Settings
from app.events import Bell, EventLog
from app.job_function import JobFunction
from app.job_ids import JobIds
from app.transitions import TERMINAL, UNREADABLE

#: Seconds after which a client should ask again for a job that has not ended.
POLL_AGAIN = 1
#: Seconds after which a client should try again when the service could not do what it was asked.
TRY_AGAIN = 5


_STATUS_FIELDS = (
    "status", "function", "origin", "enqueued_at", "started_at", "ended_at", "progress", "retries_left", "error",
    "owner", "created_at",
)  # fmt: skip

StatusObject = dict[str, Any]


def _read_object(stored: str | None, model: type[BaseModel]) -> dict[str, Any] | None:
    """JSON of a job's hash, if it is what we write there: anybody may have written to Redis."""
    try:
        return model.model_validate_json(stored).model_dump() if stored else None
    except ValidationError:
        return None


def _retry_pauses(retries: int) -> list[int]:
    """Seconds before each retry: 5, 20, 80, … up to an hour."""
    return [min(5 * 4**attempt, 3600) for attempt in range(retries)]


class Jobs:
    """The jobs of one Redis. One instance a process: it owns the event log's reader."""

    def __init__(
        self, settings: Settings, connection: Redis, functions: Mapping[str, JobFunction], events: EventLog
    ) -> None:
        self.settings = settings
        self.connection = connection
        self.functions = functions
        self.events = events
        self.ids = JobIds(connection)
        self._free_waits = threading.BoundedSemaphore(settings.max_waiting) if settings.max_waiting else None

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

    def enqueue(
        self, function: JobFunction, payload: Any, options: Mapping[str, Any], *, owner: str = "", wait: float = 0
    ) -> StatusObject:
        """Enqueue a job, and wait up to `wait` seconds for its end.

        Args:
            function: what is to run.
            payload: JSON data.
            options: of `queue`, `timeout`, `result_ttl`, `failure_ttl`, `ttl`, `at_front`, `retries`; those missing
                are the function's own defaults, or the settings'.
            owner: name of the API key that makes the job.
            wait: seconds.

        Returns:
            The status object; with `result`, if the job finished in time.

        Raises:
            InvalidRequest: the payload does not fit the function.
            QueueFull: nothing was enqueued.
        """
        try:
            function.validate(payload)
        except ValidationError as error:
            raise problems.InvalidRequest(
                f"The payload does not fit {function.name}.",
                errors=[{"loc": ["body", *item["loc"]], "msg": item["msg"]} for item in error.errors()],
            ) from None
        chosen = {**function.defaults, **{name: value for name, value in options.items() if value is not None}}
        queue = chosen.get("queue", self.settings.queues[0])
        job_id = self.ids.new(owner)
        job = self._make_job(job_id, queue, function, payload, chosen)
        fields = {**job.to_dict(), "function": function.name, "owner": owner}
        # Listening starts before the job can run, so that its end cannot be missed.
        with self.events.listen(job_id) if wait else nullcontext() as bell:
            enqueued = transitions.enqueue(
                self.connection,
                queue,
                job_id,
                fields,
                at_front=chosen.get("at_front", False),
                ttl=chosen.get("ttl"),
                limit=self.settings.max_queue_length,
            )
            if enqueued.outcome == "full":
                raise problems.QueueFull(
                    f"{self.settings.max_queue_length} jobs wait in the queue {queue}.",
                    queue=queue,
                    retry_after=TRY_AGAIN,
                )
            if bell is not None:
                return self._await_end(job_id, owner, bell, wait)
        if enqueued.outcome == "exists":  # this very request was sent twice, and did it the first time
            return self.read_status(job_id, owner)
        return self._status_object(job_id, {**fields, "status": "queued", "enqueued_at": enqueued.enqueued_at})

    def _make_job(
        self, job_id: str, queue: str, function: JobFunction, payload: Any, options: Mapping[str, Any]
    ) -> Job:
        job = Job.create(
            function.path,
            args=(payload,),
            connection=self.connection,
            serializer=JSONSerializer,
            id=job_id,
            origin=queue,
            # RQ's own description is the call with its arguments, and logs it: payloads do not belong there.
            description=function.name,
            timeout=options.get("timeout", self.settings.job_timeout),
            result_ttl=options.get("result_ttl", self.settings.result_ttl),
            failure_ttl=options.get("failure_ttl", self.settings.failure_ttl),
            ttl=options.get("ttl"),
        )
        if retries := options.get("retries"):
            retry = Retry(max=retries, interval=_retry_pauses(retries))
            job.retries_left, job.retry_intervals = retry.max, retry.intervals
        return job

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
        values: Any = self.connection.hmget(transitions.job_key(job_id), _STATUS_FIELDS)
        return self._status_object(job_id, self._decode(job_id, owner, values))

    def _decode(self, job_id: str, owner: str | None, values: list[bytes | None]) -> dict[str, str | None]:
        fields = {
            name: value.decode(errors="replace") if value else None
            for name, value in zip(_STATUS_FIELDS, values, strict=True)
        }
        # A stock worker's late heartbeat can leave a hash with nothing else in it (rq#1450).
        exists = fields["status"] is not None and fields["created_at"] is not None
        if exists and owner in (None, fields["owner"] or ""):
            return fields
        owners = ["", *(key.name for key in self.settings.api_keys)] if owner is None else [owner]
        if not exists and any(self.ids.is_ours(job_id, name) for name in owners):
            raise problems.ResultExpired(f"The job {job_id} is not kept any more.", job_id=job_id)
        raise problems.JobNotFound(f"No job has the id {job_id!r}.", job_id=job_id)

    def _status_object(self, job_id: str, fields: Mapping[str, Any]) -> StatusObject:
        status = fields["status"]
        retries_left = fields.get("retries_left")
        return {
            "job_id": job_id,
            "job_status": status,
            "function": fields.get("function") or self._function_of_foreign_job(job_id),
            "queue": fields.get("origin") or None,
            "enqueued_at": fields.get("enqueued_at") or None,
            "started_at": fields.get("started_at") or None,
            "ended_at": fields.get("ended_at") or None,
            "progress": _read_object(fields.get("progress"), schemas.JobProgress),
            "retries_left": int(str(retries_left)) if str(retries_left).isdecimal() else None,
            "error": self._error(job_id, fields.get("error")) if status in ("failed", "stopped") else None,
            "links": {
                "check_status": f"/check_status?job_id={job_id}",
                "get_result": f"/get_result?job_id={job_id}",
            },
        }

    def _foreign_job(self, job_id: str) -> Job | None:
        """The job as RQ sees it, for what only RQ's own code wrote: None if it cannot be read."""
        try:
            return Job.fetch(job_id, connection=self.connection, serializer=JSONSerializer)
        except UNREADABLE:
            return None

    def _function_of_foreign_job(self, job_id: str) -> str | None:
        job = self._foreign_job(job_id)
        try:
            return (job.func_name or "").rpartition(".")[2] or None if job else None
        except (DeserializationError, AttributeError):  # AttributeError: the function's name is no text
            return None

    def _error(self, job_id: str, stored: str | None) -> dict[str, Any]:
        if error := _read_object(stored, schemas.JobError):
            return error
        # A stock worker ran it: the last line of the traceback is the exception's class and text.
        job = self._foreign_job(job_id)
        result = job.latest_result() if job else None
        lines = ((result.exc_string if result else None) or "").strip().splitlines()
        kind, _, message = lines[-1].partition(": ") if lines else ("", "", "")
        return {"type": kind.rpartition(".")[2] or "Error", "message": message}

    # Wait

    def wait(self, job_id: str, seconds: float, owner: str | None = "") -> StatusObject:
        """The status of the job once it is terminal, at the latest after so many seconds."""
        if seconds <= 0:
            return self.read_status(job_id, owner)
        with self.events.listen(job_id) as bell:
            return self._await_end(job_id, owner, bell, seconds)

    def _await_end(self, job_id: str, owner: str | None, bell: Bell, seconds: float) -> StatusObject:
        """Look at the job, and look again when its events say that it ended.

        The job itself is looked at now and then without an event too: a stock worker's jobs have none, and a `ttl`
        that runs out is nobody's transition. The looks grow rarer, so that long waits cost little.
        """
        start = time.monotonic()
        deadline = start + seconds
        if self._free_waits is None or not self._free_waits.acquire(blocking=False):
            return self.read_status(job_id, owner)
        try:
            while True:
                status = self.read_status(job_id, owner)
                now = time.monotonic()
                if status["job_status"] in TERMINAL or now >= deadline:
                    return status
                next_look = min(deadline, now + min(max(0.25, (now - start) / 2), 5))
                while (left := next_look - time.monotonic()) > 0:
                    try:
                        if bell.get(timeout=left) in TERMINAL:
                            break
                    except Empty:
                        break
        finally:
            self._free_waits.release()

    # Result

    def read_result(self, job_id: str, owner: str | None = "") -> bytes:
        """The job's return value, as JSON text.

        Raises:
            ResultNotReady: the job has not ended.
            JobFailed, JobStopped, JobCanceled: it ended without a result.
            ResultExpired, JobNotFound: as `read_status`.
        """
        with self.connection.pipeline() as pipeline:
            pipeline.hmget(transitions.job_key(job_id), _STATUS_FIELDS)
            pipeline.xrevrange(transitions.results_key(job_id), count=1)
            values, results = pipeline.execute()
        fields = self._decode(job_id, owner, values)
        status = fields["status"]
        if status == "finished" and results:
            return self._result_text(job_id, results[0][1])
        members: dict[str, Any] = {"job_id": job_id, "job_status": status}
        if status == "finished":  # its hash outlived its result
            raise problems.ResultExpired(f"The result of the job {job_id} is not kept any more.", job_id=job_id)
        if status not in TERMINAL:
            raise problems.ResultNotReady(f"The job is {status}.", retry_after=POLL_AGAIN, **members)
        members["error"] = self._status_object(job_id, fields)["error"]
        problem = {"failed": problems.JobFailed, "stopped": problems.JobStopped, "canceled": problems.JobCanceled}
        raise problem[status or ""](f"The job was {status}." if status != "failed" else "The job failed.", **members)

    def read_result_value(self, job_id: str, owner: str | None = "") -> Any:
        """The job's return value, as JSON data; raises as `read_result`."""
        return json.loads(self.read_result(job_id, owner))

    def _result_text(self, job_id: str, entry: Mapping[bytes, bytes]) -> bytes:
        """The value as it was stored. Our worker stores strict JSON only; what a stock worker stored is checked."""
        encoded = entry.get(b"return_value")
        if encoded is None:
            return b"null"
        try:
            text = base64.b64decode(encoded, validate=True)
            if b"is_json" not in entry:
                from_json(text, allow_inf_nan=False)
        except (ValueError, binascii.Error):
            raise problems.JobFailed(
                "The job finished, but what it returned is not JSON.",
                job_id=job_id,
                job_status="finished",
                error={"type": "ValueError", "message": "The return value is not JSON."},
            ) from None
        return text
