"""Run several processes as one service: with one log, started again if they end, and ended together."""

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

#: Seconds before an ended process is started again: the first pause, and the longest. An early end doubles the pause.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
#: An end after fewer seconds than these is an early end.
STEADY_AFTER = 60.0
#: Seconds between two checks of the processes.
CHECK_EVERY = 0.1
#: Seconds to read the last lines of a process that has ended. A child of it may hold the pipe open for longer.
LAST_LINES_WITHIN = 1.0


def _do_nothing() -> None:
    pass


class _Child:
    """A process that the supervisor runs: its command, its present run, and when to start it again."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.command = name, command
        self.popen: subprocess.Popen[bytes] | None = None
        self.log: threading.Thread | None = None
        self.started_at = self.start_at = 0.0
        self.pause = FIRST_PAUSE

    def note_end(self) -> str | None:
        """Say how the process ended, if it has ended since the last call, and plan its next start."""
        if self.popen is None or (code := self.popen.poll()) is None:
            return None
        self.popen = None
        now = time.monotonic()
        if now - self.started_at > STEADY_AFTER:
            self.pause = FIRST_PAUSE
        self.start_at, self.pause = now + self.pause, min(2 * self.pause, LONGEST_PAUSE)
        return describe_exit(code)


class Supervisor:
    """Runs processes until `end`, or a signal. If `restarts` is false and one process ends, it ends all."""

    def __init__(self, output: TextIO, *, kill_after: float, log_format: str = "text") -> None:
        """Prepare a supervisor without processes.

        Args:
            output: for the log lines of all processes.
            kill_after: seconds after SIGTERM before a process is killed.
            log_format: of the processes, `text` or `json`.
        """
        self._output, self._log_format, self._kill_after = output, log_format, kill_after
        self._children: list[_Child] = []
        self._width = 0
        self._printing = threading.Lock()
        self._is_ending = False  # no threading.Event: a signal handler must not wait for its lock
        self.restarts = False
        #: Why all processes were ended, if one of them ended by itself.
        self.failure = ""

    def add(self, name: str, command: Sequence[str]) -> None:
        """Add a process that runs this command. Its name stands in front of its log lines."""
        self._children.append(_Child(name, command))
        self._width = max(self._width, len(name))

    def end(self) -> None:
        """End all processes. Any thread may call this."""
        self._is_ending = True

    def run(self, env: Mapping[str, str], keep_alive: Callable[[], None]) -> None:
        """Run the processes until `end`, SIGINT, SIGTERM or SIGHUP; return when all of them have ended.

        Args:
            env: their environment.
            keep_alive: called in this thread every CHECK_EVERY seconds, until all have ended.
        """

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.end()

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                signal.signal(number, on_signal)
        try:
            while not self._is_ending:
                keep_alive()
                self._check_children(env)
                time.sleep(CHECK_EVERY)
        finally:
            self._end_all(keep_alive)

    def _check_children(self, env: Mapping[str, str]) -> None:
        for child in self._children:
            if how := child.note_end():
                if not self.restarts:
                    self.failure = f"A process ended by itself ({child.name}: {how}); all others were stopped."
                    self.end()
                    return
                pause = child.start_at - time.monotonic()
                self._log(child.name, f"ended by itself: {how}; it is started again in {pause:.0f} s")
            if child.popen is None and time.monotonic() >= child.start_at:
                self._start(child, env)

    def _start(self, child: _Child, env: Mapping[str, str]) -> None:
        # In a session of its own, so that Ctrl-C in the terminal reaches the supervisor only, which ends all in order.
        try:
            child.popen = subprocess.Popen(
                child.command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:  # no memory, or too many processes
            self._log(child.name, f"cannot be started: {error}")
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

    def _log(self, name: str, event: str) -> None:
        self._print(name, event if self._log_format == "json" else f"{time.strftime('%H:%M:%S')} {event}")

    def _print(self, name: str, line: str) -> None:
        encoding = self._output.encoding or "utf-8"
        line = line.encode(encoding, errors="backslashreplace").decode(encoding)
        # The reader of the log may be gone, as after `| head`. The processes go on, so their output must still be read.
        with self._printing, contextlib.suppress(OSError, ValueError):
            self._output.write(f"{self._format(name, line)}\n")
            self._output.flush()

    def _format(self, name: str, line: str) -> str:
        if self._log_format == "text":
            return f"{name:<{self._width}} | {line}"
        if line.startswith('{"time": '):
            return line
        # A line that a job function printed, or the supervisor wrote.
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": now, "level": "info", "logger": name, "message": line})

    def _end_all(self, keep_alive: Callable[[], None]) -> None:
        running = [child.popen for child in self._children if child.popen]
        for popen in running:
            popen.terminate()
        deadline = time.monotonic() + self._kill_after
        while any(popen.poll() is None for popen in running) and time.monotonic() < deadline:
            try:
                keep_alive()  # jobs that end now must be able to store their results
            except (Exception, SystemExit) as error:  # noqa: BLE001  # the processes must be ended in any case
                self._log("", str(error))
                keep_alive = _do_nothing
            time.sleep(CHECK_EVERY)
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
