"""What a new job is: the fields of its hash in Redis, made of function, payload and options; and its fingerprint."""

import hashlib
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from pydantic import ValidationError
from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer

from app.config import Settings
from app.core.transitions import Argument
from app.job_function import Defaults, JobFunction
from app.jobs.problems import ErrorItem


class Options(Defaults, total=False):
    """The options of `/enqueue`; those missing are the function's own defaults, or the settings'."""

    at: datetime
    webhook: str


class Origin(NamedTuple):
    """Who makes a job: the name of the API key, the request's idempotency key, and its id, which is for the log."""

    owner: str = ""
    key: str | None = None
    request_id: str = ""


#: Bytes from which on a call of a function is large, or a body or an answer: it is counted how many there are of these.
LARGE = 64 * 1024
#: Places of a request that one answer names as wrong, at most.
MOST_ERRORS = 100

_decode_json = json.JSONDecoder().raw_decode

#: A job that no request makes.
NOBODY = Origin()


def choose_options(function: JobFunction, asked: Options, settings: Settings) -> Options:
    """The options of a request, completed with the function's defaults and then the settings'."""
    return {
        "queue": settings.queues[0],
        "timeout": settings.job_timeout,
        "result_ttl": settings.result_ttl,
        "failure_ttl": settings.failure_ttl,
        **function.defaults,
        **asked,
    }


def find_errors(function: JobFunction, payload: bytes, place: Sequence[str | int]) -> list[ErrorItem]:
    """Where the payload, which stands at this place of the request, does not fit the function: the first MOST_ERRORS.

    Read one by one out of pydantic's JSON: its list of all would take 7 s for a million.
    """
    try:
        function.validate_json(payload)
    except ValidationError as error:
        text = error.json(include_url=False, include_context=False, include_input=False)
        found: list[ErrorItem] = []
        end = 0
        for _ in range(min(error.error_count(), MOST_ERRORS)):
            item, end = _decode_json(text, end + 1)  # after `[`, or a comma
            found.append({"loc": [*place, *item["loc"]], "msg": item["msg"]})
        return found
    return []


def _retry_pauses(retries: int) -> list[float]:
    """Seconds before each retry: about 5, 20, 80, … up to about an hour: a quarter more or less.

    The jitter is each job's own, so that jobs which failed together do not all come back together.
    """
    return [round(min(5 * 4**attempt, 3600) * random.uniform(0.75, 1.25), 1) for attempt in range(retries)]  # noqa: S311  # no secret


@cache
def _blank_fields() -> dict[str, Argument]:
    """What RQ writes of a job of which nothing is known yet. Once: RQ takes 50 µs for it."""
    fields: dict[str, Argument] = Job.create("", connection=Redis(), serializer=JSONSerializer).to_dict()
    for own in ("data", "created_at", "status"):
        del fields[own]
    return fields


def shared_fields(function: JobFunction, options: Options, origin: Origin, group: str | None) -> dict[str, Argument]:
    """The fields that all jobs of one request have."""
    fields = {
        **_blank_fields(),
        "origin": options["queue"],
        # RQ's own description is the call with its arguments, and logs it: payloads do not belong there.
        "description": function.name,
        "timeout": options["timeout"],
        "result_ttl": options["result_ttl"],
        "failure_ttl": options["failure_ttl"],
        "group_id": group or "",
        "function": function.name,
        "owner": origin.owner,
    }
    if origin.request_id:
        fields["request_id"] = origin.request_id
    if ttl := options.get("ttl"):
        fields["ttl"] = ttl
    if webhook := options.get("webhook"):
        fields["notify"] = webhook
    if options.get("at_front"):
        fields["enqueue_at_front"] = 1  # `promote` looks at it
    return fields


def own_fields(function: JobFunction, payload: bytes, options: Options) -> dict[str, Argument]:
    """The fields that are each job's own: its payload, as RQ stores a call, and its retries."""
    # The call, as RQ's JSONSerializer reads it. A payload goes on as it came: values made of it would take ten times as
    # much memory, for as long as Redis takes to answer.
    call = b'["%s",null,[%s],{}]' % (function.path.encode(), payload)
    # Of what is large the default level makes 10% less, and takes six times as long, in which nobody else is served.
    level = zlib.Z_BEST_SPEED if len(call) > LARGE else zlib.Z_DEFAULT_COMPRESSION
    fields: dict[str, Argument] = {"data": zlib.compress(call, level)}
    if retries := options.get("retries"):
        # `retries` is ours: what `/retry` sets `retries_left` to again.
        fields |= {"retries_left": retries, "retry_intervals": json.dumps(_retry_pauses(retries)), "retries": retries}
    return fields


def make_fingerprint(
    function: JobFunction, payloads: Sequence[bytes], asked: Options, *, is_batch: bool = False
) -> str:
    """What a request with an idempotency key has to have in common with the first one: all that decides the job.

    Only what the client sent is in it: a default that changes between the two is no difference.
    """
    options: Mapping[str, Any] = asked
    sent = {name: value.timestamp() if name == "at" else value for name, value in options.items()}
    values = [json.loads(payload) for payload in payloads]
    text = json.dumps([function.name, is_batch, values if is_batch else values[0], sent], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
