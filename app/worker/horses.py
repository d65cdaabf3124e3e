"""The work-horses of one worker, as the worker sees them: one that runs its jobs, and one that may take its place."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from app.config import Settings
from app.logs import describe_exit
from app.worker.channel import Channel
from app.worker.fork_server import ForkServer, ForkServerDied

#: Seconds between two searches for the processes that a work-horse has started.
FAMILY_EVERY = 0.2
#: Seconds that a work-horse has to load the job functions, with whatever they load.
START_WITHIN = 300.0
#: Seconds between two calls of `meanwhile` while a work-horse loads.
MEANWHILE_EVERY = 1.0
#: Seconds that the fork server has to report a death, which takes it a millisecond unless the machine is busy. After
#: them it is not known how the process ended.
REPORT_WITHIN = 5.0
#: Seconds that a killed process has to be gone: a kernel may take a while to give much memory back.
GONE_WITHIN = 60.0


class HorseDied(Exception):
    """The work-horse's process ended; the text says how."""


def _count_out_of_memory_kills() -> int:
    """How often the kernel's out-of-memory killer has killed a process since boot (Linux 4.13 and later; else 0)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class WorkHorseHandle:
    """A work-horse as its worker sees it: a process, the channel to it, the memory that it uses, and how it ended."""

    def __init__(self, server: ForkServer) -> None:
        """Start the process; it has yet to load the job functions."""
        self.note_time()
        ours, its = socket.socketpair()
        self._server = server
        self.pid = server.start(its)
        its.close()
        self.channel = Channel(ours)
        self._is_ready = False
        self._family: list[psutil.Process] = []
        self._next_look = 0.0
        #: How many jobs were sent to it.
        self.jobs = 0
        #: Whether it may run no further job.
        self.is_spent = False
        #: By a function's path, how often its jobs may be run again after a crash, where the function says so itself.
        self.crash_limits: dict[str, int] = {}
        #: Paths of the functions whose jobs each want a process of their own.
        self.fresh: frozenset[str] = frozenset()

    def is_ready(self, within: float = 0) -> bool:
        """Whether it has loaded the job functions; waits for that at most `within` seconds.

        Raises:
            HorseDied: it could not load them; it printed why.
        """
        if not self._is_ready:
            try:
                hello = self.channel.receive(within)
            except EOFError:
                raise HorseDied(self.reap()) from None
            if hello:
                self._is_ready = True
                self.crash_limits, self.fresh = hello[0]["crash_limits"], frozenset(hello[0]["fresh"])
        return self._is_ready

    def await_ready(self, meanwhile: Callable[[], None]) -> None:
        """Wait until it has loaded the job functions; `meanwhile` is called each second until then.

        Raises:
            HorseDied: it could not load them, or not in time.
        """
        deadline = time.monotonic() + START_WITHIN
        while not self.is_ready(MEANWHILE_EVERY):
            if time.monotonic() > deadline:
                self.kill()
                self.reap()
                raise HorseDied(f"not ready after {START_WITHIN:.0f} s")
            meanwhile()

    def has_died(self) -> bool:
        """Whether the process has ended by itself."""
        return self._server.poll(self.pid) is not None

    def note_time(self) -> None:
        """From now on a death may be the system's doing, if the out-of-memory killer was at work."""
        self._out_of_memory_kills = _count_out_of_memory_kills()

    def memory(self) -> int:
        """Bytes that it and its descendants use. The descendants are searched for five times a second at most."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + FAMILY_EVERY
            with contextlib.suppress(psutil.Error):
                horse = psutil.Process(self.pid)
                self._family = [horse, *horse.children(recursive=True)]
        used = 0
        for process in self._family:
            with contextlib.suppress(psutil.Error):
                used += process.memory_info().rss
        return used

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to it and to all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def reap(self) -> str:
        """Make sure that the process and all that it started are gone. Returns how it ended."""
        self.channel.close()  # it ends itself on that
        code = self._server.wait(self.pid, REPORT_WITHIN)
        self.kill()
        if code is None:
            self._server.wait(self.pid, GONE_WITHIN)
            how = "it closed its connection to the worker"
        else:
            is_out_of_memory = code == -signal.SIGKILL and _count_out_of_memory_kills() > self._out_of_memory_kills
            how = describe_exit(code) + (", as the system was out of memory" if is_out_of_memory else "")
        self._server.forget(self.pid)
        return how


class WorkHorses:
    """Keeps a work-horse ready. Replaces it when it died, may run no further job, or uses too much memory."""

    def __init__(self, settings: Settings, log: logging.Logger, main: Callable[[socket.socket], None]) -> None:
        """Take the settings and the log of the worker, and what a work-horse runs. `open` starts the processes."""
        self._settings = settings
        self._main = main
        self._log = log
        self._server: ForkServer | None = None
        #: The work-horse that runs jobs, or will once it is ready; None between two of them.
        self.horse: WorkHorseHandle | None = None
        self._next: WorkHorseHandle | None = None

    def open(self) -> None:
        """Start the fork server and the first work-horse. No thread may have been started before.

        Raises:
            SystemExit: it cannot load the job functions, or keep WORKER_MAX_MEMORY.
        """
        self._server = ForkServer(self._main)
        try:
            horse = self.get_ready(lambda: None)
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
                horse.reap()
        if self._server:
            self._server.close()

    def get_ready(self, meanwhile: Callable[[], None], *, is_fresh: bool = False) -> WorkHorseHandle:
        """A work-horse that has loaded the job functions; if `is_fresh`, one that has run no job yet.

        While it loads, `meanwhile` is called each second. An exception of `meanwhile` ends the waiting only.

        Raises:
            HorseDied: it could not load them.
            OSError: no process could be started.
        """
        if self.horse and self.horse.has_died():  # while idle: no job's fault
            self._log.error("the idle work-horse died: %s", self.reap())
        if self.horse and self._has_to_go(self.horse, is_fresh):
            self.reap()
        if self.is_over_memory():  # or the next job would be blamed for the memory of earlier ones
            self._log.warning("a new work-horse, after the jobs of the old one: %s", self.too_much_memory)
            self.reap()
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

    def _has_to_go(self, horse: WorkHorseHandle, is_fresh: bool) -> bool:
        if horse.is_spent or (is_fresh and horse.jobs):
            return True
        most = self._settings.worker_max_jobs
        return most is not None and horse.jobs >= most and self.prepare_next()

    def prepare_next(self) -> bool:
        """Start the next work-horse, which loads the functions while the old one runs jobs. Whether it is ready."""
        try:
            self._next = self._next or self._start()
            if self._next.has_died():
                raise HorseDied(self._next.reap())
            return self._next.is_ready()
        except (HorseDied, OSError) as error:  # the old one goes on
            self._log.error("no new work-horse: %s", error)
            self._next = None
            return False

    def _start(self) -> WorkHorseHandle:
        assert self._server
        return WorkHorseHandle(self._server)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the work-horse and to all that it started, if there is one. From any thread."""
        if horse := self.horse:
            horse.kill(number)

    def reap(self) -> str:
        """End the work-horse and all that it started; the next job gets a new one. Returns how it ended."""
        assert self.horse
        horse, self.horse = self.horse, None
        horse.kill()
        return horse.reap()

    def is_over_memory(self) -> bool:
        """Whether the work-horse uses more memory than it may."""
        limit = self._settings.worker_max_memory
        return limit is not None and self.horse is not None and self.horse.memory() > limit

    @property
    def too_much_memory(self) -> str:
        """Why a run crashed: its work-horse used too much memory."""
        limit = self._settings.worker_max_memory
        assert limit
        return f"it used more memory than WORKER_MAX_MEMORY allows, {limit.human_readable()}"
