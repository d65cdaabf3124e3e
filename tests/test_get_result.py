import base64
import json
import pickle
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer

from app.core.queue import Queue
from tests.job_functions import fail, return_unjsonable
from tests.processes import end_run, enqueue_echo, job_in_state, problem_of, run_stock_worker, take_job


def get(client: FlaskClient, job_id: str) -> Any:
    return client.get("/get_result", query_string={"job_id": job_id})


VALUES = [
    0, "", [], {}, False, None, True, 1.5, -0.0, 5e-324, 2**63, 10**300, "ä\U0001d518\x00\u2028",
    {"b": 1, "a": [None]}, [[[]]],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_get_result_answers_the_value_and_nothing_else(client: FlaskClient, redis: "Redis", value: Any) -> None:
    answer = get(client, job_in_state(client, redis, "finished", value))
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert answer.headers["Cache-Control"] == "private, no-cache"
    found = json.loads(answer.data)
    assert (type(found), repr(found)) == (type(value), repr(value))


def test_get_result_may_be_asked_twice(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "finished", {"a": 1})
    assert get(client, job_id).data == get(client, job_id).data


def test_get_result_answers_head_without_a_body(client: FlaskClient, redis: "Redis") -> None:
    answer = client.head(f"/get_result?job_id={job_in_state(client, redis, 'finished', 'four')}")
    assert (answer.status_code, answer.data, answer.headers["Content-Length"]) == (200, b"", "6")


@pytest.mark.parametrize("state", ["queued", "started", "deferred", "scheduled"])
def test_get_result_of_a_job_that_has_not_ended(client: FlaskClient, redis: "Redis", state: str) -> None:
    job_id = job_in_state(client, redis, state)
    answer = get(client, job_id)
    problem = problem_of(answer, 409, "result-not-ready")
    assert (problem["job_id"], problem["job_status"]) == (job_id, state)
    assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ("failed", {"type": "ValueError", "message": "boom"}),
        ("stopped", {"type": "ValueError", "message": "boom"}),
        ("canceled", None),
    ],
)
def test_get_result_of_a_job_that_ended_without_one(
    client: FlaskClient, redis: "Redis", state: str, error: dict[str, str] | None
) -> None:
    job_id = job_in_state(client, redis, state)
    answer = get(client, job_id)
    problem = problem_of(answer, 409, f"job-{state}")
    assert (problem["job_id"], problem["job_status"], problem["error"]) == (job_id, state, error)
    assert "Retry-After" not in answer.headers
    assert "Traceback" not in answer.text


def test_get_result_of_a_job_whose_result_alone_expired(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "finished", 1)
    redis.delete(f"rq:results:{job_id}")
    assert problem_of(get(client, job_id), 410, "result-expired")["job_id"] == job_id


def test_get_result_is_the_latest_of_several(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "failed")
    Job.fetch(job_id, connection=redis, serializer=JSONSerializer).requeue()
    assert problem_of(get(client, job_id), 409, "result-not-ready")["job_status"] == "queued"
    end_run(redis, take_job(redis), value="second")
    assert get(client, job_id).json == "second"


# Jobs that RQ's own worker ran


@pytest.mark.parametrize("value", [0, None, "ä\x00", {"a": [1.5]}])
def test_get_result_of_a_job_that_a_stock_worker_ran(client: FlaskClient, redis: "Redis", value: Any) -> None:
    job_id = enqueue_echo(client, value)
    run_stock_worker(redis)
    answer = get(client, job_id)
    assert (answer.status_code, answer.json) == (200, value)


def test_get_result_of_a_job_that_failed_on_a_stock_worker(client: FlaskClient, redis: "Redis") -> None:
    job_id = Queue("default", connection=redis).enqueue(fail, "a: b").id
    run_stock_worker(redis)
    answer = get(client, job_id)
    assert problem_of(answer, 409, "job-failed")["error"] == {"type": "ValueError", "message": "a: b"}
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("kind", ["nan", "infinity"])
def test_get_result_never_answers_a_value_that_is_not_json(client: FlaskClient, redis: "Redis", kind: str) -> None:
    job_id = Queue("default", connection=redis).enqueue(return_unjsonable, kind).id
    run_stock_worker(redis)
    problem = problem_of(get(client, job_id), 409, "job-failed")
    assert "not JSON" in problem["error"]["message"]


@pytest.mark.parametrize("stored", [b"%%%", base64.b64encode(pickle.dumps({"a": 1})), base64.b64encode(b"{"), b""])
def test_get_result_never_answers_a_value_of_another_serializer(
    client: FlaskClient, redis: "Redis", stored: bytes
) -> None:
    job_id = job_in_state(client, redis, "finished", 1)
    redis.xadd(f"rq:results:{job_id}", {"type": 1, "return_value": stored})
    problem_of(get(client, job_id), 409, "job-failed")


def test_get_result_with_the_word_nan_in_a_string_is_fine(client: FlaskClient, redis: "Redis") -> None:
    assert get(client, job_in_state(client, redis, "finished", "NaN or Infinity")).json == "NaN or Infinity"
