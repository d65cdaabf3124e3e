"""Limits that keep one client from using up a web process: open requests, bytes of large bodies, and time.

Words: a body or a response is *large* if it has more than `app.config.LARGE` bytes.
"""

import errno
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import gevent
from apiflask import APIFlask
from flask import Response, current_app, g, request

from app.config import LARGE, Settings
from app.jobs import problems
from app.jobs.problems import TRY_AGAIN
from app.web.auth import current_key, is_public

#: Seconds that a client may take to send a body or to read a response. Each MIN_BYTES_PER_SECOND bytes add one second.
BASE_SECONDS = 60
MIN_BYTES_PER_SECOND = 16 * 1024
#: Bytes of large bodies and responses that a process may hold at once. If the settings allow very large ones, it may
#: hold four of the largest.
MAX_LARGE_BYTES = 256 * 2**20


class FairQuota:
    """A quota shared by API keys: a key may hold at most as much as then stays free.

    So no key ever has more than half of it, and something is left for the next key (Choudhury and Hahne, "Dynamic
    queue length thresholds", 1998). If all requests have the same key, this key may hold the whole quota.
    """

    def __init__(self, total: int, *, several_keys: bool) -> None:
        self._total = total
        self._several_keys = several_keys
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, key: str, amount: int) -> bool:
        """Take an amount for the key. Return False, and take nothing, if that is too much."""
        with self._lock:
            free_then = self._total - self._held.total() - amount
            held_then = self._held[key] + amount
            if free_then < (held_then if self._several_keys else 0):
                return False
            self._held[key] += amount
            return True

    def held(self, key: str) -> int:
        """How much the key holds."""
        return self._held[key]

    def give_back(self, key: str, amount: int) -> None:
        """Give back an amount that the key took."""
        with self._lock:
            self._held[key] -= amount


class _Limits(NamedTuple):
    #: open requests
    requests: FairQuota
    #: bytes of large bodies and responses
    bytes: FairQuota
    turn: threading.Lock
    turn_of_key: defaultdict[str, threading.Lock]


def _transfer_seconds(size: int) -> float:
    return BASE_SECONDS + size / MIN_BYTES_PER_SECOND


def _too_many(what: str) -> problems.TooManyRequests:
    name = current_key().name
    detail = (
        f"The key {name!r} has too many {what}: a key may have at most as many as are free."
        if name
        else f"There are too many {what}."
    )
    return problems.TooManyRequests(detail, retry_after=TRY_AGAIN)


class ByteAllowance:
    """The bytes that one request holds of the quota for large bodies and responses."""

    def __init__(self) -> None:
        self._give_back: list[Callable[[], None]] = []  # most requests have nothing large

    def take(self, size: int) -> None:
        """Take bytes from the quota.

        Raises:
            TooManyRequests: the key, or all keys together, hold too many already.
        """
        quota: FairQuota = current_app.extensions["limits"].bytes
        key = current_key().name
        if not quota.take(key, size):
            raise _too_many("bytes of large bodies and responses")
        self._give_back.append(partial(quota.give_back, key, size))

    def give_back(self) -> None:
        """Give back all bytes that the request took."""
        for give_back in self._give_back:
            give_back()


def limit_receive_time(size: int) -> AbstractContextManager[object]:
    """Limit the time in which a client sends a body of `size` bytes, for the length of a `with` block.

    gunicorn limits the time of a request's head only, and the socket's time-out (app/web/server.py) limits silence
    only.

    Raises:
        TimeoutError: in the block, when the time is over.
    """
    if "gunicorn.socket" not in request.environ:  # a development server, without gevent
        return nullcontext()
    return gevent.Timeout(_transfer_seconds(size), TimeoutError("The body arrives too slowly."))


def yield_to_others() -> None:
    """Let other requests of this process run, and gunicorn's heartbeat: the caller's next step may take a second.

    One caller yields at a time. gevent would otherwise resume all sleeping callers in a row, and look for other
    requests only after the last one. A key has one caller in this line: nobody waits for all requests of another key.
    """
    limits: _Limits = current_app.extensions["limits"]
    with limits.turn_of_key[current_key().name], limits.turn:
        time.sleep(0.001)  # one whole round of gevent's loop; `sleep(0)` would be less than one


def limit_send_time(response: Response) -> Response:
    """Limit the time in which the client reads a large response. Returns the response.

    The socket's time-out holds for each part of a response. Most responses have one part, but a file has many.
    """
    size = response.content_length or 0
    if size > LARGE and (connection := request.environ.get("gunicorn.socket")):
        seconds = _transfer_seconds(size)
        connection.settimeout(seconds)
        # gunicorn takes this error for a client that went away.
        limit = gevent.Timeout.start_new(seconds, BrokenPipeError(errno.EPIPE, "The response is read too slowly."))
        response.call_on_close(limit.close)
        response.direct_passthrough = False  # otherwise the response of a file would not be closed
    return response


def count_large_response(response: Response) -> Response:
    """Count the bytes of a large response until it has been sent. Returns the response.

    Raises:
        TooManyRequests: as `ByteAllowance.take`.
    """
    if (size := response.content_length or 0) > LARGE:
        allowance = ByteAllowance()
        allowance.take(size)
        response.call_on_close(allowance.give_back)
    return response


def enforce_limits(app: APIFlask, settings: Settings) -> None:
    """Give each API key a fair share of this process: of its open requests, and of the bytes of large ones.

    A request is counted until its response has been sent, whether it waits, listens, sends or reads slowly. Without
    several keys, requests are not counted: only a proxy in front can tell the clients apart.
    """
    several = len(settings.api_keys) > 1
    largest = max(settings.max_payload_bytes, settings.max_result_bytes)
    app.extensions["limits"] = limits = _Limits(
        FairQuota(settings.max_connections, several_keys=several),
        FairQuota(max(MAX_LARGE_BYTES, 4 * largest), several_keys=several),
        threading.Lock(),
        defaultdict(threading.Lock),
    )

    if not several:
        return

    @app.before_request
    def begin() -> None:
        if is_public(request.path):
            return
        if not limits.requests.take(current_key().name, 1):
            raise _too_many("open requests")
        g.is_counted = True

    @app.after_request
    def end(response: Response) -> Response:
        if "is_counted" in g:
            response.call_on_close(partial(limits.requests.give_back, current_key().name, 1))
        return response
