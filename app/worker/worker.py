"""The worker that `rq worker` runs: takes jobs under a lease, has its work-horse run them, and recovers lost ones.

RQ's own `work()` loop, signals, registration and suspension are around it (rq_worker.py makes them resilient). The
methods overridden here are those of RQ that lose jobs or cost round trips; each docstring names the behaviour of RQ
3.0.0.
"""

import copy
import math
import signal
import time
from functools import partial
from typing import Any

import rq
from redis.exceptions import RedisError, ResponseError
from rq.command import parse_payload
from rq.exceptions import TimeoutFormatError
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import WorkerStatus

from app.core import transitions
from app.core.scripts import DOORBELL_KEY, describe_failure
from app.core.transitions import Again, Ending, Nothing, Skipped, Suspended
from app.logs import configure_logs, start_sentry
from app.worker import work_horse
from app.worker.channel import wait_for_any
from app.worker.fork_server import ForkServerDied
from app.worker.horses import HorseDied, WorkHorses
from app.worker.outcomes import Crashed, Crashes, Failed, Finished, Outcome, OutcomeWriter, PutBack, choose_transition
from app.worker.rq_worker import LONGEST_PAUSE, TICK, ResilientWorker
from app.worker.run import JobRun
from app.worker.take_ahead import NextAnswer, NextJob, TakeAhead

#: Seconds without a tick after which leases are not trusted for a while: Redis was away, and live workers may extend
#: their leases first, or end their jobs with a result that they kept.
OUTAGE = 5.0
#: Seconds before a worker asks Redis again after a failed call, at first; doubled each time.
FIRST_PAUSE = 0.5


class Worker(ResilientWorker):
    """An RQ worker whose every change to a job is one atomic transition under a lease."""

    def __init__(self, queues: Any, name: str | None = None, **kwargs: Any) -> None:
        """Take what `rq worker` passes."""
        super().__init__(queues, name, **kwargs)
        self._horses = WorkHorses(self.settings, self.log, work_horse.main)
        self._outcomes = OutcomeWriter(self, self.settings, self.retry_until_stored)
        lease = self.settings.worker_lease
        self._ahead = TakeAhead(self.connection, self.log, self.name, lease, self._queue_order, self._outcomes)
        #: The runs in hand. There is one at a time; the loop would look after several.
        self._runs: list[JobRun] = []
        self._blank_job = Job("blank", connection=self.connection, serializer=JSONSerializer)
        self._next_tick = self._last_tick = self._trusts_leases_from = 0.0

    # Around RQ's loop

    def bootstrap(self, *args: Any, **kwargs: Any) -> None:
        """As RQ's, once there is a work-horse: a worker that cannot load the functions takes no job."""
        configure_logs("rq.worker", "rq.job")  # RQ's command has given them handlers
        self._horses.open()  # there are no threads yet
        start_sentry(self.settings)
        super().bootstrap(*args, **kwargs)

    def teardown(self) -> None:
        """As RQ's; a Redis that is away does not keep the worker from ending."""
        self._horses.close()
        self.start_shutdown_clock()  # bounds the wait for a Redis that is away
        try:
            self._ahead.confirm_last_finish()
            taken = self._ahead.pop_answer()
            if isinstance(taken, NextJob):  # `--max-jobs`, or a signal just now
                self._outcomes.write(taken.run, PutBack("its worker ended before the run began"))
        except RedisError as error:  # its lease runs out
            self.log.warning("Worker %s: could not put a job back: %s", self.name, error)
        super().teardown()

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the work-horse and what it started. Called from RQ's pubsub thread, too.

        RQ asks for the process group of `horse_pid`; without a horse that is 0, and the group is the worker's own.
        """
        self._horses.kill(sig)

    @property
    def horse_pid(self) -> int:
        """The work-horse's process id, for RQ; 0 while there is none."""
        horse = self._horses.horse
        return horse.pid if horse else 0

    def handle_payload(self, message: Any) -> None:
        """As RQ's, but a stop is for one job only. Called from RQ's pubsub thread.

        RQ looks which job runs and kills the work-horse then, which may have gone on to the next job in between.
        """
        payload = parse_payload(message)
        if payload.get("command") not in ("stop-job", "stop-execution"):
            super().handle_payload(message)
            return
        job_id = payload.get("job_id")
        # RQ's `stop-job` names no execution; that of cancel.lua does.
        execution = payload.get("execution") or payload.get("execution_id") or None
        if not any(run.id.job_id == job_id and run.stop(execution) for run in list(self._runs)):
            self.log.info("Worker %s: does not run job %s, which was to be stopped", self.name, job_id)

    def get_current_job_id(self) -> str | None:
        """The job that runs. RQ asks Redis if the worker knows none, and would kill a work-horse that has not begun."""
        return next((execution.job_id for execution in list(self.executions.values())), None)

    # Idle

    def dequeue_job_and_maintain_ttl(
        self, timeout: int | None, max_idle_time: int | None = None
    ) -> tuple[Job, rq.Queue] | None:
        """Take a job under a lease. If there is none, wait until a message on the doorbell says that there may be one.

        RQ pops first and writes down who has the job later, from another process: a worker killed between the two
        loses it (queue.py:1783, rq#2236).
        """
        idle_since, pause = time.monotonic(), FIRST_PAUSE
        is_burst = timeout is None
        while True:
            # From here to the end of the job a signal only sets a flag (RQ's `_shutdown`), so it cannot raise between
            # a `take` that Redis has carried out and the run.
            self._state = WorkerStatus.BUSY
            self.raise_if_stopping()
            try:
                self._tick()
                match self._take_next(may_end=is_burst or max_idle_time is not None):
                    case NextJob() as found:
                        if job := self._accept(found):
                            return job
                    case Skipped(queue, job_id, reason):
                        self.log.error("%s: job %s set aside: %s", queue, job_id, reason)
                    case Suspended():
                        self._state = WorkerStatus.IDLE
                        self._is_suspended = True
                        self.check_for_suspension(burst=is_burst)
                    case Nothing(doorbell_id):
                        self._state = WorkerStatus.IDLE
                        idle = time.monotonic() - idle_since
                        if is_burst or (max_idle_time is not None and idle >= max_idle_time):
                            return None
                        self._wait_for_doorbell(doorbell_id)
                        pause = FIRST_PAUSE
                    case Again():
                        pass
            except (RedisError, HorseDied, OSError) as error:  # OSError: no process could be started
                self._state = WorkerStatus.IDLE
                self.log.error("Worker %s: %s; trying again in %.1f s", self.name, error, pause)
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def _take_next(self, *, may_end: bool) -> NextAnswer:
        """The answer to the `take` that was sent with the last run's end, or to a new one.

        Args:
            may_end: the worker ends if no job waits. Then the answer must be newer than the end of the last job, which
                may wait for a retry.
        """
        answer = self._ahead.pop_answer()
        if not isinstance(answer, NextJob):
            self._ahead.confirm_last_finish()
        if answer is None or (may_end and isinstance(answer, Nothing)):
            self._horses.get_ready(self._while_loading)
            self.raise_if_stopping()  # a work-horse may have loaded for minutes
            answer = self._ahead.take()
        return answer

    def _wait_for_doorbell(self, doorbell_id: str) -> None:
        if self.should_run_maintenance_tasks:  # RQ's loop looks between two jobs only, and there may be none
            self.run_maintenance_tasks()
        milliseconds = max(1, math.ceil((self._next_tick - time.monotonic()) * 1000))  # Redis takes 0 for "for ever"
        self.connection.xread({DOORBELL_KEY: doorbell_id}, block=milliseconds)

    def _queue_order(self) -> list[str]:
        return [queue.name for queue in self._ordered_queues]

    def _accept(self, found: NextJob) -> tuple[Job, rq.Queue] | None:
        """The job as RQ's object, for RQ's loop; None if it cannot be run, and was failed for that."""
        queue = next(queue for queue in self.queues if queue.name == found.run.queue)
        job = copy.copy(self._blank_job)
        try:
            job.id = found.run.job_id  # RQ takes letters, numbers, underscores and dashes only
            run = JobRun(self, self._horses, found)
        except (ValueError, TimeoutFormatError) as error:
            self.log.error("%s set aside: %r", found.run, error)
            failure = describe_failure("UnreadableJob", f"The job cannot be run: {error!r}.")
            self._outcomes.write(found.run, Failed(failure, force=True))
            return None
        self._runs = [run]
        self.reorder_queues(reference_queue=queue)
        return job, queue

    def _tick(self) -> None:
        """Once a tick: the heartbeat, the jobs of dead workers, the jobs that are due, and the index of `/jobs`."""
        if time.monotonic() < self._next_tick:
            return
        self._next_tick = time.monotonic() + TICK
        if time.monotonic() - self._last_beat >= TICK:
            try:
                self._beat()
            except ResponseError as error:  # Redis is full: the rest of the tick, and the jobs, may well go on
                self.log.error("Worker %s: no heartbeat: %s", self.name, error)
        if horse := self._horses.horse:
            horse.note_time()
        names = [queue.name for queue in self.queues]
        self._recover(names)
        due = transitions.promote(self.connection, names).due
        # A job that is due before the next tick moves it forward, so that delays are right to some milliseconds.
        self._next_tick = time.monotonic() + (TICK if due is None else min(TICK, due))
        transitions.sweep(self.connection)

    def _recover(self, queues: list[str]) -> None:
        """Release the runs whose lease ran out, unless Redis was away: then live workers may renew theirs first."""
        now = time.monotonic()
        if self._last_tick and now - self._last_tick > max(OUTAGE, self.settings.worker_lease / 2):
            self._trusts_leases_from = now + 2 * LONGEST_PAUSE
        if now >= self._trusts_leases_from:
            for run, before, limit in transitions.recover(self.connection, queues):
                how = f"its worker, {run.worker}, died or was cut off"
                try:  # once: the next tick comes soon, and a job that runs here must not wait
                    self._outcomes.write(run, Crashed(how), Crashes(before, limit), is_patient=False)
                except ResponseError as error:
                    self.log.error("%s cannot be released: %s", run, error)
        self._last_tick = now

    # A job

    def execute_job(self, job: Job, queue: rq.Queue) -> None:
        """Have the work-horse run the job, and write its outcome down.

        RQ forks a process for each job, which writes down that it has it, and ends the run's records, in several steps.
        """
        (run,) = self._runs
        start = time.monotonic()
        # RQ's other commands look at these.
        self.executions[run.id.execution] = Execution(run.id.execution, job.id, self.connection, self.name)
        try:
            outcome = run.begin(self._while_loading)
            if outcome is None:
                run, outcome = self._watch()
            self._write(run, outcome)
        except ResponseError as error:
            self._outcomes.log_unwritable(run.id, error)
        except ForkServerDied:
            self.kill_horse()  # before another worker may take the job
            how = "the fork server died"
            self._outcomes.write(run.id, Crashed(how) if run.has_begun else PutBack(how), run.crashes)
            raise
        except SystemExit:  # a second signal (RQ's cold shutdown)
            self._outcomes.write(run.id, run.put_back("its worker was stopped at once"), run.crashes)
            raise
        finally:
            run.refuse_stops()
            self._runs = []
            self.executions.pop(run.id.execution, None)
            self.total_working_time += time.monotonic() - start

    def _watch(self) -> tuple[JobRun, Outcome]:
        """Look after the runs in hand until one of them has an outcome."""
        while True:
            if self._ahead.pending and not self.is_backing_off():
                self.log_redis_error(partial(self._ahead.confirm_last_finish, is_patient=False))
            wait_for_any([run.channel for run in self._runs], min(run.patience for run in self._runs))
            for run in self._runs:
                if outcome := run.react():
                    return run, outcome
                if self.is_out_of_time():
                    return run, run.give_up("its worker was stopped")
            if not self.is_backing_off():
                self.log_redis_error(self._tick)

    def _write(self, run: JobRun, outcome: Outcome) -> None:
        """Write the outcome down. The end of a run that went well is sent together with the next `take`."""
        if isinstance(outcome, Finished | Failed):
            self._ahead.confirm_last_finish()  # it may wait for Redis: only then look whether the worker must end
            if not self._stop_requested:
                ending = choose_transition(outcome, run.crashes, self.settings)
                assert isinstance(ending, Ending)
                self._ahead.finish_and_take(run.id, ending)
                return
        self._outcomes.write(run.id, outcome, run.crashes)

    def _while_loading(self) -> None:
        """What goes on while a work-horse loads the functions: minutes, if they load a model."""
        self.raise_if_stopping()
        if self.is_backing_off():
            return
        self.log_redis_error(partial(self._ahead.confirm_last_finish, is_patient=False))
        for run in self._runs:
            self.renew(run.id)  # whether it is held is asked again before the run begins
        self.log_redis_error(self._tick)
