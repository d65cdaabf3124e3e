"""The channel between worker and work-horse: frames of a JSON header and raw bytes, over a socket pair.

docs/lifecycle.md lists the messages.
"""

import json
import select
import socket
import struct
import threading
import time
from collections.abc import Collection
from typing import Any

#: Before each frame: the sizes of header and body, in bytes.
_SIZES = struct.Struct("!II")

Header = dict[str, Any]
Frame = tuple[Header, bytes]


class Channel:
    """One end of the socket pair.

    One thread receives. Others may send at the same time if that one waits without a timeout: a socket has one timeout
    for both.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._received = bytearray()
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other one reads the end of the stream."""
        self._socket.close()

    def send(self, header: Header, body: bytes = b"", timeout: float | None = None) -> None:
        """Send a frame.

        Raises:
            OSError: the other end is closed, or did not read the frame within `timeout` seconds (TimeoutError).
        """
        head = json.dumps(header).encode()
        with self._sending:
            self._socket.settimeout(timeout)
            self._socket.sendall(_SIZES.pack(len(head), len(body)) + head + body)

    def receive(self, timeout: float | None = None) -> Frame | None:
        """The next frame; None if none is complete within `timeout` seconds. With 0 it does not wait at all.

        Raises:
            EOFError: the other end is closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (frame := self._complete_frame()) is None:
            try:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0001)
                self._socket.settimeout(left if timeout else timeout)
                received = self._socket.recv(1 << 18)
            except (TimeoutError, BlockingIOError):
                return None
            except ConnectionError:
                received = b""
            if not received:
                raise EOFError
            self._received += received
        return frame

    @property
    def is_receiving(self) -> bool:
        """Whether a frame, or a part of one, has arrived that `receive` has not returned yet."""
        return bool(self._received)

    @property
    def has_frame(self) -> bool:
        """Whether a whole frame has arrived that `receive` has not returned yet."""
        return len(self._received) >= _SIZES.size and len(self._received) >= _SIZES.size + sum(
            _SIZES.unpack_from(self._received)
        )

    def _complete_frame(self) -> Frame | None:
        if not self.has_frame:
            return None
        head, body = _SIZES.unpack_from(self._received)
        start, end = _SIZES.size + head, _SIZES.size + head + body
        frame = json.loads(self._received[_SIZES.size : start]), bytes(self._received[start:end])
        del self._received[:end]
        return frame


def wait_for_any(channels: Collection[Channel], timeout: float) -> None:
    """Wait until one of the channels has something to receive, or is closed; at most `timeout` seconds."""
    if any(channel.has_frame for channel in channels):  # the socket does not show a frame that was read from it already
        return
    poll = select.poll()
    for channel in channels:
        poll.register(channel.fileno(), select.POLLIN)
    poll.poll(timeout * 1000)
