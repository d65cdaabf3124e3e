"""The Flask app: `create_app`, and the core routes, each of which parses, calls `jobs` and answers."""

import hashlib
import re
from pathlib import Path
from typing import Any, cast

import flask_swagger_ui
from apiflask import APIFlask
from flask import Response, after_this_request, request, send_from_directory
from gunicorn.http.errors import ParseException
from redis import Redis
from werkzeug.exceptions import RequestEntityTooLarge

from app import openapi, problems
from app.answers import answer_errors, json_answer
from app.auth import check_function, current_key, limit_rate, want_keys
from app.config import Settings, get_settings
from app.events import BLOCK, EventLog
from app.job_function import load_functions
from app.jobs import POLL_AGAIN, Jobs, StatusObject
from app.ops import ops
from app.redis_resc import connect, redis_conn
from app.schemas import JobQuery, enqueue_query
from app.strict_json import parse_json
from app.transitions import TERMINAL

#: What `POST /enqueue` without a name runs.
DEFAULT_FUNCTION = "some_long_function"

_SWAGGER_UI = Path(flask_swagger_ui.__file__).parent / "dist"


def _preferred_wait() -> float | None:
    """The seconds of `Prefer: wait=SECONDS` (RFC 7240); a preference that is not understood is ignored."""
    for preference in ",".join(request.headers.getlist("Prefer")).split(","):
        if match := re.fullmatch(r'wait="?(\d{1,9})"?', preference.partition(";")[0].replace(" ", ""), re.IGNORECASE):
            return float(match[1])
    return None


def _wait_seconds(asked: float | None, settings: Settings) -> float:
    """How long to wait: the option wins over the preference, and the answer says if it was the latter."""
    preferred = _preferred_wait() if asked is None else None
    seconds = min(asked if asked is not None else preferred or 0, settings.max_wait)
    if preferred is not None:

        @after_this_request
        def tell(answer: Response) -> Response:
            answer.headers["Preference-Applied"] = f"wait={seconds:.0f}"
            return answer

    return seconds


def _read_payload(limit: int) -> Any:
    if not request.is_json:
        given = request.mimetype or "none"
        raise problems.UnsupportedMediaType(f"The body must be JSON, with Content-Type application/json, not {given}.")
    try:
        body = request.get_data(cache=False)
    except (OSError, ParseException) as error:  # gunicorn's words for chunks that are none, or have no end
        raise problems.BadRequest("The body could not be read to its end.") from error
    if len(body) > limit:
        raise RequestEntityTooLarge
    if request.content_length not in (None, len(body)):  # cut short, which gunicorn does not say
        raise problems.BadRequest("The body is shorter than its Content-Length.")
    return parse_json(body)


def _ask_again(status: StatusObject) -> dict[str, str]:
    return {} if status["job_status"] in TERMINAL else {"Retry-After": str(POLL_AGAIN)}


def _reader() -> str | None:
    """Whose jobs the present request may see: those of one owner, or (None) all."""
    key = current_key()
    return None if key.admin else key.name


def create_app(settings: Settings | None = None, connection: Redis | None = None) -> APIFlask:
    """Put the service together: the one place where settings, Redis, functions and routes meet.

    Args:
        settings: instead of those of the environment.
        connection: instead of the one to the Redis of the settings.

    Raises:
        SystemExit: a job function's default queue is not one of the configured ones.
    """
    settings = settings or get_settings()
    functions = load_functions(settings.function_modules)
    for function in functions.values():
        queue = function.defaults.get("queue", settings.queues[0])
        if queue not in settings.queues:
            raise SystemExit(f"The job function {function.name} wants the queue {queue!r}, which QUEUES does not name.")

    # The event log's reads block for a while, on a client of their own.
    events = EventLog(connection or redis_conn, lambda: connection or connect(settings, socket_timeout=BLOCK + 4))
    jobs = Jobs(settings, connection or redis_conn, functions, events)

    app = APIFlask(
        __name__,
        title="Background jobs",
        version="0.1.0",
        docs_ui="swagger-ui",
        json_errors=False,
        static_folder=None,  # type: ignore[arg-type]  # APIFlask's annotation is narrower than Flask's
    )
    app.extensions["jobs"] = jobs
    app.config.update(
        # Of a chunked body werkzeug reads so many bytes and no word of the rest: one more, to see that there is more.
        MAX_CONTENT_LENGTH=settings.max_payload_bytes + 1,
        # The answers of each route are in app/openapi.py.
        **{f"AUTO_{part}_RESPONSE": False for part in ("200", "404", "VALIDATION_ERROR", "AUTH_ERROR")},
        AUTO_SERVERS=False,
        AUTO_TAGS=False,
        AUTO_OPERATION_ID=True,
        SWAGGER_UI_CSS="/docs/swagger-ui.css",
        SWAGGER_UI_BUNDLE_JS="/docs/swagger-ui-bundle.js",
        SWAGGER_UI_STANDALONE_PRESET_JS="/docs/swagger-ui-standalone-preset.js",
        DOCS_FAVICON="/docs/favicon-32x32.png",
    )
    app.spec_processor(
        lambda spec: openapi.complete(
            cast("dict[str, Any]", spec), functions, DEFAULT_FUNCTION, with_keys=bool(settings.api_keys)
        )
    )
    answer_errors(app)
    want_keys(app, settings.api_keys, settings.allow_anonymous)
    limit_rate(app, settings.rate_limit, jobs.connection)
    app.register_blueprint(ops)

    @app.before_request
    def refuse_doubled_options() -> None:
        """Refuse `?queue=a&queue=b`: which of them would win is anybody's guess."""
        errors = [
            {"loc": ["query", name], "msg": "It is there more than once."}
            for name, values in request.args.lists()
            if len(values) > 1
        ]
        if errors:
            raise problems.InvalidRequest("The query has an option more than once.", errors=errors)

    @app.get("/")
    @app.doc(tags=["Jobs"])
    def index() -> Response:
        """Tell that the app is up."""
        return Response("Running!", mimetype="text/plain")

    @app.post("/enqueue")
    @app.post("/enqueue/<function>")
    @app.input(enqueue_query(settings), location="query", arg_name="options")
    @app.doc(tags=["Jobs"])
    def enqueue(options: Any, function: str = DEFAULT_FUNCTION) -> Response:
        """Enqueue a job: the body is its payload."""
        found = jobs.find_function(function)
        check_function(function)
        payload = _read_payload(settings.max_payload_bytes)
        chosen = options.model_dump(exclude_none=True)
        wait = _wait_seconds(chosen.pop("wait", None), settings)
        status = jobs.enqueue(found, payload, chosen, owner=current_key().name, wait=wait)
        headers = {"Location": status["links"]["check_status"], **_ask_again(status)}
        if status["job_status"] not in TERMINAL:
            return json_answer(status, 202, headers)
        if status["job_status"] == "finished":
            status["result"] = jobs.read_result_value(status["job_id"], _reader())
        return json_answer(status, 200, headers)

    @app.get("/check_status")
    @app.input(JobQuery, location="query", arg_name="query")
    @app.doc(tags=["Jobs"])
    def check_status(query: JobQuery) -> Response:
        """Tell where a job is."""
        status = jobs.wait(query.job_id, _wait_seconds(query.wait, settings), _reader())
        answer = json_answer(status, headers={**_ask_again(status), "Cache-Control": "private, no-cache"})
        answer.set_etag(hashlib.blake2b(answer.get_data(), digest_size=12).hexdigest())
        answer.make_conditional(request)
        return answer

    @app.get("/get_result")
    @app.input(JobQuery, location="query", arg_name="query")
    @app.doc(tags=["Jobs"])
    def get_result(query: JobQuery) -> Response:
        """Return what a job returned, as JSON, with nothing around it."""
        if wait := _wait_seconds(query.wait, settings):
            jobs.wait(query.job_id, wait, _reader())
        text = jobs.read_result(query.job_id, _reader())
        return Response(text, 200, {"Cache-Control": "private, no-cache"}, mimetype="application/json")

    @app.get("/functions")
    @app.doc(tags=["Jobs"])
    def list_functions() -> Response:
        """List the job functions, with the schema of each one's payload."""
        listed = [
            {
                "name": function.name,
                "description": function.description,
                "payload_schema": function.payload_schema,
                "defaults": function.defaults,
            }
            for function in sorted(functions.values(), key=lambda function: function.name)
        ]
        return json_answer({"functions": listed})

    @app.get("/problems/<name>")
    @app.doc(tags=["Problems"])
    def explain_problem(name: str) -> Response:
        """Explain a problem, and what to do about it."""
        if name not in problems.PROBLEMS:
            raise problems.NotFound(f"There is no problem {name!r}.")
        problem = problems.PROBLEMS[name]
        return Response(f"{problem.title} ({problem.status})\n\n{problem.explanation}\n", mimetype="text/plain")

    @app.get("/docs/<path:name>")
    @app.doc(hide=True)
    def docs_file(name: str) -> Response:
        """Serve Swagger UI's files from the installed package: no CDN."""
        return send_from_directory(_SWAGGER_UI, name)

    return app


app = create_app()
