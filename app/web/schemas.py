"""Pydantic models of queries and responses. The status object has its model in app/jobs/status.py.

The OpenAPI document is made from them. Responses are open: a later release may add members.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from flask import current_app
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    create_model,
)

from app.config import MAX_RETRIES, MAX_SECONDS, Settings
from app.job_function import JobFunction
from app.jobs.status import StatusObject, Time


class Query(BaseModel):
    """Query parameters. An unknown one is refused, since it is most likely a typo."""

    model_config = ConfigDict(extra="forbid")


Wait = Annotated[
    float,
    Field(ge=0, le=60, allow_inf_nan=False, description="seconds to wait for the job's end"),
]


class GroupQuery(Query):
    """Which group of jobs."""

    group_id: Annotated[str, Field(min_length=1, description="the id that /enqueue_many returned")]


class JobQuery(Query):
    """Which job."""

    job_id: Annotated[str, Field(min_length=1, description="the id that /enqueue returned")]


class WaitQuery(JobQuery):
    """Which job, and how long to wait for its end."""

    wait: Wait | None = None


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class JobsQuery(Query):
    """Which jobs are listed."""

    status: (
        Literal["queued", "started", "deferred", "scheduled", "finished", "failed", "stopped", "canceled"] | None
    ) = None
    queue: Annotated[Name, Field(description="only jobs of this queue")] | None = None
    function: Annotated[Name, Field(description="only jobs of this function")] | None = None
    limit: Annotated[int, Field(ge=1, le=100, description="most jobs of the page")] = 20
    cursor: (
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,2000}$", description="from `next` of the last page")] | None
    ) = None


def _check_rfc3339(value: object) -> object:
    """Accept RFC 3339 only: pydantic takes numbers, too. A `+` in a URL may have become a space."""
    text = re.sub(r" (\d\d:\d\d)$", r"+\1", str(value))
    if not re.fullmatch(r"(?ai)\d{4}-\d\d-\d\d[t ]\d\d:\d\d:\d\d(\.\d+)?(z|[+-]\d\d:\d\d)", text):
        raise ValueError("Give a time of RFC 3339, for example 2026-11-23T10:00:00Z")
    return text


class _BoundedQuery(Query):
    """A query whose bounds are settings, so each app has its own model. Views name this class in its place.

    Only APIFlask validates with it. The class itself has no fields.
    """

    @classmethod
    def _find_model(cls) -> type[Query]:
        models: dict[type[Query], type[Query]] = current_app.extensions["query_models"]
        return models[cls]

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Any:
        """Validate with the model of the present app."""
        return cls._find_model().model_validate(obj, **options)

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Make the schema of the present app's model."""
        return cls._find_model().model_json_schema(*arguments, **options)


class JobOptions(_BoundedQuery):
    """How a job is enqueued, run and kept."""


class EnqueueQuery(_BoundedQuery):
    """The options of a job, and how long to wait for its end."""


def make_query_models(settings: Settings) -> dict[type[Query], type[Query]]:
    """Make an app's models for JobOptions and EnqueueQuery, with the bounds of its settings."""
    options = _make_options_model(
        settings.queues,
        max_timeout=settings.max_job_timeout,
        max_ttl=settings.max_ttl,
        max_retries=settings.max_retries,
        max_delay=settings.max_delay,
    )
    wait: Any = (Wait | None, None)
    return {
        JobOptions: options,
        EnqueueQuery: create_model("EnqueueQuery", __base__=options, __doc__=EnqueueQuery.__doc__, wait=wait),
    }


def _make_options_model(
    queues: tuple[str, ...], *, max_timeout: int, max_ttl: int, max_retries: int, max_delay: int
) -> type[Query]:
    def option(kind: Any, meaning: str, **limits: Any) -> Any:
        return (Annotated[kind, Field(description=meaning, **limits)] | None, None)

    def seconds(most: int, meaning: str) -> Any:
        return option(int, meaning, ge=1, le=most)

    def check_at(at: datetime, info: ValidationInfo) -> datetime:
        if info.data.get("delay") is not None:
            raise ValueError("Give delay or at, not both")
        if at - datetime.now(UTC) > timedelta(seconds=max_delay):
            raise ValueError(f"The time must be at most {max_delay} s from now")
        return at

    time = Annotated[AwareDatetime, BeforeValidator(_check_rfc3339), AfterValidator(check_at)]
    return create_model(
        "JobOptions",
        __base__=Query,
        __doc__=JobOptions.__doc__,
        queue=option(Literal[queues], "one of the configured queues"),
        at_front=option(bool, "put the job in front of the waiting jobs of its queue"),
        timeout=seconds(max_timeout, "seconds that a run of the job may take"),
        result_ttl=seconds(max_ttl, "seconds that a result is kept"),
        failure_ttl=seconds(max_ttl, "seconds that a failure is kept"),
        ttl=seconds(max_ttl, "seconds that the job may wait for a worker; then it is dropped"),
        retries=option(int, "how often the job is run again if it raises", ge=0, le=max_retries),
        delay=option(float, "seconds to wait before the job may run", ge=0, le=max_delay, allow_inf_nan=False),
        at=option(time, "time before which the job does not run (RFC 3339)"),
        webhook=option(str, "URL that is called when the job has ended", max_length=2000),
    )


def check_defaults(functions: Iterable[JobFunction], queues: tuple[str, ...]) -> None:
    """Check the defaults that job functions declare for their options.

    The limits of the settings (MAX_JOB_TIMEOUT, …) are for requests. A function may go beyond them.

    Raises:
        SystemExit: a default is not a value of its option.
    """
    model = _make_options_model(
        queues, max_timeout=MAX_SECONDS, max_ttl=MAX_SECONDS, max_retries=MAX_RETRIES, max_delay=MAX_SECONDS
    )
    for function in functions:
        # In a request None means that the option is missing. A default of None is an error: a text fits no option.
        given = {name: "None" if value is None else value for name, value in function.defaults.items()}
        try:
            model.model_validate(given, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise SystemExit(
                f"The job function {function.name} has the default {name}={first['input']!r}: {first['msg']}."
            ) from None


# Answers. Views build EnqueuedGroup, JobPage, Health and Readiness. The other models only describe JSON data that goes
# out as it was read: it is not validated, since anybody may have written to Redis.


class EnqueuedGroup(BaseModel):
    """The jobs of one /enqueue_many."""

    group_id: str
    job_ids: list[str] = Field(description="in the order of the payloads")


class WebhookTry(BaseModel):
    """One try to deliver a message."""

    at: Time
    status_code: int | None = Field(description="HTTP status of the receiver's response")
    error: str | None = Field(description="why there was no response")
    seconds: float | None


class WebhookMessage(BaseModel):
    """A message about a job's end."""

    webhook_id: str
    type: str = Field(examples=["job.finished"])
    status: str | None = Field(description="RQ's status: `finished` means delivered; null: no longer kept")
    next_try_at: Time | None
    tries: list[WebhookTry]


class WebhookLog(BaseModel):
    """The messages about the ends of a job, oldest first. A job that is retried ends more than once."""

    job_id: str
    messages: list[WebhookMessage]


class GroupObject(BaseModel):
    """The jobs of a group, counted by status."""

    group_id: str
    total: int
    counts: dict[str, int] = Field(
        description="jobs by status; `expired` jobs are no longer kept", examples=[{"finished": 2}]
    )


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[StatusObject] = Field(
        description="at most `limit` jobs, maybe fewer; only `next` says whether there are more"
    )
    next: str | None = Field(
        description="URL of the next page; null on the last page", examples=["/jobs?limit=20&cursor=MTc2Mz"]
    )


class FunctionObject(BaseModel):
    """A job function."""

    name: str
    description: str
    payload_schema: dict[str, Any] = Field(description="JSON Schema of the payload; {} allows any JSON")
    defaults: dict[str, Any] = Field(description="the function's defaults for the options of /enqueue")


class FunctionList(BaseModel):
    """All job functions, by name."""

    functions: list[FunctionObject]


class QueueObject(BaseModel):
    """A queue at one moment."""

    name: str
    jobs: dict[str, int] = Field(
        description="number of jobs by status; `failed` includes those that were stopped",
        examples=[{"queued": 3, "started": 1}],
    )
    workers: int = Field(description="number of live workers that take jobs of this queue")
    oldest_waiting_seconds: float | None = Field(description="age of the oldest waiting job")
    runs_per_minute: float = Field(description="runs that ended, over the last one to two minutes")
    mean_run_seconds: float | None = Field(description="mean time of these runs")


class WorkerObject(BaseModel):
    """A live worker."""

    name: str
    state: str = Field(description="RQ's state: busy, idle, suspended, started", examples=["busy"])
    queues: list[str] = Field(description="in the order in which the worker looks for jobs")
    job_ids: list[str] = Field(description="the job that it runs, and the next job if it has taken that already")


class Queues(BaseModel):
    """The queues, in the configured order, and the workers."""

    queues: list[QueueObject]
    workers: list[WorkerObject]


class Health(BaseModel):
    """The process answers requests."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """A job that is enqueued now would run."""

    status: Literal["ready"]
    checks: dict[str, str]


class ProblemObject(BaseModel):
    """An error (RFC 9457). Some problems have members of their own."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="URL of a page that explains the problem and what to do")
    title: str
    status: int
    detail: str
