"""Webhooks (Standard Webhooks 1.0): who may be told, and how one delivery is tried.

A delivery is a job on a queue of its own, enqueued by the very script that ends the job it tells of. It names this
module's `deliver`, which is no job function that clients can enqueue.
"""

import inspect
import json
import re
import socket
import ssl
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple

from rq import get_current_job
from rq.timeouts import JobTimeoutException
from standardwebhooks import Webhook

from app.config import get_settings
from app.core.scripts import MESSAGES_KEPT, deliveries_key, tries_key
from app.job_function import GiveUp, JobFunction, TryAgain
from app.jobs.status import make_status
from app.redis_resc import redis_conn
from app.webhooks.addresses import Refused, check_url

#: Seconds that a receiver may take for each of: connection, each part of its answer.
PATIENCE = 10.0
#: Longest pause, in seconds, that a receiver's `Retry-After` may ask for.
LONGEST_PAUSE = 24 * 3600


class Answer(NamedTuple):
    """What a receiver said."""

    status: int
    retry_after: float | None


def _read_retry_after(text: str | None) -> float | None:
    """Seconds, from a number of them or from a date (RFC 9110)."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return min(float(text), LONGEST_PAUSE)
    try:
        until = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):  # the latter of numbers with many digits
        return None
    return min(max(0.0, until - time.time()), LONGEST_PAUSE)


def _post(url: str, body: bytes, headers: dict[str, str], *, allow_private: bool) -> Answer:
    """POST to an address that was checked: the name is resolved once, and what it resolved to is dialled.

    Raises:
        Refused, OSError, HTTPException: there was no answer.
    """
    scheme, host, port, path, addresses = check_url(url, allow_private=allow_private)
    connection: HTTPConnection
    if scheme == "https":
        connection = HTTPSConnection(host, port, timeout=PATIENCE, context=ssl.create_default_context())
    else:
        connection = HTTPConnection(host, port, timeout=PATIENCE)
    # http.client's way in for tests and proxies: the host stays the name that TLS checks and `Host` says.
    connection._create_connection = lambda *_, **__: _dial(addresses, port)  # type: ignore[attr-defined]
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, _read_retry_after(answer.headers["Retry-After"]))
    finally:
        connection.close()


def _dial(addresses: list[str], port: int) -> socket.socket:
    *others, last = addresses
    for address in others:
        with suppress(OSError):
            return socket.create_connection((address, port), PATIENCE)
    return socket.create_connection((last, port), PATIENCE)


def make_body(payload: dict[str, Any]) -> bytes:
    """What is sent, the same at each try: the script sent the fields of the job's hash as they were when it ended."""
    fields = {**payload["fields"], "status": payload["status"]}
    data = make_status(redis_conn, payload["job_id"], fields, is_listed=True).model_dump(mode="json")
    event = {"type": f"job.{payload['status']}", "timestamp": data["ended_at"], "data": data}
    return json.dumps(event, separators=(",", ":")).encode()


def sign(secrets: tuple[str, ...], webhook_id: str, now: datetime, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks; several secrets, while one replaces another, are several signatures."""
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(webhook_id, now, body.decode()) for secret in secrets),
    }


def deliver(payload: dict[str, Any]) -> dict[str, Any]:
    """Try once; the log of tries has what came of it.

    Raises:
        TryAgain: the receiver did not take it.
        GiveUp: it never will (410).
    """
    settings, job, now = get_settings(), get_current_job(), datetime.now(UTC)
    assert job
    body = make_body(payload)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "background-jobs-webhooks",
        **sign(settings.webhook_secrets, job.id, now, body),
    }
    tried: dict[str, Any] = {"at": now.isoformat().replace("+00:00", "Z"), "status_code": None, "error": None}
    answer = None
    try:
        answer = _post(payload["url"], body, headers, allow_private=settings.webhook_allow_private)
        tried["status_code"] = answer.status
    except (Refused, OSError, HTTPException, JobTimeoutException) as error:
        tried["error"] = f"{type(error).__name__}: {error}"[:200]
    tried["seconds"] = round((datetime.now(UTC) - now) / timedelta(seconds=1), 3)
    is_delivered = answer is not None and 200 <= answer.status < 300
    _log(payload["job_id"], job.id, tried, settings.result_ttl if is_delivered else MESSAGES_KEPT)
    if answer and is_delivered:
        return {"status_code": answer.status}
    if answer and answer.status == 410:
        raise GiveUp("The receiver is gone: 410.")
    what = f"It answered {answer.status}." if answer else f"There was no answer: {tried['error']}."
    raise TryAgain(what, after=answer.retry_after if answer else None)


def _log(job_id: str, webhook_id: str, tried: dict[str, Any], kept: int) -> None:
    with redis_conn.pipeline(transaction=False) as pipeline:
        pipeline.rpush(tries_key(webhook_id), json.dumps(tried))
        for key in (tries_key(webhook_id), deliveries_key(job_id)):
            pipeline.expire(key, kept)
        pipeline.execute()


#: What a work-horse runs for a delivery. It is in no list of job functions.
DELIVERY = JobFunction("deliver_webhook", deliver, None, {}, inspect.signature(deliver))
