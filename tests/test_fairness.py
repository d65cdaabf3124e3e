"""What a key may hold of a web process: as much as it leaves for all others."""

import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis

from app.config import Settings
from app.fairness import LARGE, LARGE_AT_ONCE, Shares
from app.main import create_app
from tests.processes import end_run, json_of, problem_of, take_job
from tests.test_auth import ALICE, KEYS, OPS, _bearer


def test_a_key_gets_as_much_as_it_leaves_for_the_others() -> None:
    shares = Shares(100, of_several_keys=True)
    assert [shares.take("alice", 10) for _ in range(6)] == [True] * 5 + [False]
    assert [shares.take("bob", 10) for _ in range(4)] == [True] * 3 + [False]
    assert shares.take("carol", 15)
    shares.give_back("alice", 40)
    assert shares.take("bob", 10)


def test_everybody_as_one_gets_all_of_it() -> None:
    shares = Shares(100, of_several_keys=False)
    assert [shares.take("", 10) for _ in range(11)] == [True] * 10 + [False]
    shares.give_back("", 10)
    assert shares.take("", 10)


@pytest.fixture
def client(redis: "Redis") -> FlaskClient:
    return create_app(Settings(api_keys=json.dumps(KEYS)), redis).test_client()


def enqueue(client: FlaskClient, size: int, key: str = ALICE) -> Any:
    return client.post("/enqueue/echo", json="x" * size, headers=_bearer(key))


def test_large_bodies_of_one_key_leave_memory_to_the_others(client: FlaskClient, redis: "Redis") -> None:
    held = client.application.extensions["limits"].bytes
    assert held.take("alice", LARGE_AT_ONCE // 2)
    answer = enqueue(client, LARGE)
    assert "large" in problem_of(answer, 429, "too-many-requests")["detail"]
    assert answer.headers["Retry-After"] == "5"
    assert not redis.keys("rq:job:*")
    assert enqueue(client, LARGE - 100).status_code == 202
    assert enqueue(client, LARGE, OPS).status_code == 202
    held.give_back("alice", 10 * LARGE)
    for _ in range(100):  # each gives back what it had
        assert enqueue(client, LARGE).status_code == 202


def test_large_answers_of_one_key_leave_memory_to_the_others(client: FlaskClient, redis: "Redis") -> None:
    job_id = json_of(enqueue(client, LARGE))["job_id"]
    assert end_run(redis, take_job(redis), value="x" * LARGE) == "finished"
    held = client.application.extensions["limits"].bytes
    assert held.take("alice", LARGE_AT_ONCE // 2)
    for path in ("/get_payload", "/get_result"):
        answer = client.get(f"{path}?job_id={job_id}", headers=_bearer(ALICE))
        problem_of(answer, 429, "too-many-requests")
        assert client.get(f"{path}?job_id={job_id}", headers=_bearer(OPS)).status_code == 200
        assert client.get(f"/check_status?job_id={job_id}", headers=_bearer(ALICE)).status_code == 200
    held.give_back("alice", 10 * LARGE)
    for _ in range(100):
        for method in ("GET", "HEAD"):
            path = f"/get_result?job_id={job_id}"
            with client.open(path, method=method, headers=_bearer(ALICE)) as read:
                assert read.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/functions", 200), ("HEAD", "/functions", 200), ("GET", "/nope", 404), ("PUT", "/enqueue", 405),
     ("GET", "/check_status", 422), ("POST", "/enqueue", 415), ("GET", "/queues", 403), ("OPTIONS", "/enqueue", 200)],
)  # fmt: skip
def test_a_request_is_counted_until_its_answer_was_sent(
    client: FlaskClient, method: str, path: str, status: int
) -> None:
    requests = client.application.extensions["limits"].requests
    with client.open(path, method=method, headers=_bearer(ALICE)) as answer:
        assert answer.status_code == status
        assert requests.held("alice") == 1
    assert requests.held("alice") == 0
