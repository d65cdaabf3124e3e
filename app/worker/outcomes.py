"""How a run's end is written down: by one transition; by RQ's own code for a job that has what only RQ knows."""

import base64
import json
import re
import zlib
from functools import partial
from typing import Literal, NamedTuple

from redis.exceptions import RedisError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now as utc_now

from app.core import scripts, transitions
from app.core.scripts import STOPPED, Failure, describe_failure
from app.core.transitions import Ending, Run
from app.worker.channel import Header
from app.worker.rq_worker import SteadyWorker


class Assignment(NamedTuple):
    """A job as the work-horse gets it, its function's name, and how often its runs crashed and may crash."""

    run: Run
    header: Header = {}  # noqa: RUF012  # never changed
    data: bytes = b""
    function: str = "?"
    crashes: int = 0
    max_crashes: int | None = None

    @property
    def path(self) -> str:
        """The function's path, without reading the whole payload; an empty one if there is none."""
        found = re.match(rb'\s*\[\s*("(?:[^"\\]|\\.)*")', self.data)
        try:
            return str(json.loads(found[1])) if found else ""
        except ValueError:  # the work-horse will say what is wrong with it
            return ""


class EndingWorker(SteadyWorker):
    """A worker that knows how runs end, its own ones and those that others abandoned."""

    def _ending(
        self,
        outcome: Literal["finished", "failed", "stopped"],
        failure: Failure = Failure(),  # noqa: B008  # immutable
        return_value: str = "",
        progress: str = "",
    ) -> Ending:
        return Ending(outcome, self.settings.result_ttl, self.settings.failure_ttl, return_value, failure, progress)

    def _finish(self, run: Run, ending: Ending, status: str | None = None, *, is_patient: bool = True) -> None:
        """Write the end of a run down, unless Redis has answered it with a status already."""
        insist = partial(self._insist, is_patient=is_patient)
        status = status or insist(lambda: transitions.finish(self.connection, run, ending))
        if status == "rq":
            status = insist(lambda: self._finish_as_rq(run, ending))
        if status != "lost":
            self.successful_job_count += ending.outcome == "finished"
            self.failed_job_count += ending.outcome != "finished"
        self.log.info("%s %s", run, status)

    def _finish_stopped(self, run: Run) -> None:
        self._finish(run, self._ending("stopped", STOPPED))

    def _limit_of(self, assignment: Assignment) -> int:
        return self.settings.max_crashes if assignment.max_crashes is None else assignment.max_crashes

    def _release(self, assignment: Assignment, *, crashed: bool, how: str, is_patient: bool = True) -> None:
        run, crashes, limit = assignment.run, assignment.crashes, self._limit_of(assignment)
        insist = partial(self._insist, is_patient=is_patient)
        message = (
            f"The job's process died {crashes + 1} times, more often than it may; the last time: {how}."
            if crashes
            else f"The job's process died, and the job may not be run again: {how}."
        )
        failure = describe_failure("WorkHorseDied", message)
        status: str = insist(
            lambda: transitions.release(
                self.connection,
                run,
                crashed=crashed,
                limit=limit,
                failure=failure,
                failure_ttl=self.settings.failure_ttl,
            )
        )
        if status == "rq":
            status = insist(lambda: self._finish_as_rq(run, self._ending("failed", failure), crashes + crashed))
        self.failed_job_count += status in ("failed", "stopped") and run.worker == self.name
        what = "crashed" if crashed else "was put back"
        self.log.warning("%s %s (%s); it is %s now", run, what, how, status)

    def _finish_as_rq(self, run: Run, ending: Ending, crashes: int = 0) -> str:
        """End a job that has dependents, repeats or a rate limit: RQ's own code knows them.

        One that crashed so often that it is over is not for RQ to try again, whatever retries it has.
        """
        held = transitions.renew(self.connection, run, self.settings.worker_lease)
        if held == "lost":
            return "lost"
        if held == "stop":
            ending = self._ending("stopped", STOPPED)
        try:
            return self._end_as_rq(run, ending, crashes)
        except RedisError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self.log.exception("%s: RQ cannot end it", run)
        except Exception:  # RQ raises whatever there is for a job, or a dependent, that it cannot read
            self.log.exception("%s: RQ cannot end it", run)
        return transitions.finish(self.connection, run, ending._replace(force=True))

    def _end_as_rq(self, run: Run, ending: Ending, crashes: int) -> str:
        if crashes:  # in Redis, since `finish` looks there if RQ cannot do it
            self.connection.hset(scripts.job_key(run.job_id), mapping={"crashes": crashes, "retries_left": 0})
        queue = next(queue for queue in self.queues if queue.name == run.queue)
        execution = Execution(run.execution, run.job_id, self.connection, run.worker)
        job = Job.fetch(run.job_id, connection=self.connection, serializer=JSONSerializer)
        job.ended_at = utc_now()
        if ending.outcome == "finished":
            job._result = json.loads(base64.b64decode(ending.return_value)) if ending.return_value else None
            self.handle_job_success(job, queue, queue.started_job_registry, execution)
        else:
            self._stopped_job_id = job.id if ending.outcome == "stopped" else None
            trace = zlib.decompress(base64.b64decode(ending.failure.exception)).decode(errors="replace")
            self.connection.hset(job.key, "error", ending.failure.error)
            self.handle_job_failure(job, queue, exc_string=trace, execution=execution)
        stored = self.connection.hget(job.key, "status")
        status = stored.decode() if isinstance(stored, bytes) else ending.outcome  # with a result TTL of 0 it is gone
        if status == JobStatus.STARTED:  # RQ logs what Redis refused, and goes on
            raise RedisError(f"the end of job {job.id} was not written")
        transitions.notify(self.connection, job.id)
        return f"{status}, as RQ does it"
