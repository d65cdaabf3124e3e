"""The stable: the work-horses of one worker: one that runs its jobs, and one that may take its place."""

import contextlib
import logging
from collections.abc import Callable

from app.config import Settings
from app.worker import work_horse
from app.worker.fork_server import ForkServer, ForkServerDied
from app.worker.horse_process import HorseDied, WorkHorse


class Stable:
    """Sees to it that there is a work-horse, and a new one when that is called for."""

    def __init__(self, settings: Settings, log: logging.Logger) -> None:
        """Take the settings of the worker, and where it writes what happens. `open` starts the processes."""
        self._settings = settings
        self._log = log
        self._server: ForkServer | None = None
        #: The one that runs jobs, or will once it is ready; if there is one just now.
        self.horse: WorkHorse | None = None
        self._next: WorkHorse | None = None

    def open(self) -> None:
        """Start the fork server and the first work-horse. No thread may have been started before.

        Raises:
            SystemExit: it cannot load the job functions, or keep WORKER_MAX_MEMORY.
        """
        self._server = ForkServer(work_horse.main)
        try:
            horse = self.ready_horse(lambda: None)
        except HorseDied as error:
            raise SystemExit(f"The work-horse cannot load the job functions ({error}).") from None
        if self.is_over_memory():
            raise SystemExit(
                f"WORKER_MAX_MEMORY is too little: a work-horse that runs no job uses {horse.memory()} bytes."
            )

    def close(self) -> None:
        """End all of them."""
        for horse in filter(None, (self.horse, self._next)):
            horse.kill()
            with contextlib.suppress(ForkServerDied):
                horse.bury()
        if self._server:
            self._server.close()

    def ready_horse(self, meanwhile: Callable[[], None], *, is_fresh: bool = False) -> WorkHorse:
        """A work-horse that has loaded the job functions; if it is to be fresh, one that has run no job yet.

        While it has to be waited for, `meanwhile` is called each second. What that raises ends the waiting only.

        Raises:
            HorseDied: it could not load them.
            OSError: no process could be started.
        """
        if self.horse and self.horse.has_died():  # while idle: no job's fault
            self._log.error("the idle work-horse died: %s", self.bury())
        if self.horse and self._has_to_go(self.horse, is_fresh):
            self.bury()
        if self.is_over_memory():  # what its jobs left behind is not the next one's fault
            self._log.warning("a new work-horse, after the jobs of the old one: %s", self.too_much_memory)
            self.bury()
        if self.horse is None:
            self.horse, self._next = self._next, None
            if self.horse is None or self.horse.has_died():
                self.horse = self._start()
        try:
            self.horse.await_ready(meanwhile)
        except HorseDied:
            self.horse = None
            raise
        return self.horse

    def _has_to_go(self, horse: WorkHorse, is_fresh: bool) -> bool:
        if horse.is_spent or (is_fresh and horse.jobs):
            return True
        most = self._settings.worker_max_jobs
        return most is not None and horse.jobs >= most and self.prepare_next()

    def prepare_next(self) -> bool:
        """Whether there is one that may take over. It loads the functions while the old one runs jobs."""
        try:
            self._next = self._next or self._start()
            if self._next.has_died():
                raise HorseDied(self._next.bury())
            return self._next.is_ready()
        except (HorseDied, OSError) as error:  # the old one goes on
            self._log.error("no new work-horse: %s", error)
            self._next = None
            return False

    def _start(self) -> WorkHorse:
        assert self._server
        return WorkHorse(self._server)

    def bury(self) -> str:
        """End the work-horse and whatever it started; the next job gets a new one. Returns how it ended."""
        assert self.horse
        horse, self.horse = self.horse, None
        horse.kill()
        return horse.bury()

    def is_over_memory(self) -> bool:
        """Whether the work-horse uses more memory than it may."""
        limit = self._settings.worker_max_memory
        return limit is not None and self.horse is not None and self.horse.memory() > limit

    @property
    def too_much_memory(self) -> str:
        """How a run ends that does."""
        limit = self._settings.worker_max_memory
        assert limit
        return f"it used more memory than WORKER_MAX_MEMORY allows, {limit.human_readable()}"
