"""How the service answers: JSON, and each error, the framework's own included, as a problem (RFC 9457)."""

import hashlib
import json
import logging
import re
from http import HTTPStatus
from typing import Any

from apiflask import APIFlask, HTTPError
from flask import Response, current_app, request
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, InternalServerError, MethodNotAllowed, NotFound, RequestEntityTooLarge

from app.core.transitions import TERMINAL
from app.jobs import problems
from app.jobs.enqueue import LARGE, MOST_ERRORS
from app.jobs.jobs import POLL_AGAIN, TRY_AGAIN
from app.jobs.status import StatusObject
from app.web.limits import large_answer, limit_sending
from app.web.openapi import PROBLEM_JSON
from app.web.request_ids import current_request_id

logger = logging.getLogger(__name__)

#: Redis' words for "not now": https://redis.io/docs/latest/develop/reference/protocol-spec/#simple-errors
#: A script's error has the word in its middle.
_NOT_NOW = re.compile(r"\b(OOM|READONLY|MISCONF|LOADING|BUSY|MASTERDOWN|NOREPLICAS|CLUSTERDOWN|NOAUTH|NOPERM)\b")
#: redis-py has classes for some of them, and takes the word off their text.
_NOT_NOW_CLASSES = {
    "OutOfMemoryError", "ReadOnlyError", "NoPermissionError", "ClusterDownError", "MasterDownError", "TryAgainError",
}  # fmt: skip


encode_json = json.JSONEncoder(separators=(",", ":")).encode


def make_etag(text: bytes) -> str:
    """What changes with the text."""
    return hashlib.blake2b(text, digest_size=12).hexdigest()


class JsonAnswer(Response):
    """An answer whose headers are complete. werkzeug looks through them once more at the end (28 µs)."""

    default_mimetype = "application/json"

    def get_wsgi_headers(self, environ: Any) -> Headers:
        """The headers as they are; but a 304 must not have those of a body."""
        return super().get_wsgi_headers(environ) if self.status_code == HTTPStatus.NOT_MODIFIED else self.headers


def json_answer(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer of JSON, its members in the order they were given."""
    text = encode_json(data).encode()
    answer = JsonAnswer(text, status, headers)
    return limit_sending(answer) if len(text) > LARGE else answer


def text_answer(text: bytes) -> Response:
    """An answer of JSON as it is, for its owner only.

    Raises:
        TooManyRequests: as `large_answer`.
    """
    headers = {"Cache-Control": "private, no-cache"}
    return limit_sending(large_answer(Response(text, 200, headers, mimetype="application/json")))


def ask_again(status: StatusObject) -> dict[str, str]:
    """The header that says when to ask for a job's status again, while it has not ended."""
    return {} if status["job_status"] in TERMINAL else {"Retry-After": str(POLL_AGAIN)}


def _problem_answer(problem: problems.Problem) -> Response:
    # Not `json_answer`: the framework may throw it away, and nobody would end what limits the sending of it.
    answer = JsonAnswer(encode_json(problem.body()), problem.status, mimetype=PROBLEM_JSON)
    if problem.retry_after is not None:
        answer.headers["Retry-After"] = str(problem.retry_after)
    if isinstance(problem, problems.Unauthorized):
        answer.headers["WWW-Authenticate"] = "Bearer"
    return answer


def _is_outage(error: RedisError) -> bool:
    return (
        isinstance(error, RedisConnectionError | RedisTimeoutError)
        or type(error).__name__ in _NOT_NOW_CLASSES
        or _NOT_NOW.search(str(error)) is not None
    )


def _redis_answer(error: RedisError) -> Response:
    if not _is_outage(error):
        return _bug_answer(error)
    logger.error("%s %r: Redis: %s", request.method, request.path, error)
    detail = "Redis did not do what it was asked."
    return _problem_answer(problems.RedisUnavailable(detail, retry_after=TRY_AGAIN))


def _bug_answer(error: Exception) -> Response:
    request_id = current_request_id()
    logger.error("request %s: %s %r", request_id, request.method, request.path, exc_info=error)
    return _problem_answer(problems.InternalError("Something went wrong on our side.", request_id=request_id))


def _http_answer(error: HTTPException) -> Response:
    """What Flask and werkzeug refuse by themselves."""
    problem: problems.Problem
    match error:
        case NotFound():
            problem = problems.NotFound(f"There is no route {request.path!r}.")
        case MethodNotAllowed():
            problem = problems.MethodNotAllowed(f"{request.path} has no method {request.method}.")
        case RequestEntityTooLarge():
            limit = current_app.extensions["jobs"].settings.max_payload_bytes
            problem = problems.PayloadTooLarge(f"The body has more than {limit} bytes.", limit_bytes=limit)
        case InternalServerError():  # raised while another error, or an answer, was dealt with
            bug = error.original_exception
            return _bug_answer(bug if isinstance(bug, Exception) else error)
        case _:
            problem = problems.BadRequest(f"{error.description or error.name}")
    answer = _problem_answer(problem)
    if isinstance(error, MethodNotAllowed):
        answer.headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
    return answer


def _validation_answer(error: HTTPError) -> tuple[bytes, int, dict[str, str]]:
    """What APIFlask found wrong with the query."""
    errors = [
        {"loc": [location, field], "msg": message.removeprefix("Value error, ")}
        for location, fields in error.detail.items()
        for field, messages in fields.items()
        for message in messages
    ][:MOST_ERRORS]
    answer = _problem_answer(problems.InvalidRequest("The query has a value that is not allowed.", errors=errors))
    return answer.get_data(), answer.status_code, dict(answer.headers)


def answer_errors(app: APIFlask) -> None:
    """Let the app answer each error as a problem."""
    app.error_processor(_validation_answer)  # first: it puts a handler for HTTPException, too
    app.register_error_handler(problems.Problem, _problem_answer)
    app.register_error_handler(RedisError, _redis_answer)
    app.register_error_handler(HTTPException, _http_answer)
    app.register_error_handler(Exception, _bug_answer)
