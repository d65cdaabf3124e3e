"""API keys: the key of a request, what the key allows, and the rate limit."""

import hashlib
import hmac
import math
import time
from collections.abc import Collection, Sequence

from apiflask import APIFlask
from flask import g, request
from redis import Redis

from app.config import ApiKey, is_loopback
from app.jobs import problems

#: The key of every request if no keys are configured.
ANONYMOUS = ApiKey.model_construct(name="", functions=None, admin=False)

#: The paths that need no key: load balancers and people read them, and they show nobody's jobs.
PUBLIC = {"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/dashboard"}
PUBLIC_BELOW = ("/docs/", "/problems/", "/dashboard/")


def find_key(keys: Sequence[ApiKey], token: str) -> ApiKey | None:
    """Find the key of a token. The time does not depend on how much of it is right."""
    digest = hashlib.sha256(token.encode("latin-1", errors="replace")).digest()  # WSGI decodes headers as Latin-1
    matches = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return matches[0] if matches else None


def current_key() -> ApiKey:
    """The key of the present request."""
    key: ApiKey = g.api_key
    return key


def check_function(name: str | None) -> None:
    """Check that the key may enqueue jobs of this function.

    Raises:
        Forbidden: it may not.
    """
    allowed = current_key().functions
    if allowed is not None and name not in allowed:
        raise problems.Forbidden(f"The key {current_key().name!r} may not use {name or 'the function of this job'}.")


def require_admin() -> None:
    """Check that the key is an admin key. Without configured keys everybody is an admin.

    Raises:
        Forbidden: it is not.
    """
    if not (current_key() is ANONYMOUS or current_key().admin):
        raise problems.Forbidden(f"The key {current_key().name!r} is not an admin key.")


def limit_rate(app: APIFlask, limit: str | None, connection: Redis) -> None:
    """Limit the requests of each key, or of each address if there are no keys. Redis counts them."""
    if limit is None:
        return
    from flask_limiter import Limiter, RequestLimit  # heavy, and off by default

    def refuse(breached: RequestLimit) -> None:
        pause = max(1, math.ceil(breached.reset_at - time.time()))
        raise problems.TooManyRequests(f"More than {limit.replace('/', ' requests a ')}.", retry_after=pause)

    Limiter(
        lambda: current_key().name or request.remote_addr or "",
        app=app,
        application_limits=[limit],
        application_limits_exempt_when=lambda: is_public(request.path),
        on_breach=refuse,
        storage_uri="redis://",
        storage_options={"connection_pool": connection.connection_pool},  # type: ignore[dict-item]  # its annotation is too narrow
    )


def is_public(path: str) -> bool:
    """Whether a request to this path needs no key."""
    return path in PUBLIC or path.startswith(PUBLIC_BELOW)


def require_keys(app: APIFlask, keys: Sequence[ApiKey], functions: Collection[str], *, allow_anonymous: bool) -> None:
    """Require a key of each request but those to public paths. Without keys, serve this machine only.

    Raises:
        SystemExit: a key names a job function that does not exist.
    """
    for key in keys:
        if unknown := sorted((key.functions or frozenset()).difference(functions)):
            raise SystemExit(f"API_KEYS lets {key.name!r} use {', '.join(unknown)}, and there is no such job function.")

    @app.before_request
    def find_request_key() -> None:
        g.api_key = ANONYMOUS
        if is_public(request.path):
            return
        if not keys:
            # `flask run --host` and other servers do not read HOST: they may listen to everybody.
            if not (allow_anonymous or is_loopback(request.remote_addr or "localhost")):
                raise problems.Forbidden(
                    "Without API_KEYS or ALLOW_ANONYMOUS=true the service serves its own machine only."
                )
            return
        # werkzeug's parser takes a second for a header with many parameters.
        scheme, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() != "bearer":
            raise problems.Unauthorized("The request has no API key.")
        key = find_key(keys, token.strip())
        if key is None:
            raise problems.Unauthorized("The API key is not known.")
        g.api_key = key
