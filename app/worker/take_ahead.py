"""Taking jobs, the next one together with the end of the last.

The story: when a run has ended, its worker sends `take` and `finish` in one write, on a connection of its own. Redis
answers `take` first, so the next job is with the work-horse while Redis still writes down the end of the last one. The
worker reads the answer to `finish` a moment later (`confirm_last_finish`), before anything else is sent on that
connection. If an answer is lost, both are sent again: the execution id makes a second `take` answer as the first one,
and the fence makes a second `finish` write nothing.
"""

import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from typing import NamedTuple

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from app.core import transitions
from app.core.transitions import Again, Ending, Nothing, Run, Skipped, Suspended, TakeAnswer, Taken
from app.worker.outcomes import OutcomeWriter


class NextJob(NamedTuple):
    """A job that is this worker's to run."""

    run: Run
    taken: Taken
    #: when its `take` was first sent (time.monotonic): its lease is no older
    since: float


class PendingFinish(NamedTuple):
    """The end of a run that was sent to Redis."""

    run: Run
    ending: Ending
    #: whether its answer waits on the connection
    has_unread_answer: bool


NextAnswer = NextJob | Skipped | Nothing | Again | Suspended


class TakeAhead:
    """Takes the jobs of one worker."""

    def __init__(
        self,
        connection: Redis,
        log: logging.Logger,
        worker: str,
        lease: int,
        queues: Callable[[], list[str]],
        writer: OutcomeWriter,
    ) -> None:
        """Take the worker's name, the lease in seconds, and what names the queues in the order in which to look."""
        self._redis = connection.client()  # a connection of its own, where two commands await their answers
        self._log = log
        self._worker = worker
        self._lease = lease
        self._queues = queues
        self._writer = writer
        #: The id that the next job's execution will have.
        self._execution = uuid.uuid4().hex
        #: The answer to the `take` that was sent with the last `finish`.
        self._answer: TakeAnswer | None = None
        #: The last `finish`, until it is known how it was written down.
        self.pending: PendingFinish | None = None
        #: When a `take` was first sent that has no answer yet; 0 if there is none.
        self._asked_at = 0.0

    def take(self) -> NextAnswer:
        """Take the first waiting job.

        Raises:
            RedisError: there is no answer. The next `take` gets the same job, should Redis have carried this one out.
        """
        self._asked_at = self._asked_at or time.monotonic()
        return self._read(transitions.take(self._redis, self._worker, self._execution, self._lease, self._queues()))

    def pop_answer(self) -> NextAnswer | None:
        """The answer to the `take` that was sent with the last `finish`, once; None if there is none."""
        answer, self._answer = self._answer, None
        return None if answer is None else self._read(answer)

    def _read(self, answer: TakeAnswer) -> NextAnswer:
        since, self._asked_at = self._asked_at, 0.0
        if not isinstance(answer, Taken):
            return answer
        execution, self._execution = self._execution, uuid.uuid4().hex
        request_id = (answer.fields.request_id or b"").decode(errors="replace")
        return NextJob(Run(answer.job_id, execution, answer.queue, self._worker, request_id), answer, since)

    def finish_and_take(self, run: Run, ending: Ending) -> None:
        """Send `take` and the end of the last run; `pop_answer` has the next job, whose lease begins as Redis takes it.

        `confirm_last_finish` comes first: an unread answer must not stand before those of these two.
        """
        assert not self.pending
        self._asked_at = time.monotonic()
        has_unread_answer = False
        try:
            self._answer = transitions.take_and_finish(
                self._redis, run, ending, self._execution, self._lease, self._queues()
            )
            has_unread_answer = True
        except RedisError as error:
            self._log.error("Worker %s: %s", self._worker, error)
        self.pending = PendingFinish(run, ending, has_unread_answer)

    def confirm_last_finish(self, *, is_patient: bool = True) -> None:
        """Read how the last run's end was written down; write it again if the answer was lost.

        Raises:
            RedisError: Redis did not do it, and is not to be waited for.
        """
        if not self.pending:
            return
        (run, ending, has_unread_answer), status = self.pending, None
        self.pending = PendingFinish(run, ending, has_unread_answer=False)  # an answer can be read once
        if has_unread_answer:
            with contextlib.suppress(RedisError):
                status = transitions.read_finish(self._redis)
        try:
            self._writer.finish(run, ending, status, is_patient=is_patient)
        except ResponseError as error:
            if "WRONGTYPE" not in str(error):
                raise
            self._writer.log_unwritable(run, error)
        self.pending = None
