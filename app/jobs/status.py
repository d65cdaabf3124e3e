"""The status object: what clients see of a job, made from the fields of the job's hash in Redis.

The models below are its only definition. The OpenAPI document and its examples are made from them, too.
"""

import base64
import binascii
import re
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from pydantic_core import from_json
from redis import Redis
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.serializers import JSONSerializer

from app.core.scripts import UNREADABLE
from app.jobs import problems

#: The fields of a job's hash that the status object is made from. `list.lua` wants the first five in this order.
STATUS_FIELDS = (
    "status", "function", "origin", "owner", "created_at", "enqueued_at", "started_at", "ended_at", "progress",
    "retries_left", "error",
)  # fmt: skip

#: A stored call of a job function with one payload, as `own_fields` writes it and RQ's JSONSerializer does.
_CALL = re.compile(rb'\["[^"\\]*", ?null, ?\[(.*)\], ?\{\}\]', re.DOTALL)

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, description="RFC 3339, in UTC")]


class JobError(BaseModel):
    """Why a job failed."""

    type: str = Field(description="class of the exception", examples=["ValueError"])
    message: str = Field(description="text of the exception; the traceback is in the service's log")


class JobProgress(BaseModel):
    """How far a job is, as its function reports it."""

    done: FiniteFloat | int
    total: FiniteFloat | int
    message: str


class JobLinks(BaseModel):
    """Where to go on with this job."""

    check_status: str
    get_result: str
    cancel: str


class StatusObject(BaseModel):
    """The status of a job. The payload is never in it."""

    job_id: str
    job_status: str = Field(
        description="RQ's word: queued, started, deferred, scheduled; terminal: finished, failed, stopped, canceled",
        examples=["started"],
    )
    function: str | None = Field(description="name of the job function")
    queue: str | None
    enqueued_at: Time | None
    started_at: Time | None
    ended_at: Time | None
    progress: JobProgress | None
    retries_left: int | None = Field(description="how often it may be run again if it raises")
    error: JobError | None = Field(description="once the job has failed")
    links: JobLinks


class StatusWithResult(StatusObject):
    """The status of a job that the request waited for, with its return value if it finished in time.

    It only describes the answer: `json_response` adds the stored return value as text.
    """

    result: Any = Field(default=None, description="the function's return value")


def _make_links(job_id: str) -> JobLinks:
    return JobLinks(
        check_status=f"/check_status?job_id={job_id}",
        get_result=f"/get_result?job_id={job_id}",
        cancel=f"/cancel?job_id={job_id}",
    )


EXAMPLE_ID = "0b5f2f7e-3c1d-4a9b-8e57-1f6f3c9d2a10"
#: The example of a running job in the OpenAPI document.
EXAMPLE = StatusObject(
    job_id=EXAMPLE_ID,
    job_status="started",
    function="some_long_function",
    queue="default",
    enqueued_at="2026-11-23T10:00:00.123456Z",
    started_at="2026-11-23T10:00:00.125000Z",
    ended_at=None,
    progress=JobProgress(done=3, total=10, message="step 3"),
    retries_left=None,
    error=None,
    links=_make_links(EXAMPLE_ID),
)

Model = TypeVar("Model", bound=BaseModel)


def _read_object(stored: str | None, model: type[Model]) -> Model | None:
    """Read a JSON object from a job's hash; None if it does not fit, since anybody may have written to Redis."""
    try:
        return model.model_validate_json(stored) if stored else None
    except ValidationError:
        return None


def decode_fields(values: list[bytes | None]) -> dict[str, str | None]:
    """The values of STATUS_FIELDS as text, by name."""
    return {
        name: value.decode(errors="replace") if value else None
        for name, value in zip(STATUS_FIELDS, values, strict=True)
    }


def _without_surrogates(text: str | None) -> str | None:
    """A text without lone surrogates, which UTF-8 cannot encode: anybody may have written ids and names to Redis."""
    if text is None or text.isascii():
        return text
    return text.encode(errors="replace").decode()


def make_status(connection: Redis, job_id: str, fields: Mapping[str, Any], *, is_listed: bool = False) -> StatusObject:
    """Make the status object of a job.

    Args:
        connection: the Redis that has the job.
        job_id: its id.
        fields: the values of STATUS_FIELDS by name; empty and missing ones are the same.
        is_listed: leave out what needs another round trip to Redis. Only jobs of RQ's own need one.
    """
    status = fields["status"]
    stored, retries_left = fields.get("error"), str(fields.get("retries_left"))
    function = fields.get("function") or (None if is_listed else _read_foreign_function(connection, job_id))
    shown_id = _without_surrogates(job_id) or ""
    return StatusObject(
        job_id=shown_id,
        job_status=status or "",
        function=_without_surrogates(function),
        queue=fields.get("origin") or None,
        enqueued_at=fields.get("enqueued_at") or None,
        started_at=fields.get("started_at") or None,
        ended_at=fields.get("ended_at") or None,
        progress=_read_object(fields.get("progress"), JobProgress),
        retries_left=int(retries_left) if re.fullmatch(r"[0-9]{1,9}", retries_left) else None,
        error=_read_error(connection, job_id, stored, is_listed) if status in ("failed", "stopped") else None,
        links=_make_links(shown_id),
    )


def _fetch_foreign_job(connection: Redis, job_id: str) -> Job | None:
    """Read a job that RQ's own code enqueued or ended; None if it cannot be read."""
    try:
        return Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
    except UNREADABLE:
        return None


def _read_foreign_function(connection: Redis, job_id: str) -> str | None:
    job = _fetch_foreign_job(connection, job_id)
    try:
        return (job.func_name or "").rpartition(".")[2] or None if job else None
    except (DeserializationError, AttributeError):  # AttributeError: the function's name is no text
        return None


def _read_error(connection: Redis, job_id: str, stored: str | None, is_listed: bool) -> JobError | None:
    error = _read_object(stored, JobError)
    if error or is_listed:
        return error
    # A stock worker ran it: the last line of the traceback is the exception's class and text.
    job = _fetch_foreign_job(connection, job_id)
    result = job.latest_result() if job else None
    lines = ((result.exc_string if result else None) or "").strip().splitlines()
    kind, _, message = lines[-1].partition(": ") if lines else ("", "", "")
    return JobError(type=kind.rpartition(".")[2] or "Error", message=message)


def read_stored_payload(data: bytes | None, limit: int, *, is_ours: bool) -> bytes | None:
    """The payload as JSON text; None if the stored call has no single payload, or more than `limit` bytes."""
    try:
        call = _CALL.fullmatch(zlib.decompressobj().decompress(data or b"", limit))
        if call and not is_ours:
            from_json(call[1], allow_inf_nan=False)  # RQ may have stored two arguments there, or NaN
    except (zlib.error, ValueError):
        return None
    return call[1] if call else None


def read_return_value(job_id: str, entry: Mapping[bytes, bytes]) -> bytes:
    """The return value as JSON text, from an entry of the job's results.

    Our worker stores strict JSON only and marks it (`is_json`). What a stock worker stored is checked here.

    Raises:
        JobFailed: a stock worker stored something that is not JSON.
    """
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
