"""The fork server: a process that forks the work-horses. The worker forks it off while it has no threads.

A forked work-horse is ready within milliseconds, where a fresh interpreter takes a third of a second, and shares most
of its memory with the worker. RQ forks the worker itself for each job. By then the worker has threads (RQ's pubsub), so
the child may deadlock.
"""

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from typing import Literal, NoReturn

#: A message of the server about a process: `b` (born) or `d` (dead), its id, and its exit code. Or `n`: no process
#: could be started, with the error's number in place of the code.
_REPORT = struct.Struct("!cii")


class ForkServerDied(SystemExit):
    """The fork server is gone. The worker ends too: it has threads, and cannot fork another one."""


class ForkServer:
    """The fork server as the worker sees it. Only the worker's main thread may use it."""

    def __init__(self, run: Callable[[socket.socket], None]) -> None:
        """Fork. Each of the server's own children calls `run` with the socket that it was started with."""
        self._control, server_end = socket.socketpair()
        self._dead: dict[int, int] = {}
        sys.stdout.flush()  # or each process would write the buffered text
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # or a collection would write to the memory that all of them share
        self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            _serve(server_end, run)
        server_end.close()

    def start(self, end: socket.socket) -> int:
        """Start a process that has this socket; its id.

        Raises:
            OSError: the system has no room for it.
        """
        with contextlib.suppress(ConnectionError):  # `_read` raises then
            socket.send_fds(self._control, [b"s"], [end.fileno()])
        while (report := self._read())[0] == b"d":
            pass
        word, pid, code = report
        if word == b"n":
            raise OSError(code, os.strerror(code))
        self._dead.pop(pid, None)  # an earlier process had the same id
        return pid

    def poll(self, pid: int) -> int | None:
        """The exit code of one of its processes, as `subprocess` has it; None while it runs."""
        with contextlib.suppress(BlockingIOError):
            while pid not in self._dead:
                self._read(socket.MSG_DONTWAIT)
        return self._dead.get(pid)

    def wait(self, pid: int, seconds: float) -> int | None:
        """As `poll`, but wait for the end of the process, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while (code := self.poll(pid)) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        return code

    def forget(self, pid: int) -> None:
        """Drop the exit code of this process: nobody will ask for it again."""
        self._dead.pop(pid, None)

    def close(self) -> None:
        """End the server."""
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _read(self, flags: int = 0) -> tuple[bytes, int, int]:
        try:
            report = self._control.recv(_REPORT.size, flags)
        except ConnectionError:
            report = b""
        if not report:
            raise ForkServerDied("The fork server died.")
        word, pid, code = _REPORT.unpack(report)
        if word == b"d":
            self._dead[pid] = code
        return word, pid, code


class _Server:
    """The fork server itself, in its own process."""

    def __init__(self, control: socket.socket, run: Callable[[socket.socket], None]) -> None:
        self._control, self._run = control, run
        self._children: set[int] = set()
        # A signal handler alone would run after the next order if the signal came just before the wait for it.
        self._wakes, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Start processes and report their ends, until the worker closes its end of the socket."""
        while True:
            ready, _, _ = select.select([self._control, self._wakes], [], [])
            if self._wakes in ready:
                self._wakes.recv(4096)
                self._report_ends()
            if self._control in ready:
                order, files, _, _ = socket.recv_fds(self._control, 1, 1)
                if not order:
                    return
                self._start(files)
                for file in files:
                    os.close(file)

    def kill_children(self) -> None:
        """Kill them. Each ends itself as its worker does, but a job that holds the GIL keeps it from that."""
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    def _report(self, word: Literal[b"b", b"d", b"n"], pid: int, code: int = 0) -> None:
        self._control.send(_REPORT.pack(word, pid, code))

    def _report_ends(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._children.discard(ended[0])
                self._report(b"d", ended[0], os.waitstatus_to_exitcode(ended[1]))

    def _start(self, files: list[int]) -> None:
        try:
            if not files:  # the kernel drops a file that this process has no number left for
                raise OSError(errno.EMFILE, "")
            pid = os.fork()
        except OSError as error:
            self._report(b"n", 0, error.errno or 0)
            return
        if pid == 0:
            self._become_child(files[0])
        self._children.add(pid)
        self._report(b"b", pid)

    def _become_child(self, file: int) -> NoReturn:
        self._children.clear()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        for inherited in (self._control, self._wakes, self._wake):
            inherited.close()
        _run_child(socket.socket(fileno=file), self._run)


def _serve(control: socket.socket, run: Callable[[socket.socket], None]) -> NoReturn:
    with contextlib.suppress(BaseException):  # a bug, or the worker's end: this process must not run the worker's code
        os.setpgid(0, 0)  # a Ctrl-C in a terminal is the worker's to handle
        for number in (signal.SIGINT, signal.SIGTERM):  # when a service is stopped, all its processes may get them
            signal.signal(number, signal.SIG_IGN)
        _let_go_of_files(control)
        server = _Server(control, run)
        try:
            server.serve()
        finally:
            server.kill_children()
    os._exit(0)


def _let_go_of_files(control: socket.socket) -> None:
    """Replace each file that the worker has open with an empty one, its connections to Redis and stdin among them.

    They are replaced, not closed: an object of the worker that is destroyed here closes its file number once more, and
    that number might belong to another file by then.
    """
    with open(os.devnull, "r+b", buffering=0) as nothing:  # noqa: PTH123  # a descriptor is wanted
        for name in os.listdir("/dev/fd"):  # noqa: PTH208  # its names are the numbers
            if int(name) not in (1, 2, control.fileno(), nothing.fileno()):
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.fstat(int(name))
                    os.dup2(nothing.fileno(), int(name), inheritable=False)


def _run_child(end: socket.socket, run: Callable[[socket.socket], None]) -> NoReturn:
    code = 1
    try:
        run(end)
        code = 0
    except SystemExit as error:
        print(error, file=sys.stderr)
    except BaseException:  # noqa: BLE001  # as the interpreter does it at the end of a program
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
