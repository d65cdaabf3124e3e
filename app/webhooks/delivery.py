"""Deliver one message to a webhook (Standard Webhooks 1.0): one signed try.

A delivery is a job on a queue of its own. The script that ends a job enqueues it, so that no end goes without its
message. The delivery names `app.webhooks.deliver`; a work-horse runs `DELIVERY` for this name. Clients cannot enqueue
it, since it is in no list of job functions.
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

from redis import Redis
from rq import get_current_job
from rq.timeouts import JobTimeoutException
from standardwebhooks import Webhook

from app.config import get_settings
from app.core.scripts import MESSAGES_KEPT, deliveries_key, tries_key
from app.job_function import GiveUp, JobFunction, TryAgain
from app.jobs.status import make_status
from app.webhooks.addresses import Refused, check_url

#: Seconds that a receiver may take to accept the connection, and again for each part of its answer.
RECEIVER_TIMEOUT = 10.0
#: Longest pause, in seconds, that a receiver's `Retry-After` may ask for.
LONGEST_PAUSE = 24 * 3600


class Answer(NamedTuple):
    """The answer of a receiver; `retry_after` in seconds, if it has that header."""

    status: int
    retry_after: float | None


def _read_retry_after(text: str | None) -> float | None:
    """The seconds that a `Retry-After` header asks for, as a number or as a date (RFC 9110); None if it is neither."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text.strip()):
        return min(float(text), LONGEST_PAUSE)
    try:
        until = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):  # OverflowError: a number has too many digits
        return None
    return min(max(0.0, until - time.time()), LONGEST_PAUSE)


def _post(url: str, body: bytes, headers: dict[str, str], *, allow_private: bool) -> Answer:
    """POST to the URL. Resolve its host once, check these addresses, and connect to no others.

    A second look-up could give an address that was not checked.

    Raises:
        Refused, OSError, HTTPException: there was no answer.
    """
    scheme, host, port, path, addresses = check_url(url, allow_private=allow_private)
    connection: HTTPConnection
    if scheme == "https":
        connection = HTTPSConnection(host, port, timeout=RECEIVER_TIMEOUT, context=ssl.create_default_context())
    else:
        connection = HTTPConnection(host, port, timeout=RECEIVER_TIMEOUT)
    # http.client's hook for tests and proxies. TLS and the header `Host` still use the name of the host.
    connection._create_connection = lambda *_, **__: _connect(addresses, port)  # type: ignore[attr-defined]
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        return Answer(answer.status, _read_retry_after(answer.headers["Retry-After"]))
    finally:
        connection.close()


def _connect(addresses: list[str], port: int) -> socket.socket:
    """Connect to the first of the addresses that answers."""
    *others, last = addresses
    for address in others:
        with suppress(OSError):
            return socket.create_connection((address, port), RECEIVER_TIMEOUT)
    return socket.create_connection((last, port), RECEIVER_TIMEOUT)


def make_body(connection: Redis, payload: dict[str, Any]) -> bytes:
    """Make the body of the message from the fields that the job had at its end, so that it is the same at each try."""
    fields = {**payload["fields"], "status": payload["status"]}
    data = make_status(connection, payload["job_id"], fields, is_listed=True).model_dump(mode="json")
    event = {"type": f"job.{payload['status']}", "timestamp": data["ended_at"], "data": data}
    return json.dumps(event, separators=(",", ":")).encode()


def sign(secrets: tuple[str, ...], webhook_id: str, now: datetime, body: bytes) -> dict[str, str]:
    """Make the headers of Standard Webhooks. Each secret signs, so that a new secret can replace an old one."""
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(webhook_id, now, body.decode()) for secret in secrets),
    }


def deliver(payload: dict[str, Any]) -> dict[str, Any]:
    """Try to deliver the message once, and add the try to its log.

    Returns:
        The status code of the receiver's answer, as `status_code`.

    Raises:
        TryAgain: the receiver did not accept it.
        GiveUp: the receiver is gone for good (410).
    """
    settings, job, now = get_settings(), get_current_job(), datetime.now(UTC)
    assert job
    body = make_body(job.connection, payload)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "background-jobs-webhooks",
        **sign(settings.webhook_secrets, job.id, now, body),
    }
    attempt: dict[str, Any] = {"at": now.isoformat().replace("+00:00", "Z"), "status_code": None, "error": None}
    answer = None
    try:
        answer = _post(payload["url"], body, headers, allow_private=settings.webhook_allow_private)
        attempt["status_code"] = answer.status
    except (Refused, OSError, HTTPException, JobTimeoutException) as error:
        attempt["error"] = f"{type(error).__name__}: {error}"[:200]
    attempt["seconds"] = round((datetime.now(UTC) - now) / timedelta(seconds=1), 3)
    is_delivered = answer is not None and 200 <= answer.status < 300
    _log_try(job.connection, payload["job_id"], job.id, attempt, settings.result_ttl if is_delivered else MESSAGES_KEPT)
    if answer and is_delivered:
        return {"status_code": answer.status}
    if answer and answer.status == 410:
        raise GiveUp("The receiver is gone: 410.")
    reason = f"It answered {answer.status}." if answer else f"There was no answer: {attempt['error']}."
    raise TryAgain(reason, after=answer.retry_after if answer else None)


def _log_try(connection: Redis, job_id: str, webhook_id: str, attempt: dict[str, Any], ttl: int) -> None:
    with connection.pipeline(transaction=False) as pipeline:
        pipeline.rpush(tries_key(webhook_id), json.dumps(attempt))
        for key in (tries_key(webhook_id), deliveries_key(job_id)):
            pipeline.expire(key, ttl)
        pipeline.execute()


#: The function that a work-horse runs for a delivery.
DELIVERY = JobFunction("deliver_webhook", deliver, None, {}, inspect.signature(deliver))
