"""`delay=` and `at=` of `/enqueue`. Tests with real workers check that jobs run on time (test_worker, faults)."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis

from app.config import Settings
from app.core import transitions
from app.job_function import FUNCTIONS, JobFunction
from app.jobs.enqueue import Enqueuer
from app.main import create_app
from tests.processes import enqueue_echo, json_of, just_set, problem_of, take_job


def enqueue(client: FlaskClient, **options: Any) -> Any:
    return client.post("/enqueue/echo", json=1, query_string=options)


def due(redis: "Redis", job_id: str) -> float:
    score = redis.zscore("rq:scheduled:default", job_id)
    assert isinstance(score, float)
    return score


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize(
    "options", [lambda: {"delay": 100}, lambda: {"delay": "100.0"}, lambda: {"at": in_seconds(100)}]
)
def test_delayed_job_is_scheduled(client: FlaskClient, redis: "Redis", options: Any) -> None:
    before = time.time()
    answer = enqueue(client, **options())
    after = time.time()
    status = json_of(answer)
    assert (answer.status_code, status["job_status"], status["enqueued_at"]) == (202, "scheduled", None)
    assert answer.headers["Retry-After"]
    assert status == json_of(client.get(answer.headers["Location"]))
    assert before + 100 - 0.01 <= due(redis, status["job_id"]) <= after + 100 + 0.01
    assert not redis.exists("rq:queue:default")
    assert redis.smembers("rq:queues") == {b"rq:queue:default"}


def test_delayed_job_waits_for_its_time_and_runs_then(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, delay=0.2)
    at = due(redis, job_id)
    promoted = transitions.promote(redis, ["default"])
    if not promoted.jobs:  # on a busy machine, the job may be due already
        assert promoted.due is not None
        assert 0 < promoted.due <= 0.2
        time.sleep(promoted.due)
        promoted = transitions.promote(redis, ["default"])
    assert promoted == (1, None)
    assert time.time() >= at
    status = json_of(client.get(f"/check_status?job_id={job_id}"))
    assert status["job_status"] == "queued"
    assert status["enqueued_at"]
    assert take_job(redis).job_id == job_id


@pytest.mark.parametrize("delay", [0.4, 1.6])
def test_delayed_job_is_never_early(client: FlaskClient, redis: "Redis", delay: float) -> None:
    # RQ's own schedule cuts times down to whole seconds.
    before = time.time()
    assert due(redis, enqueue_echo(client, delay=delay)) >= before + delay - 0.001


@pytest.mark.parametrize("options", [{"delay": 0}, {"at": "2020-01-01T00:00:00Z"}, {"at": "1969-12-31T23:59:59Z"}])
def test_job_that_is_due_already_is_queued_at_once(client: FlaskClient, redis: "Redis", options: Any) -> None:
    assert json_of(enqueue(client, **options))["job_status"] == "queued"
    assert redis.llen("rq:queue:default") == 1


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-23T10:00:00Z", "2026-11-23t10:00:00z", "2026-11-23T10:00:00.123456Z", "2026-11-23T11:00:00+01:00",
        "2026-11-23T11:00:00 01:00", "2026-11-23 10:00:00Z", "2026-11-23T02:00:00-08:00",
    ],
)  # fmt: skip
def test_at_is_a_time_of_rfc_3339(client: FlaskClient, text: str) -> None:
    assert enqueue(client, at=text).status_code == 202


@pytest.mark.parametrize(
    "text",
    [
        "", "now", "tomorrow", "1700000000", "1e9", "2026-11-23", "2026-11-23T10:00:00", "2026-11-23T10:00Z",
        "2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-11-23T24:01:00Z", "20261123T100000Z", "10:00:00Z",
        "2026-11-23T10:00:00+25:00", "9999-12-31T23:59:59Z", "2026-11-23T10:00:00Z\n", "2026-11-23T10:00:00.Z",
        "٢٠٢٦-11-23T10:00:00Z",
    ],
)  # fmt: skip
def test_at_that_is_not_a_time_of_rfc_3339_or_too_late_is_422(client: FlaskClient, redis: "Redis", text: str) -> None:
    problem = problem_of(enqueue(client, at=text), 422, "invalid-request")
    assert problem["errors"][0]["loc"] == ["query", "at"]
    assert not redis.exists("rq:queue:default", "rq:scheduled:default")


@pytest.mark.parametrize("delay", ["-1", "nan", "inf", "1e400", "2592001", "x", "", "-0.001"])
def test_delay_out_of_range_is_422(client: FlaskClient, delay: str) -> None:
    problem = problem_of(enqueue(client, delay=delay), 422, "invalid-request")
    assert problem["errors"][0]["loc"] == ["query", "delay"]


def test_delay_and_at_together_are_422(client: FlaskClient) -> None:
    problem = problem_of(enqueue(client, delay=1, at="2026-11-23T10:00:00Z"), 422, "invalid-request")
    assert problem["errors"] == [{"loc": ["query", "at"], "msg": "Give delay or at, not both"}]


def test_max_delay_bounds_both(redis: "Redis") -> None:
    client = create_app(Settings(max_delay=60), redis).test_client()
    assert enqueue(client, delay=60).status_code == 202
    problem_of(enqueue(client, delay=61), 422, "invalid-request")
    assert enqueue(client, at=in_seconds(55)).status_code == 202
    problem_of(enqueue(client, at=in_seconds(70)), 422, "invalid-request")


@pytest.mark.parametrize("retries", ["-1", "11", "1.5", "x", ""])
def test_retries_out_of_range_are_422(client: FlaskClient, retries: str) -> None:
    problem = problem_of(enqueue(client, retries=retries), 422, "invalid-request")
    assert problem["errors"][0]["loc"] == ["query", "retries"]


def test_delayed_jobs_count_against_the_limit_of_the_queue(client: FlaskClient, enqueuer: Enqueuer) -> None:
    enqueuer.settings = enqueuer.settings.model_copy(update={"max_queue_length": 2})
    enqueue_echo(client, delay=100)
    enqueue_echo(client)
    problem_of(enqueue(client, delay=100), 503, "queue-full")
    problem_of(enqueue(client), 503, "queue-full")


def test_delayed_job_in_front_is_put_there_when_it_is_due(client: FlaskClient, redis: "Redis") -> None:
    other, urgent = enqueue_echo(client), enqueue_echo(client, delay=100, at_front="true")
    redis.zadd("rq:scheduled:default", {urgent: 1})
    transitions.promote(redis, ["default"])
    assert redis.lrange("rq:queue:default", 0, -1) == [urgent.encode(), other.encode()]


def test_ttl_of_a_delayed_job_begins_when_it_is_due(client: FlaskClient, redis: "Redis") -> None:
    assert redis.ttl(f"rq:job:{enqueue_echo(client, delay=100, ttl=50)}") == just_set(150)


def test_delayed_job_that_is_gone_is_forgotten(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, delay=100)
    redis.delete(f"rq:job:{job_id}")
    redis.zadd("rq:scheduled:default", {job_id: 1})
    assert transitions.promote(redis, ["default"]) == (0, None)
    assert not redis.exists("rq:queue:default", "rq:scheduled:default", f"rq:job:{job_id}")


@pytest.fixture
def lazy() -> Any:
    """A job function that has defaults for everything."""
    echo = FUNCTIONS["echo"]
    defaults: Any = {"delay": 50, "retries": 4, "ttl": 30, "failure_ttl": 9, "result_ttl": 8, "at_front": True}
    FUNCTIONS["lazy"] = JobFunction("lazy", echo.call, None, defaults, echo.signature)
    yield
    del FUNCTIONS["lazy"]


@pytest.mark.usefixtures("lazy")
def test_function_declares_its_own_defaults_and_a_request_overrides_them(client: FlaskClient, redis: "Redis") -> None:
    status = json_of(client.post("/enqueue/lazy", json=1))
    assert (status["job_status"], status["retries_left"]) == ("scheduled", 4)
    key = f"rq:job:{status['job_id']}"
    assert redis.hmget(key, "ttl", "failure_ttl", "result_ttl", "enqueue_at_front") == [b"30", b"9", b"8", b"1"]
    for options in ({"delay": 0}, {"at": "2026-11-23T10:00:00Z"}):
        assert json_of(client.post("/enqueue/lazy", json=1, query_string=options))["job_status"] == "queued"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", 0),
        ("timeout", "x"),
        ("retries", -1),
        ("delay", -1),
        ("result_ttl", 10**9),
        ("at_front", "maybe"),
        ("at_front", "false"),
        ("retries", "2"),
        ("ttl", True),
        ("queue", None),
        ("ttl", None),
    ],
)
def test_function_with_an_invalid_default_stops_the_start(redis: "Redis", name: str, value: Any) -> None:
    echo = FUNCTIONS["echo"]
    FUNCTIONS["broken"] = JobFunction("broken", echo.call, None, {name: value}, echo.signature)  # type: ignore[misc]  # any name
    try:
        with pytest.raises(SystemExit, match=f"broken has the default {name}="):
            create_app(Settings(), redis)
    finally:
        del FUNCTIONS["broken"]
