"""The parts of a request that views read: JSON body, time to wait, idempotency key, and the jobs that it may see."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO

from flask import Response, after_this_request, current_app, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import RequestEntityTooLarge

from app.config import LARGE, Settings
from app.job_function import JobFunction
from app.jobs import problems
from app.jobs.enqueue import Enqueuer, Options, Origin
from app.jobs.jobs import Jobs
from app.jobs.problems import MOST_ERRORS
from app.jobs.waiting import Waiting
from app.web.auth import check_function, current_key
from app.web.json_bodies import check_json, has_more_values
from app.web.limits import ByteAllowance, limit_receive_time, yield_to_others
from app.web.metrics import count_wait
from app.web.request_ids import current_request_id
from app.webhooks.addresses import check_webhook


def current_jobs() -> Jobs:
    """The jobs of the present app."""
    jobs: Jobs = current_app.extensions["jobs"]
    return jobs


def current_enqueuer() -> Enqueuer:
    """The enqueuer of the present app."""
    enqueuer: Enqueuer = current_app.extensions["enqueuer"]
    return enqueuer


def current_settings() -> Settings:
    """The settings of the present app."""
    return current_jobs().settings


def current_waiting() -> Waiting:
    """The long polls and event streams of the present app."""
    waiting: Waiting = current_app.extensions["waiting"]
    return waiting


def refuse_repeated_options() -> None:
    """Refuse a query like `?queue=a&queue=b`: the client cannot know which value would count.

    Raises:
        InvalidRequest: the query has an option more than once.
    """
    if b"&" not in request.query_string:
        return
    errors: list[problems.ErrorItem] = [
        {"loc": ["query", name], "msg": "The option is given more than once."}
        for name, values in request.args.lists()
        if len(values) > 1
    ]
    if errors:
        raise problems.InvalidRequest("The query has an option more than once.", errors=errors[:MOST_ERRORS])


def find_function(name: str) -> JobFunction:
    """The job function of this name, if the key of the present request may use it.

    Raises:
        FunctionNotFound: there is none.
        Forbidden: the key may not use it.
    """
    function = current_enqueuer().find_function(name)
    check_function(name)
    return function


@contextmanager
def read_new_jobs(asked: Options) -> Iterator[tuple[bytes, Origin]]:
    """The body and the origin of a request that makes jobs, as long as the `with` block lasts.

    Args:
        asked: the options of the request. Their webhook is checked.

    Raises:
        InvalidRequest: the webhook is not allowed, or the header Idempotency-Key is malformed.
        UnsupportedMediaType, InvalidJson, BadRequest, RequestEntityTooLarge, PayloadTooLarge, TooManyRequests: as
            `read_json_body`.
    """
    settings = current_settings()
    with read_json_body(settings) as body:
        origin = Origin(current_key().name, _read_idempotency_key(), current_request_id())
        check_webhook(asked.get("webhook"), settings)
        yield body, origin


@contextmanager
def read_json_body(settings: Settings) -> Iterator[bytes]:
    """The body of the request, which is JSON text. Its bytes are counted until the end of the `with` block.

    Raises:
        UnsupportedMediaType: the header Content-Type does not say JSON.
        InvalidJson: it is not JSON.
        BadRequest: it did not arrive as a whole.
        RequestEntityTooLarge: it has more bytes than the settings allow.
        PayloadTooLarge: it has more values than the settings allow.
        TooManyRequests: the process holds too many large bodies, all in all or of this key.
    """
    if not request.is_json:
        given = request.mimetype or "none"
        raise problems.UnsupportedMediaType(f"The body must be JSON, with Content-Type application/json, not {given}.")
    limit, length = settings.max_payload_bytes, request.content_length
    if length is not None and length > limit:
        raise RequestEntityTooLarge
    # gunicorn accepts any coding before `chunked`, and decodes none of them.
    if length is None and (coding := request.headers.get("Transfer-Encoding", "chunked")).lower() != "chunked":
        raise problems.BadRequest(f"The body's Transfer-Encoding is {coding!r}; only chunked is known.")
    allowance = ByteAllowance()
    try:
        # If the length is not known, read one byte beyond the limit, to see whether the body is longer.
        body = _read(limit + 1 if length is None else length, allowance)
        if len(body) > limit:
            raise RequestEntityTooLarge
        if len(body) < (length or 0):  # gunicorn does not report a body that was cut short
            raise problems.BadRequest("The body is shorter than its Content-Length.")
        if len(body) > LARGE:
            yield_to_others()
        if has_more_values(body, most := settings.max_payload_values):
            detail = f"The body has more than {most} values."
            raise problems.PayloadTooLarge(detail, limit_bytes=limit, limit_values=most)
        check_json(body)
        if len(body) > LARGE:
            yield_to_others()
        yield body
    finally:
        allowance.give_back()


def _read(most: int, allowance: ByteAllowance) -> bytes:
    """Read at most `most` bytes of the body. Those after the first LARGE bytes are counted as they arrive."""
    # A request has no body if it has no length and the server does not mark the end of a body.
    if request.content_length is None and not request.environ.get("wsgi.input_terminated"):
        return b""
    stream = request.environ["wsgi.input"]  # werkzeug's own stream around it is slow
    try:
        with limit_receive_time(most):
            body: bytes = stream.read(min(most, LARGE))
            if LARGE <= len(body) < most:
                body = _read_on(stream, body, most, allowance)
    except (OSError, ParseException) as error:  # a time-out; or gunicorn found malformed chunks, or too many
        raise problems.BadRequest("The body could not be read to its end.") from error
    return body


def _read_on(stream: IO[bytes], begin: bytes, most: int, allowance: ByteAllowance) -> bytes:
    whole = BytesIO()  # to join a list of parts would need twice the memory
    size = whole.write(begin)
    while size < most:
        allowance.take(step := min(most - size, LARGE))
        if not (part := stream.read(step)):
            break
        size += whole.write(part)
    return whole.getvalue()


def _preferred_wait() -> float | None:
    """The seconds of `Prefer: wait=SECONDS` (RFC 7240). Other preferences are ignored."""
    given = request.environ.get("HTTP_PREFER")
    for preference in given.split(",") if given else ():
        if match := re.fullmatch(r'wait="?(\d{1,9})"?', preference.partition(";")[0].replace(" ", ""), re.IGNORECASE):
            return float(match[1])
    return None


def read_wait(asked: float | None) -> float:
    """The seconds that the request waits for a job's end: its option `wait`, or else its `Prefer: wait=SECONDS`.

    If the preference counts, the response says so (`Preference-Applied`).

    Args:
        asked: the option `wait` in seconds, if the request has it.
    """
    preferred = _preferred_wait() if asked is None else None
    wanted = asked if asked is not None else preferred
    seconds = min(wanted, current_settings().max_wait) if wanted else 0
    if preferred is not None:
        add_header("Preference-Applied", f"wait={seconds:.0f}")
    if seconds > 0:
        count_wait(request)
    return seconds


def add_header(name: str, value: str) -> None:
    """Add a header to the response of the present request, also if that is a problem."""

    @after_this_request
    def add(response: Response) -> Response:
        response.headers[name] = value
        return response


def _read_idempotency_key() -> str | None:
    """The `Idempotency-Key` of the request. A quoted key is the same key as a bare one.

    Source: draft-ietf-httpapi-idempotency-key-header, and RFC 8941 for the quoted form.

    Raises:
        InvalidRequest: it is not 1 to 255 visible characters.
    """
    given = request.headers.get("Idempotency-Key")
    if given is None:
        return None
    key = given
    if given.startswith('"'):
        quoted = re.fullmatch(r'"((?:[^"\\]|\\["\\])*)"', given)
        key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else ""
    # A repeated header arrives as one header with a comma, and the client cannot know which key would count.
    if not re.fullmatch(r"[!-~]{1,255}", key) or ("," in key and key is given):
        expected = "The key must be 1 to 255 visible characters. A key with a comma must be in quotes."
        error: problems.ErrorItem = {"loc": ["header", "Idempotency-Key"], "msg": expected}
        raise problems.InvalidRequest("The header Idempotency-Key is malformed.", errors=[error])
    return key


def visible_owner() -> str | None:
    """The owner whose jobs the present request may see and control; None for all owners (an admin key)."""
    key = current_key()
    return None if key.admin else key.name
