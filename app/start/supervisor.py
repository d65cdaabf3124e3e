"""Processes that are one service: their logs as one, started again when they end, and ended together."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import TextIO

from app.logs import describe_exit

#: Seconds before a process that ended is started again, at first and at most: doubled each time it ends early.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
#: Seconds after which an end is no early one.
STEADY = 60.0
#: Seconds between two looks at the processes.
LOOK_EVERY = 0.1
#: Seconds that the last lines of a process have once it is gone: one that left its group may hold the pipe for longer.
LAST_LINES_WITHIN = 1.0


def _look_at_nothing() -> None:
    pass


class _Child:
    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.command = name, command
        self.popen: subprocess.Popen[bytes] | None = None
        self.log: threading.Thread | None = None
        self.started_at = self.start_at = 0.0
        self.pause = FIRST_PAUSE

    def note_end(self) -> str | None:
        """How it ended, if it did since the last look."""
        if self.popen is None or (code := self.popen.poll()) is None:
            return None
        self.popen = None
        now = time.monotonic()
        if now - self.started_at > STEADY:
            self.pause = FIRST_PAUSE
        self.start_at, self.pause = now + self.pause, min(2 * self.pause, LONGEST_PAUSE)
        return describe_exit(code)


class Supervisor:
    """Runs processes until it is told to end. While `restarts` is false, the end of one is the end of all."""

    def __init__(self, output: TextIO, *, kill_after: float, log_format: str = "text") -> None:
        """Take where the logs go and how, and how many seconds the processes have for their end."""
        self._output, self._log_format, self._kill_after = output, log_format, kill_after
        self._children: list[_Child] = []
        self._width = 0
        self._printing = threading.Lock()
        self._is_ending = False  # no event: it is set by signal handlers, which must not wait for its lock
        self.restarts = False
        #: Why all were ended, if one of them ended by itself.
        self.failure = ""

    def add(self, name: str, command: Sequence[str]) -> None:
        """Have a process run this command, under a name for its lines in the log."""
        self._children.append(_Child(name, command))
        self._width = max(self._width, len(name))

    def end(self) -> None:
        """Tell all processes to end; from any thread."""
        self._is_ending = True

    def run(self, env: Mapping[str, str], look: Callable[[], None]) -> None:
        """Start the processes and look after them until `end`, SIGINT, SIGTERM or SIGHUP, and all are gone.

        Args:
            env: their environment.
            look: called at each look at them, from this thread.
        """

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.end()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, on_signal)
        try:
            while not self._is_ending:
                look()
                self._look_after(env)
                time.sleep(LOOK_EVERY)
        finally:
            self._end_all(look)

    def _look_after(self, env: Mapping[str, str]) -> None:
        for child in self._children:
            if how := child.note_end():
                if not self.restarts:
                    self.failure = f"A process ended by itself ({child.name}: {how}); all others were stopped."
                    self.end()
                    return
                pause = child.start_at - time.monotonic()
                self._tell(child.name, f"ended by itself: {how}; it is started again in {pause:.0f} s")
            if child.popen is None and time.monotonic() >= child.start_at:
                self._start(child, env)

    def _start(self, child: _Child, env: Mapping[str, str]) -> None:
        # In a session of its own: Ctrl-C in the terminal is ours to pass on.
        try:
            child.popen = subprocess.Popen(
                child.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:  # no memory, or too many processes
            self._tell(child.name, f"cannot be started: {error}")
            child.start_at = time.monotonic() + LONGEST_PAUSE
            return
        child.started_at = time.monotonic()
        child.log = threading.Thread(target=self._copy_log, args=(child.name, child.popen), daemon=True)
        child.log.start()

    def _copy_log(self, name: str, popen: subprocess.Popen[bytes]) -> None:
        assert popen.stdout
        with popen.stdout:
            for line in popen.stdout:
                self._print(name, line.decode(errors="replace").rstrip("\n"))

    def _tell(self, name: str, event: str) -> None:
        self._print(name, event if self._log_format == "json" else f"{time.strftime('%H:%M:%S')} {event}")

    def _print(self, name: str, line: str) -> None:
        encoding = self._output.encoding or "utf-8"
        line = line.encode(encoding, errors="backslashreplace").decode(encoding)
        # Whoever reads the log may be gone, as after `| head`; the processes go on, and so does the reading of theirs.
        with self._printing, contextlib.suppress(OSError, ValueError):
            self._output.write(f"{self._shape(name, line)}\n")
            self._output.flush()

    def _shape(self, name: str, line: str) -> str:
        if self._log_format == "text":
            return f"{name:<{self._width}} | {line}"
        if line.startswith('{"time": '):
            return line
        # What a job function printed, or what we have to say.
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": now, "level": "info", "logger": name, "message": line})

    def _end_all(self, look: Callable[[], None]) -> None:
        running = [child.popen for child in self._children if child.popen]
        for popen in running:
            popen.terminate()
        deadline = time.monotonic() + self._kill_after
        while any(popen.poll() is None for popen in running) and time.monotonic() < deadline:
            try:
                look()  # what jobs come to in their last seconds is to be stored
            except (Exception, SystemExit) as error:  # noqa: BLE001  # the processes are to be ended all the same
                self._tell("", str(error))
                look = _look_at_nothing
            time.sleep(LOOK_EVERY)
        for popen in running:
            if popen.poll() is None:
                os.killpg(popen.pid, signal.SIGKILL)
            popen.wait()
        for child in self._children:
            if child.log:
                child.log.join(LAST_LINES_WITHIN)


def python(*arguments: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", *arguments]
