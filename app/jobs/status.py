"""What a job's hash in Redis says, as clients are told it: the status object, and the return value as JSON."""

import base64
import binascii
import re
import zlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from redis import Redis
from rq.exceptions import DeserializationError
from rq.job import Job
from rq.serializers import JSONSerializer

from app.core.transitions import UNREADABLE
from app.jobs import problems
from app.web import schemas

#: What is read of the hash for it; the first five in the order that `list.lua` wants.
STATUS_FIELDS = (
    "status", "function", "origin", "owner", "created_at", "enqueued_at", "started_at", "ended_at", "progress",
    "retries_left", "error",
)  # fmt: skip

#: Where to go on with a job.
LINKS = {"check_status": "/check_status", "get_result": "/get_result", "cancel": "/cancel"}

#: How a call of a job function is stored.
_CALL = re.compile(rb'\["[^"\\]*", ?null, ?\[(.*)\], ?\{\}\]', re.DOTALL)

StatusObject = dict[str, Any]


def _read_object(stored: str | None, model: type[BaseModel]) -> dict[str, Any] | None:
    """JSON of a job's hash, if it is what we write there: anybody may have written to Redis."""
    try:
        return model.model_validate_json(stored).model_dump() if stored else None
    except ValidationError:
        return None


def decode_fields(values: list[bytes | None]) -> dict[str, str | None]:
    """The values of STATUS_FIELDS as text, by name."""
    return {
        name: value.decode(errors="replace") if value else None
        for name, value in zip(STATUS_FIELDS, values, strict=True)
    }


def make_status_object(
    connection: Redis, job_id: str, fields: Mapping[str, Any], *, is_listed: bool = False
) -> StatusObject:
    """The status object; in a list, without what only another look at Redis would tell of a job of RQ's own."""
    status = fields["status"]
    stored, retries_left = fields.get("error"), str(fields.get("retries_left"))
    return {
        "job_id": job_id,
        "job_status": status,
        "function": fields.get("function") or (None if is_listed else _function_of_foreign_job(connection, job_id)),
        "queue": fields.get("origin") or None,
        "enqueued_at": fields.get("enqueued_at") or None,
        "started_at": fields.get("started_at") or None,
        "ended_at": fields.get("ended_at") or None,
        "progress": _read_object(fields.get("progress"), schemas.JobProgress),
        "retries_left": int(retries_left) if re.fullmatch(r"[0-9]{1,9}", retries_left) else None,
        "error": _error(connection, job_id, stored, is_listed) if status in ("failed", "stopped") else None,
        "links": {name: f"{path}?job_id={job_id}" for name, path in LINKS.items()},
    }


def _foreign_job(connection: Redis, job_id: str) -> Job | None:
    """The job as RQ sees it, for what only RQ's own code wrote: None if it cannot be read."""
    try:
        return Job.fetch(job_id, connection=connection, serializer=JSONSerializer)
    except UNREADABLE:
        return None


def _function_of_foreign_job(connection: Redis, job_id: str) -> str | None:
    job = _foreign_job(connection, job_id)
    try:
        return (job.func_name or "").rpartition(".")[2] or None if job else None
    except (DeserializationError, AttributeError):  # AttributeError: the function's name is no text
        return None


def _error(connection: Redis, job_id: str, stored: str | None, is_listed: bool) -> dict[str, Any] | None:
    error = _read_object(stored, schemas.JobError)
    if error or is_listed:
        return error
    # A stock worker ran it: the last line of the traceback is the exception's class and text.
    job = _foreign_job(connection, job_id)
    result = job.latest_result() if job else None
    lines = ((result.exc_string if result else None) or "").strip().splitlines()
    kind, _, message = lines[-1].partition(": ") if lines else ("", "", "")
    return {"type": kind.rpartition(".")[2] or "Error", "message": message}


def read_stored_payload(data: bytes | None, limit: int, *, is_ours: bool) -> bytes | None:
    """The payload, as JSON text; None if the job's call is none of one payload, or has more bytes."""
    try:
        call = _CALL.fullmatch(zlib.decompressobj().decompress(data or b"", limit))
        if call and not is_ours:
            from_json(call[1], allow_inf_nan=False)  # RQ may have stored two arguments there, or NaN
    except (zlib.error, ValueError):
        return None
    return call[1] if call else None


def read_return_value(job_id: str, entry: Mapping[bytes, bytes]) -> bytes:
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
