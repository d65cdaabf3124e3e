from unittest.mock import patch

import pytest
from apiflask import APIFlask
from flask.testing import FlaskClient
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, RedisError, TimeoutError

from app.config import Settings
from app.main import create_app
from tests.processes import json_of, problem_of


def sign_on(redis: "Redis", queue: str = "default") -> None:
    """Register a worker, as a worker does itself."""
    redis.hset("rq:worker:w", "birth", "now")
    redis.sadd(f"rq:workers:{queue}", "rq:worker:w")


def test_healthz_says_that_the_process_serves(client: FlaskClient) -> None:
    answer = client.get("/healthz")
    assert (answer.status_code, json_of(answer)) == (200, {"status": "ok"})


def test_healthz_does_not_ask_redis(client: FlaskClient, redis: "Redis") -> None:
    with patch.object(type(redis), "execute_command", side_effect=RedisConnectionError("down")) as execute:
        assert client.get("/healthz").status_code == 200
    assert execute.call_count == 0


def test_readyz_is_ready_with_a_live_worker(client: FlaskClient, redis: "Redis") -> None:
    sign_on(redis)
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert json_of(answer) == {"status": "ready", "checks": {"redis": "ok", "queue default": "ok"}}


def test_readyz_names_a_queue_without_a_worker(client: FlaskClient) -> None:
    answer = client.get("/readyz")
    problem = problem_of(answer, 503, "not-ready")
    assert problem["checks"] == {"redis": "ok", "queue default": "no live worker"}
    assert int(answer.headers["Retry-After"]) >= 1


def test_readyz_does_not_count_a_worker_that_died_suddenly(client: FlaskClient, redis: "Redis") -> None:
    sign_on(redis)
    redis.delete("rq:worker:w")  # as when it expires: the set keeps its member
    assert problem_of(client.get("/readyz"), 503, "not-ready")["checks"]["queue default"] == "no live worker"


def test_readyz_needs_a_worker_for_every_queue(redis: "Redis") -> None:
    client = create_app(Settings(queues=("high", "low")), redis).test_client()
    sign_on(redis, "high")
    problem = problem_of(client.get("/readyz"), 503, "not-ready")
    assert problem["checks"] == {"redis": "ok", "queue high": "ok", "queue low": "no live worker"}
    assert "queue low" in problem["detail"]
    assert "queue high" not in problem["detail"]
    sign_on(redis, "low")
    assert client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "error", [RedisConnectionError("x"), TimeoutError("x"), OutOfMemoryError("x"), ReadOnlyError("x")]
)
def test_readyz_names_redis(client: FlaskClient, redis: "Redis", error: RedisError) -> None:
    sign_on(redis)
    with patch("redis.client.Pipeline.execute", side_effect=error):
        problem = problem_of(client.get("/readyz"), 503, "not-ready")
    assert problem["checks"] == {"redis": type(error).__name__}


def test_readyz_sees_that_redis_refuses_writes(real_redis: "Redis", settings: Settings) -> None:
    sign_on(real_redis)
    client = create_app(settings, real_redis).test_client()
    assert client.get("/readyz").status_code == 200
    real_redis.config_set("maxmemory", 1)
    try:
        problem = problem_of(client.get("/readyz"), 503, "not-ready")
        full = client.post("/enqueue/echo", json=1)
    finally:
        real_redis.config_set("maxmemory", 0)
    assert problem["checks"] == {"redis": "OutOfMemoryError"}
    problem_of(full, 503, "redis-unavailable")


def test_readyz_sees_that_redis_is_a_replica(real_redis: "Redis", settings: Settings) -> None:
    client = create_app(settings, real_redis).test_client()
    assert client.post("/enqueue/echo", json=1).status_code == 202
    real_redis.replicaof("127.0.0.1", "1")
    try:
        problem = problem_of(client.get("/readyz"), 503, "not-ready")
        read_only = client.post("/enqueue/echo", json=1)
    finally:
        real_redis.replicaof("NO", "ONE")
    assert problem["checks"] == {"redis": "ReadOnlyError"}
    problem_of(read_only, 503, "redis-unavailable")


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_healthz_and_readyz_refuse_other_methods(app: APIFlask, path: str, method: str) -> None:
    answer = app.test_client().open(path, method=method)
    problem_of(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"
