"""`GET /get_payload`: the payload of a job in every state, as JSON."""

import json
import zlib
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis

from app.config import Settings
from app.main import create_app
from tests.processes import STATES, enqueue_echo, job_in_state, json_of, problem_of
from tests.test_auth import ALICE, KEYS, OPS, _bearer


@pytest.mark.parametrize(
    "payload",
    [0, "", None, [], {}, False, "å\U0001f600", 2**80, 1e-300, {"b": 1, "a": [None, {"x": "<b>"}]}, "x" * 100_000],
)  # fmt: skip
def test_get_payload_answers_the_payload_as_sent(client: FlaskClient, payload: Any) -> None:
    answer = client.get(f"/get_payload?job_id={enqueue_echo(client, payload)}")
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    assert json_of(answer) == payload
    assert answer.headers["Cache-Control"] == "private, no-cache"


@pytest.mark.parametrize("state", STATES)
def test_get_payload_answers_as_long_as_the_job_exists(client: FlaskClient, redis: "Redis", state: str) -> None:
    job_id = job_in_state(client, redis, state, [1, 2])
    expected = "boom" if state == "scheduled" else [1, 2]
    assert json_of(client.get(f"/get_payload?job_id={job_id}")) == expected
    redis.delete(f"rq:job:{job_id}")
    problem_of(client.get(f"/get_payload?job_id={job_id}"), 410, "result-expired")


def test_get_payload_answers_head_with_the_size(client: FlaskClient) -> None:
    body = '  ["å", "\\u00e5"]\n'.encode()  # as it was sent
    job_id = json_of(client.post("/enqueue/echo", data=body, content_type="application/json"))["job_id"]
    assert client.get(f"/get_payload?job_id={job_id}").data == body
    answer = client.head(f"/get_payload?job_id={job_id}")
    assert (answer.headers["Content-Length"], answer.data) == (str(len(body)), b"")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x80\x04.", zlib.compress(b"["), zlib.compress(b"[" * 100_000), zlib.compress(b"null"),
        zlib.compress(b'["f", null, [1, 2], {}]'), zlib.compress(b'["f", null, [NaN], {}]'),
        zlib.compress(b'["f", null, ["' + b"x" * 101_000_000 + b'"], {}]'), zlib.compress(b'["f", null, ["\xff"], {}]'),
    ],
)  # fmt: skip
def test_get_payload_of_bad_data_in_redis_is_404(client: FlaskClient, redis: "Redis", data: bytes) -> None:
    job_id = enqueue_echo(client, 1)
    redis.hset(f"rq:job:{job_id}", "data", data)
    redis.hdel(f"rq:job:{job_id}", "owner")
    problem_of(client.get(f"/get_payload?job_id={job_id}"), 404, "payload-not-found")
    redis.hdel(f"rq:job:{job_id}", "data")
    problem_of(client.get(f"/get_payload?job_id={job_id}"), 404, "payload-not-found")


def test_get_payload_hides_the_payload_from_other_owners(redis: "Redis") -> None:
    client = create_app(Settings(api_keys=json.dumps(KEYS)), redis).test_client()
    job_id = json_of(client.post("/enqueue/echo", json=1, headers=_bearer(ALICE)))["job_id"]
    bob = _bearer("bob's own long key")
    problem_of(client.get(f"/get_payload?job_id={job_id}", headers=bob), 404, "job-not-found")
    problem_of(client.get(f"/get_payload?job_id={job_id}"), 401, "unauthorized")
    for key in (ALICE, OPS):
        assert client.get(f"/get_payload?job_id={job_id}", headers=_bearer(key)).text == "1"
    problem_of(client.get("/get_payload"), 401, "unauthorized")
    problem_of(client.get("/get_payload", headers=_bearer(ALICE)), 422, "invalid-request")
