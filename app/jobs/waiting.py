"""Requests that wait: for a job to end, or for each change of it."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from redis.exceptions import RedisError

from app.core.scripts import TERMINAL
from app.jobs.enqueue import Receipt
from app.jobs.events import EventLog, Subscription
from app.jobs.jobs import Jobs
from app.jobs.status import StatusObject

logger = logging.getLogger(__name__)

#: Seconds after which a listener gets a sign of life, if nothing changes. Proxies close connections that are silent.
SIGN_OF_LIFE = 15.0
#: Least seconds between two messages to a listener. A job may report progress more often than people can look.
LEAST_PAUSE = 0.1
#: Most seconds between two looks at a job that has no events.
LOOK_EVERY = 5.0


class Look(NamedTuple):
    """What a look at a job finds."""

    status: StatusObject
    #: the return value as JSON text, if the job has finished and the caller wants it
    result: bytes | None = None


class Waiting:
    """The requests that wait in this process. There are MAX_WAITING places for them."""

    def __init__(self, jobs: Jobs, events: EventLog) -> None:
        self.jobs = jobs
        self.events = events
        #: Whether this process is about to end, so that no request may wait in it any longer.
        self.is_draining: Callable[[], bool] = lambda: False
        self._places = threading.BoundedSemaphore(jobs.settings.max_waiting)

    @contextmanager
    def _take_place(self) -> Iterator[bool]:
        """Take a place until the end of the `with` block; False if none is free."""
        is_taken = self._places.acquire(blocking=False)
        try:
            yield is_taken
        finally:
            if is_taken:
                self._places.release()

    def wait(self, job_id: str, seconds: float, owner: str | None = "") -> StatusObject:
        """The status of the job as soon as it is terminal, or after these seconds.

        Raises:
            JobNotFound, ResultExpired: as `read_status`.
        """
        if seconds <= 0:
            return self.jobs.read_status(job_id, owner)
        with self.events.subscribe(job_id) as subscription:
            return self._await_end(lambda: Look(self.jobs.read_status(job_id, owner)), subscription, seconds).status

    def wait_for_new(self, receipt: Receipt, seconds: float, owner: str = "") -> Look:
        """As `wait`, for a job that was just enqueued; and its result, as JSON text, if it finishes in time.

        If Redis fails once the job is enqueued, the answer is its status as it was: after an error the client would
        enqueue the job again.

        Raises:
            JobFailed, ResultExpired: it finished, but there is no result to return.
        """
        if seconds <= 0:
            return Look(receipt.status or self.jobs.read_status(receipt.job_id, owner))
        # If the reader runs already, no event of this new job was missed: its status need not be read first.
        known = Look(receipt.status) if receipt.status and self.events.has_reader else None
        try:
            with self.events.subscribe(receipt.job_id) as subscription:
                return self._await_end(
                    lambda: Look(*self.jobs.read_status_and_result(receipt.job_id, owner)), subscription, seconds, known
                )
        except RedisError as error:
            if receipt.status is None:
                raise
            logger.error("job %s is enqueued, but the request cannot wait for it: %s", receipt.job_id, error)
            return Look(receipt.status)

    def _await_end(
        self, look: Callable[[], Look], subscription: Subscription, seconds: float, known: Look | None = None
    ) -> Look:
        """Look at the job, and look again when an event says that it has ended.

        Look now and then without an event, too: the jobs of a stock worker have none, and no transition happens when a
        `ttl` runs out. The looks grow rarer, so that long waits cost little.

        Args:
            look: reads the status and maybe the result.
            subscription: to the events of the job.
            seconds: the longest wait.
            known: the status, if it need not be read first.
        """
        start = time.monotonic()
        deadline = start + seconds
        with self._take_place() as may_wait:
            found = known or look()
            while may_wait and found.status.job_status not in TERMINAL and (now := time.monotonic()) < deadline:
                if self.is_draining():
                    break
                next_look = min(deadline, now + min(max(0.25, (now - start) / 2), LOOK_EVERY))
                while (left := next_look - time.monotonic()) > 0 and subscription.wait(left):
                    subscription.clear()
                    if subscription.status in TERMINAL:
                        break
                found = look()
            return found

    def follow(self, job_id: str, owner: str | None = "") -> Iterator[StatusObject | None]:
        """The status of the job now and after each change, until it is terminal; None is a sign of life.

        It ends early if no place is free, or if this process is about to end. The client then connects again.

        Raises:
            JobNotFound, ResultExpired: as `read_status`, also if the job expires meanwhile.
            RedisError: Redis does not answer.
        """
        with self._take_place() as may_wait, self.events.subscribe(job_id) as subscription:
            sent: StatusObject | None = None
            sent_at = 0.0
            while True:
                status = self.jobs.read_status(job_id, owner)
                now = time.monotonic()
                if status != sent:
                    yield status
                    sent, sent_at = status, now
                elif now - sent_at >= SIGN_OF_LIFE:
                    yield None
                    sent_at = now
                if status.job_status in TERMINAL or not may_wait or self.is_draining():
                    return
                subscription.wait(LOOK_EVERY)
                time.sleep(max(0, sent_at + LEAST_PAUSE - time.monotonic()))
                subscription.clear()  # the next look sees the events until now
