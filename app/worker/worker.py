"""The worker that `rq worker` runs: takes jobs, has the work-horse run them, renews, finishes, releases, recovers.

RQ's own `work()` loop, signals, registration and suspension are around it, made steady in rq_worker.py; overridden here
is what loses jobs or costs round trips. Each override names the behaviour of RQ 3.0.0 that it answers.
"""

import base64
import contextlib
import copy
import json
import math
import signal
import threading
import time
import uuid
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import rq
from redis.exceptions import RedisError, ResponseError
from rq.command import parse_payload
from rq.exceptions import StopRequested, TimeoutFormatError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import parse_timeout
from rq.worker import WorkerStatus

from app.core import transitions
from app.core.scripts import DOORBELL_KEY, describe_failure
from app.core.transitions import Ending, Run
from app.logs import configure_logs, start_sentry
from app.worker.channel import Header
from app.worker.fork_server import ForkServerDied
from app.worker.horse_process import HorseDied, WorkHorse
from app.worker.horses import Stable
from app.worker.outcomes import Assignment, EndingWorker
from app.worker.rq_worker import LONGEST_PAUSE, TICK

#: Seconds between two looks at the memory that a work-horse uses.
MEMORY_EVERY = 0.2
#: Seconds between two writes of a job's progress.
PROGRESS_EVERY = 0.1
#: Seconds without a tick, at least, after which no job is taken from its worker for a while: Redis was away, and live
#: workers may extend their leases first, or end their jobs with a result that they kept.
OUTAGE = 5.0
#: Seconds that a function has to end after its timeout was raised inside it, before its process is killed.
KILL_AFTER = 5.0


class Unsettled(NamedTuple):
    """The end of a run that was sent to Redis, and whether the answer can still be read."""

    run: Run
    ending: Ending
    is_answered: bool


class Worker(EndingWorker):
    """An RQ worker whose every change to a job is one atomic transition under a lease."""

    def __init__(self, queues: Any, name: str | None = None, **kwargs: Any) -> None:
        """Take what `rq worker` passes."""
        super().__init__(queues, name, **kwargs)
        self._stable = Stable(self.settings, self.log)
        self._next_execution = uuid.uuid4().hex
        # One connection of its own: a third of the time that redis-py spends on a command goes into its pool.
        self._redis = self.connection.client()
        self._taken_ahead: transitions.TakeAnswer | None = None
        #: The end of the last job, while it is not known how it was written down.
        self._unsettled: Unsettled | None = None
        self._assignment: Assignment | None = None
        #: The run that a message from the pubsub thread may stop: not one whose end is being written down already.
        self._stoppable_run: Run | None = None
        #: Whether one did. RQ's `_stopped_job_id` may be that of an earlier job, which RQ's code ends meanwhile.
        self._is_stopped = False
        self._stop_lock = threading.Lock()
        self._blank_job = Job("blank", connection=self.connection, serializer=JSONSerializer)
        self._next_tick = self._last_tick = self._trusts_leases_from = 0.0
        #: While a job runs, Redis is not asked before this time, as it just did not answer: the job's limits hold too.
        self._patient_until = 0.0
        #: When a `take` was first sent, whose answer is not there yet; and when that of the job in hand was.
        self._asked_at = self._taken_at = 0.0
        #: Whether the job in hand was sent to the work-horse.
        self._has_begun = False

    # Around RQ's loop

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """As RQ's, once there is a work-horse: a worker that cannot load the functions takes no job."""
        configure_logs("rq.worker", "rq.job")  # RQ's command has given them handlers
        self._stable.open()  # there are no threads yet
        start_sentry(self.settings)
        super().bootstrap(*args, **kwargs)

    def teardown(self) -> None:
        """As RQ's; a Redis that is away does not keep the worker from ending."""
        self._stable.close()
        self._stopping_since = self._stopping_since or time.monotonic()  # a Redis that is away is not waited for long
        try:
            self._settle()
            if isinstance(self._taken_ahead, transitions.Taken):  # `--max-jobs`, or a signal just now
                run = Run(self._taken_ahead.job_id, self._next_execution, self._taken_ahead.queue, self.name)
                self._release(Assignment(run), crashed=False, how="its worker ended before the run began")
        except RedisError as error:  # its lease runs out
            self.log.warning("Worker %s: could not put a job back: %s", self.name, error)
        super().teardown()

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the work-horse and what it started. Called from RQ's pubsub thread, too.

        RQ asks for the process group of `horse_pid`; without a horse that is 0, and the group is the worker's own.
        """
        if horse := self._stable.horse:
            horse.kill(sig)

    @property
    def horse_pid(self) -> int:
        """The work-horse's process id, for RQ; 0 while there is none."""
        horse = self._stable.horse
        return horse.pid if horse else 0

    def handle_payload(self, message: Any) -> None:
        """As RQ's; a stop is for one job only.

        RQ looks which job runs and kills the work-horse then, which may have gone on to the next job in between.
        """
        payload = parse_payload(message)
        if payload.get("command") not in ("stop-job", "stop-execution"):
            super().handle_payload(message)
            return
        with self._stop_lock:
            run, job_id = self._stoppable_run, payload.get("job_id")
            # RQ's `stop-job` names no execution; ours does (cancel.lua), so that one that is read late, after the job
            # was retried, is not taken for the new run.
            execution = payload.get("execution") or payload.get("execution_id") or (run and run.execution)
            if not run or run.job_id != job_id or run.execution != execution:
                self.log.info("Worker %s: does not run job %s, which was to be stopped", self.name, job_id)
                return
            self._is_stopped = True
            self.kill_horse()

    def get_current_job_id(self) -> str | None:
        """The job that runs. RQ asks Redis where it knows of none, and would kill a work-horse that has not begun."""
        return next((execution.job_id for execution in list(self.executions.values())), None)

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
            self._heed_stop()
            try:
                self._tick()
                taken, self._taken_ahead = self._taken_ahead, None
                if not isinstance(taken, transitions.Taken):
                    self._settle()
                    if isinstance(taken, transitions.Nothing) and (timeout is None or max_idle_time is not None):
                        taken = None  # it was taken before the last job ended, which may wait again
                if taken is None:
                    self._stable.ready_horse(self._while_loading)
                    self._heed_stop()  # what was before may have taken its time
                    self._asked_at = self._asked_at or time.monotonic()
                    taken = transitions.take(
                        self._redis, self.name, self._next_execution, self.settings.worker_lease, self._queue_order()
                    )
                if isinstance(taken, transitions.Taken):
                    self._taken_at, self._asked_at = self._asked_at, 0.0
                    if job := self._read_job(taken):
                        return job
                    continue
                self._asked_at = 0.0
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
                if self.should_run_maintenance_tasks:  # RQ's loop looks between two jobs only, and there may be none
                    self.run_maintenance_tasks()
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

    def _read_job(self, taken: transitions.Taken) -> tuple[Job, rq.Queue] | None:
        """The job as RQ's object; None if it cannot be run, and was failed for that."""
        queue = next(queue for queue in self.queues if queue.name == taken.queue)
        request_id = (taken.fields.request_id or b"").decode(errors="replace")
        run = Run(taken.job_id, self._next_execution, taken.queue, self.name, request_id)
        self._next_execution = uuid.uuid4().hex
        try:
            # Not RQ's `restore`, which takes a tenth of a millisecond and trips over fields that nobody needs here.
            job = copy.copy(self._blank_job)
            job.id = taken.job_id
            self._assignment = self._read_assignment(run, taken)
        except (ValueError, TimeoutFormatError) as error:
            self.log.error("%s set aside: %r", run, error)
            failure = describe_failure("UnreadableJob", f"The job cannot be run: {error!r}.")
            # Not RQ's way, whatever the job has: that way the hooks that it names would be called.
            self._finish(run, self._ending("failed", failure)._replace(force=True))
            return None
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
            "request_id": run.request_id,
            "queue": run.queue,
            "worker": self.name,
            "timeout": (fields.timeout and parse_timeout(fields.timeout.decode())) or self.settings.job_timeout,
            "enqueued_at": (fields.enqueued_at or b"").decode(),
            "started_at": taken.started_at,
        }
        function = (fields.function or b"?").decode(errors="replace")
        return Assignment(run, header, data, function, int(fields.crashes or 0))

    def _tick(self) -> None:
        """Once a tick: what dead workers left, what is due, and the own heartbeat."""
        if time.monotonic() < self._next_tick:
            return
        self._next_tick = time.monotonic() + TICK
        if time.monotonic() - self._last_beat >= TICK:
            try:
                self._beat()
            except ResponseError as error:  # Redis is full: what is below, and the jobs, may well go on
                self.log.error("Worker %s: no heartbeat: %s", self.name, error)
        if horse := self._stable.horse:
            horse.note_time()
        names = [queue.name for queue in self.queues]
        now = time.monotonic()
        if self._last_tick and now - self._last_tick > max(OUTAGE, self.settings.worker_lease / 2):
            self._trusts_leases_from = now + 2 * LONGEST_PAUSE
        if now >= self._trusts_leases_from:
            for run, crashes, max_crashes in transitions.recover(self.connection, names):
                abandoned = Assignment(run, crashes=crashes, max_crashes=max_crashes)
                how = f"its worker, {run.worker}, died or was cut off"
                try:  # once: the next tick comes soon, and a job that runs here is not to be kept waiting
                    self._release(abandoned, crashed=True, how=how, is_patient=False)
                except ResponseError as error:
                    self.log.error("%s cannot be released: %s", run, error)
        self._last_tick = now
        due = transitions.promote(self.connection, names).due
        # A job that is due before the next tick moves it forward; so delays are right to some milliseconds.
        self._next_tick = time.monotonic() + (TICK if due is None else min(TICK, due))
        transitions.sweep(self.connection)

    def _heed_stop(self) -> None:
        """No job is begun any more once the worker was told to end."""
        # The latter if an `except Exception` ate the StopRequested that RQ's handler raises in an idle worker.
        if self._stop_requested or self._stopping_since is not None:
            raise StopRequested

    def _while_loading(self) -> None:
        """What goes on while a work-horse loads the functions: minutes, if they load a model."""
        self._heed_stop()
        if time.monotonic() < self._patient_until:
            return
        self._quietly(partial(self._settle, is_patient=False))
        if run := self._stoppable_run:
            self._renew(run, "")  # whether it is held is asked again before the run begins
        self._quietly(self._tick)

    # A job

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        """Have the work-horse run the job, and write down what came of it.

        RQ forks a process for each job, which writes down that it has it, and ends the run's records, in several steps.
        """
        assert self._assignment
        run = self._assignment.run
        self._stoppable_run, self._has_begun = run, False
        start = time.monotonic()
        # What RQ's other commands look at.
        self.executions[run.execution] = Execution(run.execution, job.id, self.connection, self.name)
        try:
            self._run()
        except ResponseError as error:
            self._complain(run, error)
        except ForkServerDied:
            self.kill_horse()  # before another worker may take the job
            self._release(self._assignment, crashed=self._has_begun, how="the fork server died")
            raise
        except SystemExit:  # a second signal (RQ's cold shutdown)
            self._put_back("its worker was told to end at once")
            raise
        finally:
            self._close_to_stops()
            self.executions.pop(run.execution, None)
            self.total_working_time += time.monotonic() - start

    def _complain(self, run: Run, error: ResponseError) -> None:
        # A key of another type: `recover` will find the run, and set it aside.
        self.log.error("%s: its end cannot be written: %s", run, error)

    def _close_to_stops(self) -> bool:
        """From now on no message stops the run; True if one did before, and the work-horse was killed for it."""
        with self._stop_lock:
            self._stoppable_run = None
            is_stopped, self._is_stopped = self._is_stopped, False
        if is_stopped and self._stable.horse:
            self._stable.bury()
        return is_stopped

    def _run(self) -> None:
        assert self._assignment
        run = self._assignment.run
        try:
            horse = self._stable.ready_horse(self._while_loading)
            path = self._assignment.path if horse.crash_limits or horse.fresh else ""
            own_limit = horse.crash_limits.get(path)
            if is_fresh := self.settings.worker_fresh_process or path in horse.fresh:
                horse = self._stable.ready_horse(self._while_loading, is_fresh=True)
            self._assignment = assignment = self._assignment._replace(max_crashes=own_limit)
            # The function's limit is written down before the run begins: another worker may have to know. And what was
            # taken a while ago, or must not run twice, is run only if it is still this worker's.
            is_old = time.monotonic() - self._taken_at > TICK
            if own_limit is not None or is_old or self.settings.max_crashes == 0:
                renew = partial(transitions.renew, self.connection, run, self.settings.worker_lease, "", own_limit)
                if (held := self._insist(renew)) != "held":
                    self._end_unheld(run, held)
                    return
            if self._is_stopped:  # as the work-horse was started
                self._end_stopped(run)
                return
            self._heed_stop()
            self._has_begun = True
            horse.jobs, horse.is_spent = horse.jobs + 1, is_fresh
            horse.channel.send(assignment.header, assignment.data, timeout=KILL_AFTER)
            if is_fresh:
                self._stable.prepare_next()  # it begins to load
            self._watch(horse, assignment)
        except StopRequested:
            if not self._end_stopped(run):
                self._put_back("its worker was told to end before it began")
        except HorseDied as error:  # as it was started
            if not self._end_stopped(run):
                self._release(self._assignment, crashed=False, how=f"no work-horse: {error}")
        except (EOFError, OSError) as error:  # OSError: it was gone, or did not read, as we sent
            if isinstance(error, TimeoutError):
                self._stable.bury()
                how = f"it did not take the job within {KILL_AFTER:.0f} s"
            else:
                how = self._stable.bury() if self._stable.horse else str(error)
            if not self._end_stopped(run):
                self._release(self._assignment, crashed=self._has_begun, how=how)

    def _end_stopped(self, run: Run) -> bool:
        """Whether a message stopped the run; it ends `stopped` then."""
        is_stopped = self._close_to_stops()
        if is_stopped:
            self._finish_stopped(run)
        return is_stopped

    def _watch(self, horse: WorkHorse, assignment: Assignment) -> None:
        """Renew the lease and keep the limits until the run has an end, and write that down.

        Raises:
            EOFError: the work-horse died.
        """
        run, limit, progress = assignment.run, assignment.header["timeout"], ""
        start = last_renewal = last_progress = next_look = time.monotonic()
        is_told = False
        patience = MEMORY_EVERY if self.settings.worker_max_memory else TICK
        while True:
            if self._unsettled and time.monotonic() >= self._patient_until:
                self._quietly(partial(self._settle, is_patient=False))
            # All that is there: an outcome may stand behind old progress, after Redis kept us waiting.
            frame = horse.channel.receive(PROGRESS_EVERY if progress else patience)
            if frame is None:
                # It may have sent the outcome as we looked away. The socket may be open still in what the job forked.
                if horse.has_died() and not (frame := horse.channel.receive(0)):
                    raise EOFError
                if not is_told:  # a line in the log takes 50 µs: a short job has but the one of its end
                    self.log.info("%s, %s, runs", run, assignment.function)
                    is_told = True
            reading_since = time.monotonic()
            while frame:
                if "outcome" in frame[0]:
                    self._end(run, *frame, progress)
                    return
                if frame[0]["job_id"] == run.job_id:  # an earlier one may have left a thread that had begun to report
                    progress = json.dumps(frame[0]["progress"])
                if time.monotonic() - reading_since > PROGRESS_EVERY:
                    break
                frame = horse.channel.receive(0)
            now = time.monotonic()
            due = progress and now - last_progress >= PROGRESS_EVERY
            # Each tick, which is oftener than the lease needs: a stop whose message was missed is seen here.
            if (due or now - last_renewal >= TICK) and now >= self._patient_until:
                if (held := self._renew(run, progress)) != "held":
                    self._stable.bury()
                    self._end_unheld(run, held)
                    return
                last_renewal = last_progress = now
                progress = ""
            if limit > 0 and now - start > limit + KILL_AFTER:
                self._stable.bury()
                message = f"The job ran longer than its limit of {limit} s, and its process was killed."
                self.log.error("%s failed: %s", run, message)
                self._finish(run, self._ending("failed", describe_failure("JobTimeoutException", message)))
                return
            is_over = now >= next_look and self._stable.is_over_memory()
            next_look = now + MEMORY_EVERY if now >= next_look else next_look
            if is_over:
                self._stable.bury()
                self._release(assignment, crashed=True, how=self._stable.too_much_memory)
                return
            if self._is_out_of_time():
                self._stable.bury()
                self._put_back("its worker was told to end")
                return
            if now >= self._patient_until:
                self._quietly(self._tick)

    def _end_unheld(self, run: Run, held: Literal["lost", "stop"]) -> None:
        """Nothing more is written for a run that lost its lease; one that was canceled is stopped."""
        if held == "stop":
            self._finish_stopped(run)
        else:
            self.log.warning("%s is lost to this worker; its run was ended", run)

    def _end(self, run: Run, header: Header, body: bytes, progress: str) -> None:
        """Write down what the work-horse sent."""
        self._close_to_stops()
        if header["outcome"] == "finished":
            value = "" if body == b"null" else base64.b64encode(body).decode()
            ending = self._ending("finished", return_value=value, progress=progress)
        else:
            trace, error = body.decode(errors="replace"), header["error"]  # it may be cut in a character
            log = self.log.warning if header["is_foreseen"] else self.log.error
            log("%s raised %s", run, error["type"], extra={"trace": trace})
            failure = describe_failure(error["type"], error["message"], trace)
            ending = self._ending("failed", failure, progress=progress)._replace(after=header["after"])
        self._finish_and_take(run, ending)

    # Redis, whether it is there or not

    def _renew(self, run: Run, progress: str) -> Literal["held", "lost", "stop"]:
        try:
            return transitions.renew(self.connection, run, self.settings.worker_lease, progress)
        except RedisError as error:  # the lease may yet hold; whether it did, `finish` will learn
            self.log.error("%s: its lease could not be renewed: %s", run, error)
            self._be_patient(error)
            return "held"

    def _quietly(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RedisError as error:
            self.log.error("Worker %s: %s", self.name, error)
            self._be_patient(error)

    def _be_patient(self, error: RedisError) -> None:
        if not isinstance(error, ResponseError):  # which is an answer
            self._patient_until = time.monotonic() + min(2 * TICK, self.settings.worker_lease / 6)

    def _finish_and_take(self, run: Run, ending: Ending) -> None:
        """Finish, and take the next job with it; `dequeue_job_and_maintain_ttl` finds it.

        The next job is with the work-horse before the last one is settled; its lease begins as it is taken, as ever.
        """
        self._settle()
        if self._stop_requested:
            self._finish(run, ending)
            return
        self._asked_at = time.monotonic()
        try:
            self._taken_ahead = transitions.take_and_finish(
                self._redis, run, ending, self._next_execution, self.settings.worker_lease, self._queue_order()
            )
            self._unsettled = Unsettled(run, ending, is_answered=True)
        except RedisError as error:
            self.log.error("Worker %s: %s", self.name, error)
            self._unsettled = Unsettled(run, ending, is_answered=False)

    def _settle(self, *, is_patient: bool = True) -> None:
        """Learn how the last job's end was written down; write it again if the answer was lost.

        Raises:
            RedisError: Redis did not do it, and is not to be waited for.
        """
        if not self._unsettled:
            return
        (run, ending, is_answered), status = self._unsettled, None
        self._unsettled = Unsettled(run, ending, is_answered=False)  # an answer can be read once
        if is_answered:
            with contextlib.suppress(RedisError):
                status = transitions.read_finish(self._redis)
        try:
            self._finish(run, ending, status, is_patient=is_patient)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._complain(run, error)
        self._unsettled = None

    def _put_back(self, how: str) -> None:
        """Let the job in hand wait again, as nobody's fault; one that has begun and must not run twice is failed."""
        assert self._assignment
        must_not = self._has_begun and self._limit_of(self._assignment) == 0
        self._release(self._assignment, crashed=must_not, how=how)
