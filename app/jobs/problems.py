"""The problems of the API (RFC 9457): an exception class for each, with its HTTP status and the text of its page."""

import inspect
import re
from typing import Any, ClassVar, Self, TypedDict

#: Seconds after which a client should ask again about a job that has not ended.
POLL_AGAIN = 1
#: Seconds after which a client should send a request again that the service could not serve.
TRY_AGAIN = 5
#: Most errors of a request that one answer lists.
MOST_ERRORS = 100
#: The media type of a problem (RFC 9457).
PROBLEM_JSON = "application/problem+json"


class ErrorItem(TypedDict):
    """One error of a request: its place, as a path into query or body, and what is wrong there."""

    loc: list[str | int]
    msg: str


class Problem(Exception):
    """An error that the API answers. `detail` says what happened, `members` are further fields of the answer."""

    status: ClassVar[int]
    title: ClassVar[str]
    #: The last part of its `type`: `job-not-found` for `JobNotFound`.
    slug: ClassVar[str]
    #: Text of the problem's page: what it means, and what to do. It is the docstring of the class after the first line.
    explanation: ClassVar[str]
    #: Example of its members, for the OpenAPI document.
    example: ClassVar[dict[str, Any]] = {}

    def __init__(self, detail: str, *, retry_after: int | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after
        self.members = members

    def __init_subclass__(cls, status: int) -> None:
        cls.explanation = (inspect.getdoc(cls) or "").partition("\n\n")[2].replace("\n", " ")
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", cls.__name__).capitalize()
        cls.status, cls.title, cls.slug = status, words.replace("json", "JSON"), words.lower().replace(" ", "-")

    def body(self) -> dict[str, Any]:
        """The problem as JSON data."""
        return {
            "type": f"/problems/{self.slug}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            **self.members,
        }


class InvalidRequest(Problem, status=422):
    """The payload does not fit the function, or an option is missing, unknown or out of range.

    The request has a value that is not allowed. `errors` lists each wrong place: `query` for an option, `body` for the
    payload. Correct them: the same request will be refused again. GET /functions shows the schema of each function's
    payload.
    """

    example: ClassVar = {"errors": [{"loc": ["query", "timeout"], "msg": "Input should be greater than or equal to 1"}]}


class InvalidJson(Problem, status=400):
    """The body is not JSON.

    The body is not JSON in UTF-8 (RFC 8259), or other JSON parsers could not read it: it has NaN, Infinity, a number
    too big for a double, a lone surrogate, or more than 100 levels. Correct the body at the line and column that
    `detail` names.
    """

    example: ClassVar = {"line": 1, "column": 9}


class BadRequest(Problem, status=400):
    """The request is not valid HTTP.

    The request is malformed, so the service did not look at its content. Check the client.
    """


class Unauthorized(Problem, status=401):
    """No API key, or one that is not known.

    This service needs an API key. Send it as `Authorization: Bearer KEY`.
    """


class Forbidden(Problem, status=403):
    """The API key may not do this.

    The API key is known, but it may not use this function or route. Ask for another key.
    """


class NotFound(Problem, status=404):
    """There is no such route.

    There is no such route. GET /openapi.json lists all routes, /docs shows them.
    """


class JobNotFound(Problem, status=404):
    """No job has this id.

    No job has this id, or the job belongs to another API key. Check the id; /enqueue returns it as `job_id`.
    """

    example: ClassVar = {"job_id": "abc"}


class PayloadNotFound(Problem, status=404):
    """The job has no payload that could be shown.

    The job was enqueued with RQ itself, and its arguments are not one JSON value.
    """

    example: ClassVar = {"job_id": "abc"}


class WebhookNotFound(Problem, status=404):
    """There is no message to a webhook about this job.

    There is no message to send again: the job was enqueued without `webhook`, it has not ended, or its message is no
    longer kept. GET /webhooks lists the messages of a job.
    """

    example: ClassVar = {"job_id": "abc"}


class GroupNotFound(Problem, status=404):
    """No group of jobs has this id.

    No group has this id, or it belongs to another API key. Check the id; /enqueue_many returns it as `group_id`.
    """

    example: ClassVar = {"group_id": "abc"}


class FunctionNotFound(Problem, status=404):
    """There is no job function of this name.

    There is no job function of this name. `known` lists all names; GET /functions describes the functions.
    """

    example: ClassVar = {"known": ["count_words", "estimate_pi", "some_long_function"]}


class MethodNotAllowed(Problem, status=405):
    """The route has no such method.

    The route does not have this method. The header `Allow` lists its methods.
    """


class ResultNotReady(Problem, status=409):
    """The job has not ended yet.

    The job waits or runs. Ask again after `Retry-After` seconds, or add `wait=SECONDS` to get the answer as soon as
    the job ends.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "started"}


class JobFailed(Problem, status=409):
    """The job ended with an error; it has no result.

    The job function raised an exception, or its process died. `error` says which; the service's log has more.
    """

    example: ClassVar = {
        "job_id": "abc",
        "job_status": "failed",
        "error": {"type": "ValueError", "message": "no such image"},
    }


class JobStopped(Problem, status=409):
    """The job was stopped while it ran; it has no result.

    Somebody stopped the job while it ran, so there is no result. Enqueue it again if you need one.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "stopped", "error": None}


class JobCanceled(Problem, status=409):
    """The job was canceled while it waited; it has no result.

    Somebody canceled the job while it waited, so it has no result. POST /retry runs it after all.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "canceled", "error": None}


class JobAlreadyEnded(Problem, status=409):
    """The job had finished or failed before it could be canceled.

    The job had finished or failed already. Nothing was changed. Fetch its result, or its error.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "finished"}


class JobNotRetryable(Problem, status=409):
    """The job did not fail, and was neither stopped nor canceled, so there is nothing to run again.

    Only a failed, stopped or canceled job can be retried. This job waits, runs or has finished; `job_status` says
    which. To run it once more, enqueue it again.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "finished"}


class ResultExpired(Problem, status=410):
    """The job existed, but it is not kept any more.

    The job existed, but its TTL has passed, so it and its result were deleted. Enqueue it again, with a longer
    `result_ttl` if you need one.
    """

    example: ClassVar = {"job_id": "abc"}


class IdempotencyKeyReused(Problem, status=422):
    """The idempotency key stands for another request already.

    An earlier request had the same `Idempotency-Key`, but another function, payload or option. Nothing was enqueued.
    Use a new key for a new request. Use the same key only to send the same request again.
    """


class PayloadTooLarge(Problem, status=413):
    """The body has more bytes, or JSON values, than this service takes.

    The body has more than `limit_bytes` bytes, or more than `limit_values` JSON values. Send less, for example a
    link to the data, or many numbers as one string in base64.
    """

    example: ClassVar = {"limit_bytes": 16777216}


class UnsupportedMediaType(Problem, status=415):
    """The Content-Type of the body is not JSON.

    All bodies are JSON. Send `Content-Type: application/json` (curl: -H 'Content-Type: application/json').
    """


class TooManyRequests(Problem, status=429):
    """The API key sends more requests than it may, or has too many open at once.

    The key sent more requests in a short time than are allowed. Or it has too many requests open, or too many bytes in
    them: a key must leave as much room for others as it takes. Try again after `Retry-After` seconds.
    """


class InternalError(Problem, status=500):
    """A bug of this service.

    This is a bug of the service. Give the `request_id` to its operator, who finds the error in the log with it.
    """

    example: ClassVar = {"request_id": "7f3c2a1e9b0d4c58"}


class QueueFull(Problem, status=503):
    """The queue is full.

    The queue holds as many jobs as MAX_QUEUE_LENGTH allows. Nothing was enqueued. Try again after `Retry-After`
    seconds.
    """

    example: ClassVar = {"queue": "default"}

    @classmethod
    def of(cls, queue: str | None, limit: int) -> Self:
        """The problem for this queue, which may hold `limit` jobs (MAX_QUEUE_LENGTH)."""
        return cls(
            f"The queue {queue} has no room for this: it may hold {limit} jobs.", queue=queue, retry_after=TRY_AGAIN
        )


class RedisUnavailable(Problem, status=503):
    """Redis is not available, or refused the command.

    Redis is down, starting, full, read-only or too slow. The job may be enqueued or not. Try again after `Retry-After`
    seconds; with an `Idempotency-Key` it cannot be enqueued twice.
    """


class NotReady(Problem, status=503):
    """The service is up, but jobs would not run.

    `checks` says what is missing: Redis, its writes, or a live worker for a queue.
    """

    example: ClassVar = {"checks": {"redis": "ok", "queue default": "no live worker"}}


#: All problems by the last part of their `type`.
PROBLEMS: dict[str, type[Problem]] = {problem.slug: problem for problem in Problem.__subclasses__()}
