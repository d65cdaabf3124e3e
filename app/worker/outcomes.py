"""Outcomes: how a run ended, and how that is written down.

`Outcome` is a small union. One `match`, in `choose_transition`, says which script writes each of them. A job with
dependents, repeats or a rate limit is ended by RQ's own code, since only that knows them.
"""

import base64
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import rq
from redis.exceptions import RedisError, ResponseError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now as utc_now

from app.config import Settings
from app.core import scripts, transitions
from app.core.scripts import STOPPED, Failure, describe_failure
from app.core.transitions import Ending, Run

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Finished:
    """The function returned."""

    #: base64 of the JSON text; empty for null
    return_value: str
    #: the last progress that is not yet in Redis, as JSON; empty if there is none
    progress: str = ""


@dataclass(frozen=True)
class Failed:
    """The function raised, or the job cannot be run."""

    failure: Failure
    progress: str = ""
    #: least seconds before a retry, -1 for no retry; None for the job's own pause
    after: float | None = None
    #: end the job also if RQ's own code should: that would call the hooks that a foreign job names
    force: bool = False


@dataclass(frozen=True)
class TimedOut:
    """The function ran longer than its limit, and went on after the exception that says so. Its process was killed."""

    limit: int


@dataclass(frozen=True)
class Crashed:
    """The process died, or used too much memory, or the worker died: the job runs again, up to its crash limit."""

    how: str


@dataclass(frozen=True)
class PutBack:
    """The run ended through no fault of the job, which waits again in front of its queue."""

    how: str


@dataclass(frozen=True)
class Stopped:
    """Somebody canceled the job while it ran."""


@dataclass(frozen=True)
class Lost:
    """The lease was lost: another worker decides about the job, and this one writes nothing."""


Outcome = Finished | Failed | TimedOut | Crashed | PutBack | Stopped | Lost


class Crashes(NamedTuple):
    """How often runs of the job crashed before this one, and how often they may; None for MAX_CRASHES."""

    before: int = 0
    limit: int | None = None


class Release(NamedTuple):
    """The arguments of `release.lua`: give the job back, or fail it if its runs crashed too often."""

    is_crash: bool
    limit: int
    failure: Failure
    #: how the run ended, for the log
    how: str


def choose_transition(outcome: Outcome, crashes: Crashes, settings: Settings) -> Ending | Release | None:
    """The transition that writes the outcome down: `finish` (Ending), `release` (Release), or none."""
    end = partial(Ending, result_ttl=settings.result_ttl, failure_ttl=settings.failure_ttl)
    limit = settings.max_crashes if crashes.limit is None else crashes.limit
    match outcome:
        case Finished(return_value, progress):
            return end("finished", return_value=return_value, progress=progress)
        case Failed(failure, progress, after, force):
            return end("failed", failure=failure, progress=progress, after=after, force=force)
        case TimedOut(seconds):
            message = f"The job ran longer than its limit of {seconds} s, and its process was killed."
            return end("failed", failure=describe_failure("JobTimeoutException", message))
        case Stopped():
            return end("stopped", failure=STOPPED)
        case Crashed(how) | PutBack(how):
            return Release(isinstance(outcome, Crashed), limit, _describe_crash(how, crashes.before), how)
        case Lost():
            return None


def _describe_crash(how: str, before: int) -> Failure:
    message = (
        f"The job's process died {before + 1} times, more often than it may; the last time: {how}."
        if before
        else f"The job's process died, and the job may not be run again: {how}."
    )
    return describe_failure("WorkHorseDied", message)


class Retry(Protocol):
    """`retry_until_stored` of the worker: call again while Redis is away."""

    def __call__(self, call: Callable[[], Answer], *, is_patient: bool = True) -> Answer:
        """The answer of the call."""


class OutcomeWriter:
    """Writes outcomes down: those of the worker's own runs, and those of runs that dead workers left behind."""

    def __init__(self, worker: rq.Worker, settings: Settings, retry: Retry) -> None:
        """Take the worker, which knows RQ's way to end a job, and counts."""
        self._worker = worker
        self._settings = settings
        self._retry = retry

    def write(self, run: Run, outcome: Outcome, crashes: Crashes = Crashes(), *, is_patient: bool = True) -> None:  # noqa: B008  # immutable
        """Write the outcome down.

        Args:
            run: the run that ended.
            outcome: how it ended.
            crashes: how often the job's runs crashed before.
            is_patient: whether to wait for a Redis that is away.

        Raises:
            RedisError: Redis did not do it, and is not to be waited for.
        """
        match transition := choose_transition(outcome, crashes, self._settings):
            case Ending():
                if isinstance(outcome, TimedOut):
                    self._worker.log.error("%s: killed after its limit of %s s", run, outcome.limit)
                self.finish(run, transition, is_patient=is_patient)
            case Release():
                self._release(run, transition, crashes.before, is_patient=is_patient)
            case None:
                self._worker.log.warning("%s: its lease is lost to another worker; the run was ended", run)

    def finish(self, run: Run, ending: Ending, status: str | None = None, *, is_patient: bool = True) -> None:
        """Write the end of a run down, unless Redis has answered already, with this status.

        Raises:
            RedisError: as `write`.
        """
        retry = partial(self._retry, is_patient=is_patient)
        status = status or retry(lambda: transitions.finish(self._worker.connection, run, ending))
        if status == "rq":
            status = retry(lambda: self._finish_as_rq(run, ending))
        if status != "lost":
            self._worker.successful_job_count += ending.outcome == "finished"
            self._worker.failed_job_count += ending.outcome != "finished"
        self._worker.log.info("%s %s", run, status)

    def log_unwritable(self, run: Run, error: ResponseError) -> None:
        """Log that Redis refuses the end of a run: a key has another type. `recover` finds the run, and fails it."""
        self._worker.log.error("%s: its end cannot be written: %s", run, error)

    def _release(self, run: Run, release: Release, before: int, *, is_patient: bool) -> None:
        is_crash, limit, failure, how = release
        retry = partial(self._retry, is_patient=is_patient)
        status: str = retry(
            lambda: transitions.release(
                self._worker.connection,
                run,
                crashed=is_crash,
                limit=limit,
                failure=failure,
                failure_ttl=self._settings.failure_ttl,
            )
        )
        if status == "rq":
            ending = Ending("failed", self._settings.result_ttl, self._settings.failure_ttl, failure=failure)
            status = retry(lambda: self._finish_as_rq(run, ending, before + is_crash))
        self._worker.failed_job_count += status in ("failed", "stopped") and run.worker == self._worker.name
        what = "crashed" if is_crash else "was put back"
        self._worker.log.warning("%s %s (%s); it is %s now", run, what, how, status)

    def _finish_as_rq(self, run: Run, ending: Ending, crashes: int = 0) -> str:
        """End a job with RQ's own code, since it has dependents, repeats or a rate limit. Returns the new status.

        A job whose runs crashed too often is not for RQ to retry, even if it has retries left.
        """
        held = transitions.renew(self._worker.connection, run, self._settings.worker_lease)
        if held == "lost":
            return "lost"
        if held == "stop":
            ending = Ending("stopped", ending.result_ttl, ending.failure_ttl, failure=STOPPED)
        try:
            return self._end_as_rq(run, ending, crashes)
        except RedisError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._worker.log.exception("%s: RQ cannot end it", run)
        except Exception:  # RQ raises any kind of exception for a job, or a dependent, that it cannot read
            self._worker.log.exception("%s: RQ cannot end it", run)
        return transitions.finish(self._worker.connection, run, ending._replace(force=True))

    def _end_as_rq(self, run: Run, ending: Ending, crashes: int) -> str:
        worker, connection = self._worker, self._worker.connection
        if crashes:  # in Redis, since `finish` reads it there if RQ cannot end the job
            connection.hset(scripts.job_key(run.job_id), mapping={"crashes": crashes, "retries_left": 0})
        queue = next(queue for queue in worker.queues if queue.name == run.queue)
        execution = Execution(run.execution, run.job_id, connection, run.worker)
        job = Job.fetch(run.job_id, connection=connection, serializer=JSONSerializer)
        job.ended_at = utc_now()
        if ending.outcome == "finished":
            job._result = json.loads(base64.b64decode(ending.return_value)) if ending.return_value else None
            worker.handle_job_success(job, queue, queue.started_job_registry, execution)
        else:
            worker._stopped_job_id = job.id if ending.outcome == "stopped" else None
            trace = zlib.decompress(base64.b64decode(ending.failure.exception)).decode(errors="replace")
            connection.hset(job.key, "error", ending.failure.error)
            worker.handle_job_failure(job, queue, exc_string=trace, execution=execution)
        stored: Any = connection.hget(job.key, "status")
        status = (
            stored.decode() if isinstance(stored, bytes) else ending.outcome
        )  # None: with a result TTL of 0 it is gone
        if status == JobStatus.STARTED:  # RQ logs an error of Redis, and goes on
            raise RedisError(f"the end of job {job.id} was not written")
        transitions.notify(connection, job.id)
        return f"{status}, as RQ does it"
