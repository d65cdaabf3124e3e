"""RQ's worker, made resilient: its loop, registration, signals and maintenance survive outages and restarts of Redis.

Each override names the behaviour of RQ 3.0.0 that it changes. tests/test_rq_overrides.py fails when an upgrade of RQ
changes one of these methods.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import rq
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry
from rq import worker_registration
from rq.exceptions import StopRequested
from rq.registry import CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, ReadyJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import now as utc_now
from rq.utils import utcformat

from app.config import get_settings
from app.core import scripts, transitions
from app.core.connections import connect
from app.core.queue import Queue
from app.core.transitions import Held, Run

#: Seconds between two ticks, which renew leases, send the heartbeat, and look for jobs that are due. Also the longest
#: block.
TICK = 1.0
#: Seconds after its last heartbeat at which a worker counts as dead in `/readyz` and `rq info`.
ALIVE = 35
#: Canceled jobs that one step of the maintenance looks at.
MOST_CANCELED = 1000
#: Longest pause, in seconds, between two tries to reach Redis.
LONGEST_PAUSE = 5.0

Answer = TypeVar("Answer")


class ResilientWorker(rq.Worker):
    """An RQ worker that survives outages of Redis, and ends in a bounded time after SIGTERM."""

    def __init__(self, queues: Any, name: str | None = None, **kwargs: Any) -> None:
        """Take what `rq worker` passes; JSON is forced, whatever serializer it names (RQ's default is pickle)."""
        queues = [queues] if isinstance(queues, str | rq.Queue) else list(queues)
        connection = kwargs.pop("connection", None) or queues[0].connection
        self.settings = get_settings()
        if self.settings.redis_sentinels:  # RQ's command has made one of redis-py's (see core/connections.py)
            connection = connect(self.settings)
        kwargs |= {"serializer": JSONSerializer, "queue_class": Queue, "default_result_ttl": self.settings.result_ttl}
        own = [Queue(queue if isinstance(queue, str) else queue.name, connection=connection) for queue in queues]
        super().__init__(own, name, connection=connection, **kwargs)
        self._is_suspended = True  # until the first `take` knows
        self._last_beat = 0.0
        #: When the worker was asked to end (time.monotonic); None until then.
        self._stopping_since: float | None = None
        #: After a failed call, leave Redis alone until this time, so the loop can still enforce the job's limits.
        self._backoff_until = 0.0

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """As RQ's, without its scheduler: `promote` does that work.

        RQ's scheduler reads the due ids and enqueues them later. A worker that takes one of those jobs in between runs
        it, and then it runs again (scheduler.py, `enqueue_scheduled_jobs`).
        """
        if kwargs.pop("with_scheduler", False):
            self.log.info("Worker %s: needs no scheduler, since each worker enqueues delayed jobs", self.name)
        return super().work(*args, **kwargs)

    def _set_connection(self, connection: Redis) -> Redis:
        """RQ waits 415 s for an answer, and redis-py tries ten times. Here no command blocks longer than a tick."""
        pool = connection.connection_pool
        retry = Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,))
        pool.connection_kwargs.update(socket_timeout=TICK + 2, retry=retry)
        pool.reset()  # RQ's command may have connected already
        return connection

    def teardown(self) -> None:
        """As RQ's; a Redis that is away does not keep the worker from ending."""
        try:
            super().teardown()
        except RedisError as error:
            self.log.warning("Worker %s: could not sign off: %s", self.name, error)

    def check_for_suspension(self, burst: bool) -> None:
        """RQ asks Redis before each job; here the answer of `take` says whether the workers are suspended."""
        if self._is_suspended:
            self._is_suspended = False
            try:
                super().check_for_suspension(burst)
            except RedisError as error:  # RQ's loop would end the worker; `take` will ask again
                self.log.error("Worker %s: %s", self.name, error)

    def heartbeat(self, timeout: int | None = None, pipeline: Any = None) -> None:
        """RQ sends three commands five times a job; here one round trip a tick.

        A worker that Redis has forgotten (after a flush, or a lost disk) registers again.
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
            # RQ adds to the counts in Redis with each job, which is three commands more for it.
            counts = ("successful_job_count", "failed_job_count", "total_working_time")
            counted: dict[Any, Any] = {name: getattr(self, name) for name in counts}
            beat.hset(self.key, mapping={"last_heartbeat": utcformat(self.last_heartbeat), **counted})
            beat.expire(self.key, ALIVE)
            if self._shutdown_requested_date:
                beat.hset(self.key, "shutdown_requested_date", utcformat(self._shutdown_requested_date))
            known = beat.execute()[0]
            if not known and self.birth_date:
                beat.hset(self.key, mapping=self.serialize())
                worker_registration.register(self, beat)
                beat.execute()

    def clean_registries(self) -> None:
        """As RQ's, but it does not fail the jobs of dead workers: `recover` runs them again."""
        for queue in self.queues:
            if queue.acquire_maintenance_lock():
                # The scores are times of Redis' clock. RQ compares them with its own clock, and may drop live entries.
                now: Any = self.connection.time()
                for registry in (FinishedJobRegistry, FailedJobRegistry, ReadyJobRegistry):
                    registry(queue=queue).cleanup(now[0])
                until = time.monotonic() + 2  # seconds: a job that was taken ahead may wait, under its lease
                while self._clean_canceled(queue, now[0]) == MOST_CANCELED and time.monotonic() < until:
                    self.heartbeat()
                worker_registration.clean_worker_registry(queue)
                queue.release_maintenance_lock()
        self.last_cleaned_at = utc_now()  # type: ignore[assignment]  # RQ's own annotation is None

    def _clean_canceled(self, queue: rq.Queue, now: int) -> int:
        """Let canceled jobs expire as failed ones do. RQ 3.0.0 keeps those of `Job.cancel` for ever.

        Looks at MOST_CANCELED of them at most, and returns at how many.
        """
        key = CanceledJobRegistry(queue=queue).key
        due: Any = self.connection.zrangebyscore(key, "-inf", now, start=0, num=MOST_CANCELED)
        job_ids = [job_id.decode(errors="surrogateescape") for job_id in due]
        with self.connection.pipeline() as pipeline:
            for job_id in job_ids:
                pipeline.ttl(scripts.job_key(job_id))
            for job_id, left in zip(job_ids, pipeline.execute(), strict=True):
                if left == -2:  # the job is gone
                    pipeline.zrem(key, job_id)
                    continue
                if left == -1:  # it has no end yet
                    left = self.settings.failure_ttl
                    pipeline.expire(scripts.job_key(job_id), left)
                pipeline.zadd(key, {job_id: now + max(1, left)})
            pipeline.execute()
        return len(job_ids)

    def run_maintenance_tasks(self) -> None:
        """As RQ's; an outage during it does not end the worker."""
        try:
            super().run_maintenance_tasks()
        except RedisError as error:
            self.log.warning("Worker %s: maintenance put off: %s", self.name, error)
            self.last_cleaned_at = utc_now()  # type: ignore[assignment]  # RQ's own annotation is None

    def request_stop(self, signum: Any, frame: Any) -> None:
        """As RQ's; the running job's time is bounded from now on (WORKER_SHUTDOWN_SECONDS)."""
        self._stopping_since = time.monotonic()
        super().request_stop(signum, frame)

    def start_shutdown_clock(self) -> None:
        """Bound the time that the worker still waits for Redis, if no signal did so."""
        self._stopping_since = self._stopping_since or time.monotonic()

    def raise_if_stopping(self) -> None:
        """Begin no job any more once the worker was asked to end.

        Raises:
            StopRequested: it was.
        """
        # `_stopping_since` too: an `except Exception` may have swallowed the StopRequested of RQ's signal handler.
        if self._stop_requested or self._stopping_since is not None:
            raise StopRequested

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """RQ ends the thread on a time-out or a malformed command, and receives no further one; here it goes on."""
        self.log.error("Worker %s: a command was not received or not understood: %r", self.name, exc)
        if isinstance(exc, RedisError):
            time.sleep(2 * TICK)

    def is_out_of_time(self) -> bool:
        """Whether WORKER_SHUTDOWN_SECONDS have passed since the worker was asked to end."""
        since = self._stopping_since
        return since is not None and time.monotonic() - since > self.settings.worker_shutdown_seconds

    def set_shutdown_requested_date(self) -> None:
        """RQ writes to Redis here, inside the signal handler; the next heartbeat does it.

        In the handler an outage would raise. And the signal may have interrupted the connection pool, for whose lock
        the handler would wait for ever (redis-py's BlockingConnectionPool).
        """

    # Calls to a Redis that may be away

    def retry_until_stored(self, call: Callable[[], Answer], *, is_patient: bool = True) -> Answer:
        """Call until Redis answers, so that an outage throws away nothing that a job has computed.

        Args:
            call: sends one transition. It may run several times.
            is_patient: False to call once.

        Raises:
            RedisError: not patient, or the worker must end, or a key has another type, which no waiting changes.
        """
        pause = 0.1
        while True:
            try:
                return call()
            except RedisError as error:
                if not is_patient or self.is_out_of_time() or "WRONGTYPE" in str(error):
                    raise
                self.log.error("Worker %s: %s; trying again in %.1f s", self.name, error, pause)
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)

    def renew(self, run: Run, progress: str = "") -> Held:
        """Extend the lease of a run.

        The answer is `held` also if Redis does not answer: the script that ends the run checks the lease again.
        """
        try:
            return transitions.renew(self.connection, run, self.settings.worker_lease, progress)
        except RedisError as error:
            self.log.error("%s: its lease could not be renewed: %s", run, error)
            self._back_off(error)
            return "held"

    def log_redis_error(self, call: Callable[[], None]) -> None:
        """Call, and log an error of Redis instead of raising it."""
        try:
            call()
        except RedisError as error:
            self.log.error("Worker %s: %s", self.name, error)
            self._back_off(error)

    def is_backing_off(self) -> bool:
        """Whether to leave Redis alone, since it just did not answer."""
        return time.monotonic() < self._backoff_until

    def _back_off(self, error: RedisError) -> None:
        if not isinstance(error, ResponseError):  # which is an answer
            self._backoff_until = time.monotonic() + min(2 * TICK, self.settings.worker_lease / 6)
