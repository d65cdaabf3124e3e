"""Clients that wait: for a job's end, or for whatever happens to it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from redis.exceptions import RedisError

from app.core.scripts import TERMINAL
from app.jobs.enqueue import Receipt
from app.jobs.events import EventLog, Subscription
from app.jobs.jobs import Jobs
from app.jobs.status import StatusObject

logger = logging.getLogger(__name__)

#: Seconds after which a listener hears from us, whatever happens; proxies end connections on which nothing is said.
SIGN_OF_LIFE = 15.0
#: Seconds between two messages to a listener: a job may report progress more often than people can look.
LEAST_PAUSE = 0.1
#: Seconds between two looks at a job that no event tells of.
LONGEST_LOOK = 5.0


class Waiting:
    """Those who wait in this process. It owns the event log's one reader."""

    def __init__(self, jobs: Jobs, events: EventLog) -> None:
        self.jobs = jobs
        self.events = events
        #: Whether this process is about to end, and nobody is to wait here any longer.
        self.is_draining: Callable[[], bool] = lambda: False
        self._places = threading.BoundedSemaphore(jobs.settings.max_waiting)

    @contextmanager
    def _place(self) -> Iterator[bool]:
        """Whether there is a place left to wait in."""
        is_there = self._places.acquire(blocking=False)
        try:
            yield is_there
        finally:
            if is_there:
                self._places.release()

    def wait(self, job_id: str, seconds: float, owner: str | None = "") -> StatusObject:
        """The status of the job once it is terminal, at the latest after so many seconds."""
        if seconds <= 0:
            return self.jobs.read_status(job_id, owner)
        with self.events.listen(job_id) as bell:
            return self._await_end(partial(self.jobs.read_status, job_id, owner), bell, seconds)

    def wait_for_new(self, receipt: Receipt, seconds: float, owner: str = "") -> StatusObject:
        """As `wait`, for what `enqueue` answered; with `result`, as JSON data, if it was waited for and has finished.

        An outage that begins once the job is enqueued is no error: told of one, a client would send the job again.

        Raises:
            JobFailed, ResultExpired: it finished, but there is no result to be told.
        """
        if seconds <= 0:
            return receipt.status or self.jobs.read_status(receipt.job_id, owner)
        # A job that was just made needs no look before its first event.
        known = receipt.status if self.events.is_read else None
        try:
            with self.events.listen(receipt.job_id) as bell:
                look = partial(self.jobs.read_status_and_result, receipt.job_id, owner)
                return self._await_end(look, bell, seconds, known)
        except RedisError as error:
            if receipt.status is None:
                raise
            logger.error("job %s is enqueued, but cannot be waited for: %s", receipt.job_id, error)
            return receipt.status

    def _await_end(
        self, look: Callable[[], StatusObject], bell: Subscription, seconds: float, known: StatusObject | None = None
    ) -> StatusObject:
        """Look at the job, unless its status is known, and look again when its events say that it ended.

        The job itself is looked at now and then without an event too: a stock worker's jobs have none, and a `ttl`
        that runs out is nobody's transition. The looks grow rarer, so that long waits cost little.
        """
        start = time.monotonic()
        deadline = start + seconds
        with self._place() as may_wait:
            status = known or look()
            while may_wait and status.job_status not in TERMINAL and (now := time.monotonic()) < deadline:
                if self.is_draining():
                    break
                next_look = min(deadline, now + min(max(0.25, (now - start) / 2), LONGEST_LOOK))
                while (left := next_look - time.monotonic()) > 0 and bell.wait(left):
                    bell.clear()
                    if bell.status in TERMINAL:
                        break
                status = look()
            return status

    def follow(self, job_id: str, owner: str | None = "") -> Iterator[StatusObject | None]:
        """The job's status now and whenever it has changed, until it is terminal; None as a sign of life.

        It ends early where no place is left to wait in, or this process is about to end: the client comes again.

        Raises:
            JobNotFound, ResultExpired: as `read_status`; or the job is kept no longer.
            RedisError: Redis does not answer.
        """
        with self._place() as may_wait, self.events.listen(job_id) as bell:
            told: StatusObject | None = None
            spoke_at = 0.0
            while True:
                status = self.jobs.read_status(job_id, owner)
                now = time.monotonic()
                if status != told:
                    yield status
                    told, spoke_at = status, now
                elif now - spoke_at >= SIGN_OF_LIFE:
                    yield None
                    spoke_at = now
                if status.job_status in TERMINAL or not may_wait or self.is_draining():
                    return
                bell.wait(LONGEST_LOOK)
                time.sleep(max(0, spoke_at + LEAST_PAUSE - time.monotonic()))
                bell.clear()  # what was heard meanwhile, the next look sees
