"""No client takes a web process from all others: how much each may hold of it, and for how long."""

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

#: Seconds that a client may take to send a body or to read an answer, and one more for each LEAST_RATE bytes.
PATIENCE = 60
LEAST_RATE = 16 * 1024
#: Bytes of large bodies and answers that may be there at once; where the largest are very large, four of these.
LARGE_AT_ONCE = 256 * 2**20


class FairQuota:
    """So much of something, of which each key may hold as much as it leaves for all others.

    So one key never has more than half of it; and where some have much, there is something left for the next one
    (Choudhury and Hahne, Dynamic queue length thresholds, 1998). Where everybody is the same key, it may have all.
    """

    def __init__(self, most: int, *, of_several_keys: bool) -> None:
        self._most = most
        self._of_several_keys = of_several_keys
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, key: str, amount: int) -> bool:
        """Whether the key got so much more of it."""
        with self._lock:
            left = self._most - self._held.total()
            if amount + (self._held[key] + amount) * self._of_several_keys > left:
                return False
            self._held[key] += amount
            return True

    def held(self, key: str) -> int:
        """How much of it the key has."""
        return self._held[key]

    def give_back(self, key: str, amount: int) -> None:
        """What it had."""
        with self._lock:
            self._held[key] -= amount


class _Limits(NamedTuple):
    requests: FairQuota
    #: of large bodies and answers
    bytes: FairQuota
    turn: threading.Lock
    turn_of_key: defaultdict[str, threading.Lock]


def _longest(size: int) -> float:
    return PATIENCE + size / LEAST_RATE


def _too_many(what: str) -> problems.TooManyRequests:
    name = current_key().name
    whose = f"The key {name!r} has as many {what} as are left for others." if name else f"There are too many {what}."
    return problems.TooManyRequests(whose, retry_after=TRY_AGAIN)


class ByteAllowance:
    """The bytes of large bodies and answers that one request has."""

    def __init__(self) -> None:
        self._give_back: list[Callable[[], None]] = []  # most requests have nothing large

    def take(self, size: int) -> None:
        """So many more.

        Raises:
            TooManyRequests: there are too many, of this key or of all together.
        """
        shares: FairQuota = current_app.extensions["limits"].bytes
        key = current_key().name
        if not shares.take(key, size):
            raise _too_many("bytes of large bodies and answers")
        self._give_back.append(partial(shares.give_back, key, size))

    def give_back(self) -> None:
        """All of them."""
        for give_back in self._give_back:
            give_back()


def limit_receive_time(size: int) -> AbstractContextManager[object]:
    """Where a client may send a body of so many bytes, but not for ever.

    gunicorn limits the time of a request's head only, and its socket's time-out (gunicorn.conf.py) silence only.

    Raises:
        TimeoutError: inside, if it takes too long.
    """
    if "gunicorn.socket" not in request.environ:  # a server for developers, without gevent
        return nullcontext()
    return gevent.Timeout(_longest(size), TimeoutError("The body comes too slowly."))


def yield_to_others() -> None:
    """Let other requests of this process go first, and gunicorn's sign of life: what follows may take a second.

    One at a time: gevent would go from one that slept to the next, and look for others at the end only. And one of
    each key, so that none waits for all that another one sends.
    """
    limits: _Limits = current_app.extensions["limits"]
    with limits.turn_of_key[current_key().name], limits.turn:
        time.sleep(0.001)  # a whole round of gevent's loop; with 0 it would be none


def limit_send_time(answer: Response) -> Response:
    """The answer, whose client may take its time to read it, but not for ever.

    The socket's time-out is for each part of an answer: one for most of them, many for a file.
    """
    size = answer.content_length or 0
    if size > LARGE and (connection := request.environ.get("gunicorn.socket")):
        connection.settimeout(_longest(size))
        # gunicorn takes it for a client that went away.
        limit = gevent.Timeout.start_new(_longest(size), BrokenPipeError(errno.EPIPE, "The answer is read too slowly."))
        answer.call_on_close(limit.close)
        answer.direct_passthrough = False  # a file's answer would not be closed
    return answer


def count_large_response(answer: Response) -> Response:
    """The answer, which is counted if it is large.

    Raises:
        TooManyRequests: as `ByteAllowance.take`.
    """
    if (size := answer.content_length or 0) > LARGE:
        room = ByteAllowance()
        room.take(size)
        answer.call_on_close(room.give_back)
    return answer


def enforce_limits(app: APIFlask, settings: Settings) -> None:
    """Let each key hold as many requests of this process as are left for all others, and as many bytes of large ones.

    Whatever it does with them: wait, listen, send or read slowly. Without keys a proxy in front knows clients apart.
    """
    several = len(settings.api_keys) > 1
    largest = max(settings.max_payload_bytes, settings.max_result_bytes)
    app.extensions["limits"] = limits = _Limits(
        FairQuota(settings.max_connections, of_several_keys=several),
        FairQuota(max(LARGE_AT_ONCE, 4 * largest), of_several_keys=several),
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
            raise _too_many("requests")
        g.is_open = True

    @app.after_request
    def end(answer: Response) -> Response:
        if "is_open" in g:
            answer.call_on_close(partial(limits.requests.give_back, current_key().name, 1))
        return answer
