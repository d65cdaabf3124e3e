"""Responses: JSON, and every error as a problem (RFC 9457), those of Flask and werkzeug included."""

import hashlib
import json
import logging
import re
from http import HTTPStatus
from typing import Any

from apiflask import APIFlask, HTTPError
from flask import Response, current_app, request
from pydantic import BaseModel
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, InternalServerError, MethodNotAllowed, NotFound, RequestEntityTooLarge

from app.config import LARGE
from app.core.scripts import TERMINAL
from app.jobs import problems
from app.jobs.problems import MOST_ERRORS, POLL_AGAIN, PROBLEM_JSON, TRY_AGAIN
from app.jobs.status import StatusObject
from app.web.limits import count_large_response, limit_send_time
from app.web.request_ids import current_request_id

logger = logging.getLogger(__name__)

#: Redis' error codes that mean "not now": https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
#: The error of a script has the code in its middle.
_OUTAGE_CODES = re.compile(r"\b(OOM|READONLY|MISCONF|LOADING|BUSY|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|NOAUTH|NOPERM)\b")
#: redis-py has classes for some of these errors, and removes the code from their text.
_OUTAGE_CLASSES = {
    "OutOfMemoryError", "ReadOnlyError", "NoPermissionError", "ClusterDownError", "MasterDownError", "TryAgainError",
}  # fmt: skip

#: The headers of an answer that no proxy may cache.
PRIVATE = {"Cache-Control": "private, no-cache"}

_encode_json = json.JSONEncoder(separators=(",", ":")).encode


def encode_json(data: Any) -> bytes:
    """JSON text of a pydantic model, or of JSON data, in ASCII: some clients of /events split lines at U+2028."""
    text = data.model_dump_json(ensure_ascii=True) if isinstance(data, BaseModel) else _encode_json(data)
    return text.encode()


def make_etag(text: bytes) -> str:
    """A digest of the text, as an ETag."""
    return hashlib.blake2b(text, digest_size=12).hexdigest()


class JsonResponse(Response):
    """A response with complete headers. So werkzeug need not look through them once more, which is slow."""

    default_mimetype = "application/json"

    def get_wsgi_headers(self, environ: Any) -> Headers:
        """Return the headers as they are. Only a 304 must lose those that describe a body."""
        return super().get_wsgi_headers(environ) if self.status_code == HTTPStatus.NOT_MODIFIED else self.headers


def json_response(
    data: Any, status: int = 200, headers: dict[str, str] | None = None, result: bytes | None = None
) -> Response:
    """A JSON response of a pydantic model, or of JSON data.

    Args:
        data: an object.
        status: HTTP status code.
        headers: besides Content-Type.
        result: JSON text for a last member `result`. It goes out as it is stored.

    Raises:
        TooManyRequests: as `count_large_response`, with a result.
    """
    text = encode_json(data)
    if result is not None:
        text = b'%s,"result":%s}' % (text[:-1], result)
    response = JsonResponse(text, status, headers)
    if result is not None:
        count_large_response(response)  # before the timer of its sending starts, which nothing would end
    return limit_send_time(response) if len(text) > LARGE else response


def stored_json_response(text: bytes) -> Response:
    """A response of JSON text, as it is stored. No proxy may cache it.

    Raises:
        TooManyRequests: as `count_large_response`.
    """
    return limit_send_time(count_large_response(Response(text, 200, PRIVATE, mimetype="application/json")))


def poll_headers(status: StatusObject) -> dict[str, str]:
    """The header that says when to ask again for the job's status. It is missing once the job has ended."""
    return {} if status.job_status in TERMINAL else {"Retry-After": str(POLL_AGAIN)}


def _answer_problem(problem: problems.Problem) -> Response:
    # `json_response` would start a timer. Flask may drop this response, and then nothing would end the timer.
    response = JsonResponse(encode_json(problem.body()), problem.status, mimetype=PROBLEM_JSON)
    if problem.retry_after is not None:
        response.headers["Retry-After"] = str(problem.retry_after)
    if isinstance(problem, problems.Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def _is_outage(error: RedisError) -> bool:
    return (
        isinstance(error, RedisConnectionError | RedisTimeoutError)
        or type(error).__name__ in _OUTAGE_CLASSES
        or _OUTAGE_CODES.search(str(error)) is not None
    )


def _answer_redis_error(error: RedisError) -> Response:
    if not _is_outage(error):
        return _answer_bug(error)
    logger.error("%s %r: Redis: %s", request.method, request.path, error)
    detail = "Redis did not carry out the command."
    return _answer_problem(problems.RedisUnavailable(detail, retry_after=TRY_AGAIN))


def _answer_bug(error: Exception) -> Response:
    request_id = current_request_id()
    logger.error("request %s: %s %r", request_id, request.method, request.path, exc_info=error)
    return _answer_problem(
        problems.InternalError("An unexpected error occurred in the service.", request_id=request_id)
    )


def _answer_http_error(error: HTTPException) -> Response:
    """The response to an error that Flask or werkzeug raised."""
    problem: problems.Problem
    match error:
        case NotFound():
            problem = problems.NotFound(f"There is no route {request.path!r}.")
        case MethodNotAllowed():
            problem = problems.MethodNotAllowed(f"{request.path} has no method {request.method}.")
        case RequestEntityTooLarge():
            limit = current_app.extensions["jobs"].settings.max_payload_bytes
            problem = problems.PayloadTooLarge(f"The body has more than {limit} bytes.", limit_bytes=limit)
        case InternalServerError():  # Flask raises it when an error handler or a hook fails
            bug = error.original_exception
            return _answer_bug(bug if isinstance(bug, Exception) else error)
        case _:
            problem = problems.BadRequest(f"{error.description or error.name}")
    response = _answer_problem(problem)
    if isinstance(error, MethodNotAllowed):
        response.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
    return response


def _answer_invalid_query(error: HTTPError) -> tuple[bytes, int, dict[str, str]]:
    """The response to a query that APIFlask refused."""
    errors = [
        {"loc": [location, field], "msg": message.removeprefix("Value error, ")}
        for location, fields in error.detail.items()
        for field, messages in fields.items()
        for message in messages
    ][:MOST_ERRORS]
    response = _answer_problem(problems.InvalidRequest("The query has a value that is not allowed.", errors=errors))
    return response.get_data(), response.status_code, dict(response.headers)


def register_error_handlers(app: APIFlask) -> None:
    """Make the app answer every error as a problem."""
    app.error_processor(_answer_invalid_query)  # first: it registers a handler for HTTPException, too
    app.register_error_handler(problems.Problem, _answer_problem)
    app.register_error_handler(RedisError, _answer_redis_error)
    app.register_error_handler(HTTPException, _answer_http_error)
    app.register_error_handler(Exception, _answer_bug)
