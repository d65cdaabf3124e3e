"""The control routes: cancel, retry, enqueue many, lists of jobs, and live events."""

import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from apiflask import APIBlueprint
from flask import Response, request
from redis.exceptions import RedisError

from app.core.transitions import TERMINAL
from app.jobs.jobs import POLL_AGAIN, Jobs
from app.jobs.problems import Problem
from app.jobs.status import StatusObject
from app.jobs.waiting import Waiting
from app.web.auth import check_function, current_key
from app.web.metrics import count_listener
from app.web.requests import add_header, origin, reader, received_body
from app.web.responses import ask_again, encode_json, json_answer, make_etag
from app.web.schemas import GroupQuery, JobQuery, JobsQuery, Query

logger = logging.getLogger(__name__)

#: Seconds that a listener may take to read one message.
SLOWEST = 10.0
#: What the id of an end has, which that of a status has not.
ENDED = ".end"


def _encode_events(found: Iterator[StatusObject | None], last: str | None) -> Iterator[str]:
    """The event stream (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    An event's id is a digest of what it says, so that one which the client has had is not told again.
    """
    yield f"retry: {POLL_AGAIN * 1000}\n\n"
    try:
        for status in found:
            if status is None:
                yield ": still here\n\n"
                continue
            text = encode_json(status)
            told = make_etag(text.encode())
            if told != last:
                yield f"event: status\nid: {told}\ndata: {text}\n\n"
            if status["job_status"] in TERMINAL:
                yield f"event: end\nid: {told}{ENDED}\ndata: {text}\n\n"
    except (Problem, RedisError) as error:  # the answer has begun: the client comes again, and is told then
        logger.warning("the events of a job end early: %s", error)


def make_control(jobs: Jobs, waiting: Waiting, options: type[Query]) -> APIBlueprint:
    """The routes, for these jobs and the options that new ones may have."""
    control = APIBlueprint("control", __name__, tag="Control")

    @control.post("/cancel")
    @control.input(JobQuery, location="query", arg_name="query")
    def cancel(query: JobQuery) -> Response:
        """Cancel a job: one that waits never runs, one that runs is stopped."""
        has_ended, status = jobs.cancel(query.job_id, reader())
        return json_answer(status, 200 if has_ended else 202, ask_again(status))

    @control.post("/retry")
    @control.input(JobQuery, location="query", arg_name="query")
    def retry(query: JobQuery) -> Response:
        """Run a job again that failed, was stopped or canceled."""
        if current_key().functions is not None:
            check_function(jobs.read_status(query.job_id, reader())["function"])
        status = jobs.retry(query.job_id, reader())
        return json_answer(status, 202, {"Location": status["links"]["check_status"], **ask_again(status)})

    @control.post("/enqueue_many/<function>")
    @control.input(options, location="query", arg_name="options")
    def enqueue_many(function: str, options: Any) -> Response:
        """Enqueue a job for each payload of the body, an array: all or none."""
        found = jobs.find_function(function)
        check_function(function)
        asked = options.model_dump(exclude_none=True)
        with received_body(jobs.settings) as payloads:
            receipt = jobs.enqueue_many(found, payloads, asked, origin())
        if receipt.is_replay:
            add_header("Idempotent-Replayed", "true")
        answer = {"group_id": receipt.group_id, "job_ids": receipt.job_ids}
        location = f"/check_group?group_id={receipt.group_id}"
        return json_answer(answer, 202, {"Location": location, "Retry-After": str(POLL_AGAIN)})

    @control.get("/check_group")
    @control.input(GroupQuery, location="query", arg_name="query")
    def check_group(query: GroupQuery) -> Response:
        """Tell how many jobs of a group there are in each status."""
        return json_answer(jobs.read_group(query.group_id, reader()), headers={"Cache-Control": "private, no-cache"})

    @control.get("/events")
    @control.input(JobQuery, location="query", arg_name="query")
    def events(query: JobQuery) -> Response:
        """Tell whatever happens to a job, as it happens."""
        last = request.headers.get("Last-Event-ID")
        jobs.read_status(query.job_id, reader())  # what is wrong is told before the stream begins
        if last and last.endswith(ENDED):
            return Response(status=204)  # `EventSource` comes again after an end, unless it is told so
        if connection := request.environ.get("gunicorn.socket"):
            connection.settimeout(SLOWEST)  # for each write: who reads nothing is dropped
        found = count_listener(waiting.follow(query.job_id, reader()))
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return Response(_encode_events(found, last), 200, headers, mimetype="text/event-stream")

    @control.get("/webhooks")
    @control.input(JobQuery, location="query", arg_name="query")
    def list_webhooks(query: JobQuery) -> Response:
        """List the messages that told of a job's ends, and the tries to deliver them."""
        found = jobs.read_webhooks(query.job_id, reader())
        return json_answer(found, headers={"Cache-Control": "private, no-cache"})

    @control.post("/webhooks/redeliver")
    @control.input(JobQuery, location="query", arg_name="query")
    def redeliver(query: JobQuery) -> Response:
        """Deliver the message that tells of a job's last end once more."""
        return json_answer(jobs.redeliver(query.job_id, reader()), 202)

    @control.get("/jobs")
    @control.input(JobsQuery, location="query", arg_name="query")
    def list_jobs(query: JobsQuery) -> Response:
        """List jobs, newest first, a page at a time."""
        filters = query.model_dump(include={"status", "queue", "function"}, exclude_none=True)
        listed, cursor = jobs.list_jobs(filters, query.limit, query.cursor, reader())
        following = f"/jobs?{urlencode({**filters, 'limit': query.limit, 'cursor': cursor})}" if cursor else None
        return json_answer({"jobs": listed, "next": following}, headers={"Cache-Control": "private, no-cache"})

    return control
