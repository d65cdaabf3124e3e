"""What routes read from a request: the payload, how long to wait, the idempotency key, whose jobs may be seen."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO

from flask import Response, after_this_request, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import RequestEntityTooLarge

from app.config import Settings
from app.jobs import problems
from app.jobs.enqueue import LARGE, Origin
from app.web.auth import current_key
from app.web.json_bodies import has_more_values, want_json
from app.web.limits import Room, give_way, limited_time
from app.web.metrics import note_wait
from app.web.request_ids import current_request_id


@contextmanager
def received_body(settings: Settings) -> Iterator[bytes]:
    """The body, which is JSON text.

    Raises:
        UnsupportedMediaType, InvalidJson, BadRequest: it is no JSON, or not said to be, or did not come to its end.
        RequestEntityTooLarge, PayloadTooLarge: it has more bytes, or values, than the settings allow.
        TooManyRequests: there are too many large bodies.
    """
    if not request.is_json:
        given = request.mimetype or "none"
        raise problems.UnsupportedMediaType(f"The body must be JSON, with Content-Type application/json, not {given}.")
    limit, length = settings.max_payload_bytes, request.content_length
    if length is not None and length > limit:
        raise RequestEntityTooLarge
    # gunicorn takes any coding before `chunked`, and decodes none of them.
    if length is None and (coding := request.headers.get("Transfer-Encoding", "chunked")).lower() != "chunked":
        raise problems.BadRequest(f"The body's Transfer-Encoding is {coding!r}; only chunked is known.")
    room = Room()
    try:
        # Of a body without a length one byte more, to see that there is more.
        body = _read(limit + 1 if length is None else length, room)
        if len(body) > limit:
            raise RequestEntityTooLarge
        if len(body) < (length or 0):  # cut short, which gunicorn does not say
            raise problems.BadRequest("The body is shorter than its Content-Length.")
        if len(body) > LARGE:
            give_way()
        if has_more_values(body, most := settings.max_payload_values):
            detail = f"The body has more than {most} values."
            raise problems.PayloadTooLarge(detail, limit_bytes=limit, limit_values=most)
        want_json(body)
        if len(body) > LARGE:
            give_way()
        yield body
    finally:
        room.give_back()


def _read(most: int, room: Room) -> bytes:
    """So many bytes of the body, or all of it; what is above the first LARGE takes room as it comes."""
    # Without a length, and a server that knows where a body ends, there is none.
    if request.content_length is None and not request.environ.get("wsgi.input_terminated"):
        return b""
    stream = request.environ["wsgi.input"]  # werkzeug's own stream around it takes 25 µs
    try:
        with limited_time(most):
            body: bytes = stream.read(min(most, LARGE))
            if LARGE <= len(body) < most:
                body = _read_on(stream, body, most, room)
    except (OSError, ParseException) as error:  # a time-out; gunicorn's word for chunks that are none, or endless
        raise problems.BadRequest("The body could not be read to its end.") from error
    return body


def _read_on(stream: IO[bytes], begin: bytes, most: int, room: Room) -> bytes:
    whole = BytesIO()  # not a list of parts, which would be there beside the whole
    size = whole.write(begin)
    while size < most:
        room.take(step := min(most - size, LARGE))
        if not (part := stream.read(step)):
            break
        size += whole.write(part)
    return whole.getvalue()


def _preferred_wait() -> float | None:
    """The seconds of `Prefer: wait=SECONDS` (RFC 7240); a preference that is not understood is ignored."""
    given = request.environ.get("HTTP_PREFER")
    for preference in given.split(",") if given else ():
        if match := re.fullmatch(r'wait="?(\d{1,9})"?', preference.partition(";")[0].replace(" ", ""), re.IGNORECASE):
            return float(match[1])
    return None


def wait_seconds(asked: float | None, settings: Settings) -> float:
    """How long to wait: the option wins over the preference, and the answer says if it was the latter."""
    preferred = _preferred_wait() if asked is None else None
    seconds = min(asked if asked is not None else preferred or 0, settings.max_wait)
    if preferred is not None:
        add_header("Preference-Applied", f"wait={seconds:.0f}")
    if seconds > 0:
        note_wait(request)
    return seconds


def add_header(name: str, value: str) -> None:
    """Give the answer to the present request a header, whether it is a good one or a problem."""

    @after_this_request
    def add(answer: Response) -> Response:
        answer.headers[name] = value
        return answer


def idempotency_key() -> str | None:
    """The `Idempotency-Key` of the request, bare or quoted; a quoted one is the same key.

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
    # A header that is there twice comes as one, with a comma: which of them would win is anybody's guess.
    if not re.fullmatch(r"[!-~]{1,255}", key) or ("," in key and key is given):
        what = "one key of 1 to 255 visible characters, in quotes if it has a comma"
        error: problems.ErrorItem = {"loc": ["header", "Idempotency-Key"], "msg": what}
        raise problems.InvalidRequest("The header Idempotency-Key is malformed.", errors=[error])
    return key


def origin() -> Origin:
    """Where the jobs come from that the present request makes.

    Raises:
        InvalidRequest: as `idempotency_key`.
    """
    return Origin(current_key().name, idempotency_key(), current_request_id())


def reader() -> str | None:
    """Whose jobs the present request may see and control: those of one owner, or (None) all."""
    key = current_key()
    return None if key.admin else key.name
