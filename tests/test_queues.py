"""`GET /queues`: the queues and workers, for people and for the dashboard."""

import json
from typing import Any

import jsonschema_rs
import pytest
from flask.testing import FlaskClient
from redis import Redis

from app.config import Settings
from app.main import create_app
from tests.processes import end_run, enqueue_echo, job_in_state, json_of, problem_of, take_job
from tests.test_auth import ALICE, KEYS, OPS
from tests.test_health import sign_on


@pytest.fixture(params=["fake", "real"])
def redis(request: pytest.FixtureRequest, fake_redis: "Redis") -> Any:
    """A fake and a real server: each runs the script with a Lua of its own."""
    if request.param == "real":
        return request.getfixturevalue("real_redis")
    fake_redis.flushall()
    return fake_redis


def queue_of(client: FlaskClient) -> dict[str, Any]:
    (queue,) = json_of(client.get("/queues"))["queues"]
    return dict(queue)


def test_queues_of_a_new_service_are_empty(client: FlaskClient) -> None:
    jobs = dict.fromkeys(("queued", "started", "scheduled", "deferred", "finished", "failed", "canceled"), 0)
    assert json_of(client.get("/queues")) == {
        "queues": [
            {
                "name": "default",
                "jobs": jobs,
                "workers": 0,
                "oldest_waiting_seconds": None,
                "runs_per_minute": 0,
                "mean_run_seconds": None,
            }
        ],
        "workers": [],
    }


@pytest.mark.parametrize(
    ("state", "counted"),
    [
        ("queued", "queued"),
        ("started", "started"),
        ("scheduled", "scheduled"),
        ("finished", "finished"),
        ("failed", "failed"),
        ("stopped", "failed"),
        ("canceled", "canceled"),
    ],
)
def test_queues_counts_jobs_by_status(client: FlaskClient, redis: "Redis", state: str, counted: str) -> None:
    job_in_state(client, redis, state)
    jobs = queue_of(client)["jobs"]
    assert {status: number for status, number in jobs.items() if number} == {counted: 1}


def test_queues_does_not_count_expired_jobs(client: FlaskClient, redis: "Redis") -> None:
    redis.zadd("rq:finished:default", {"long ago": 1000, "for ever": float("inf")})
    assert queue_of(client)["jobs"]["finished"] == 1


def test_queues_has_the_age_of_the_oldest_waiting_job(client: FlaskClient, redis: "Redis") -> None:
    oldest = enqueue_echo(client)
    redis.hset(f"rq:job:{oldest}", "enqueued_at", "2024-02-29T23:59:59.5Z")
    for _ in range(3):
        enqueue_echo(client, at_front="true")
    before, _ = redis.time()
    age = queue_of(client)["oldest_waiting_seconds"]
    after, _ = redis.time()
    assert before <= age + 1709251199.5 <= after + 1
    client.post(f"/cancel?job_id={oldest}")
    assert queue_of(client)["oldest_waiting_seconds"] < 60


def test_queues_has_the_rate_and_the_mean_duration_of_recent_runs(client: FlaskClient, redis: "Redis") -> None:
    for outcome in ("finished", "failed"):
        enqueue_echo(client)
        run = take_job(redis)
        redis.hset(f"rq:execution:{run.job_id}:{run.execution}", "created_at", float(redis.time()[0]) - 4)
        end_run(redis, run, outcome)
    queue = queue_of(client)
    assert 4 <= queue["mean_run_seconds"] < 8
    assert 1 <= queue["runs_per_minute"] <= 2


def test_queues_names_the_workers_and_what_they_run(client: FlaskClient, redis: "Redis") -> None:
    sign_on(redis)
    redis.sadd("rq:workers", "rq:worker:w", "rq:worker:died")
    redis.hset("rq:worker:w", mapping={"queues": "default,low", "state": "idle"})
    idle = json_of(client.get("/queues"))
    assert idle["workers"] == [{"name": "w", "state": "idle", "queues": ["default", "low"], "job_ids": []}]
    job_id = enqueue_echo(client)
    take_job(redis)
    busy = json_of(client.get("/queues"))
    assert busy["workers"] == [{"name": "w", "state": "busy", "queues": ["default", "low"], "job_ids": [job_id]}]
    assert busy["queues"][0]["workers"] == 1


def test_queues_has_the_configured_queues_in_their_order(redis: "Redis") -> None:
    client = create_app(Settings(queues=("low", "high")), redis).test_client()
    assert [queue["name"] for queue in json_of(client.get("/queues"))["queues"]] == ["low", "high"]


def test_queues_survives_corrupt_keys_in_redis(client: FlaskClient, redis: "Redis") -> None:
    sign_on(redis)
    redis.sadd("rq:workers", "rq:worker:w", "rq:queues", b"\xff")
    for key in ("rq:queue:default", "rq:wip:default", "rq:finished:default", "rq:api:metrics"):
        redis.set(key, "no such thing")
    assert set(queue_of(client)["jobs"].values()) == {0}
    redis.delete("rq:api:metrics", "rq:queue:default")
    redis.hset("rq:api:metrics", mapping={"x": 1, "finished:default:echo": "many", b"\xff:\xff:\xff": 1})
    redis.rpush("rq:queue:default", "gone", b"\xff")
    assert queue_of(client)["jobs"]["queued"] == 2
    assert client.get("/metrics").status_code == 200


def test_queues_counts_all_of_many_jobs(client: FlaskClient, redis: "Redis") -> None:
    for _ in range(150):
        enqueue_echo(client)
    answer = json_of(client.get("/queues"))
    assert answer["queues"][0]["jobs"]["queued"] == 150


@pytest.mark.parametrize("route", ["/queues", "/metrics"])
def test_queues_and_metrics_require_an_admin_key(redis: "Redis", route: str) -> None:
    client = create_app(Settings(api_keys=json.dumps(KEYS)), redis).test_client()
    problem_of(client.get(route), 401, "unauthorized")
    problem_of(client.get(route, headers={"Authorization": f"Bearer {ALICE}"}), 403, "forbidden")
    assert client.get(route, headers={"Authorization": f"Bearer {OPS}"}).status_code == 200


@pytest.mark.parametrize("route", ["/queues", "/metrics"])
def test_queues_and_metrics_refuse_other_methods(client: FlaskClient, route: str) -> None:
    answer = client.post(route)
    problem_of(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


def test_queues_match_the_openapi_document(client: FlaskClient, redis: "Redis") -> None:
    sign_on(redis)
    redis.sadd("rq:workers", "rq:worker:w")
    document = json_of(client.get("/openapi.json"))
    schema = {"$ref": "#/components/schemas/Queues", "components": document["components"]}
    jsonschema_rs.validate(schema, json_of(client.get("/queues")))
