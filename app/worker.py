"""The worker that `rq worker` runs: takes jobs, has the work-horse run them, renews, finishes, releases, recovers.

RQ's own `work()` loop, signals, registration, suspension and scheduler are around it; overridden is what loses jobs or
costs round trips. Each override names the behaviour of RQ 3.0.0 that it answers.
"""

import base64
import contextlib
import copy
import json
import math
import os
import signal
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import rq
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import worker_registration
from rq.command import parse_payload
from rq.exceptions import StopRequested, TimeoutFormatError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, ReadyJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import now as utc_now
from rq.utils import parse_timeout, utcformat
from rq.worker import WorkerStatus

from app import transitions
from app.config import get_settings
from app.frames import Header
from app.horse_process import HorseDied, WorkHorse
from app.redis_resc import Queue
from app.transitions import DOORBELL_KEY, STOPPED, UNREADABLE, Ending, Failure, Run, describe_failure

#: Seconds between two looks at what is due: leases, delayed jobs, its own heartbeat. Also the longest block.
TICK = 1.0
#: Seconds between two writes of a job's progress.
PROGRESS_EVERY = 0.1
#: Seconds that a function has to end after its timeout was raised inside it, before its process is killed.
KILL_AFTER = 5.0
#: Seconds after its last heartbeat at which a worker counts as dead in `/readyz` and `rq info`.
ALIVE = 35
#: Longest pause, in seconds, between two tries to reach Redis.
LONGEST_PAUSE = 5.0

Answer = TypeVar("Answer")


class Assignment(NamedTuple):
    """A job as the work-horse gets it, and how often its runs crashed before."""

    run: Run
    header: Header
    data: bytes
    crashes: int


class Worker(rq.Worker):
    """An RQ worker whose every change to a job is one atomic transition under a lease."""

    def __init__(self, queues: Any, name: str | None = None, **kwargs: Any) -> None:
        """Take what `rq worker` passes; JSON is forced, whatever serializer it names (RQ's default is pickle)."""
        queues = [queues] if isinstance(queues, str | rq.Queue) else list(queues)
        connection = kwargs.pop("connection", None) or queues[0].connection
        self.settings = get_settings()
        kwargs |= {"serializer": JSONSerializer, "queue_class": Queue, "default_result_ttl": self.settings.result_ttl}
        own = [Queue(queue if isinstance(queue, str) else queue.name, connection=connection) for queue in queues]
        super().__init__(own, name, connection=connection, **kwargs)
        self._horse: WorkHorse | None = None
        self._next_execution = uuid.uuid4().hex
        # One connection of its own: a third of the time that redis-py spends on a command goes into its pool.
        self._redis = connection.client()
        self._taken_ahead: transitions.TakeAnswer | None = None
        self._assignment: Assignment | None = None
        #: The job that a message from the pubsub thread may stop: not one whose end is being written down already.
        self._stoppable_job_id: str | None = None
        self._stop_lock = threading.Lock()
        self._blank_job = Job("blank", connection=connection, serializer=JSONSerializer)
        self._is_suspended = True  # until the first `take` knows
        self._next_tick = self._last_beat = 0.0
        self._stopping_since: float | None = None

    # Around RQ's loop

    def _set_connection(self, connection: Redis) -> Redis:
        """RQ waits 415 s for an answer, and redis-py tries ten times. Nothing here blocks longer than a tick."""
        connection.connection_pool.connection_kwargs["socket_timeout"] = TICK + 4
        connection.set_retry(Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)))
        return connection

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """As RQ's, once there is a work-horse: a worker that cannot load the functions takes no job."""
        try:
            self._ensure_horse()
        except HorseDied as error:
            raise SystemExit(f"The work-horse cannot load the job functions ({error}).") from None
        super().bootstrap(*args, **kwargs)

    def teardown(self) -> None:
        """As RQ's; a Redis that is away does not keep the worker from ending."""
        if self._horse:
            self._horse.bury()
        self._stopping_since = self._stopping_since or time.monotonic()  # a Redis that is away is not waited for long
        try:
            if isinstance(self._taken_ahead, transitions.Taken):  # `--max-jobs`, or a signal just now
                run = Run(self._taken_ahead.job_id, self._next_execution, self._taken_ahead.queue, self.name)
                self._release(run, crashed=False, how="its worker ended before the run began")
            super().teardown()
        except RedisError as error:
            self.log.warning("Worker %s: could not sign off: %s", self.name, error)

    def check_for_suspension(self, burst: bool) -> None:
        """RQ asks Redis before each job; here `take` says it with its answer."""
        if self._is_suspended:
            self._is_suspended = False
            try:
                super().check_for_suspension(burst)
            except RedisError as error:  # RQ's loop would end the worker; `take` will ask again
                self.log.error("Worker %s: %s", self.name, error)

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ sends three commands five times a job; here one round trip a tick.

        A worker that Redis has forgotten (it was flushed, or lost its disk) signs on again.
        """
        if pipeline is not None:
            super().heartbeat(timeout, pipeline)
            return
        if time.monotonic() - self._last_beat < TICK:
            return
        try:
            self._beat()
        except RedisError as error:  # RQ's loop would end the worker, over a Redis that is full for example
            self.log.error("Worker %s: no heartbeat: %s", self.name, error)

    def _beat(self) -> None:
        self._last_beat = time.monotonic()
        self.last_heartbeat = utc_now()
        with self.connection.pipeline() as beat:
            beat.hexists(self.key, "birth")
            beat.hset(self.key, "last_heartbeat", utcformat(self.last_heartbeat))
            beat.expire(self.key, ALIVE)
            known = beat.execute()[0]
            if not known and self.birth_date:
                beat.hset(self.key, mapping=self.serialize())
                worker_registration.register(self, beat)
                beat.execute()

    def clean_registries(self) -> None:
        """As RQ's, without what would fail the jobs of dead workers: `recover` runs them again."""
        for queue in self.queues:
            if queue.acquire_maintenance_lock():
                for registry in (FinishedJobRegistry, FailedJobRegistry, ReadyJobRegistry):
                    registry(queue=queue).cleanup()
                self._clean_canceled(queue)
                worker_registration.clean_worker_registry(queue)
                queue.release_maintenance_lock()
        self.last_cleaned_at = utc_now()  # type: ignore[assignment]  # RQ's own annotation is None

    def _clean_canceled(self, queue: rq.Queue) -> None:
        """Let canceled jobs expire as failed ones do. RQ 3.0.0 keeps those of `Job.cancel` for ever."""
        key, now = CanceledJobRegistry(queue=queue).key, time.time()
        due: Any = self.connection.zrangebyscore(key, "-inf", now, start=0, num=1000)
        job_ids = [job_id.decode(errors="surrogateescape") for job_id in due]
        with self.connection.pipeline() as pipeline:
            for job_id in job_ids:
                pipeline.ttl(transitions.job_key(job_id))
            for job_id, left in zip(job_ids, pipeline.execute(), strict=True):
                if left == -2:  # the job is gone
                    pipeline.zrem(key, job_id)
                    continue
                if left == -1:  # it has no end yet
                    left = self.settings.failure_ttl
                    pipeline.expire(transitions.job_key(job_id), left)
                pipeline.zadd(key, {job_id: now + left})
            pipeline.execute()

    def run_maintenance_tasks(self) -> None:
        """As RQ's; an outage in the middle of it does not end the worker."""
        try:
            super().run_maintenance_tasks()
        except RedisError as error:
            self.log.warning("Worker %s: maintenance put off: %s", self.name, error)
            self.last_cleaned_at = utc_now()  # type: ignore[assignment]  # RQ's own annotation is None

    def request_stop(self, signum: Any, frame: Any) -> None:
        """As RQ's; the running job's time is bounded from now on (WORKER_SHUTDOWN_SECONDS)."""
        self._stopping_since = time.monotonic()
        super().request_stop(signum, frame)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the work-horse and what it started. Called from RQ's pubsub thread, too.

        RQ asks for the process group of `horse_pid`; without a horse that is 0, and the group is the worker's own.
        """
        if horse := self._horse:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(horse.pid, sig)

    def handle_payload(self, message: Any) -> None:
        """As RQ's; a stop is for one job only.

        RQ looks which job runs and kills the work-horse then, which may have gone on to the next job in between.
        """
        payload = parse_payload(message)
        if payload.get("command") != "stop-job":
            super().handle_payload(message)
            return
        with self._stop_lock:
            job_id = payload.get("job_id")
            if not job_id or job_id != self._stoppable_job_id:  # it has ended, or `renew` will say so
                self.log.info("Worker %s: does not run job %s, which was to be stopped", self.name, job_id)
                return
            self._stopped_job_id = self._stoppable_job_id
            self.kill_horse()

    def get_current_job_id(self) -> str | None:
        """The job that runs. RQ asks Redis where it knows of none, and would kill a work-horse that has not begun."""
        return next((execution.job_id for execution in list(self.executions.values())), None)

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """As RQ's, which ends the thread on a time-out or a malformed command, and never hears another one."""
        self.log.error("Worker %s: a command was not heard or not understood: %r", self.name, exc)
        if isinstance(exc, RedisError):
            time.sleep(2 * TICK)

    def _is_out_of_time(self) -> bool:
        since = self._stopping_since
        return since is not None and time.monotonic() - since > self.settings.worker_shutdown_seconds

    def set_shutdown_requested_date(self) -> None:
        """As RQ's, which runs inside the signal handler: an outage must not raise there."""
        try:
            super().set_shutdown_requested_date()
        except RedisError:
            self.log.debug("Worker %s: could not note the shutdown request", self.name)

    # Idle

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, rq.Queue] | None:
        """Take a job under a lease; wait for one on the doorbell.

        RQ pops first and writes down who has the job later, from another process: a worker killed between the two
        loses it (queue.py:1783, rq#2236).
        """
        idle_since, pause = time.monotonic(), 0.5
        while True:
            # From here to the end of the job a signal only asks (RQ's `_shutdown`): it cannot raise between a `take`
            # that Redis has carried out and the run.
            self._state = WorkerStatus.BUSY
            if self._stop_requested:
                raise StopRequested
            try:
                self._tick()
                taken, self._taken_ahead = self._taken_ahead, None
                if not taken:
                    self._ensure_horse()
                    taken = transitions.take(
                        self._redis, self.name, self._next_execution, self.settings.worker_lease, self._queue_order()
                    )
                if isinstance(taken, transitions.Taken):
                    if job := self._read_job(taken):
                        return job
                    continue
                if isinstance(taken, transitions.Skipped):
                    self.log.error("%s: job %s set aside: %s", taken.queue, taken.job_id, taken.reason)
                    continue
                if isinstance(taken, transitions.Again):
                    continue
                self._state = WorkerStatus.IDLE
                if isinstance(taken, transitions.Suspended):
                    self._is_suspended = True
                    self.check_for_suspension(burst=timeout is None)
                    continue
                idle = time.monotonic() - idle_since
                if timeout is None or (max_idle_time is not None and idle >= max_idle_time):
                    return None
                self.connection.xread({DOORBELL_KEY: taken.rung}, block=self._milliseconds_to_tick())
                pause = 0.5
            except (RedisError, HorseDied, OSError) as error:  # OSError: no process could be started
                self._state = WorkerStatus.IDLE
                self.log.error("Worker %s: %s; trying again in %.1f s", self.name, error, pause)
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _milliseconds_to_tick(self) -> int:
        return max(1, math.ceil((self._next_tick - time.monotonic()) * 1000))  # 0 is for ever

    def _queue_order(self) -> list[str]:
        return [queue.name for queue in self._ordered_queues]

    def _ensure_horse(self) -> WorkHorse:
        if self._horse and self._horse.has_died():  # while idle: no job's fault
            self.log.error("Worker %s: the idle work-horse died: %s", self.name, self._kill_horse())
        if self._horse is None:
            self._horse = WorkHorse()
            self._horse_pid = self._horse.pid
        return self._horse

    def _read_job(self, taken: transitions.Taken) -> tuple[Job, rq.Queue] | None:
        """The job as RQ's object; None if it cannot be run, and was failed for that."""
        queue = next(queue for queue in self.queues if queue.name == taken.queue)
        run = Run(taken.job_id, self._next_execution, taken.queue, self.name)
        self._next_execution = uuid.uuid4().hex
        try:
            # Not RQ's `restore`, which takes a tenth of a millisecond and trips over fields that nobody needs here.
            job = copy.copy(self._blank_job)
            job.id = taken.job_id
            self._assignment = self._read_assignment(run, taken)
        except (ValueError, TimeoutFormatError) as error:
            self.log.error("%s: job %s set aside: %r", taken.queue, taken.job_id, error)
            failure = describe_failure("UnreadableJob", f"The job cannot be run: {error!r}.")
            # Not RQ's way, whatever the job has: that way the hooks that it names would be called.
            self._finish(run, self._ending("failed", failure)._replace(force=True))
            return None
        function = (taken.fields.function or b"?").decode(errors="replace")
        self.log.info("%s: %s (%s)", taken.queue, function, taken.job_id)
        self.reorder_queues(reference_queue=queue)
        return job, queue

    def _read_assignment(self, run: Run, taken: transitions.Taken) -> Assignment:
        fields = taken.fields
        JobStatus((fields.status or b"").decode())  # ValueError: not a word of RQ's
        if any(fields.callbacks):
            raise ValueError("it names a callback or a webhook of RQ, and only job functions may be run")
        if fields.data is None:
            raise ValueError("it has no data")
        data = fields.data
        with contextlib.suppress(zlib.error):  # RQ reads uncompressed data too
            data = zlib.decompress(data)
        header = {
            "job_id": run.job_id,
            "queue": run.queue,
            "worker": self.name,
            "timeout": (fields.timeout and parse_timeout(fields.timeout.decode())) or self.settings.job_timeout,
            "enqueued_at": (fields.enqueued_at or b"").decode(),
            "started_at": taken.started_at,
        }
        return Assignment(run, header, data, int(fields.crashes or 0))

    def _tick(self) -> None:
        """Once a tick: what dead workers left, what is due, and the own heartbeat."""
        if time.monotonic() < self._next_tick:
            return
        self._next_tick = time.monotonic() + TICK
        self.heartbeat()
        names = [queue.name for queue in self.queues]
        for run, crashes in transitions.recover(self.connection, names):
            self._release(run, crashed=True, how="its worker died", crashes=crashes)
        due = transitions.promote(self.connection, names).due
        # A job that is due before the next tick moves it forward; so delays are right to some milliseconds.
        self._next_tick = time.monotonic() + (TICK if due is None else min(TICK, due))
        transitions.sweep(self.connection)

    # A job

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        """Have the work-horse run the job, and write down what came of it."""
        assert self._assignment
        run = self._assignment.run
        self._stoppable_job_id = run.job_id
        # What RQ's other commands look at.
        self.executions[run.execution] = Execution(run.execution, job.id, self.connection, self.name)
        try:
            self._run(self._assignment)
        except SystemExit:  # a second signal (RQ's cold shutdown): the job is not to blame
            self._release(run, crashed=False, how="its worker was told to end at once")
            raise
        finally:
            self._close_to_stops(run)
            self.executions.pop(run.execution, None)

    def _close_to_stops(self, run: Run) -> bool:
        """From now on no message stops the run; True if one did before, and the work-horse was killed for it."""
        with self._stop_lock:
            self._stoppable_job_id = None
            is_stopped, self._stopped_job_id = self._stopped_job_id == run.job_id, None
        if is_stopped and self._horse:
            self._kill_horse()
        return is_stopped

    def _run(self, assignment: Assignment) -> None:
        run, header, data, crashes = assignment
        limit = header["timeout"]
        start = last_renewal = last_progress = time.monotonic()
        progress = ""
        try:
            horse = self._ensure_horse()
            horse.channel.send(header, data, timeout=KILL_AFTER)
            while True:
                frame = horse.channel.receive(PROGRESS_EVERY if progress else TICK)
                if frame and "outcome" in frame[0]:
                    self._end(run, *frame, progress)
                    return
                if frame is None and horse.has_died():
                    raise EOFError  # the socket is still open in a process that the job forked
                if frame:
                    progress = json.dumps(frame[0]["progress"])
                now = time.monotonic()
                due = progress and now - last_progress >= PROGRESS_EVERY
                # Each tick, which is oftener than the lease needs: a stop whose message was missed is seen here.
                if due or now - last_renewal >= TICK:
                    held = self._renew(run, progress)
                    if held != "held":
                        self._kill_horse()
                        if held == "stop":
                            self._finish_stopped(run)
                        else:
                            message = "%s: job %s is lost to this worker; its run was ended"
                            self.log.warning(message, run.queue, run.job_id)
                        return
                    last_renewal = last_progress = now
                    progress = ""
                if limit > 0 and now - start > limit + KILL_AFTER:
                    self._kill_horse()
                    message = f"The job ran longer than its limit of {limit} s, and its process was killed."
                    self._fail(run, "JobTimeoutException", message)
                    return
                if self._is_out_of_time():
                    self._kill_horse()
                    self._release(run, crashed=False, how="its worker was told to end")
                    return
                self._tick_quietly()
        except (EOFError, OSError, HorseDied) as error:  # OSError: it was gone, or did not read, as we sent
            how = self._kill_horse() if self._horse else str(error)
            if self._close_to_stops(run):
                self._finish_stopped(run)
                return
            self._release(run, crashed=True, how=how, crashes=crashes)

    def _finish_stopped(self, run: Run) -> None:
        self._finish(run, self._ending("stopped", STOPPED))

    def _end(self, run: Run, header: Header, body: bytes, progress: str) -> None:
        """Write down what the work-horse sent."""
        self._close_to_stops(run)
        if header["outcome"] == "finished":
            value = "" if body == b"null" else base64.b64encode(body).decode()
            ending = self._ending("finished", return_value=value, progress=progress)
        else:
            trace, error = body.decode(errors="replace"), header["error"]  # it may be cut in a character
            self.log.error("%s: job %s raised %s\n%s", run.queue, run.job_id, error["type"], trace)
            failure = describe_failure(error["type"], error["message"], trace)
            ending = self._ending("failed", failure, progress=progress)
        self._finish_and_take(run, ending)

    def _finish_as_rq(self, run: Run, ending: Ending) -> str:
        """End a job that has dependents, repeats or a rate limit: RQ's own code knows them."""
        held = transitions.renew(self.connection, run, self.settings.worker_lease)
        if held == "lost":
            return "lost"
        if held == "stop":
            ending = self._ending("stopped", STOPPED)
        queue = next(queue for queue in self.queues if queue.name == run.queue)
        execution = Execution(run.execution, run.job_id, self.connection, run.worker)
        try:
            job = Job.fetch(run.job_id, connection=self.connection, serializer=JSONSerializer)
        except UNREADABLE:  # RQ cannot read it, and would be of no help
            return transitions.finish(self.connection, run, ending._replace(force=True))
        job.ended_at = utc_now()
        if ending.outcome == "finished":
            job._result = json.loads(base64.b64decode(ending.return_value)) if ending.return_value else None
            self.handle_job_success(job, queue, queue.started_job_registry, execution)
        else:
            if ending.outcome == "stopped":
                self._stopped_job_id = job.id
            trace = zlib.decompress(base64.b64decode(ending.failure.exception)).decode(errors="replace")
            self.connection.hset(job.key, "error", ending.failure.error)
            self.handle_job_failure(job, queue, exc_string=trace, execution=execution)
        stored = self.connection.hget(job.key, "status")
        status = stored.decode() if isinstance(stored, bytes) else ending.outcome  # with a result TTL of 0 it is gone
        if status == JobStatus.STARTED:  # RQ logs what Redis refused, and goes on
            raise RedisError(f"the end of job {job.id} was not written")
        return f"{status}, as RQ does it"

    def _fail(self, run: Run, kind: str, message: str) -> None:
        self.log.error("%s: job %s failed: %s", run.queue, run.job_id, message)
        self._finish(run, self._ending("failed", describe_failure(kind, message)))

    def _kill_horse(self) -> str:
        """End the work-horse and whatever it started; the next job gets a new one. Returns how it ended."""
        assert self._horse
        self.kill_horse()
        how = self._horse.bury()
        self._horse, self._horse_pid = None, 0
        return how

    # Redis, whether it is there or not

    def _insist(self, call: Callable[[], Answer]) -> Answer:
        """Do it as soon as Redis lets us: what a job computed during an outage is not thrown away."""
        pause = 0.1
        while True:
            try:
                return call()
            except RedisError as error:
                if self._is_out_of_time():
                    raise
                self.log.error("Worker %s: %s; trying again in %.1f s", self.name, error, pause)
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _renew(self, run: Run, progress: str) -> Literal["held", "lost", "stop"]:
        try:
            return transitions.renew(self.connection, run, self.settings.worker_lease, progress)
        except RedisError as error:  # the lease may yet hold; whether it did, `finish` will learn
            self.log.error("Worker %s: could not renew the lease of job %s: %s", self.name, run.job_id, error)
            return "held"

    def _tick_quietly(self) -> None:
        try:
            self._tick()
        except RedisError as error:
            self.log.error("Worker %s: %s", self.name, error)

    def _ending(
        self,
        outcome: Literal["finished", "failed", "stopped"],
        failure: Failure = Failure(),  # noqa: B008  # immutable
        return_value: str = "",
        progress: str = "",
    ) -> Ending:
        return Ending(outcome, self.settings.result_ttl, self.settings.failure_ttl, return_value, failure, progress)

    def _finish(self, run: Run, ending: Ending) -> None:
        self._close(run, ending, self._insist(lambda: transitions.finish(self.connection, run, ending)))

    def _close(self, run: Run, ending: Ending, status: str) -> None:
        if status == "rq":
            status = self._insist(lambda: self._finish_as_rq(run, ending))
        self.log.info("%s: job %s %s", run.queue, run.job_id, status)

    def _finish_and_take(self, run: Run, ending: Ending) -> None:
        """Finish, and take the next job in the same round trip; `dequeue_job_and_maintain_ttl` finds it.

        One trip less a job was worth a third more jobs/s; the next job's lease begins as it is taken, as ever.
        """
        if self._stop_requested:
            self._finish(run, ending)
            return
        status, self._taken_ahead = self._insist(
            lambda: transitions.finish_and_take(
                self._redis, run, ending, self._next_execution, self.settings.worker_lease, self._queue_order()
            )
        )
        self._close(run, ending, status)

    def _release(self, run: Run, *, crashed: bool, how: str, crashes: int = 0) -> None:
        message = f"The job's process died {crashes + 1} times, more often than it may; the last time: {how}."
        failure = describe_failure("WorkHorseDied", message)
        status: str = self._insist(
            lambda: transitions.release(
                self.connection,
                run,
                crashed=crashed,
                limit=self.settings.max_crashes,
                failure=failure,
                failure_ttl=self.settings.failure_ttl,
            )
        )
        if status == "rq":
            status = self._insist(lambda: self._finish_as_rq(run, self._ending("failed", failure)))
        self.log.warning("%s: job %s is %s: %s", run.queue, run.job_id, status, how)
