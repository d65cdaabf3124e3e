"""No client takes a web process from all others: how much each may hold open in it, and for how long."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import gevent
from apiflask import APIFlask
from flask import Response, g, request

from app import problems
from app.auth import current_key, is_public
from app.config import Settings
from app.jobs import TRY_AGAIN

#: Seconds that a client may take to send a body or to read an answer, and one more for each LEAST_RATE bytes.
PATIENCE = 60
LEAST_RATE = 16 * 1024


def _longest(size: int) -> float:
    return PATIENCE + size / LEAST_RATE


@contextmanager
def limit_reading(size: int) -> Iterator[None]:
    """Let a client send a body of so many bytes, but not for ever.

    gunicorn limits the time of a request's head only, and its socket's time-out (gunicorn.conf.py) silence only.

    Raises:
        TimeoutError: it takes too long.
    """
    if "gunicorn.socket" not in request.environ:  # a server for developers, without gevent
        yield
        return
    with gevent.Timeout(_longest(size), TimeoutError("The body comes too slowly.")):
        yield


def share_connections(app: APIFlask, settings: Settings) -> None:
    """Let each key hold open as many requests of this process as are left for all others, if there are several keys.

    So one key never has more than half of the connections, whatever it does with them: wait, listen, send or read
    slowly; and where some have much, there is something left for the next one (Choudhury and Hahne, Dynamic queue
    length thresholds, 1998). Without keys everybody is trusted, or a proxy in front knows them apart.
    """
    is_shared = len(settings.api_keys) > 1
    open_requests: Counter[str] = Counter()
    lock = threading.Lock()

    def close(name: str) -> None:
        with lock:
            open_requests[name] -= 1

    @app.before_request
    def begin() -> None:
        if not is_shared or is_public():
            return
        name = current_key().name
        with lock:
            left = settings.max_connections - open_requests.total()
            if open_requests[name] >= left:
                detail = f"The key {name!r} has {open_requests[name]} requests open, as many as are left for others."
                raise problems.TooManyRequests(detail, retry_after=TRY_AGAIN)
            open_requests[name] += 1
        g.is_open = True

    @app.after_request
    def end(answer: Response) -> Response:
        if "is_open" in g:
            answer.call_on_close(partial(close, current_key().name))
        size = answer.content_length
        if size and size > LEAST_RATE and (connection := request.environ.get("gunicorn.socket")):
            connection.settimeout(_longest(size))  # for all of it
        return answer
