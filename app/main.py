"""The Flask app. `create_app` is the one place where settings, Redis, job functions and routes meet."""

from collections.abc import Callable
from typing import Any, cast

from apiflask import APIFlask
from redis import Redis

from app.config import Settings, get_settings
from app.core.connections import connect
from app.core.job_ids import JobIds
from app.dashboard.page import dashboard
from app.job_function import load_functions
from app.jobs.enqueue import Enqueuer
from app.jobs.events import BLOCK, EventLog
from app.jobs.jobs import Jobs
from app.jobs.waiting import Waiting
from app.redis_resc import redis_conn
from app.web import openapi
from app.web.auth import limit_rate, require_keys
from app.web.limits import enforce_limits
from app.web.request_ids import track_requests
from app.web.requests import refuse_repeated_options
from app.web.responses import register_error_handlers
from app.web.routes import control, docs, ops
from app.web.routes import jobs as job_routes
from app.web.schemas import check_defaults, make_query_models
from app.web.shared_round_trips import PipelinedRedis


class App(APIFlask):
    """APIFlask without async views: Flask would look for one at every call of a view or hook."""

    def ensure_sync(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """The function as it is."""
        return func


def create_app(settings: Settings | None = None, connection: Redis | None = None) -> APIFlask:
    """Put the service together.

    Args:
        settings: instead of those of the environment.
        connection: instead of the one to the Redis of the settings.

    Raises:
        SystemExit: a job function's default is not a value of its option, or an API key names an unknown function.
    """
    settings = settings or get_settings()
    functions = load_functions(settings.function_modules)
    check_defaults(functions.values(), settings.queues)

    app = App(
        __name__,
        title="Background jobs",
        version="0.1.0",
        docs_ui="swagger-ui",
        json_errors=False,
        static_folder=None,  # type: ignore[arg-type]  # APIFlask's annotation is narrower than Flask's
    )
    app.config.update(
        # Each view declares its answers (app/web/openapi.py).
        **{f"AUTO_{part}_RESPONSE": False for part in ("200", "404", "VALIDATION_ERROR", "AUTH_ERROR")},
        AUTO_SERVERS=False,
        AUTO_OPERATION_ID=True,
        SWAGGER_UI_CSS="/docs/swagger-ui.css",
        SWAGGER_UI_BUNDLE_JS="/docs/swagger-ui-bundle.js",
        SWAGGER_UI_STANDALONE_PRESET_JS="/docs/swagger-ui-standalone-preset.js",
        DOCS_FAVICON="/docs/favicon-32x32.png",
    )
    app.spec_processor(lambda spec: openapi.complete(app, cast("dict[str, Any]", spec), job_routes.DEFAULT_FUNCTION))

    redis = connection or PipelinedRedis(connection_pool=redis_conn.connection_pool)
    # The reader of the event log blocks, so it has a connection of its own, which it closes at its end.
    events = EventLog(
        connection or redis_conn,
        lambda: connection.client() if connection else connect(settings, socket_timeout=BLOCK + 4),
    )
    ids = JobIds(redis)  # one for both, or they could hold different secrets after Redis lost its data
    jobs = Jobs(settings, redis, ids)
    app.extensions.update(
        jobs=jobs,
        enqueuer=Enqueuer(settings, redis, ids, functions),
        waiting=Waiting(jobs, events),
        query_models=make_query_models(settings),
    )

    # Flask calls the hooks that run before a view in this order, and those that run after it in the reverse order.
    register_error_handlers(app)
    track_requests(app, access_log=settings.access_log)
    require_keys(app, settings.api_keys, functions, allow_anonymous=settings.allow_anonymous)
    limit_rate(app, settings.rate_limit, redis)
    app.before_request(refuse_repeated_options)
    # Last, so that no other hook can refuse a request between the two halves of this one.
    enforce_limits(app, settings)
    for blueprint in (job_routes.jobs, control.control, ops.ops, docs.docs, dashboard):
        app.register_blueprint(blueprint)
    return app


app = create_app()
