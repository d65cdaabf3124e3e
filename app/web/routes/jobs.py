"""The core routes: enqueue a job, check its status, get its result and its payload."""

from contextlib import suppress
from typing import Any

from apiflask import APIBlueprint
from flask import Response, request

from app.core.scripts import TERMINAL
from app.jobs import problems
from app.jobs.status import EXAMPLE, StatusObject, StatusWithResult
from app.web.auth import current_key
from app.web.openapi import (
    ANY_JSON,
    IDEMPOTENCY_KEY,
    IF_NONE_MATCH,
    MAKES_JOBS,
    PREFER,
    READS_JOB,
    TEXT,
    Answer,
    answers,
)
from app.web.requests import (
    add_header,
    current_enqueuer,
    current_jobs,
    current_waiting,
    find_function,
    read_new_jobs,
    read_wait,
    visible_owner,
)
from app.web.responses import PRIVATE, json_response, make_etag, poll_headers, stored_json_response
from app.web.schemas import EnqueueQuery, FunctionList, JobQuery, WaitQuery

#: The job function that `POST /enqueue` without a name runs.
DEFAULT_FUNCTION = "some_long_function"

# The operation ids are those of earlier releases: generated clients name their methods after them.
jobs = APIBlueprint("jobs", __name__, tag="Jobs")


@jobs.get("/")
@jobs.doc(operation_id="get_index")
@answers({200: Answer("the app is up: `Running!`", TEXT)})
def index() -> Response:
    """Say that the app is up."""
    return Response("Running!", mimetype="text/plain")


@jobs.post("/enqueue")
@jobs.post("/enqueue/<function>")
@jobs.input(EnqueueQuery, location="query", arg_name="options")
@answers(
    {
        202: Answer(
            "enqueued",
            StatusObject,
            ("Location", "Retry-After", "Preference-Applied", "Idempotent-Replayed"),
            EXAMPLE.model_copy(update={"job_status": "queued", "started_at": None, "progress": None}),
        ),
        200: Answer(
            "the job ended within the wait",
            StatusWithResult,
            ("Location", "Preference-Applied", "Idempotent-Replayed"),
        ),
    },
    problems=(*MAKES_JOBS, problems.ResultExpired, problems.JobFailed),
    headers=(PREFER, IDEMPOTENCY_KEY),
)
def enqueue(options: Any, function: str = DEFAULT_FUNCTION) -> Response:
    """Enqueue a job: the body is its payload."""
    found = find_function(function)
    asked = options.model_dump(exclude_none=True)
    wait = read_wait(asked.pop("wait", None))
    with read_new_jobs(asked) as (payload, origin):
        receipt = current_enqueuer().enqueue(found, payload, asked, origin)
    del payload  # otherwise it stays in memory while this request waits
    if receipt.is_replay:
        add_header("Idempotent-Replayed", "true")
    status, result = current_waiting().wait_for_new(receipt, wait, current_key().name)
    headers = {"Location": status.links.check_status, **poll_headers(status)}
    if wait and status.job_status in TERMINAL:
        # If there are too many large responses, send the status without the result. After a 429 the client would
        # enqueue the job again.
        with suppress(problems.TooManyRequests):
            return json_response(status, 200, headers, result)
    return json_response(status, 202, headers)


@jobs.get("/check_status")
@jobs.doc(operation_id="get_check_status")
@jobs.input(WaitQuery, location="query", arg_name="query")
@answers(
    {
        200: Answer("the status of the job", StatusObject, ("ETag", "Retry-After", "Preference-Applied"), EXAMPLE),
        304: Answer("still the status that `If-None-Match` names", headers=("ETag",)),
    },
    problems=READS_JOB,
    headers=(PREFER, IF_NONE_MATCH),
)
def check_status(query: WaitQuery) -> Response:
    """Read the status of a job."""
    waiting = current_waiting()
    status = waiting.wait(query.job_id, read_wait(query.wait), visible_owner())
    response = json_response(status, headers={**poll_headers(status), **PRIVATE})
    response.set_etag(make_etag(response.get_data()))
    if "If-None-Match" in request.headers:
        response.make_conditional(request)
    return response


@jobs.get("/get_result")
@jobs.doc(operation_id="get_get_result")
@jobs.input(WaitQuery, location="query", arg_name="query")
@answers(
    {200: Answer("the return value of the job function", ANY_JSON, ("Preference-Applied",))},
    problems=(*READS_JOB, problems.ResultNotReady, problems.JobFailed, problems.JobStopped, problems.JobCanceled),
    headers=(PREFER,),
)
def get_result(query: WaitQuery) -> Response:
    """Return the result of a job: JSON with nothing around it."""
    waiting = current_waiting()
    if wait := read_wait(query.wait):
        waiting.wait(query.job_id, wait, visible_owner())
    return stored_json_response(waiting.jobs.read_result(query.job_id, visible_owner()))


@jobs.get("/get_payload")
@jobs.doc(operation_id="get_get_payload")
@jobs.input(JobQuery, location="query", arg_name="query")
@answers(
    {200: Answer("the payload of the job", ANY_JSON)},
    problems=(*READS_JOB, problems.PayloadNotFound),
)
def get_payload(query: JobQuery) -> Response:
    """Return the payload of a job: JSON with nothing around it."""
    return stored_json_response(current_jobs().read_payload(query.job_id, visible_owner()))


@jobs.get("/functions")
@jobs.doc(operation_id="get_list_functions")
@answers({200: Answer("all job functions", FunctionList)})
def list_functions() -> Response:
    """List the job functions, with the schema of each one's payload."""
    functions = current_enqueuer().functions.values()
    listed = [
        {
            "name": function.name,
            "description": function.description,
            "payload_schema": function.payload_schema,
            "defaults": function.defaults,
        }
        for function in sorted(functions, key=lambda function: function.name)
    ]
    return json_response({"functions": listed})
