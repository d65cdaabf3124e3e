import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis

from app.core import transitions
from app.jobs.jobs import Jobs
from app.jobs.waiting import Waiting
from tests.processes import (
    STATES,
    end_run,
    enqueue_echo,
    job_in_state,
    json_of,
    just_set,
    problem_of,
    take_job,
    wait_until,
)
from tests.test_transitions import BOOM

RETRYABLE = ("failed", "stopped", "canceled")


def retry(client: FlaskClient, job_id: str) -> Any:
    return client.post("/retry", query_string={"job_id": job_id})


@pytest.mark.parametrize("state", RETRYABLE)
def test_retry_enqueues_the_job_again_under_its_id(client: FlaskClient, redis: "Redis", state: str) -> None:
    job_id = job_in_state(client, redis, state)
    answer = retry(client, job_id)
    status = json_of(answer)
    assert (answer.status_code, status["job_id"], status["job_status"]) == (202, job_id, "queued")
    assert [status[name] for name in ("started_at", "ended_at", "progress", "error")] == [None] * 4
    assert answer.headers["Location"] == status["links"]["check_status"]
    assert answer.headers["Retry-After"]
    assert redis.lrange("rq:queue:default", 0, -1) == [job_id.encode()]
    assert not redis.exists("rq:failed:default", "rq:canceled:default")
    assert redis.ttl(f"rq:job:{job_id}") == -1
    assert end_run(redis, take_job(redis), value="new") == "finished"
    assert client.get(f"/get_result?job_id={job_id}").json == "new"


@pytest.mark.parametrize("state", sorted(set(STATES) - set(RETRYABLE)))
def test_retry_of_any_other_job_changes_nothing(client: FlaskClient, redis: "Redis", state: str) -> None:
    job_id = job_in_state(client, redis, state)
    before = redis.hgetall(f"rq:job:{job_id}"), redis.lrange("rq:queue:default", 0, -1)
    problem = problem_of(retry(client, job_id), 409, "job-not-retryable")
    assert (problem["job_id"], problem["job_status"]) == (job_id, state)
    assert (redis.hgetall(f"rq:job:{job_id}"), redis.lrange("rq:queue:default", 0, -1)) == before


def test_retry_sent_twice_enqueues_once(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "failed")
    assert [retry(client, job_id).status_code for _ in range(2)] == [202, 409]
    assert redis.llen("rq:queue:default") == 1


def test_retry_resets_the_retries(client: FlaskClient, redis: "Redis") -> None:
    job_id = json_of(client.post("/enqueue/echo?retries=1", json=1))["job_id"]
    assert end_run(redis, take_job(redis), "failed") == "scheduled"
    redis.zadd("rq:scheduled:default", {job_id: 1})
    assert transitions.promote(redis, ["default"]).jobs == 1
    assert end_run(redis, take_job(redis), "failed") == "failed"
    assert json_of(retry(client, job_id))["retries_left"] == 1
    assert end_run(redis, take_job(redis), "failed") == "scheduled"


def test_retry_resets_the_crashes(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)

    def crash() -> str:
        return transitions.release(redis, take_job(redis), crashed=True, limit=1, failure=BOOM, failure_ttl=100)

    assert [crash(), crash()] == ["queued", "failed"]
    retry(client, job_id)
    assert [crash(), crash()] == ["queued", "failed"]


def test_retry_resets_the_ttl(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, ttl=60)
    client.post(f"/cancel?job_id={job_id}")
    assert redis.ttl(f"rq:job:{job_id}") > 60
    retry(client, job_id)
    assert redis.ttl(f"rq:job:{job_id}") == just_set(60)


def test_retry_of_a_delayed_job_does_not_wait_again(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, delay=100)
    client.post(f"/cancel?job_id={job_id}")
    assert json_of(retry(client, job_id))["job_status"] == "queued"
    assert not redis.exists("rq:scheduled:default")


def test_retry_into_a_full_queue_leaves_the_job_as_it_was(client: FlaskClient, redis: "Redis", jobs: Jobs) -> None:
    job_id = job_in_state(client, redis, "failed")
    enqueue_echo(client)
    jobs.settings = jobs.settings.model_copy(update={"max_queue_length": 1})
    answer = retry(client, job_id)
    assert problem_of(answer, 503, "queue-full")["queue"] == "default"
    assert answer.headers["Retry-After"]
    problem_of(client.get(f"/get_result?job_id={job_id}"), 409, "job-failed")


def test_wait_on_a_retried_job_waits_for_the_new_run(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "failed")
    retry(client, job_id)
    assert json_of(client.get(f"/check_status?job_id={job_id}&wait=0.2"))["job_status"] == "queued"
    problem_of(client.get(f"/get_result?job_id={job_id}&wait=0.2"), 409, "result-not-ready")


def test_wait_on_a_retried_job_returns_the_end_of_the_new_run(
    client: FlaskClient, redis: "Redis", waiting: Waiting
) -> None:
    job_id = job_in_state(client, redis, "failed")
    retry(client, job_id)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.application.test_client().get, f"/get_result?job_id={job_id}&wait=20")
        wait_until(lambda: waiting.events._subscriptions, what="the waiting request")
        assert end_run(redis, take_job(redis), value="new") == "finished"
        answer = asked.result(15)
    assert (answer.status_code, json_of(answer)) == (200, "new")


def test_retry_of_a_stopped_job_is_not_stopped_again(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)
    run = take_job(redis)
    client.post(f"/cancel?job_id={job_id}")
    assert end_run(redis, run) == "stopped"
    retry(client, job_id)
    again = take_job(redis)
    assert transitions.renew(redis, again, 30) == "held"
    assert end_run(redis, again) == "finished"


def test_retry_keeps_the_idempotency_key(client: FlaskClient, redis: "Redis") -> None:
    def send() -> Any:
        return client.post("/enqueue/echo", json=1, headers={"Idempotency-Key": "k"})

    job_id = json_of(send())["job_id"]
    end_run(redis, take_job(redis), "failed")
    retry(client, job_id)
    assert json_of(send())["job_id"] == job_id
    assert redis.llen("rq:queue:default") == 1


@pytest.mark.parametrize("job_id", ["x", "0b5f2f7e-3c1d-4a9b-8e57-1f6f3c9d2a10", "\x00", "*"])
def test_retry_of_an_unknown_job_is_404(client: FlaskClient, job_id: str) -> None:
    assert problem_of(retry(client, job_id), 404, "job-not-found")["job_id"] == job_id


def test_retry_of_an_expired_job_is_410(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)
    redis.delete(f"rq:job:{job_id}")
    problem_of(retry(client, job_id), 410, "result-expired")


@pytest.mark.parametrize("query", ["", "?job_id=", "?job_id=a&job_id=b", "?job_id=a&x=1"])
def test_retry_with_a_bad_query_is_422(client: FlaskClient, query: str) -> None:
    assert problem_of(client.post(f"/retry{query}"), 422, "invalid-request")["errors"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_retry_refuses_other_methods(client: FlaskClient, method: str) -> None:
    problem_of(client.open("/retry?job_id=x", method=method), 405, "method-not-allowed")


# retries=, delay=, at=


@pytest.mark.parametrize(("asked", "expected"), [({}, None), ({"retries": 0}, None), ({"retries": 3}, 3)])
def test_enqueue_takes_retries(client: FlaskClient, asked: dict[str, int], expected: int | None) -> None:
    status = json_of(client.post("/enqueue/echo", json=1, query_string=asked))
    assert status["retries_left"] == expected


def test_enqueue_overrides_the_retries_of_the_function(client: FlaskClient) -> None:
    def retries_left(**asked: int) -> Any:
        return json_of(client.post("/enqueue/fail_with_retries", json="x", query_string=asked))["retries_left"]

    assert (retries_left(), retries_left(retries=5), retries_left(retries=0)) == (2, 5, None)


def test_retries_have_growing_pauses_with_jitter(client: FlaskClient, redis: "Redis") -> None:
    seen = []
    for _ in range(20):
        job_id = json_of(client.post("/enqueue/echo?retries=8", json=1))["job_id"]
        stored: Any = redis.hget(f"rq:job:{job_id}", "retry_intervals")
        pauses = json.loads(stored)
        middles = [5, 20, 80, 320, 1280, 3600, 3600, 3600]
        assert all(0.74 * middle <= pause <= 1.26 * middle for pause, middle in zip(pauses, middles, strict=True))
        seen.append(pauses[0])
    assert len(set(seen)) > 5
