"""The fork server: a process that the worker forks off while it has no threads, and that forks the work-horses.

A work-horse is ready within milliseconds that way, where a fresh interpreter takes a third of a second, and shares most
of its memory with the worker. RQ forks the worker itself for each job; with the threads that it has by then (RQ's
pubsub) that can deadlock the child.
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

#: What the server says of a process: `b` for born or `d` for dead, its id, and its exit code; or `n` if none could be
#: born, with the error's number in place of the code.
_NEWS = struct.Struct("!cii")


class ForkServerDied(SystemExit):
    """The fork server is gone. The worker ends too: it has threads, and cannot fork another one."""


class ForkServer:
    """The fork server as the worker sees it. Only the worker's main thread may use it."""

    def __init__(self, run: Callable[[socket.socket], None]) -> None:
        """Fork. Each of the server's own children calls `run` with the socket that it was started with."""
        self._control, its = socket.socketpair()
        self._dead: dict[int, int] = {}
        sys.stdout.flush()  # what waits there would be written by each process
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # a collection would write to memory that all of them share: 5 MB of it
        self._pid = os.fork()
        if self._pid == 0:
            self._control.close()
            _serve(its, run)
        its.close()

    def start(self, end: socket.socket) -> int:
        """Start a process that has this socket; its id.

        Raises:
            OSError: the system has no room for it.
        """
        with contextlib.suppress(ConnectionError):  # `_read` will say it
            socket.send_fds(self._control, [b"s"], [end.fileno()])
        while (news := self._read())[0] == b"d":
            pass
        word, pid, code = news
        if word == b"n":
            raise OSError(code, os.strerror(code))
        self._dead.pop(pid, None)  # of another one, long ago
        return pid

    def poll(self, pid: int) -> int | None:
        """The exit code of one of its processes, as `subprocess` has it; None while it runs."""
        with contextlib.suppress(BlockingIOError):
            while pid not in self._dead:
                self._read(socket.MSG_DONTWAIT)
        return self._dead.get(pid)

    def wait(self, pid: int, seconds: float) -> int | None:
        """As `poll`, once it has ended, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while (code := self.poll(pid)) is None and time.monotonic() < deadline:
            time.sleep(0.001)
        return code

    def forget(self, pid: int) -> None:
        """Nobody will ask for this process again."""
        self._dead.pop(pid, None)

    def close(self) -> None:
        """End the server."""
        self._control.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _read(self, flags: int = 0) -> tuple[bytes, int, int]:
        try:
            news = self._control.recv(_NEWS.size, flags)
        except ConnectionError:
            news = b""
        if not news:
            raise ForkServerDied("The fork server died.")
        word, pid, code = _NEWS.unpack(news)
        if word == b"d":
            self._dead[pid] = code
        return word, pid, code


def _serve(control: socket.socket, run: Callable[[socket.socket], None]) -> NoReturn:
    children: set[int] = set()
    with contextlib.suppress(BaseException):  # a bug, or a worker that ended as we spoke to it: not into its code
        os.setpgid(0, 0)  # a Ctrl-C in a terminal is the worker's to handle
        for number in (signal.SIGINT, signal.SIGTERM):  # as when all processes of a service are told to end
            signal.signal(number, signal.SIG_IGN)
        _let_go_of_files(control)

        def tell(word: Literal[b"b", b"d", b"n"], pid: int, code: int = 0) -> None:
            control.send(_NEWS.pack(word, pid, code))

        # A handler alone would run only after the wait for the next order if the signal came just before that.
        wakes, wake = socket.socketpair()
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready, _, _ = select.select([control, wakes], [], [])
            if wakes in ready:
                wakes.recv(4096)
                with contextlib.suppress(ChildProcessError):
                    while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                        children.discard(ended[0])
                        tell(b"d", ended[0], os.waitstatus_to_exitcode(ended[1]))
            if control not in ready:
                continue
            order, files, _, _ = socket.recv_fds(control, 1, 1)
            if not order:
                break
            try:
                if not files:  # the kernel drops what there is no number for
                    raise OSError(errno.EMFILE, "")
                pid = os.fork()
            except OSError as error:
                tell(b"n", 0, error.errno or 0)
            else:
                if pid == 0:
                    children.clear()
                    signal.set_wakeup_fd(-1)
                    for number in (signal.SIGCHLD, signal.SIGTERM):
                        signal.signal(number, signal.SIG_DFL)
                    os.setpgid(0, 0)
                    for inherited in (control, wakes, wake):
                        inherited.close()
                    _be_child(socket.socket(fileno=files[0]), run)
                children.add(pid)
                tell(b"b", pid)
            for file in files:
                os.close(file)
    for pid in children:  # each ends itself as its worker does, but not while its job keeps all threads from running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def _let_go_of_files(control: socket.socket) -> None:
    """Put an empty file in the place of each that the worker has open, its connections to Redis and stdin among them.

    They are not closed: an object of the worker's that is thrown away here would close what has its number by then.
    """
    with open(os.devnull, "r+b", buffering=0) as nothing:  # noqa: PTH123  # a descriptor is wanted
        for name in os.listdir("/dev/fd"):  # noqa: PTH208  # its names are the numbers
            if int(name) not in (1, 2, control.fileno(), nothing.fileno()):
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.fstat(int(name))
                    os.dup2(nothing.fileno(), int(name), inheritable=False)


def _be_child(end: socket.socket, run: Callable[[socket.socket], None]) -> NoReturn:
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
