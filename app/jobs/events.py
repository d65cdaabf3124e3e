"""The event log's one reader in a web process: it wakes whoever waits for a job, however many wait.

Each transition of a job adds an entry to a stream in Redis (CORE: the log is a hint, the job's hash is the truth).
The reader is a thread, a greenlet under gevent; it starts with the first listener and ends soon after the last one.
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
#: Seconds that the reader stays without listeners, so that the next one need not start it again.
LINGER = 10.0

FIELDS = (b"job_id", b"status")


class Subscription(threading.Event):
    """Set at each event of a job. A listener clears it before it reads the status, and so misses none."""

    def __init__(self) -> None:
        super().__init__()
        #: The job's newest one, once it has rung.
        self.status = ""

    def ring(self, status: str) -> None:
        """Tell of a status."""
        self.status = status
        self.set()


class EventLog:
    """Hands the events of jobs to those who listen for them."""

    def __init__(self, connection: Redis, connect: Callable[[], Redis]) -> None:
        """Take a client for quick commands, and what makes the reader's own, whose reads block."""
        self._connection = connection
        self._connect = connect
        self._bells: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._lock = threading.Lock()
        #: Whether somebody listens, or did just now: a new listener misses nothing from the first moment on then.
        self.is_read = False

    @contextmanager
    def listen(self, job_id: str) -> Iterator[Subscription]:
        """Hear of each event of a job from now on.

        Raises:
            RedisError: the reader has to be started, and Redis does not answer.
        """
        bell = Subscription()
        with self._lock:
            self._bells[job_id].add(bell)
        try:
            self._ensure_reader()
            yield bell
        finally:
            with self._lock:
                self._bells[job_id].discard(bell)
                if not self._bells[job_id]:
                    del self._bells[job_id]

    def _ensure_reader(self) -> None:
        with self._lock:
            if self.is_read:
                return
            self.is_read = True
        try:
            # Where the log ends now: from here on the first listener misses nothing. Whoever comes while Redis is asked
            # is not kept waiting for it (it may be stalled), and might miss an event until its next look at the job.
            newest: list[Any] = self._connection.xrevrange(EVENTS_KEY, count=1)  # type: ignore[assignment]  # not awaitable
            position = newest[0][0] if newest else "0-0"
            # In a new context: under gevent the thread would log with the id of the request that starts it.
            read = partial(Context().run, self._read, position)
            threading.Thread(target=read, name="events", daemon=True).start()
        except BaseException:
            self.is_read = False
            raise

    def _read(self, position: bytes | str) -> None:
        connection = self._connect()
        last_heard = time.monotonic()
        try:
            while True:
                with self._lock:
                    if self._bells:
                        last_heard = time.monotonic()
                    elif time.monotonic() - last_heard > LINGER:
                        self.is_read = False
                        return
                try:
                    answer: Any = connection.xread({EVENTS_KEY: position}, count=1000, block=int(BLOCK * 1000))
                except RedisError as error:
                    # Those who wait look at their job themselves now and then, and answer that Redis is unavailable.
                    level = logging.WARNING if isinstance(error, RedisConnectionError) else logging.ERROR
                    logger.log(level, "cannot read the event log, trying again: %s", error)
                    time.sleep(BLOCK)
                    continue
                for _, entries in answer:
                    for entry_id, fields in entries:
                        position = entry_id
                        job_id, status = (fields.get(name, b"").decode(errors="replace") for name in FIELDS)
                        self._ring(job_id, status)
        except BaseException:
            self.is_read = False  # the next listener starts another
            raise
        finally:
            connection.close()

    def _ring(self, job_id: str, status: str) -> None:
        with self._lock:
            bells = list(self._bells.get(job_id, ()))
        for bell in bells:
            bell.ring(status)
