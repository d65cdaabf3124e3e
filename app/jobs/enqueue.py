"""Make new jobs from function, payloads and options: one path for `/enqueue` and `/enqueue_many`."""

import hashlib
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import from_json
from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer

from app.config import LARGE, MAX_SECONDS, Settings
from app.core import transitions
from app.core.job_ids import JobIds
from app.core.scripts import Argument
from app.job_function import Defaults, JobFunction
from app.jobs import problems
from app.jobs.problems import MOST_ERRORS, ErrorItem
from app.jobs.status import StatusObject, make_status

#: Seconds that an idempotency key is remembered at least.
KEY_TTL = 24 * 3600
#: Seconds that a group is kept, however long its jobs are kept: the longest delay and the longest TTL.
GROUP_TTL = 2 * MAX_SECONDS

_decode_json = json.JSONDecoder().raw_decode


class Options(Defaults, total=False):
    """The options of `/enqueue`. For a missing option, the function's default counts, or else the settings'."""

    at: datetime
    webhook: str


class Origin(NamedTuple):
    """The request that makes a job: the name of its API key, its idempotency key, and its id, for the log."""

    owner: str = ""
    key: str | None = None
    request_id: str = ""


#: The origin of a job that no request makes.
NO_REQUEST = Origin()


class Receipt(NamedTuple):
    """The answer to `enqueue`."""

    job_id: str
    #: None if the job existed already; then the caller reads it
    status: StatusObject | None
    #: whether the same request came before, with the same idempotency key
    is_replay: bool


class GroupReceipt(NamedTuple):
    """The answer to `enqueue_many`, with the ids in the order of the payloads."""

    group_id: str
    job_ids: list[str]
    is_replay: bool


class _NewJobs(NamedTuple):
    """New jobs: their ids, the fields of the first one, and Redis' answer, which is None if they existed already."""

    job_ids: list[str]
    fields: dict[str, Argument]
    created: transitions.Created | None


class Enqueuer:
    """Makes jobs of the job functions, in one Redis."""

    def __init__(
        self, settings: Settings, connection: Redis, ids: JobIds, functions: Mapping[str, JobFunction]
    ) -> None:
        self.settings = settings
        self.connection = connection
        self.functions = functions
        self.ids = ids

    def find_function(self, name: str) -> JobFunction:
        """The job function of this name.

        Raises:
            FunctionNotFound: there is none.
        """
        if name not in self.functions:
            known = sorted(self.functions)
            raise problems.FunctionNotFound(f"There is no job function {name!r}.", known=known)
        return self.functions[name]

    def enqueue(self, function: JobFunction, payload: bytes, asked: Options, origin: Origin = NO_REQUEST) -> Receipt:
        """Enqueue a job.

        Args:
            function: the job function to run.
            payload: JSON text that `check_json` accepted.
            asked: options of the request; `check_webhook` accepted their webhook.
            origin: the request. If the same request comes again with the same idempotency key, the answer names the
                job of the first one, in whatever status it is by then.

        Raises:
            InvalidRequest: the payload does not fit the function.
            IdempotencyKeyReused: another request came with this idempotency key.
            QueueFull: nothing was enqueued.
        """
        self._check_payloads(function, [(payload, ["body"])])
        new = self._create(function, [payload], asked, origin)
        (job_id,) = new.job_ids
        if new.created is None:
            # Without a key: redis-py sent the command twice, because the answer to the first one was lost.
            return Receipt(job_id, None, is_replay=origin.key is not None)
        enqueued_at = new.created.at if new.created.status == "queued" else None
        fields = {**new.fields, "status": new.created.status, "enqueued_at": enqueued_at}
        return Receipt(job_id, make_status(self.connection, job_id, fields), is_replay=False)

    def enqueue_many(
        self, function: JobFunction, batch: bytes, asked: Options, origin: Origin = NO_REQUEST
    ) -> GroupReceipt:
        """Enqueue a job for each payload of a batch, an array as JSON text; all or none, in one round trip.

        Raises:
            InvalidRequest: there is no payload, or there are too many, or some do not fit the function.
            IdempotencyKeyReused, QueueFull: as `enqueue`.
        """
        most = self.settings.max_batch
        values = from_json(batch)
        if not isinstance(values, list) or not 1 <= len(values) <= most:
            error: ErrorItem = {"loc": ["body"], "msg": f"It must be an array of 1 to {most} payloads."}
            raise problems.InvalidRequest(
                "The body is not an array of payloads, or has too many of them.", errors=[error]
            )
        payloads = [dump_json(value) for value in values]
        del values  # they may take ten times as much memory as their text
        self._check_payloads(function, [(payload, ["body", index]) for index, payload in enumerate(payloads)])
        owner, key, _ = origin
        # An owner's name has no colon, so a group's id is never a job's.
        group_owner = f"group:{owner}"
        group = self.ids.derive(group_owner, key) if key else self.ids.new(group_owner)
        new = self._create(function, payloads, asked, origin, group)
        return GroupReceipt(group, new.job_ids, is_replay=new.created is None and key is not None)

    @staticmethod
    def _check_payloads(function: JobFunction, payloads: Sequence[tuple[bytes, list[str | int]]]) -> None:
        """Check each payload, which stands at its place in the request, against the function's type hint."""
        errors = [error for payload, place in payloads for error in find_errors(function, payload, place)]
        if errors:
            raise problems.InvalidRequest(f"The payload does not fit {function.name}.", errors=errors[:MOST_ERRORS])

    def _create(
        self, function: JobFunction, payloads: list[bytes], asked: Options, origin: Origin, group: str | None = None
    ) -> _NewJobs:
        """Create a job for each payload, unless the same request did so before. One round trip.

        Raises:
            IdempotencyKeyReused: another request came with this idempotency key.
            QueueFull: nothing was enqueued.
        """
        owner, key, _ = origin
        options = choose_options(function, asked, self.settings)
        shared = shared_fields(function, options, origin, group)
        # With an idempotency key every web process derives the same ids.
        key_id = self.ids.derive(owner, key) if key else None
        if key_id and group:
            job_ids = [self.ids.derive(owner, group, str(index)) for index in range(len(payloads))]
        else:
            job_ids = [key_id or self.ids.new(owner) for _ in payloads]
        own = {
            job_id: own_fields(function, payload, options) for job_id, payload in zip(job_ids, payloads, strict=True)
        }
        fingerprint = make_fingerprint(function, payloads, asked, is_batch=group is not None) if key else None
        if fingerprint:
            own[job_ids[0]]["fingerprint"] = fingerprint
        ttl = GROUP_TTL if group else KEY_TTL
        script_options: transitions.EnqueueOptions = {
            "at_front": options.get("at_front", False),
            "ttl": options.get("ttl"),
            "delay": options.get("delay"),
            "at": options["at"].timestamp() if "at" in options else None,
            "key_id": key_id,
            "key_ttl": ttl,
            "fingerprint": fingerprint,
        }
        if group:
            script_options |= {"group": group, "group_ttl": ttl}
        limit = self.settings.max_queue_length
        answer = transitions.enqueue(self.connection, options["queue"], own, shared, limit=limit, **script_options)
        match answer:
            case transitions.Full():
                raise problems.QueueFull.of(options["queue"], limit)
            case transitions.Exists(known) if fingerprint is not None and known != fingerprint:
                raise problems.IdempotencyKeyReused("This Idempotency-Key was used for another request.")
            case transitions.Exists():
                return _NewJobs(job_ids, {}, None)
        return _NewJobs(job_ids, {**shared, **own[job_ids[0]]}, answer)


def dump_json(value: Any) -> bytes:
    """The JSON text of a value that was read from JSON text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


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
    """The places where a payload does not fit the function's type hint, the first MOST_ERRORS of them.

    Args:
        function: the job function.
        payload: JSON text.
        place: where the payload stands in the request, as a path.
    """
    try:
        function.validate_json(payload)
    except ValidationError as error:
        # Read the errors one by one from pydantic's JSON: its list of a million errors takes seconds to make.
        text = error.json(include_url=False, include_context=False, include_input=False)
        found: list[ErrorItem] = []
        end = 0
        for _ in range(min(error.error_count(), MOST_ERRORS)):
            item, end = _decode_json(text, end + 1)  # after `[`, or a comma
            found.append({"loc": [*place, *item["loc"]], "msg": item["msg"]})
        return found
    return []


def _retry_pauses(retries: int) -> list[float]:
    """Seconds before each retry: about 5, 20, 80, … up to about an hour.

    Each is a quarter longer or shorter at random, so that jobs that failed together do not all come back together.
    """
    return [round(min(5 * 4**attempt, 3600) * random.uniform(0.75, 1.25), 1) for attempt in range(retries)]  # noqa: S311  # no secret


@cache
def _blank_fields() -> dict[str, Argument]:
    """The fields that RQ writes for a job without any options. Cached, since RQ makes them slowly."""
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
    """The fields that differ from job to job: its payload, as RQ stores a call, and its retries."""
    # The call as RQ's JSONSerializer reads it. The payload stays text: parsed values would take ten times the memory.
    call = b'["%s",null,[%s],{}]' % (function.path.encode(), payload)
    # On large calls the default level saves 10 % and takes six times as long, while no other request is served.
    level = zlib.Z_BEST_SPEED if len(call) > LARGE else zlib.Z_DEFAULT_COMPRESSION
    fields: dict[str, Argument] = {"data": zlib.compress(call, level)}
    if retries := options.get("retries"):
        # `retries` is a field of our own: `/retry` sets `retries_left` to it again.
        fields |= {"retries_left": retries, "retry_intervals": json.dumps(_retry_pauses(retries)), "retries": retries}
    return fields


def make_fingerprint(
    function: JobFunction, payloads: Sequence[bytes], asked: Options, *, is_batch: bool = False
) -> str:
    """A digest of a request. Two requests with the same idempotency key must have the same one.

    It covers the function, the payloads and the options that the client sent. Defaults are left out: they may change
    between the two requests.
    """
    options: Mapping[str, Any] = asked
    sent = {name: value.timestamp() if name == "at" else value for name, value in options.items()}
    values = [json.loads(payload) for payload in payloads]
    text = json.dumps([function.name, is_batch, values if is_batch else values[0], sent], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
