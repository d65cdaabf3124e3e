"""The OpenAPI document. APIFlask makes it; this adds the answers that views declare, and a path for each function."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from flask import Flask
from pydantic import BaseModel

from app.job_function import JobFunction
from app.jobs import problems
from app.jobs.enqueue import Enqueuer
from app.jobs.problems import PROBLEM_JSON, Problem
from app.web import schemas
from app.web.auth import is_public

Spec = dict[str, Any]
View = TypeVar("View", bound=Callable[..., Any])

TEXT: Spec = {"text/plain": {"schema": {"type": "string"}}}
#: Any JSON, as the function returned it or the client sent it.
ANY_JSON: Spec = {"application/json": {"schema": {}}}

_RESPONSE_HEADERS = {
    "Retry-After": {"description": "seconds to wait before the next request", "schema": {"type": "integer"}},
    "Idempotent-Replayed": {
        "description": "`true` if the same request with the same key came before",
        "schema": {"type": "string"},
    },
    "Location": {"description": "URL of the job's or group's status", "schema": {"type": "string"}},
    "ETag": {"description": "changes with the status", "schema": {"type": "string"}},
    "Preference-Applied": {"description": "the time that the request waits at most", "schema": {"type": "string"}},
}


def _request_header(name: str, description: str, schema: Spec) -> Spec:
    schema = {"type": "string", **schema}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


#: The service ignores a value that it does not understand. HTTP allows visible ASCII in a header.
_ANY_TEXT = {"pattern": "^[!-~]{0,200}$"}
PREFER = _request_header(
    "Prefer", "`wait=SECONDS` (RFC 7240) means the same as the option `wait`", {**_ANY_TEXT, "examples": ["wait=10"]}
)
IF_NONE_MATCH = _request_header(
    "If-None-Match", "an `ETag` of an earlier response. The answer is 304 while the status is the same", _ANY_TEXT
)
LAST_EVENT_ID = _request_header(
    "Last-Event-ID", "the `id` of the last event that the client received. That status is not sent again", _ANY_TEXT
)
IDEMPOTENCY_KEY = _request_header(
    "Idempotency-Key",
    "1 to 255 visible characters, bare or quoted. The same request with the same key is done once",
    {
        "pattern": r'^([!#-+\--~][!-+\--~]{0,254}|"[!#-\[\]-~]{1,255}")$',
        "examples": ["8e03978e-40d5-43e8-bc93"],
    },
)

#: The problems of a view that reads a job.
READS_JOB: tuple[type[Problem], ...] = (
    problems.InvalidRequest,
    problems.JobNotFound,
    problems.ResultExpired,
    problems.RedisUnavailable,
)
#: The problems of a view that makes jobs from a body.
MAKES_JOBS: tuple[type[Problem], ...] = (
    problems.InvalidJson,
    problems.InvalidRequest,
    problems.IdempotencyKeyReused,
    problems.FunctionNotFound,
    problems.PayloadTooLarge,
    problems.UnsupportedMediaType,
    problems.QueueFull,
    problems.RedisUnavailable,
)
#: The problems that any request may have.
_ALWAYS = (problems.BadRequest, problems.InternalError)


class Answer(NamedTuple):
    """One answer of a view. Problems are declared separately."""

    description: str
    #: the model of the JSON, or OpenAPI's `content`; None for an empty answer
    content: type[BaseModel] | Spec | None = None
    headers: tuple[str, ...] = ()
    #: an instance of the model
    example: BaseModel | None = None

    def spec(self) -> Spec:
        """The answer as OpenAPI has it."""
        spec: Spec = {"description": self.description}
        if isinstance(self.content, dict):
            spec["content"] = self.content
        elif self.content:
            content: Spec = {"schema": {"$ref": f"#/components/schemas/{self.content.__name__}"}}
            if self.example:
                content["example"] = self.example.model_dump(mode="json")
            spec["content"] = {"application/json": content}
        if self.headers:
            spec["headers"] = {name: _RESPONSE_HEADERS[name] for name in self.headers}
        return spec


class Declaration(NamedTuple):
    """What a view declares with `@answers`."""

    answers: Mapping[int, Answer]
    problems: tuple[type[Problem], ...]
    headers: tuple[Spec, ...]


def answers(
    by_status: Mapping[int, Answer], problems: Iterable[type[Problem]] = (), headers: Iterable[Spec] = ()
) -> Callable[[View], View]:
    """Declare the answers of a view. It stands directly above the `def`.

    Args:
        by_status: the answers that are no problems, by HTTP status code.
        problems: the classes of the problems that the view raises.
        headers: the request headers that it reads.
    """

    def declare(view: View) -> View:
        vars(view)["declaration"] = Declaration(by_status, tuple(problems), tuple(headers))
        vars(view).setdefault("_spec", {})  # APIFlask leaves a view without it out of the document
        return view

    return declare


def _problem_specs(kinds: Iterable[type[Problem]]) -> dict[str, Spec]:
    """The answers of these problems, by status. Problems with the same status are examples of one answer."""
    specs: dict[str, Spec] = {}
    for kind in kinds:
        spec = specs.setdefault(
            str(kind.status),
            {
                "description": "",
                "content": {PROBLEM_JSON: {"schema": {"$ref": "#/components/schemas/ProblemObject"}, "examples": {}}},
            },
        )
        spec["description"] += ("; " if spec["description"] else "") + kind.title
        example = kind(kind.explanation.partition(". ")[0].rstrip(".") + ".", **kind.example).body()
        spec["content"][PROBLEM_JSON]["examples"][kind.slug] = {"value": example}
        if kind.status in (429, 503) or kind is problems.ResultNotReady:
            spec["headers"] = {"Retry-After": _RESPONSE_HEADERS["Retry-After"]}
    return specs


def _find_declarations(app: Flask) -> dict[str, Declaration]:
    """The declarations of all views, by method and path: `GET /problems/{name}`. Their routes have no converters."""
    return {
        f"{method} {rule.rule.replace('<', '{').replace('>', '}')}": declaration
        for rule in app.url_map.iter_rules()
        if (declaration := getattr(app.view_functions[rule.endpoint], "declaration", None))
        for method in rule.methods or ()
    }


def _model_schemas(declarations: Iterable[Declaration]) -> dict[str, Spec]:
    """The schemas of the models in the answers, and of the models within those."""
    models = [answer.content for declared in declarations for answer in declared.answers.values()]
    found: dict[str, Spec] = {}
    for model in (*models, schemas.ProblemObject):
        if isinstance(model, type):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
            found |= {**schema.pop("$defs", {}), model.__name__: schema}
    return found


def complete(app: Flask, spec: Spec, default: str) -> Spec:
    """Add answers, problems, and a path for each job function to APIFlask's document.

    Args:
        app: with its views, and its job functions and settings in `extensions["enqueuer"]`.
        spec: APIFlask's document; it is changed.
        default: name of the job function that `/enqueue` runs.
    """
    enqueuer: Enqueuer = app.extensions["enqueuer"]
    functions, settings = enqueuer.functions, enqueuer.settings
    declarations = _find_declarations(app)
    spec.setdefault("components", {}).setdefault("schemas", {}).update(_model_schemas(declarations.values()))
    one, many = (spec["paths"].pop(f"/{route}/{{function}}")["post"] for route in ("enqueue", "enqueue_many"))
    operations = {
        (method.upper(), path): operation
        for path, methods in spec["paths"].items()
        for method, operation in methods.items()
    }
    operations |= {("POST", "/enqueue/{function}"): one, ("POST", "/enqueue_many/{function}"): many}
    for (method, path), operation in operations.items():
        declared = declarations[f"{method} {path}"]  # KeyError: the view has no @answers
        kinds = declared.problems
        if not is_public(path):
            kinds = (*kinds, problems.Unauthorized, problems.Forbidden, problems.TooManyRequests)
            operation["security"] = [{"ApiKey": []}] if settings.api_keys else []
        specs = {str(status): answer.spec() for status, answer in declared.answers.items()}
        operation["responses"] = {**specs, **_problem_specs((*kinds, *_ALWAYS))}
        operation["parameters"] = [*map(_without_null, operation["parameters"]), *declared.headers]
    if settings.api_keys:
        spec["components"]["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
    _add_functions(spec, one, many, functions, settings.max_batch)
    if default in functions:
        spec["paths"]["/enqueue"]["post"] = {**spec["paths"][f"/enqueue/{default}"]["post"], "operationId": "enqueue"}
    else:
        del spec["paths"]["/enqueue"]
    return spec


def _without_null(parameter: Spec) -> Spec:
    """The parameter without null in its schema. pydantic allows null for an optional one, but no query can have it."""
    options = [option for option in parameter["schema"].get("anyOf", []) if option != {"type": "null"}]
    if len(options) != 1:
        return parameter
    schema = dict(options[0])
    return {**parameter, "description": schema.pop("description", ""), "schema": schema}


def _add_functions(spec: Spec, one: Spec, many: Spec, functions: Mapping[str, JobFunction], max_batch: int) -> None:
    """Add the paths of each function, made from the operations of `/enqueue/{function}` and `/enqueue_many/…`."""
    for operation in (one, many):
        operation["parameters"] = [parameter for parameter in operation["parameters"] if parameter["in"] != "path"]
    for name, function in functions.items():
        schema = _payload_schema(function, "one")
        spec["paths"][f"/enqueue/{name}"] = {
            "post": {
                **one,
                "operationId": f"enqueue_{name}",
                "summary": f"Enqueue a job of {name}",
                "description": function.description,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            }
        }
        items = _payload_schema(function, "batch")
        schema = {"type": "array", "minItems": 1, "maxItems": max_batch, "items": items}
        spec["paths"][f"/enqueue_many/{name}"] = {
            "post": {
                **many,
                "operationId": f"enqueue_many_{name}",
                "summary": f"Enqueue jobs of {name}, one for each payload",
                "description": f"All jobs are enqueued or none. {function.description}",
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            }
        }


def _payload_schema(function: JobFunction, place: str) -> Spec:
    schema = function.payload_schema
    # With an `$id`, "#/$defs/…" points into this schema, and not to the root of the document.
    return {**schema, "$id": f"urn:job-function:{function.name}:{place}"} if "$defs" in schema else schema
