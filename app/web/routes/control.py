"""The control routes: cancel, retry, enqueue many, lists of jobs, live events, and the messages to webhooks."""

import logging
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from apiflask import APIBlueprint
from flask import Response, request
from redis.exceptions import RedisError

from app.core.scripts import TERMINAL
from app.jobs import problems
from app.jobs.problems import POLL_AGAIN
from app.jobs.status import EXAMPLE_ID, StatusObject
from app.web.auth import check_function, current_key
from app.web.metrics import count_listener
from app.web.openapi import IDEMPOTENCY_KEY, LAST_EVENT_ID, MAKES_JOBS, READS_JOB, Answer, answers
from app.web.requests import (
    add_header,
    current_enqueuer,
    current_jobs,
    current_waiting,
    find_function,
    read_new_jobs,
    visible_owner,
)
from app.web.responses import PRIVATE, encode_json, json_response, make_etag, poll_headers
from app.web.schemas import (
    EnqueuedGroup,
    GroupObject,
    GroupQuery,
    JobOptions,
    JobPage,
    JobQuery,
    JobsQuery,
    WebhookLog,
)

logger = logging.getLogger(__name__)

#: Seconds that a listener may take to read one event.
MAX_READ_SECONDS = 10.0
#: The suffix of the id of an `end` event. The id of a `status` event does not have it.
END_SUFFIX = ".end"

control = APIBlueprint("control", __name__, tag="Control")


@control.post("/cancel")
@control.input(JobQuery, location="query", arg_name="query")
@answers(
    {
        200: Answer("the job was canceled or stopped", StatusObject),
        202: Answer("the job runs, and its worker is stopping it", StatusObject, ("Retry-After",)),
    },
    problems=(*READS_JOB, problems.JobAlreadyEnded),
)
def cancel(query: JobQuery) -> Response:
    """Cancel a job: a waiting job never runs, a running job is stopped."""
    has_ended, status = current_jobs().cancel(query.job_id, visible_owner())
    return json_response(status, 200 if has_ended else 202, poll_headers(status))


@control.post("/retry")
@control.input(JobQuery, location="query", arg_name="query")
@answers(
    {202: Answer("the job waits again", StatusObject, ("Location", "Retry-After"))},
    problems=(*READS_JOB, problems.JobNotRetryable, problems.QueueFull),
)
def retry(query: JobQuery) -> Response:
    """Run a job again, after it failed, was stopped or was canceled."""
    jobs = current_jobs()
    if current_key().functions is not None:
        check_function(jobs.read_status(query.job_id, visible_owner()).function)
    status = jobs.retry(query.job_id, visible_owner())
    return json_response(status, 202, {"Location": status.links.check_status, **poll_headers(status)})


@control.post("/enqueue_many/<function>")
@control.input(JobOptions, location="query", arg_name="options")
@answers(
    {
        202: Answer(
            "all jobs are enqueued",
            EnqueuedGroup,
            ("Location", "Retry-After", "Idempotent-Replayed"),
            EnqueuedGroup(group_id="f4a1d4a8-8f0e-9f7b-5f05-1f6f3c9d2a10", job_ids=[EXAMPLE_ID]),
        )
    },
    problems=MAKES_JOBS,
    headers=(IDEMPOTENCY_KEY,),
)
def enqueue_many(function: str, options: Any) -> Response:
    """Enqueue a job for each payload in the body, which is an array. All are enqueued or none."""
    found = find_function(function)
    asked = options.model_dump(exclude_none=True)
    with read_new_jobs(asked) as (payloads, origin):
        receipt = current_enqueuer().enqueue_many(found, payloads, asked, origin)
    if receipt.is_replay:
        add_header("Idempotent-Replayed", "true")
    group = EnqueuedGroup(group_id=receipt.group_id, job_ids=receipt.job_ids)
    location = f"/check_group?group_id={receipt.group_id}"
    return json_response(group, 202, {"Location": location, "Retry-After": str(POLL_AGAIN)})


@control.get("/check_group")
@control.input(GroupQuery, location="query", arg_name="query")
@answers(
    {200: Answer("the jobs of the group, counted by status", GroupObject)},
    problems=(problems.InvalidRequest, problems.GroupNotFound, problems.ResultExpired, problems.RedisUnavailable),
)
def check_group(query: GroupQuery) -> Response:
    """Count the jobs of a group by status."""
    return json_response(current_jobs().read_group(query.group_id, visible_owner()), headers=PRIVATE)


@control.get("/jobs")
@control.input(JobsQuery, location="query", arg_name="query")
@answers(
    {200: Answer("a page of jobs, newest first", JobPage)},
    problems=(problems.InvalidRequest, problems.RedisUnavailable),
)
def list_jobs(query: JobsQuery) -> Response:
    """List jobs, newest first, a page at a time."""
    filters = query.model_dump(include={"status", "queue", "function"}, exclude_none=True)
    listed, cursor = current_jobs().list_jobs(filters, query.limit, query.cursor, visible_owner())
    following = f"/jobs?{urlencode({**filters, 'limit': query.limit, 'cursor': cursor})}" if cursor else None
    return json_response(JobPage(jobs=listed, next=following), headers=PRIVATE)


@control.get("/events")
@control.input(JobQuery, location="query", arg_name="query")
@answers(
    {
        200: Answer("`event: status` at each change, and `event: end`", {"text/event-stream": {"schema": {}}}),
        204: Answer("the client has received the end"),
    },
    problems=READS_JOB,
    headers=(LAST_EVENT_ID,),
)
def events(query: JobQuery) -> Response:
    """Send each change of a job's status as it happens."""
    last = request.headers.get("Last-Event-ID")
    current_jobs().read_status(query.job_id, visible_owner())  # in a stream that has begun, no problem can be sent
    if last and last.endswith(END_SUFFIX):
        return Response(status=204)  # a 204 stops `EventSource`, which connects again after an end
    if connection := request.environ.get("gunicorn.socket"):
        connection.settimeout(MAX_READ_SECONDS)  # a client that reads nothing is dropped
    found = count_listener(current_waiting().follow(query.job_id, visible_owner()))
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return Response(_encode_events(found, last), 200, headers, mimetype="text/event-stream")


def _encode_events(found: Iterator[StatusObject | None], last: str | None) -> Iterator[str]:
    """The event stream (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    The id of an event is a digest of its data. A client that connects again sends the last id, and does not get the
    same status twice.
    """
    yield f"retry: {POLL_AGAIN * 1000}\n\n"
    try:
        for status in found:
            if status is None:
                yield ": still here\n\n"
                continue
            text = encode_json(status)
            event_id = make_etag(text)
            if event_id != last:
                yield f"event: status\nid: {event_id}\ndata: {text.decode()}\n\n"
            if status.job_status in TERMINAL:
                yield f"event: end\nid: {event_id}{END_SUFFIX}\ndata: {text.decode()}\n\n"
    except (problems.Problem, RedisError) as error:  # the client connects again, and its response is the problem
        logger.warning("an event stream ended early: %s", error)


@control.get("/webhooks")
@control.input(JobQuery, location="query", arg_name="query")
@answers({200: Answer("the messages about the ends of the job", WebhookLog)}, problems=READS_JOB)
def list_webhooks(query: JobQuery) -> Response:
    """List the messages about a job's ends, and the tries to deliver them."""
    return json_response(current_jobs().read_webhooks(query.job_id, visible_owner()), headers=PRIVATE)


@control.post("/webhooks/redeliver")
@control.input(JobQuery, location="query", arg_name="query")
@answers(
    {202: Answer("the last message is delivered once more", WebhookLog)},
    problems=(*READS_JOB, problems.WebhookNotFound, problems.QueueFull),
)
def redeliver(query: JobQuery) -> Response:
    """Deliver the message about a job's last end once more."""
    return json_response(current_jobs().redeliver(query.job_id, visible_owner()), 202)
