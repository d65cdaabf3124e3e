"""The event log's one reader in a web process: it wakes whoever waits for a job, however many wait.

Each transition of a job adds an entry to a stream in Redis (CORE: the log is a hint, the job's hash is the truth).
The reader is a thread, a greenlet under gevent; it starts with the first listener and ends soon after the last one.
"""

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from app.transitions import EVENTS_KEY

logger = logging.getLogger(__name__)

#: Seconds that one read of the log blocks.
BLOCK = 1.0
#: Seconds that the reader stays without listeners, so that the next one need not start it again.
LINGER = 10.0

#: What listeners get: the job's new status.
Bell = queue.SimpleQueue[str]


class EventLog:
    """Hands the events of jobs to those who listen for them."""

    def __init__(self, connect: Callable[[], Redis]) -> None:
        """Take what makes the reader's own client: its reads block, so it must not share its connection."""
        self._connect = connect
        self._bells: defaultdict[str, set[Bell]] = defaultdict(set)
        self._lock = threading.Lock()
        self._reading = False

    @contextmanager
    def listen(self, job_id: str) -> Iterator[Bell]:
        """Hear of each event of a job from now on.

        Raises:
            RedisError: the reader has to be started, and Redis does not answer.
        """
        bell: Bell = queue.SimpleQueue()
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
            if self._reading:
                return
            self._reading = True
        try:
            connection = self._connect()
            # Where the log ends now, so that nothing that happens from here on is missed.
            newest: list[Any] = connection.xrevrange(EVENTS_KEY, count=1)  # type: ignore[assignment]  # not awaitable
            position = newest[0][0] if newest else "0-0"
            threading.Thread(target=self._read, args=(connection, position), name="events", daemon=True).start()
        except BaseException:
            self._reading = False
            raise

    def _read(self, connection: Redis, position: bytes | str) -> None:
        last_heard = time.monotonic()
        while True:
            with self._lock:
                if self._bells:
                    last_heard = time.monotonic()
                elif time.monotonic() - last_heard > LINGER:
                    self._reading = False
                    break
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
                    self._ring(fields.get(b"job_id", b"").decode(), fields.get(b"status", b"").decode())
        connection.close()

    def _ring(self, job_id: str, status: str) -> None:
        with self._lock:
            bells = list(self._bells.get(job_id, ()))
        for bell in bells:
            bell.put(status)
