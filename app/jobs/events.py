"""The event log in a web process: one reader wakes all requests that wait for a job.

Each transition of a job adds an entry to a stream in Redis, the event log. The log is a hint: the truth about a job is
its hash. The reader is a thread, or a greenlet under gevent. It starts with the first subscription and ends a little
after the last one.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from functools import partial
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from app.core.scripts import EVENTS_KEY

logger = logging.getLogger(__name__)

#: Seconds that one read of the log blocks.
BLOCK = 1.0
#: Seconds that the reader goes on without subscriptions, so that the next one need not start it again.
LINGER = 10.0

FIELDS = (b"job_id", b"status")


class Subscription(threading.Event):
    """A subscription to the events of a job. Each event sets it.

    To miss no event, clear it before you read the job's status.
    """

    def __init__(self) -> None:
        super().__init__()
        #: The status in the newest event; empty before the first one.
        self.status = ""

    def notify(self, status: str) -> None:
        """Note the status of an event, and wake the subscriber."""
        self.status = status
        self.set()


class EventLog:
    """Reads the event log, and notifies the subscriptions of this process."""

    def __init__(self, connection: Redis, connect: Callable[[], Redis]) -> None:
        """Prepare the reader, without any I/O.

        Args:
            connection: a client for quick commands.
            connect: makes the client of the reader, whose commands block for BLOCK seconds.
        """
        self._connection = connection
        self._connect = connect
        self._subscriptions: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._lock = threading.Lock()
        #: Whether the reader runs. If it does, a new subscription misses no event from its first moment on.
        self.has_reader = False

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[Subscription]:
        """Subscribe to the events of a job until the end of the `with` block.

        Raises:
            RedisError: the reader must start first, and Redis does not answer.
        """
        subscription = Subscription()
        with self._lock:
            self._subscriptions[job_id].add(subscription)
        try:
            self._ensure_reader()
            yield subscription
        finally:
            with self._lock:
                self._subscriptions[job_id].discard(subscription)
                if not self._subscriptions[job_id]:
                    del self._subscriptions[job_id]

    def _ensure_reader(self) -> None:
        with self._lock:
            if self.has_reader:
                return
            self.has_reader = True
        try:
            # Start at the current end of the log. Other subscribers do not wait for this call, since Redis may be
            # stalled. One that arrives during it may miss an event; its next look at the job finds the change.
            newest: list[Any] = self._connection.xrevrange(EVENTS_KEY, count=1)  # type: ignore[assignment]  # not awaitable
            position = newest[0][0] if newest else "0-0"
            # In a new context: under gevent the thread would log with the id of the request that starts it.
            read = partial(Context().run, self._read, position)
            threading.Thread(target=read, name="events", daemon=True).start()
        except BaseException:
            self.has_reader = False
            raise

    def _read(self, position: bytes | str) -> None:
        connection = self._connect()
        last_needed = time.monotonic()
        try:
            while True:
                with self._lock:
                    if self._subscriptions:
                        last_needed = time.monotonic()
                    elif time.monotonic() - last_needed > LINGER:
                        self.has_reader = False
                        return
                try:
                    answer: Any = connection.xread({EVENTS_KEY: position}, count=1000, block=int(BLOCK * 1000))
                except RedisError as error:
                    # The requests that wait look at their job now and then. They answer that Redis is unavailable.
                    level = logging.WARNING if isinstance(error, RedisConnectionError) else logging.ERROR
                    logger.log(level, "cannot read the event log, trying again: %s", error)
                    time.sleep(BLOCK)
                    continue
                for _, entries in answer:
                    for entry_id, fields in entries:
                        position = entry_id
                        job_id, status = (fields.get(name, b"").decode(errors="replace") for name in FIELDS)
                        self._notify(job_id, status)
        except BaseException:
            self.has_reader = False  # the next subscription starts another reader
            raise
        finally:
            connection.close()

    def _notify(self, job_id: str, status: str) -> None:
        with self._lock:
            subscriptions = list(self._subscriptions.get(job_id, ()))
        for subscription in subscriptions:
            subscription.notify(status)
