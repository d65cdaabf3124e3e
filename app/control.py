"""The control routes: cancel, retry, enqueue many, and lists of jobs."""

from typing import Any
from urllib.parse import urlencode

from apiflask import APIBlueprint
from flask import Response

from app.answers import ask_again, json_answer
from app.auth import check_function, current_key
from app.jobs import POLL_AGAIN, Jobs
from app.request_parts import add_header, origin, read_payload, reader
from app.schemas import GroupQuery, JobQuery, JobsQuery, Query


def make_control(jobs: Jobs, options: type[Query]) -> APIBlueprint:
    """The routes, for these jobs and the options that new ones may have."""
    control = APIBlueprint("control", __name__)

    @control.post("/cancel")
    @control.input(JobQuery, location="query", arg_name="query")
    @control.doc(tags=["Control"])
    def cancel(query: JobQuery) -> Response:
        """Cancel a job: one that waits never runs, one that runs is stopped."""
        has_ended, status = jobs.cancel(query.job_id, reader())
        return json_answer(status, 200 if has_ended else 202, ask_again(status))

    @control.post("/retry")
    @control.input(JobQuery, location="query", arg_name="query")
    @control.doc(tags=["Control"])
    def retry(query: JobQuery) -> Response:
        """Run a job again that failed, was stopped or canceled."""
        if current_key().functions is not None:
            check_function(jobs.read_status(query.job_id, reader())["function"])
        status = jobs.retry(query.job_id, reader())
        return json_answer(status, 202, {"Location": status["links"]["check_status"], **ask_again(status)})

    @control.post("/enqueue_many/<function>")
    @control.input(options, location="query", arg_name="options")
    @control.doc(tags=["Control"])
    def enqueue_many(function: str, options: Any) -> Response:
        """Enqueue a job for each payload of the body, an array: all or none."""
        found = jobs.find_function(function)
        check_function(function)
        payloads = read_payload(jobs.settings.max_payload_bytes)
        asked = options.model_dump(exclude_none=True)
        receipt = jobs.enqueue_many(found, payloads, asked, **origin())
        if receipt.is_replay:
            add_header("Idempotent-Replayed", "true")
        answer = {"group_id": receipt.group_id, "job_ids": receipt.job_ids}
        location = f"/check_group?group_id={receipt.group_id}"
        return json_answer(answer, 202, {"Location": location, "Retry-After": str(POLL_AGAIN)})

    @control.get("/check_group")
    @control.input(GroupQuery, location="query", arg_name="query")
    @control.doc(tags=["Control"])
    def check_group(query: GroupQuery) -> Response:
        """Tell how many jobs of a group there are in each status."""
        return json_answer(jobs.read_group(query.group_id, reader()), headers={"Cache-Control": "private, no-cache"})

    @control.get("/jobs")
    @control.input(JobsQuery, location="query", arg_name="query")
    @control.doc(tags=["Control"])
    def list_jobs(query: JobsQuery) -> Response:
        """List jobs, newest first, a page at a time."""
        filters = query.model_dump(include={"status", "queue", "function"}, exclude_none=True)
        listed, cursor = jobs.list_jobs(filters, query.limit, query.cursor, reader())
        following = f"/jobs?{urlencode({**filters, 'limit': query.limit, 'cursor': cursor})}" if cursor else None
        return json_answer({"jobs": listed, "next": following}, headers={"Cache-Control": "private, no-cache"})

    return control
