"""Who asks: the API key of a request, and what it lets its owner do."""

import hashlib
import hmac
import math
import time
from collections.abc import Sequence

from apiflask import APIFlask
from flask import g, request
from redis import Redis

from app.config import ApiKey, is_loopback
from app.jobs import problems

#: Without configured keys everybody is this one.
ANONYMOUS = ApiKey.model_construct(name="", functions=None, admin=False)

#: What needs no key: it says nothing of anybody's jobs, and load balancers and people look at it.
PUBLIC = {"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/dashboard"}
PUBLIC_BELOW = ("/docs/", "/problems/", "/dashboard/")


def find_key(keys: Sequence[ApiKey], token: str) -> ApiKey | None:
    """The key that this token is, in a time that does not tell how much of it was right."""
    digest = hashlib.sha256(token.encode("latin-1", errors="replace")).digest()  # WSGI's way: bytes as they came
    matches = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return matches[0] if matches else None


def current_key() -> ApiKey:
    """The key of the present request."""
    key: ApiKey = g.api_key
    return key


def check_function(name: str) -> None:
    """Let the key enqueue jobs of this function.

    Raises:
        Forbidden: it may not.
    """
    allowed = current_key().functions
    if allowed is not None and name not in allowed:
        raise problems.Forbidden(f"The key {current_key().name!r} may not use {name}.")


def want_admin() -> None:
    """Let only an admin key go on, where there are keys.

    Raises:
        Forbidden: it is another key.
    """
    if not (current_key() is ANONYMOUS or current_key().admin):
        raise problems.Forbidden(f"The key {current_key().name!r} is no admin key.")


def limit_rate(app: APIFlask, limit: str | None, connection: Redis) -> None:
    """Let each key (each address, where there are no keys) send so many requests, counted in Redis."""
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
        application_limits_exempt_when=is_public,
        on_breach=refuse,
        storage_uri="redis://",
        storage_options={"connection_pool": connection.connection_pool},  # type: ignore[dict-item]  # its annotation is too narrow
    )


def is_public() -> bool:
    """Whether the present request needs no key."""
    path = request.path
    return path in PUBLIC or path.startswith(PUBLIC_BELOW)


def want_keys(app: APIFlask, keys: Sequence[ApiKey], allow_anonymous: bool) -> None:
    """Ask each request but those of public routes for a key; without keys, serve this machine only."""

    @app.before_request
    def find() -> None:
        g.api_key = ANONYMOUS
        if is_public():
            return
        if not keys:
            # `flask run --host` and other servers do not read our settings: what listens may be open to everybody.
            if not (allow_anonymous or is_loopback(request.remote_addr or "localhost")):
                raise problems.Forbidden("Without API_KEYS only this machine is served, unless ALLOW_ANONYMOUS=true.")
            return
        # Not werkzeug's reading of it, which knows all schemes, and takes a second for one with many parameters.
        scheme, _, token = request.environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme.lower() != "bearer":
            raise problems.Unauthorized("The request has no API key.")
        key = find_key(keys, token.strip())
        if key is None:
            raise problems.Unauthorized("The API key is not known.")
        g.api_key = key
