"""Pydantic models of what clients send and get; the OpenAPI document is made from them."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationInfo,
    create_model,
)

from app.config import Settings


class Query(BaseModel):
    """Query parameters; an unknown one is refused, since it is most often a typo that would do nothing."""

    model_config = ConfigDict(extra="forbid")


Wait = Annotated[
    float,
    Field(ge=0, le=60, allow_inf_nan=False, description="answer when the job has ended, at the latest after so many s"),
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


def _read_time(value: object) -> object:
    """Want RFC 3339 (pydantic takes numbers, too), and forgive a `+` that came as a space, as in many a URL."""
    text = re.sub(r" (\d\d:\d\d)$", r"+\1", str(value))
    if not re.fullmatch(r"(?ai)\d{4}-\d\d-\d\d[t ]\d\d:\d\d:\d\d(\.\d+)?(z|[+-]\d\d:\d\d)", text):
        raise ValueError("a time as in RFC 3339 is wanted: 2026-11-23T10:00:00Z")
    return text


def job_options(settings: Settings) -> type[Query]:
    """The options that a new job may have, with the bounds that are configured."""

    def option(kind: Any, meaning: str, **limits: Any) -> Any:
        return (Annotated[kind, Field(description=meaning, **limits)] | None, None)

    def seconds(most: int, meaning: str) -> Any:
        return option(int, meaning, ge=1, le=most)

    def check_at(at: datetime, info: ValidationInfo) -> datetime:
        if info.data.get("delay") is not None:
            raise ValueError("delay and at are both given, one is wanted")
        if at - datetime.now(UTC) > timedelta(seconds=settings.max_delay):
            raise ValueError(f"at most {settings.max_delay} s from now")
        return at

    time = Annotated[AwareDatetime, BeforeValidator(_read_time), AfterValidator(check_at)]
    return create_model(
        "JobOptions",
        __base__=Query,
        __doc__="How a job is enqueued, run and kept.",
        queue=option(Literal[settings.queues], "one of the configured queues"),
        at_front=option(bool, "ahead of what waits in that queue"),
        timeout=seconds(settings.max_job_timeout, "the job's run limit in s"),
        result_ttl=seconds(settings.max_ttl, "how long a result is kept, in s"),
        failure_ttl=seconds(settings.max_ttl, "how long a failure is kept, in s"),
        ttl=seconds(settings.max_ttl, "drop the job if no worker took it within so many s"),
        retries=option(int, "how often it is run again if it raises", ge=0, le=settings.max_retries),
        delay=option(float, "not before so many seconds from now", ge=0, le=settings.max_delay, allow_inf_nan=False),
        at=option(time, "not before this time (RFC 3339)"),
        webhook=option(str, "URL that is told when the job has ended", max_length=2000),
    )


def enqueue_query(settings: Settings) -> type[Query]:
    """The options of `/enqueue`: those of a new job, and how long to wait for its end."""
    return create_model(
        "EnqueueQuery", __base__=job_options(settings), __doc__="How a job is enqueued.", wait=(Wait | None, None)
    )


class Answer(BaseModel):
    """JSON that the service answers with."""

    model_config = ConfigDict(extra="forbid")


class JobError(Answer):
    """Why a job failed."""

    type: str = Field(description="class of the exception", examples=["ValueError"])
    message: str = Field(description="text of the exception; the traceback is in the service's log")


class JobProgress(Answer):
    """How far a job is, as its function reports it."""

    done: FiniteFloat | int
    total: FiniteFloat | int
    message: str


class JobLinks(Answer):
    """Where to go on with this job."""

    check_status: str
    get_result: str
    cancel: str


Time = Annotated[str, Field(json_schema_extra={"format": "date-time"}, description="RFC 3339, in UTC")]


class StatusObject(Answer):
    """Where a job is. The payload is never in it."""

    job_id: str
    job_status: str = Field(
        description="RQ's word: queued, started, deferred, scheduled; terminal: finished, failed, stopped, canceled",
        examples=["started"],
    )
    function: str | None = Field(description="name of the job function")
    queue: str | None
    enqueued_at: Time | None
    started_at: Time | None
    ended_at: Time | None
    progress: JobProgress | None
    retries_left: int | None = Field(description="how often it may be run again if it raises")
    error: JobError | None = Field(description="once the job has failed")
    links: JobLinks


class StatusWithResult(StatusObject):
    """The status of a job that was waited for; with its return value if it finished in time."""

    result: Any = Field(default=None, description="the function's return value")


class EnqueuedGroup(Answer):
    """The jobs of one /enqueue_many."""

    group_id: str
    job_ids: list[str] = Field(description="in the order of the payloads")


class WebhookTry(Answer):
    """One try to deliver a message."""

    at: Time
    status_code: int | None = Field(description="what the receiver answered")
    error: str | None = Field(description="why there was no answer")
    seconds: float | None


class WebhookMessage(Answer):
    """A message that tells of a job's end."""

    webhook_id: str
    type: str = Field(examples=["job.finished"])
    status: str | None = Field(description="RQ's word: finished once it was taken; null: kept no longer")
    next_try_at: Time | None
    tries: list[WebhookTry]


class WebhookLog(Answer):
    """The messages that told of a job's ends, the first one first: a job that is retried ends more than once."""

    job_id: str
    messages: list[WebhookMessage]


class GroupObject(Answer):
    """Where the jobs of a group are."""

    group_id: str
    total: int
    counts: dict[str, int] = Field(
        description="jobs by status; `expired` are those that are not kept any more", examples=[{"finished": 2}]
    )


class JobPage(Answer):
    """A page of jobs, newest first."""

    jobs: list[StatusObject] = Field(
        description="as many as `limit` says, or fewer; `next` alone says if there are more"
    )
    next: str | None = Field(description="URL of the next page", examples=["/jobs?limit=20&cursor=MTc2Mz"])


class FunctionObject(Answer):
    """A job function."""

    name: str
    description: str
    payload_schema: dict[str, Any] = Field(description="JSON Schema of the payload; {} allows any JSON")
    defaults: dict[str, Any] = Field(description="its own defaults for the options of /enqueue")


class FunctionList(Answer):
    """All job functions, by name."""

    functions: list[FunctionObject]


class QueueObject(Answer):
    """A queue at one moment."""

    name: str
    jobs: dict[str, int] = Field(
        description="by status; `failed` has those that were stopped, too", examples=[{"queued": 3, "started": 1}]
    )
    workers: int = Field(description="live ones that take its jobs")
    oldest_waiting_seconds: float | None = Field(description="age of the job that waits longest")
    runs_per_minute: float = Field(description="runs that ended, in the last one to two minutes")
    mean_run_seconds: float | None = Field(description="of these")


class WorkerObject(Answer):
    """A live worker."""

    name: str
    state: str = Field(description="RQ's word: busy, idle, suspended, started", examples=["busy"])
    queues: list[str] = Field(description="in the order in which it looks")
    job_ids: list[str] = Field(description="the job that it runs, and maybe the next one, which it has taken already")


class Queues(Answer):
    """The queues, in the configured order, and the workers."""

    queues: list[QueueObject]
    workers: list[WorkerObject]


class Health(Answer):
    """The process serves."""

    status: Literal["ok"]


class Readiness(Answer):
    """Jobs that are enqueued now would run."""

    status: Literal["ready"]
    checks: dict[str, str]


class ProblemObject(BaseModel):
    """An error, as RFC 9457 has it; some problems have members of their own."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="its page: GET it for what it means and what to do")
    title: str
    status: int
    detail: str
