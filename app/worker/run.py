"""One run of a job, as the worker sees it: begun, watched, ended.

The worker's loop calls `begin` once, and then `react` whenever a message may be there or a deadline may have passed.
Both return the outcome once there is one. Neither waits for a message, so that one loop can look after several runs.
"""

import base64
import contextlib
import json
import re
import threading
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from rq.exceptions import StopRequested
from rq.job import JobStatus
from rq.utils import parse_timeout

from app.config import Settings
from app.core import transitions
from app.core.scripts import describe_failure
from app.core.transitions import Run, Taken
from app.worker.channel import Channel, Frame, Header
from app.worker.horses import HorseDied, WorkHorseHandle, WorkHorses
from app.worker.outcomes import Crashed, Crashes, Failed, Finished, Lost, Outcome, PutBack, Stopped, TimedOut
from app.worker.rq_worker import TICK, ResilientWorker
from app.worker.take_ahead import NextJob

#: Seconds between two looks at the memory that a work-horse uses.
MEMORY_EVERY = 0.2
#: Seconds between two writes of a job's progress.
PROGRESS_EVERY = 0.1
#: Seconds that a function has to end after its timeout was raised inside it, before its process is killed.
KILL_AFTER = 5.0
#: Seconds that a work-horse has to read a job that is sent to it.
READ_WITHIN = 5.0


class Assignment(NamedTuple):
    """A job as the work-horse gets it."""

    header: Header
    #: the call, as RQ's JSONSerializer writes it
    data: bytes
    #: the function's name, for the log
    function: str

    @property
    def path(self) -> str:
        """The function's path, read without the payload; empty if there is none."""
        found = re.match(rb'\s*\[\s*("(?:[^"\\]|\\.)*")', self.data)
        try:
            return str(json.loads(found[1])) if found else ""
        except ValueError:  # the work-horse will say what is wrong with it
            return ""


def read_assignment(run: Run, taken: Taken, settings: Settings) -> Assignment:
    """Read the job out of what `take` answered.

    RQ's `Job.restore` is slow, and fails on fields that nobody needs here.

    Raises:
        ValueError, TimeoutFormatError: it cannot be run.
    """
    fields = taken.fields
    JobStatus((fields.status or b"").decode())  # ValueError: it is no status of RQ's
    if any(fields.callbacks):
        raise ValueError("it names a callback or a webhook of RQ, and only job functions may be run")
    if fields.data is None:
        raise ValueError("it has no data")
    data = fields.data
    with contextlib.suppress(zlib.error):  # RQ reads uncompressed data too
        data = zlib.decompress(data)
    header = {
        "job_id": run.job_id,
        "request_id": run.request_id,
        "queue": run.queue,
        "worker": run.worker,
        "timeout": (fields.timeout and parse_timeout(fields.timeout.decode())) or settings.job_timeout,
        "enqueued_at": (fields.enqueued_at or b"").decode(),
        "started_at": taken.started_at,
    }
    return Assignment(header, data, (fields.function or b"?").decode(errors="replace"))


class JobRun:
    """A run of a job. Only `stop` may be called from another thread."""

    def __init__(self, worker: ResilientWorker, horses: WorkHorses, next_job: NextJob) -> None:
        """Read the job that was taken.

        Raises:
            ValueError, TimeoutFormatError: it cannot be run.
        """
        self.id = next_job.run
        self._worker, self._settings, self._horses = worker, worker.settings, horses
        self._taken_since = next_job.since
        self._assignment = read_assignment(self.id, next_job.taken, self._settings)
        self.crashes = Crashes(int(next_job.taken.fields.crashes or 0))
        self._horse: WorkHorseHandle | None = None
        #: Whether the job was sent to the work-horse: what happens from then on may have been done in part.
        self.has_begun = False

        #: Whether a stop message may kill the work-horse: from `begin` on, until the result is being written.
        self._may_be_stopped = False
        #: Whether one did.
        self._is_stopped = False
        self._stopping = threading.Lock()

        self._progress = ""
        self._is_logged = False
        self._began_at = self._renewed_at = self._look_at_memory_at = 0.0

    # The begin

    def begin(self, meanwhile: Callable[[], None]) -> Outcome | None:
        """Hand the job to a work-horse. Returns an outcome if the run is over before it began.

        Args:
            meanwhile: called each second while a work-horse loads the job functions.
        """
        self._may_be_stopped = True
        try:
            return self._begin(meanwhile)
        except (StopRequested, HorseDied, EOFError, OSError) as error:
            return self._outcome_of(error)

    def _begin(self, meanwhile: Callable[[], None]) -> Outcome | None:
        horse = self._horses.get_ready(meanwhile)
        path = self._assignment.path if horse.crash_limits or horse.fresh else ""
        self.crashes = self.crashes._replace(limit=horse.crash_limits.get(path))
        if is_fresh := self._settings.worker_fresh_process or path in horse.fresh:
            horse = self._horses.get_ready(meanwhile, is_fresh=True)
        self._horse = horse
        if ended := self._confirm_lease():
            return ended
        if self._is_stopped:  # as the work-horse was started
            self.refuse_stops()
            return Stopped()
        self._worker.raise_if_stopping()
        self.has_begun = True
        horse.jobs, horse.is_spent = horse.jobs + 1, is_fresh
        horse.channel.send(self._assignment.header, self._assignment.data, timeout=READ_WITHIN)
        self._began_at = self._renewed_at = self._look_at_memory_at = time.monotonic()
        if is_fresh:
            self._horses.prepare_next()  # it begins to load
        return None

    def _confirm_lease(self) -> Outcome | None:
        """Ask Redis whether this worker still holds the job, if the take is old or the job must not run twice.

        The same call stores the function's own crash limit. Another worker may need it, and may not know the function.
        """
        is_old = time.monotonic() - self._taken_since > TICK
        if self.crashes.limit is None and not is_old and self._settings.max_crashes > 0:
            return None
        connection, lease, limit = self._worker.connection, self._settings.worker_lease, self.crashes.limit
        held = self._worker.retry_until_stored(partial(transitions.renew, connection, self.id, lease, "", limit))
        return {"held": None, "lost": Lost(), "stop": Stopped()}[held]

    # The watch

    @property
    def channel(self) -> Channel:
        """The channel to the work-horse, once the run has begun."""
        assert self._horse
        return self._horse.channel

    @property
    def patience(self) -> float:
        """Seconds after which `react` must be called, even if no message came."""
        if self._progress:
            return PROGRESS_EVERY
        return MEMORY_EVERY if self._settings.worker_max_memory else TICK

    def react(self) -> Outcome | None:
        """Handle the messages that came and the deadlines that passed. Returns the outcome once there is one."""
        try:
            return self._read_messages() or self._keep_lease() or self._check_limits()
        except (EOFError, OSError) as error:
            return self._outcome_of(error)

    def _read_messages(self) -> Outcome | None:
        """Read all that is there, since an outcome may stand behind old progress.

        Raises:
            EOFError: the work-horse died.
        """
        assert self._horse
        frame = self.channel.receive(0)
        if frame is None:
            # The outcome may have come since. Without a look at the process its death may go unnoticed: a process that
            # the job started may keep the socket open.
            if self._horse.has_died() and not (frame := self.channel.receive(0)):
                raise EOFError
            # A short job has one line in the log, that of its end, also if its large result arrives in parts.
            if not self._is_logged and not self.channel.is_receiving:
                self._is_logged = True
                self._worker.log.info("%s, %s, runs", self.id, self._assignment.function)
        reading_since = time.monotonic()
        while frame:
            if "outcome" in frame[0]:
                self.refuse_stops()
                return self._read_outcome(frame)
            if frame[0]["job_id"] == self.id.job_id:  # a thread that an earlier job left may still report its progress
                self._progress = json.dumps(frame[0]["progress"])
            if time.monotonic() - reading_since > PROGRESS_EVERY:
                break
            frame = self.channel.receive(0)
        return None

    def _read_outcome(self, frame: Frame) -> Outcome:
        header, body = frame
        if header["outcome"] == "finished":
            return Finished("" if body == b"null" else base64.b64encode(body).decode(), self._progress)
        trace, error = body.decode(errors="replace"), header["error"]  # the trace may be cut inside a character
        log = self._worker.log.warning if header["is_foreseen"] else self._worker.log.error
        log("%s raised %s", self.id, error["type"], extra={"trace": trace})
        return Failed(describe_failure(error["type"], error["message"], trace), self._progress, header["after"])

    def _keep_lease(self) -> Outcome | None:
        """Renew the lease, and write the progress down with it.

        Each tick, which is oftener than the lease needs, so that the worker sees a cancel if it missed the message.
        """
        now = time.monotonic()
        due = now - self._renewed_at >= (PROGRESS_EVERY if self._progress else TICK)
        if not due or self._worker.is_backing_off():
            return None
        held = self._worker.renew(self.id, self._progress)
        if held != "held":
            self._horses.reap()
            return Stopped() if held == "stop" else Lost()
        self._renewed_at, self._progress = now, ""
        return None

    def _check_limits(self) -> Outcome | None:
        """End the run if it has passed its timeout, or its process uses too much memory."""
        now, limit = time.monotonic(), self._assignment.header["timeout"]
        if limit > 0 and now - self._began_at > limit + KILL_AFTER:  # RQ's -1 is no limit
            self._horses.reap()
            return TimedOut(limit)
        if now >= self._look_at_memory_at:
            self._look_at_memory_at = now + MEMORY_EVERY
            if self._horses.is_over_memory():
                self._horses.reap()
                return Crashed(self._horses.too_much_memory)
        return None

    # The end

    def put_back(self, how: str) -> Outcome:
        """The outcome of a run that ends through no fault of the job. One that must not run twice has crashed."""
        limit = self._settings.max_crashes if self.crashes.limit is None else self.crashes.limit
        return Crashed(how) if self.has_begun and limit == 0 else PutBack(how)

    def give_up(self, how: str) -> Outcome:
        """End the work-horse, since the worker must end."""
        self._horses.reap()
        return self.put_back(how)

    def _outcome_of(self, error: Exception) -> Outcome:
        """The outcome of a run that an error ended. If a stop message killed the work-horse, that is the reason."""
        outcome: Outcome
        match error:
            case StopRequested():
                outcome = self.put_back("its worker was stopped before the run began")
            case HorseDied():  # as it was started
                outcome = PutBack(f"no work-horse: {error}")
            case _:  # it was gone, or did not read, as the worker sent or received
                how = self._horses.reap() if self._horses.horse else str(error)
                if isinstance(error, TimeoutError):
                    how = f"it did not take the job within {READ_WITHIN:.0f} s"
                outcome = Crashed(how) if self.has_begun else PutBack(how)
        return Stopped() if self.refuse_stops() else outcome

    # Stop messages

    def stop(self, execution: str | None) -> bool:
        """Kill the work-horse, since somebody stops the job. From RQ's pubsub thread.

        Args:
            execution: which run is meant; None for the present one. A message may arrive late, after a retry.

        Returns:
            Whether this is the run that was meant, and it may still be stopped.
        """
        with self._stopping:
            if not self._may_be_stopped or execution not in (None, self.id.execution):
                return False
            self._is_stopped = True
            self._horses.kill()
            return True

    def refuse_stops(self) -> bool:
        """Accept no further stop message. Returns whether one was accepted before, which killed the work-horse."""
        with self._stopping:
            self._may_be_stopped = False
            is_stopped, self._is_stopped = self._is_stopped, False
        if is_stopped and self._horses.horse:
            self._horses.reap()
        return is_stopped
