"""The Flask app: `create_app`, and the core routes, each of which parses, calls `jobs` and answers."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import flask_swagger_ui
from apiflask import APIFlask
from flask import Response, request, send_from_directory
from pydantic import ValidationError
from redis import Redis

from app.config import MAX_RETRIES, MAX_SECONDS, Settings, get_settings
from app.core.transitions import TERMINAL
from app.dashboard.page import dashboard
from app.job_function import load_functions
from app.jobs import problems
from app.jobs.enqueue import MOST_ERRORS
from app.jobs.events import BLOCK, EventLog
from app.jobs.jobs import Jobs
from app.jobs.waiting import Waiting
from app.redis_resc import connect, redis_conn
from app.web import openapi
from app.web.auth import check_function, current_key, limit_rate, want_keys
from app.web.limits import large_answer, limit_sending, share_out
from app.web.request_ids import follow_requests
from app.web.requests import add_header, origin, reader, received_body, wait_seconds
from app.web.responses import answer_errors, ask_again, json_answer, make_etag, text_answer
from app.web.routes.control import make_control
from app.web.routes.ops import ops
from app.web.schemas import JobQuery, WaitQuery, enqueue_query, job_options
from app.web.shared_round_trips import PipelinedRedis

#: What `POST /enqueue` without a name runs.
DEFAULT_FUNCTION = "some_long_function"

_SWAGGER_UI = Path(flask_swagger_ui.__file__).parent / "dist"


class App(APIFlask):
    """APIFlask, whose functions are none of them async: Flask would ask that of each one at each call."""

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """The function."""
        return func


def create_app(settings: Settings | None = None, connection: Redis | None = None) -> APIFlask:
    """Put the service together: the one place where settings, Redis, functions and routes meet.

    Args:
        settings: instead of those of the environment.
        connection: instead of the one to the Redis of the settings.

    Raises:
        SystemExit: a job function's default is no value for its option, or an API key names no function.
    """
    settings = settings or get_settings()
    functions = load_functions(settings.function_modules)
    # The limits are for requests; what a function declares is the operator's own word.
    widest = dict.fromkeys(("max_job_timeout", "max_ttl", "max_delay"), MAX_SECONDS)
    any_option = job_options(settings.model_copy(update={**widest, "max_retries": MAX_RETRIES}))
    for function in functions.values():
        try:
            # Strictly, since they are used as they are. None, which an option that is not there has, is no value.
            given = {name: "None" if value is None else value for name, value in function.defaults.items()}
            any_option.model_validate(given, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise SystemExit(
                f"The job function {function.name} has the default {name}={first['input']!r}: {first['msg']}."
            ) from None

    for key in settings.api_keys:
        if unknown := sorted((key.functions or frozenset()) - functions.keys()):
            raise SystemExit(f"API_KEYS lets {key.name!r} use {', '.join(unknown)}, and there is no such job function.")

    # The event log's reads block for a while, on a connection of their own, which the reader closes in the end.
    events = EventLog(
        connection or redis_conn,
        lambda: connection.client() if connection else connect(settings, socket_timeout=BLOCK + 4),
    )
    jobs = Jobs(settings, connection or PipelinedRedis(connection_pool=redis_conn.connection_pool), functions)
    waiting = Waiting(jobs, events)

    app = App(
        __name__,
        title="Background jobs",
        version="0.1.0",
        docs_ui="swagger-ui",
        json_errors=False,
        static_folder=None,  # type: ignore[arg-type]  # APIFlask's annotation is narrower than Flask's
    )
    app.extensions.update(jobs=jobs, waiting=waiting)
    app.config.update(
        # The answers of each route are in app/openapi.py.
        **{f"AUTO_{part}_RESPONSE": False for part in ("200", "404", "VALIDATION_ERROR", "AUTH_ERROR")},
        AUTO_SERVERS=False,
        AUTO_OPERATION_ID=True,
        SWAGGER_UI_CSS="/docs/swagger-ui.css",
        SWAGGER_UI_BUNDLE_JS="/docs/swagger-ui-bundle.js",
        SWAGGER_UI_STANDALONE_PRESET_JS="/docs/swagger-ui-standalone-preset.js",
        DOCS_FAVICON="/docs/favicon-32x32.png",
    )
    app.spec_processor(
        lambda spec: openapi.complete(
            cast("dict[str, Any]", spec),
            functions,
            DEFAULT_FUNCTION,
            with_keys=bool(settings.api_keys),
            max_batch=settings.max_batch,
        )
    )
    answer_errors(app)
    follow_requests(app, access_log=settings.access_log)
    want_keys(app, settings.api_keys, settings.allow_anonymous)
    limit_rate(app, settings.rate_limit, jobs.connection)
    app.register_blueprint(ops)
    app.register_blueprint(dashboard)
    app.register_blueprint(make_control(jobs, waiting, job_options(settings)))

    @app.before_request
    def refuse_doubled_options() -> None:
        """Refuse `?queue=a&queue=b`: which of them would win is anybody's guess."""
        if b"&" not in request.query_string:
            return
        errors = [
            {"loc": ["query", name], "msg": "It is there more than once."}
            for name, values in request.args.lists()
            if len(values) > 1
        ]
        if errors:
            raise problems.InvalidRequest("The query has an option more than once.", errors=errors[:MOST_ERRORS])

    # The last of all: nothing that is asked before an answer, or done with it, may come between its two halves.
    share_out(app, settings)

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
        asked = options.model_dump(exclude_none=True)
        wait = wait_seconds(asked.pop("wait", None), settings)
        with received_body(settings) as payload:
            receipt = jobs.enqueue(found, payload, asked, origin())
        del payload  # it would be kept for as long as this request waits
        if receipt.is_replay:
            add_header("Idempotent-Replayed", "true")
        status = waiting.wait_for_new(receipt, wait, current_key().name)
        headers = {"Location": status["links"]["check_status"], **ask_again(status)}
        if wait and status["job_status"] in TERMINAL:
            with suppress(problems.TooManyRequests):  # the job is there: told to send it again, a client would
                return large_answer(json_answer(status, 200, headers))
            status.pop("result", None)
        return json_answer(status, 202, headers)

    @app.get("/check_status")
    @app.input(WaitQuery, location="query", arg_name="query")
    @app.doc(tags=["Jobs"])
    def check_status(query: WaitQuery) -> Response:
        """Tell where a job is."""
        status = waiting.wait(query.job_id, wait_seconds(query.wait, settings), reader())
        answer = json_answer(status, headers={**ask_again(status), "Cache-Control": "private, no-cache"})
        answer.set_etag(make_etag(answer.get_data()))
        if "If-None-Match" in request.headers:
            answer.make_conditional(request)
        return answer

    @app.get("/get_result")
    @app.input(WaitQuery, location="query", arg_name="query")
    @app.doc(tags=["Jobs"])
    def get_result(query: WaitQuery) -> Response:
        """Return what a job returned, as JSON, with nothing around it."""
        if wait := wait_seconds(query.wait, settings):
            waiting.wait(query.job_id, wait, reader())
        text = jobs.read_result(query.job_id, reader())
        return text_answer(text)

    @app.get("/get_payload")
    @app.input(JobQuery, location="query", arg_name="query")
    @app.doc(tags=["Jobs"])
    def get_payload(query: JobQuery) -> Response:
        """Return what a job was given, as JSON, with nothing around it."""
        text = jobs.read_payload(query.job_id, reader())
        return text_answer(text)

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
        return limit_sending(send_from_directory(_SWAGGER_UI, name))

    return app


app = create_app()
