"""The problems that clients are told about (RFC 9457): one exception class each, with its status and its page."""

import inspect
import re
from typing import Any, ClassVar, Self, TypedDict

#: Seconds after which a client should ask again for a job that has not ended.
POLL_AGAIN = 1
#: Seconds after which a client should try again when the service could not do what it was asked.
TRY_AGAIN = 5
#: Places of a request that one answer names as wrong, at most.
MOST_ERRORS = 100
#: The media type of a problem (RFC 9457).
PROBLEM_JSON = "application/problem+json"


class ErrorItem(TypedDict):
    """One place of a request that is wrong: where, as a path into query or body, and why."""

    loc: list[str | int]
    msg: str


class Problem(Exception):
    """Something that a client is told: `detail` says what happened, `members` are its own fields."""

    status: ClassVar[int]
    title: ClassVar[str]
    #: The last part of its `type`: that of `JobNotFound` is `job-not-found`.
    slug: ClassVar[str]
    #: For the problem's page: what it means, and what to do; its class' docstring, after the first line.
    explanation: ClassVar[str]
    #: An example of its own members, for the OpenAPI document.
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

    The request was understood, but a value in it is not allowed. `errors` names each place: `query` for an option,
    `body` for the payload. Correct them; the same request will be refused again. GET /functions shows the schema of
    each function's payload.
    """

    example: ClassVar = {"errors": [{"loc": ["query", "timeout"], "msg": "Input should be greater than or equal to 1"}]}


class InvalidJson(Problem, status=400):
    """The body is not JSON.

    The body is not JSON as RFC 8259 has it, in UTF-8; or it holds what others could not read back: NaN, Infinity, a
    number too big for a double, a lone surrogate, more than 100 levels. Correct the body at the line and column
    that `detail` names.
    """

    example: ClassVar = {"line": 1, "column": 9}


class BadRequest(Problem, status=400):
    """The request is not valid HTTP.

    The request itself is malformed, before any of its content was looked at. Check the client.
    """


class Unauthorized(Problem, status=401):
    """No API key, or one that is not known.

    This service wants an API key: send it as `Authorization: Bearer KEY`.
    """


class Forbidden(Problem, status=403):
    """The API key may not do this.

    The API key is known, but it may not use this function or route. Ask for another key.
    """


class NotFound(Problem, status=404):
    """There is no such route.

    There is no such route. GET /openapi.json lists all of them, /docs shows them.
    """


class JobNotFound(Problem, status=404):
    """No job has this id.

    No job has this id, or it belongs to somebody else. Check the id; /enqueue returns it as `job_id`.
    """

    example: ClassVar = {"job_id": "abc"}


class PayloadNotFound(Problem, status=404):
    """The job has no payload that could be shown.

    The job was not enqueued by this service but with RQ itself, and its arguments are not one JSON value.
    """

    example: ClassVar = {"job_id": "abc"}


class WebhookNotFound(Problem, status=404):
    """The job has told no webhook of its end.

    There is no message to send again: the job was enqueued without `webhook`, has not ended, or its message is kept
    no more. GET /webhooks lists the messages of a job.
    """

    example: ClassVar = {"job_id": "abc"}


class GroupNotFound(Problem, status=404):
    """No group of jobs has this id.

    No group has this id, or it belongs to somebody else. Check the id; /enqueue_many returns it as `group_id`.
    """

    example: ClassVar = {"group_id": "abc"}


class FunctionNotFound(Problem, status=404):
    """There is no job function of this name.

    There is no job function of this name. `known` lists the names there are; GET /functions describes them.
    """

    example: ClassVar = {"known": ["count_words", "estimate_pi", "some_long_function"]}


class MethodNotAllowed(Problem, status=405):
    """The route has no such method.

    The route exists, but not with this method. The header `Allow` lists its methods.
    """


class ResultNotReady(Problem, status=409):
    """The job has not ended yet.

    The job waits or runs. Ask again after the seconds that `Retry-After` names, or add `wait=SECONDS` to be
    answered as soon as it ends.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "started"}


class JobFailed(Problem, status=409):
    """The job ended with an error; it has no result.

    The job function raised, or its process died. `error` says how; the service's log has more.
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

    Somebody canceled the job while it waited, so it has no result. `POST /retry` lets it run after all.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "canceled", "error": None}


class JobAlreadyEnded(Problem, status=409):
    """The job had finished or failed before it could be canceled.

    The job finished or failed before the cancel came. Nothing was changed; fetch its result, or its error.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "finished"}


class JobNotRetryable(Problem, status=409):
    """The job did not fail, and was neither stopped nor canceled, so there is nothing to run again.

    Only a job that failed, was stopped or was canceled can be retried. This one waits, runs or finished;
    `job_status` says which. To run it once more, enqueue it again.
    """

    example: ClassVar = {"job_id": "abc", "job_status": "finished"}


class ResultExpired(Problem, status=410):
    """The job existed, but it is not kept any more.

    The job existed, but it and its result were kept no longer than its TTL. Enqueue it again, with a longer
    `result_ttl` if you need one.
    """

    example: ClassVar = {"job_id": "abc"}


class IdempotencyKeyReused(Problem, status=422):
    """The idempotency key stands for another request already.

    A request with the same `Idempotency-Key` came before, with another function, payload or option. Nothing was
    enqueued. Use a new key for a new request, and the same key only to send the very same one again.
    """


class PayloadTooLarge(Problem, status=413):
    """The body has more bytes, or JSON values, than this service takes.

    The body has more than `limit_bytes` bytes, or more than `limit_values` JSON values. Send less, for example a
    link to the data, or many numbers as one string in base64.
    """

    example: ClassVar = {"limit_bytes": 16777216}


class UnsupportedMediaType(Problem, status=415):
    """The body is not said to be JSON.

    Bodies are JSON: send `Content-Type: application/json` (curl: -H 'Content-Type: application/json').
    """


class TooManyRequests(Problem, status=429):
    """The API key sends more requests than it may, or has too many open at once.

    The key sent more requests in a short time than are allowed, or has as many open as are left for all others.
    Wait for the seconds of `Retry-After`.
    """


class InternalError(Problem, status=500):
    """A bug of this service.

    This is a bug of the service. Tell its operator the `request_id`; the log knows it.
    """

    example: ClassVar = {"request_id": "7f3c2a1e9b0d4c58"}


class QueueFull(Problem, status=503):
    """As many jobs wait in the queue as may.

    As many jobs wait in this queue as may. Nothing was enqueued; try again after `Retry-After`.
    """

    example: ClassVar = {"queue": "default"}

    @classmethod
    def of(cls, queue: str | None, limit: int) -> Self:
        """The problem of this queue, which may hold `limit` jobs (MAX_QUEUE_LENGTH)."""
        return cls(f"{limit} jobs wait in the queue {queue}, or almost.", queue=queue, retry_after=TRY_AGAIN)


class RedisUnavailable(Problem, status=503):
    """Redis did not do what it was asked.

    Redis is down, starting, full, read-only or too slow. A job may or may not have been enqueued. Try again after
    `Retry-After`.
    """


class NotReady(Problem, status=503):
    """The service is up, but jobs would not run.

    `checks` says what is missing: Redis, its writes, or a live worker for a queue.
    """

    example: ClassVar = {"checks": {"redis": "ok", "queue default": "no live worker"}}


#: All problems by the last part of their `type`.
PROBLEMS: dict[str, type[Problem]] = {problem.slug: problem for problem in Problem.__subclasses__()}
