"""Pydantic models of what clients send and get; the OpenAPI document is made from them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, create_model

from app.config import Settings


class Query(BaseModel):
    """Query parameters; an unknown one is refused, since it is most often a typo that would do nothing."""

    model_config = ConfigDict(extra="forbid")


Wait = Annotated[
    float,
    Field(ge=0, le=60, allow_inf_nan=False, description="answer when the job has ended, at the latest after so many s"),
]


class JobQuery(Query):
    """Which job, and how long to wait for its end."""

    job_id: Annotated[str, Field(min_length=1, description="the id that /enqueue returned")]
    wait: Wait | None = None


def enqueue_query(settings: Settings) -> type[Query]:
    """The options of `/enqueue`, with the bounds that are configured."""

    def seconds(most: int, meaning: str) -> Any:
        return (Annotated[int, Field(ge=1, le=most, description=meaning)] | None, None)

    queue: Any = Annotated[Literal[settings.queues], Field(description="one of the configured queues")]
    at_front: Any = Annotated[bool, Field(description="ahead of what waits in that queue")]
    return create_model(
        "EnqueueQuery",
        __base__=Query,
        __doc__="How a job is enqueued, run and kept.",
        wait=(Wait | None, None),
        queue=(queue | None, None),
        at_front=(at_front | None, None),
        timeout=seconds(settings.max_job_timeout, "the job's run limit in s"),
        result_ttl=seconds(settings.max_ttl, "how long a result is kept, in s"),
        failure_ttl=seconds(settings.max_ttl, "how long a failure is kept, in s"),
        ttl=seconds(settings.max_ttl, "drop the job if no worker took it within so many s"),
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


class FunctionObject(Answer):
    """A job function."""

    name: str
    description: str
    payload_schema: dict[str, Any] = Field(description="JSON Schema of the payload; {} allows any JSON")
    defaults: dict[str, Any] = Field(description="its own defaults for the options of /enqueue")


class FunctionList(Answer):
    """All job functions, by name."""

    functions: list[FunctionObject]


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
