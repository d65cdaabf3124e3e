"""The Redis connection and the queues, as the rest of the app and `rq` itself use them. Importing it does no I/O."""

from functools import partial
from queue import Empty
from typing import Any

import rq
from redis import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry
from rq.exceptions import DuplicateJobError
from rq.job import Job
from rq.serializers import JSONSerializer

from app.config import Settings, get_settings
from app.core import transitions
from app.core.connections import following_connection, sentinel_addresses, sentinel_options
from app.core.job_ids import JobIds

#: Seconds that one command may take. With the one reconnection below, a request on a stalled Redis is answered in 3 s.
SOCKET_TIMEOUT = 1.25
#: Connections that one process opens at most.
MAX_CONNECTIONS = 100


class Pool(BlockingConnectionPool):
    """A pool that takes its connections for good until a command shows otherwise.

    redis-py polls each connection before each command: 50 µs of a request's 500. What it would find, a connection that
    Redis closed, the client's retry finds too. Over TLS 1.3 it takes the tickets that a server sends after a handshake
    for leftovers, and refuses the connection unless a greeting was read before.
    """

    def get_connection(self, command_name: Any = None, *_: Any, **__: Any) -> Any:
        """A connection of this caller's own; it connects at its first command.

        Raises:
            redis.exceptions.ConnectionError: all are in use, for longer than the pool's time-out.
        """
        self._checkpid()
        try:
            return self.pool.get(timeout=self.timeout) or self.make_connection()
        except Empty:
            raise RedisConnectionError("No connection is free.") from None


def connect(settings: Settings, socket_timeout: float = SOCKET_TIMEOUT) -> Redis:
    """Make a client; it connects at its first command.

    A connection that turns out to be broken is replaced once, at once. A command that timed out is not sent again:
    the caller would wait twice as long for a server that is stalled.
    """
    options: dict[str, Any] = {
        # A burst of requests waits for a connection a little; redis-py's other pool refuses the 101st.
        "max_connections": MAX_CONNECTIONS,
        "timeout": SOCKET_TIMEOUT,
        "socket_timeout": socket_timeout,
        "socket_connect_timeout": SOCKET_TIMEOUT,
        # No greetings before the first command: each would be waited for on a Redis that is stalled.
        "protocol": 2,
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    if settings.redis_sentinels:
        pool = partial(Pool, **options)
        return Redis(connection_pool=pool(**following_connection(settings, pool)))
    return Redis(connection_pool=Pool.from_url(settings.redis_address, **options))


class Queue(rq.Queue):
    """An `rq.Queue` that speaks JSON only, and whose enqueue is one atomic script instead of two round trips.

    `queue.enqueue(function, payload)` works as in any RQ tutorial. What the script does not do (dependencies, rate
    limits, a caller's pipeline, a job id that may be there already) goes RQ's own way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # RQ's default is pickle, which lets whoever can write to Redis run code in every reader.
        super().__init__(*args, **{**kwargs, "serializer": JSONSerializer})
        self.ids = JobIds(self.connection)

    def enqueue_job(self, job: Job, pipeline: Any = None, at_front: bool = False, unique: bool = False) -> Job:
        """Enqueue the job.

        Raises:
            DuplicateJobError: `unique` is set and a job with this id is there.
            RuntimeError: MAX_QUEUE_LENGTH jobs wait in the queue.
        """
        has_own_id = job._id is not None
        if pipeline is not None or not self._is_async or job._dependency_ids or job.has_rate_limit:
            return super().enqueue_job(job, pipeline=pipeline, at_front=at_front, unique=unique)
        if has_own_id and not unique:  # RQ lets such a job replace the one that is there
            return super().enqueue_job(job, at_front=at_front)
        if not has_own_id:
            job.id = self.ids.new()
        self._prepare_for_queue(job)
        fields = {**job.to_dict(), "function": (job.func_name or "").rpartition(".")[2]}
        limit = get_settings().max_queue_length
        enqueued = transitions.enqueue(
            self.connection, self.name, {job.id: {}}, fields, limit=limit, at_front=at_front, ttl=job.ttl
        )
        if isinstance(enqueued, transitions.Full):
            raise RuntimeError(f"The queue {self.name} is full.")
        if isinstance(enqueued, transitions.Exists) and unique:
            raise DuplicateJobError(f"A job with the id {job.id} exists.")
        return job

    def get_redis_server_version(self) -> tuple[int, int, int]:
        """The oldest version that has what we use, instead of a round trip to learn the actual one."""
        return (6, 2, 0)


settings = get_settings()
redis_conn = connect(settings)
queues = {name: Queue(name, connection=redis_conn) for name in settings.queues}
#: Where jobs go unless told otherwise.
redis_queue = queues[settings.queues[0]]

# `rq worker`, `rq info` and the rest read these (RQ_CONFIG=app.redis_resc): the same Redis and queues as the API.
REDIS_URL = None if settings.redis_sentinels else settings.redis_address
SENTINEL = {
    "INSTANCES": sentinel_addresses(settings),
    "MASTER_NAME": settings.redis_sentinel_service,
    "SENTINEL_KWARGS": sentinel_options(settings),
    "SSL": settings.redis_ssl,
    "DB": settings.redis_db,
    "USERNAME": settings.redis_username,
    "PASSWORD": settings.redis_password,
}
QUEUES = list(settings.all_queues)
