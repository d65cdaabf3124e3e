"""The id of a request. Its response, its lines in the log and the jobs that it makes have the same id."""

import logging
import os
import re
import time
from wsgiref.types import WSGIEnvironment

from flask import Flask, Request, Response, g, request

from app.logs import request_members
from app.web.metrics import observe_request

logger = logging.getLogger(__name__)

#: A client's id must be harmless in a log, a header and a shell.
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: W3C Trace Context, version 00 and later versions, which begin like it: https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

#: Keys in the WSGI environ of a request. Flask's `g` would be a slower place.
_ID_KEY, _BEGAN_KEY = "app.request_id", "app.began"


def _choose_id(environ: WSGIEnvironment) -> str:
    """The client's `X-Request-ID`, or else the trace id of its `traceparent`, or else a new id."""
    if "HTTP_X_REQUEST_ID" in environ and _ID.fullmatch(given := environ["HTTP_X_REQUEST_ID"]):
        return str(given)
    if "HTTP_TRACEPARENT" in environ and (trace := _TRACEPARENT.fullmatch(environ["HTTP_TRACEPARENT"])):
        return trace[1]
    return os.urandom(16).hex()


def current_request_id() -> str:
    """The id of the present request."""
    request_id: str = request.environ[_ID_KEY]
    return request_id


def track_requests(app: Flask, *, access_log: bool) -> None:
    """Give each request an id, measure its time, and, with `access_log`, write a line about it in the log."""

    # One hook of each kind does all of this, since each call of a hook costs time.
    @app.before_request
    def begin() -> None:
        environ = request.environ
        environ[_BEGAN_KEY] = time.perf_counter()
        environ[_ID_KEY] = request_id = _choose_id(environ)
        request_members.set({"request_id": request_id})

    @app.teardown_request
    def forget(_error: BaseException | None) -> None:
        request_members.set({})

    @app.after_request
    def end(response: Response) -> Response:
        current: Request = request._get_current_object()  # type: ignore[attr-defined]  # of werkzeug's proxies
        seconds = time.perf_counter() - current.environ[_BEGAN_KEY]
        response.headers["X-Request-ID"] = current.environ[_ID_KEY]
        observe_request(current, response.status_code, seconds)
        if access_log:
            members = {
                "method": current.method,
                "path": current.path,
                "status": response.status_code,
                "ms": round(seconds * 1000, 1),
                "key": g.api_key.name if "api_key" in g else "",
            }
            # Without the query, which may hold private data.
            text = "%(method)s %(path)s %(status)s in %(ms)s ms"
            logger.info(text, members, extra={"members": members})
        return response
