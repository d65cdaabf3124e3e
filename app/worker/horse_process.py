"""The work-horse as its worker sees it: a process, a channel to it, how much memory it uses, and how it ended."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from app.logs import describe_exit
from app.worker.channel import Channel
from app.worker.fork_server import ForkServer

#: Seconds between two looks at which processes a work-horse has started.
FAMILY_EVERY = 0.2
#: Seconds that a work-horse has to load the job functions, with whatever they load.
START_WITHIN = 300.0
#: Seconds of it after which its worker looks after other things, each time.
LOOK_AWAY_EVERY = 1.0
#: Seconds that the fork server has to tell of a death, which takes it a millisecond unless the machine is busy. After
#: them it is not known how the process ended.
TOLD_WITHIN = 5.0


class HorseDied(Exception):
    """The work-horse's process ended; the text says how."""


def _count_out_of_memory_kills() -> int:
    """How often the kernel's out-of-memory killer was at work since boot (Linux 4.13 and later; else 0)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


class WorkHorse:
    """The work-horse as the worker sees it: a process and a channel to it."""

    def __init__(self, server: ForkServer) -> None:
        """Start the process; it has to load the job functions yet."""
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
        #: By path of a function, how often its jobs may be run again after a crash, where it says so itself.
        self.crash_limits: dict[str, int] = {}
        #: Paths of the functions whose jobs each want a process of their own.
        self.fresh: frozenset[str] = frozenset()

    def is_ready(self, within: float = 0) -> bool:
        """Whether it has loaded the job functions, at the latest after so many seconds.

        Raises:
            HorseDied: it could not load them; it printed why.
        """
        if not self._is_ready:
            try:
                hello = self.channel.receive(within)
            except EOFError:
                raise HorseDied(self.bury()) from None
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
        while not self.is_ready(LOOK_AWAY_EVERY):
            if time.monotonic() > deadline:
                self.kill()
                self.bury()
                raise HorseDied(f"not ready after {START_WITHIN:.0f} s")
            meanwhile()

    def has_died(self) -> bool:
        """Whether the process has ended by itself."""
        return self._server.poll(self.pid) is not None

    def note_time(self) -> None:
        """From now on a death may be the system's, if it kills for want of memory."""
        self._out_of_memory_kills = _count_out_of_memory_kills()

    def memory(self) -> int:
        """Bytes that it and the processes below it use.

        Which these are is looked up now and then only: that takes some milliseconds, for a look at all there are.
        """
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

    def bury(self) -> str:
        """Make sure that the process and all that it started are gone, and tell how it ended."""
        self.channel.close()  # it ends itself on that
        code = self._server.wait(self.pid, TOLD_WITHIN)
        self.kill()
        if code is None:
            self._server.wait(self.pid, 60)  # seconds: a kernel may take a while to give much memory back
            how = "it closed its connection to the worker"
        else:
            is_out_of_memory = code == -signal.SIGKILL and _count_out_of_memory_kills() > self._out_of_memory_kills
            how = describe_exit(code) + (", as the system was out of memory" if is_out_of_memory else "")
        self._server.forget(self.pid)
        return how
