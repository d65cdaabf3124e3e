"""The work-horse as its worker sees it: a process, and a channel to it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

from app.frames import Channel


class HorseDied(Exception):
    """The work-horse's process ended; the text says how."""


class WorkHorse:
    """The work-horse as the worker sees it: a process and a channel to it."""

    def __init__(self) -> None:
        """Start the process and wait until it has loaded the job functions.

        Raises:
            HorseDied: it could not load them; it printed why.
        """
        ours, its = socket.socketpair()
        # A fresh interpreter: forking a process that has threads (RQ's pubsub) can deadlock the child.
        code = f"import sys; sys.path[:] = {sys.path!r}; from app.work_horse import main; main({its.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, process_group=0
        )
        its.close()
        self.pid = self._process.pid
        self.channel = Channel(ours)
        try:
            self.channel.receive()
        except EOFError:
            raise HorseDied(self.bury()) from None

    def has_died(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.poll() is not None

    def bury(self) -> str:
        """Make sure that the process and all that it started are gone, and tell how it ended."""
        self.channel.close()  # it ends itself on that
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
