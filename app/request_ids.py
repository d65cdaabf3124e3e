"""The id that follows a request: into its answer, its lines in the log, and the jobs that it makes."""

import logging
import re
import time
import uuid

from flask import Flask, Response, g, request

from app.logs import request_members

logger = logging.getLogger(__name__)

#: What a client's id may be: nothing that a log, a header or a shell would stumble over.
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
#: W3C Trace Context, version 00 and those that begin like it: https://www.w3.org/TR/trace-context/#traceparent-header
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


def _choose_id() -> str:
    """The client's `X-Request-ID`, or the trace that the request is part of, or a new one."""
    given = request.headers.get("X-Request-ID", "")
    if _ID.fullmatch(given):
        return given
    if trace := _TRACEPARENT.fullmatch(request.headers.get("traceparent", "")):
        return trace[1]
    return uuid.uuid4().hex


def current_request_id() -> str:
    """The id of the present request."""
    if "request_id" not in g:
        g.request_id = _choose_id()
    request_id: str = g.request_id
    return request_id


def follow_requests(app: Flask, *, access_log: bool) -> None:
    """Give each request of the app its id, and a line in the log if there is to be one."""

    @app.before_request
    def begin() -> None:
        request_members.set({"request_id": current_request_id()})

    @app.teardown_request
    def forget(_error: BaseException | None) -> None:
        request_members.set({})

    @app.after_request
    def end(answer: Response) -> Response:
        answer.headers["X-Request-ID"] = current_request_id()
        if access_log:
            members = {
                "method": request.method,
                "path": request.path,
                "status": answer.status_code,
                "ms": round((time.perf_counter() - g.began) * 1000, 1),
                "key": g.api_key.name if "api_key" in g else "",
            }
            # Not the query: it may hold what is nobody's business.
            text = "%(method)s %(path)s %(status)s in %(ms)s ms"
            logger.info(text, members, extra={"members": members})
        return answer
