"""The OpenAPI document: what APIFlask derives from the views, completed with every answer and every job function."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from app.job_function import JobFunction
from app.jobs import problems
from app.jobs.problems import Problem
from app.web import schemas
from app.web.auth import PUBLIC, PUBLIC_BELOW

Spec = dict[str, Any]

PROBLEM_JSON = "application/problem+json"

_EXAMPLE_ID = "0b5f2f7e-3c1d-4a9b-8e57-1f6f3c9d2a10"
_EXAMPLE_STATUS = {
    "job_id": _EXAMPLE_ID,
    "job_status": "started",
    "function": "some_long_function",
    "queue": "default",
    "enqueued_at": "2026-11-23T10:00:00.123456Z",
    "started_at": "2026-11-23T10:00:00.125000Z",
    "ended_at": None,
    "progress": {"done": 3, "total": 10, "message": "step 3"},
    "retries_left": None,
    "error": None,
    "links": {
        "check_status": f"/check_status?job_id={_EXAMPLE_ID}",
        "get_result": f"/get_result?job_id={_EXAMPLE_ID}",
        "cancel": f"/cancel?job_id={_EXAMPLE_ID}",
    },
}

_HEADERS = {
    "Retry-After": {"description": "seconds after which to ask again", "schema": {"type": "integer"}},
    "Idempotent-Replayed": {
        "description": "`true` if the same request with the same key came before",
        "schema": {"type": "string"},
    },
    "Location": {"description": "where to ask for the status", "schema": {"type": "string"}},
    "ETag": {"description": "changes with the status", "schema": {"type": "string"}},
    "Preference-Applied": {"description": "the wait that was granted", "schema": {"type": "string"}},
}


def _header(name: str, description: str, schema: Spec) -> Spec:
    schema = {"type": "string", **schema}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


#: What is not understood in one is ignored; only texts that HTTP allows in a header can be sent.
_ANY_TEXT = {"pattern": "^[!-~]{0,200}$"}
_PREFER = _header(
    "Prefer", "`wait=SECONDS` (RFC 7240) means the same as the option `wait`", {**_ANY_TEXT, "examples": ["wait=10"]}
)
_IF_NONE_MATCH = _header(
    "If-None-Match", "an `ETag` that was received: answers 304 while the status is the same", _ANY_TEXT
)
_LAST_EVENT_ID = _header(
    "Last-Event-ID", "the `id` of the last event that was received; what it said is not told again", _ANY_TEXT
)
_IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    "1 to 255 visible characters, bare or quoted. The same request with the same key is done once",
    {
        "pattern": r'^([!#-+\--~][!-+\--~]{0,254}|"[!#-\[\]-~]{1,255}")$',
        "examples": ["8e03978e-40d5-43e8-bc93"],
    },
)

#: The models that answers are made of.
_MODELS: list[type[BaseModel]] = [schemas.ProblemObject]


def _json(model: type[BaseModel], example: Any = None) -> Spec:
    _MODELS.append(model)
    content: Spec = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if example is not None:
        content["example"] = example
    return {"application/json": content}


def _answer(description: str, content: Spec | None = None, *headers: str) -> Spec:
    answer: Spec = {"description": description}
    if content:
        answer["content"] = content
    if headers:
        answer["headers"] = {name: _HEADERS[name] for name in headers}
    return answer


_READS_JOB: tuple[type[Problem], ...] = (
    problems.InvalidRequest,
    problems.JobNotFound,
    problems.ResultExpired,
    problems.RedisUnavailable,
)
_TAKES_PAYLOAD: tuple[type[Problem], ...] = (
    problems.InvalidJson,
    problems.InvalidRequest,
    problems.IdempotencyKeyReused,
    problems.FunctionNotFound,
    problems.PayloadTooLarge,
    problems.UnsupportedMediaType,
    problems.QueueFull,
    problems.RedisUnavailable,
)
_TEXT = {"text/plain": {"schema": {"type": "string"}}}

#: What each endpoint answers: its good answers by status, and the problems it may have.
ANSWERS: dict[str, tuple[dict[str, Spec], tuple[type[Problem], ...]]] = {
    "GET /": ({"200": _answer("the app is up: `Running!`", _TEXT)}, ()),
    "POST /enqueue": (
        {
            "202": _answer(
                "enqueued", _json(schemas.StatusObject, {**_EXAMPLE_STATUS, "job_status": "queued", "started_at": None,
                                                         "progress": None}),
                "Location", "Retry-After", "Preference-Applied", "Idempotent-Replayed",
            ),
            "200": _answer(
                "waited for, and ended in time", _json(schemas.StatusWithResult), "Location", "Preference-Applied",
                "Idempotent-Replayed",
            ),
        },
        (*_TAKES_PAYLOAD, problems.ResultExpired, problems.JobFailed),
    ),
    "POST /enqueue_many": (
        {
            "202": _answer(
                "enqueued, all of them",
                _json(schemas.EnqueuedGroup, {"group_id": "f4a1d4a8-8f0e-9f7b-5f05", "job_ids": [_EXAMPLE_ID]}),
                "Location", "Retry-After", "Idempotent-Replayed",
            ),
        },
        _TAKES_PAYLOAD,
    ),
    "GET /check_group": (
        {"200": _answer("its jobs, counted by status", _json(schemas.GroupObject))},
        (problems.InvalidRequest, problems.GroupNotFound, problems.ResultExpired, problems.RedisUnavailable),
    ),
    "POST /cancel": (
        {
            "200": _answer("it has ended, and has not finished", _json(schemas.StatusObject)),
            "202": _answer("it runs, and its worker was told to stop it", _json(schemas.StatusObject), "Retry-After"),
        },
        (*_READS_JOB, problems.JobAlreadyEnded),
    ),
    "POST /retry": (
        {"202": _answer("it waits again", _json(schemas.StatusObject), "Location", "Retry-After")},
        (*_READS_JOB, problems.JobNotRetryable, problems.QueueFull),
    ),
    "GET /jobs": (
        {"200": _answer("a page of jobs, newest first", _json(schemas.JobPage))},
        (problems.InvalidRequest, problems.RedisUnavailable),
    ),
    "GET /check_status": (
        {
            "200": _answer(
                "where the job is", _json(schemas.StatusObject, _EXAMPLE_STATUS), "ETag", "Retry-After",
                "Preference-Applied",
            ),
            "304": _answer("still the status that `If-None-Match` names", None, "ETag"),
        },
        _READS_JOB,
    ),
    "GET /get_result": (
        {"200": _answer("what the function returned", {"application/json": {"schema": {}}}, "Preference-Applied")},
        (*_READS_JOB, problems.ResultNotReady, problems.JobFailed, problems.JobStopped, problems.JobCanceled),
    ),
    "GET /get_payload": (
        {"200": _answer("what the job was given", {"application/json": {"schema": {}}})},
        (*_READS_JOB, problems.PayloadNotFound),
    ),
    "GET /functions": ({"200": _answer("all job functions", _json(schemas.FunctionList))}, ()),
    "GET /problems/{name}": ({"200": _answer("what it means, and what to do", _TEXT)}, (problems.NotFound,)),
    "GET /healthz": ({"200": _answer("the process serves", _json(schemas.Health, {"status": "ok"}))}, ()),
    "GET /webhooks": (
        {"200": _answer("the messages that told of its ends", _json(schemas.WebhookLog))}, _READS_JOB,
    ),
    "POST /webhooks/redeliver": (
        {"202": _answer("the last one is delivered once more", _json(schemas.WebhookLog))},
        (*_READS_JOB, problems.WebhookNotFound, problems.QueueFull),
    ),
    "GET /events": (
        {
            "200": _answer("`event: status` at each change, and `event: end`", {"text/event-stream": {"schema": {}}}),
            "204": _answer("the client has had the end"),
        },
        _READS_JOB,
    ),
    "GET /queues": (
        {"200": _answer("the queues and workers at this moment", _json(schemas.Queues))},
        (problems.RedisUnavailable,),
    ),
    "GET /metrics": ({"200": _answer("Prometheus' text format", _TEXT)}, ()),
    "GET /readyz": (
        {"200": _answer("Redis takes writes and every queue has a live worker", _json(schemas.Readiness))},
        (problems.NotReady,),
    ),
}  # fmt: skip

#: The headers that an endpoint reads.
_READS: dict[str, tuple[Spec, ...]] = {
    "POST /enqueue": (_PREFER, _IDEMPOTENCY_KEY),
    "POST /enqueue_many": (_IDEMPOTENCY_KEY,),
    "GET /check_status": (_PREFER, _IF_NONE_MATCH),
    "GET /get_result": (_PREFER,),
    "GET /events": (_LAST_EVENT_ID,),
}

#: What any request may be answered with.
_ALWAYS = (problems.BadRequest, problems.InternalError)


def _problem_answers(kinds: tuple[type[Problem], ...]) -> dict[str, Spec]:
    """The problems by status; several of one status are several examples of one answer."""
    answers: dict[str, Spec] = {}
    for kind in kinds:
        answer = answers.setdefault(
            str(kind.status),
            {
                "description": "",
                "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemObject"}, "examples": {}}},
            },
        )
        answer["description"] += ("; " if answer["description"] else "") + kind.title
        example = kind(kind.explanation.partition(". ")[0].rstrip(".") + ".", **kind.example).body()
        answer["content"][PROBLEM_JSON]["examples"][kind.slug] = {"value": example}
        if kind.status in (429, 503) or kind is problems.ResultNotReady:
            answer["headers"] = {"Retry-After": _HEADERS["Retry-After"]}
    return answers


def complete(spec: Spec, functions: Mapping[str, JobFunction], default: str, with_keys: bool, max_batch: int) -> Spec:
    """Add to APIFlask's document what it cannot know: answers, problems, and a path for each job function.

    Args:
        spec: APIFlask's document; it is changed.
        functions: the job functions.
        default: name of the one that `/enqueue` runs.
        with_keys: whether API keys are wanted.
        max_batch: payloads that one `/enqueue_many` may hold.
    """
    components = spec.setdefault("components", {}).setdefault("schemas", {})
    for model in _MODELS:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
        components.update(schema.pop("$defs", {}))
        components[model.__name__] = schema

    one, many = (spec["paths"].pop(f"/{route}/{{function}}")["post"] for route in ("enqueue", "enqueue_many"))
    for operation in (one, many):
        operation["parameters"] = [parameter for parameter in operation["parameters"] if parameter["in"] != "path"]
    operations = {
        f"{method.upper()} {path}": operation
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    }
    for route, operation in {**operations, "POST /enqueue": one, "POST /enqueue_many": many}.items():
        answers, kinds = ANSWERS[route]
        path = route.partition(" ")[2]
        if path not in PUBLIC and not path.startswith(PUBLIC_BELOW):
            kinds = (*kinds, problems.Unauthorized, problems.Forbidden, problems.TooManyRequests)
            operation["security"] = [{"ApiKey": []}] if with_keys else []
        operation["responses"] = {**answers, **_problem_answers((*kinds, *_ALWAYS))}
        operation["parameters"] = [*map(_without_null, operation["parameters"]), *_READS.get(route, ())]
    if with_keys:
        spec["components"]["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}

    for name, function in functions.items():
        spec["paths"][f"/enqueue/{name}"] = {"post": _function_operation(one, function)}
        spec["paths"][f"/enqueue_many/{name}"] = {"post": _batch_operation(many, function, max_batch)}
    if default in functions:
        operation = _function_operation(one, functions[default])
        spec["paths"]["/enqueue"]["post"] = {**operation, "operationId": "enqueue"}
    else:
        del spec["paths"]["/enqueue"]
    return spec


def _without_null(parameter: Spec) -> Spec:
    """A query parameter that may be left out, as it is when it is there: pydantic's schema is "this, or null"."""
    options = [option for option in parameter["schema"].get("anyOf", []) if option != {"type": "null"}]
    if len(options) != 1:
        return parameter
    schema = dict(options[0])
    return {**parameter, "description": schema.pop("description", ""), "schema": schema}


def _payload_schema(function: JobFunction, place: str) -> Spec:
    schema = function.payload_schema
    # A schema of its own: "#/$defs/…" in it would point to the document's root.
    return {**schema, "$id": f"urn:job-function:{function.name}:{place}"} if "$defs" in schema else schema


def _batch_operation(generic: Spec, function: JobFunction, max_batch: int) -> Spec:
    schema = {"type": "array", "minItems": 1, "maxItems": max_batch, "items": _payload_schema(function, "batch")}
    return {
        **generic,
        "operationId": f"enqueue_many_{function.name}",
        "summary": f"Enqueue jobs of {function.name}, one for each payload",
        "description": f"All or none of them. {function.description}",
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
    }


def _function_operation(generic: Spec, function: JobFunction) -> Spec:
    schema = _payload_schema(function, "one")
    return {
        **generic,
        "operationId": f"enqueue_{function.name}",
        "summary": f"Enqueue a job of {function.name}",
        "description": function.description,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
    }
