"""RQ's worker made steady: its loop, registration, signals and maintenance, where an outage or a restart ends nothing.

Each override says which behaviour of RQ 3.0.0 it answers; tests/test_rq_overrides.py fails when an upgrade of RQ
changes one of the methods below them.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import rq
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry
from rq import worker_registration
from rq.registry import CanceledJobRegistry, FailedJobRegistry, FinishedJobRegistry, ReadyJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import now as utc_now
from rq.utils import utcformat

from app.config import get_settings
from app.core import scripts
from app.core.connections import connect
from app.core.queue import Queue

#: Seconds between two looks at what is due: leases, delayed jobs, its own heartbeat. Also the longest block.
TICK = 1.0
#: Seconds after its last heartbeat at which a worker counts as dead in `/readyz` and `rq info`.
ALIVE = 35
#: Canceled jobs that one step of the maintenance looks at.
MOST_CANCELED = 1000
#: Longest pause, in seconds, between two tries to reach Redis.
LONGEST_PAUSE = 5.0

Answer = TypeVar("Answer")


class SteadyWorker(rq.Worker):
    """An RQ worker that outlives Redis' absence, and ends in a bounded time once it is told to."""

    def __init__(self, queues: Any, name: str | None = None, **kwargs: Any) -> None:
        """Take what `rq worker` passes; JSON is forced, whatever serializer it names (RQ's default is pickle)."""
        queues = [queues] if isinstance(queues, str | rq.Queue) else list(queues)
        connection = kwargs.pop("connection", None) or queues[0].connection
        self.settings = get_settings()
        if self.settings.redis_sentinels:  # RQ's command has made one of redis-py's (see app/sentinel.py)
            connection = connect(self.settings)
        kwargs |= {"serializer": JSONSerializer, "queue_class": Queue, "default_result_ttl": self.settings.result_ttl}
        own = [Queue(queue if isinstance(queue, str) else queue.name, connection=connection) for queue in queues]
        super().__init__(own, name, connection=connection, **kwargs)
        self._is_suspended = True  # until the first `take` knows
        self._last_beat = 0.0
        self._stopping_since: float | None = None

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """As RQ's, without its scheduler: `promote` does that work.

        Between the scheduler's reading of the due ids and its writing, a worker may have taken one of those jobs, which
        would then run twice (scheduler.py, `enqueue_scheduled_jobs`).
        """
        if kwargs.pop("with_scheduler", False):
            self.log.info("Worker %s: needs no scheduler, each worker looks after delayed jobs", self.name)
        return super().work(*args, **kwargs)

    def _set_connection(self, connection: Redis) -> Redis:
        """RQ waits 415 s for an answer, and redis-py tries ten times. Nothing here blocks longer than a tick."""
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
            # RQ adds to the counts in Redis with each job, which is three commands more for it.
            counts = ("successful_job_count", "failed_job_count", "total_working_time")
            told: dict[Any, Any] = {name: getattr(self, name) for name in counts}
            beat.hset(self.key, mapping={"last_heartbeat": utcformat(self.last_heartbeat), **told})
            beat.expire(self.key, ALIVE)
            if self._shutdown_requested_date:
                beat.hset(self.key, "shutdown_requested_date", utcformat(self._shutdown_requested_date))
            known = beat.execute()[0]
            if not known and self.birth_date:
                beat.hset(self.key, mapping=self.serialize())
                worker_registration.register(self, beat)
                beat.execute()

    def clean_registries(self) -> None:
        """As RQ's, without what would fail the jobs of dead workers: `recover` runs them again."""
        for queue in self.queues:
            if queue.acquire_maintenance_lock():
                # By Redis' clock, as the scores were made: with its own RQ would drop entries of jobs that are there.
                now: Any = self.connection.time()
                for registry in (FinishedJobRegistry, FailedJobRegistry, ReadyJobRegistry):
                    registry(queue=queue).cleanup(now[0])
                enough = time.monotonic() + 2  # seconds: a job that was taken ahead may wait, under its lease
                while self._clean_canceled(queue, now[0]) == MOST_CANCELED and time.monotonic() < enough:
                    self.heartbeat()
                worker_registration.clean_worker_registry(queue)
                queue.release_maintenance_lock()
        self.last_cleaned_at = utc_now()  # type: ignore[assignment]  # RQ's own annotation is None

    def _clean_canceled(self, queue: rq.Queue, now: int) -> int:
        """Let canceled jobs expire as failed ones do. RQ 3.0.0 keeps those of `Job.cancel` for ever.

        Looks at a bounded number of them, and returns how many these were.
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

    def _pubsub_exception_handler(self, exc: Exception, pubsub: Any, pubsub_thread: Any) -> None:
        """As RQ's, which ends the thread on a time-out or a malformed command, and never hears another one."""
        self.log.error("Worker %s: a command was not heard or not understood: %r", self.name, exc)
        if isinstance(exc, RedisError):
            time.sleep(2 * TICK)

    def _is_out_of_time(self) -> bool:
        since = self._stopping_since
        return since is not None and time.monotonic() - since > self.settings.worker_shutdown_seconds

    def set_shutdown_requested_date(self) -> None:
        """RQ speaks to Redis here, inside the signal handler; the next heartbeat does it.

        An outage would raise there; and the handler may have cut into the connection pool, whose lock it would await
        for ever (redis-py's BlockingConnectionPool).
        """

    def _insist(self, call: Callable[[], Answer], *, is_patient: bool = True) -> Answer:
        """Do it as soon as Redis lets us: what a job computed during an outage is not thrown away."""
        pause = 0.1
        while True:
            try:
                return call()
            except RedisError as error:
                # A key of another type stays one: somebody else wrote it, and no waiting helps.
                if not is_patient or self._is_out_of_time() or "WRONGTYPE" in str(error):
                    raise
                self.log.error("Worker %s: %s; trying again in %.1f s", self.name, error, pause)
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
