import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from rq.job import JobStatus

from app.jobs.enqueue import Enqueuer
from tests.processes import (
    STATES,
    end_run,
    enqueue_echo,
    job_in_state,
    json_of,
    just_set,
    problem_of,
    take_job,
)

WAITING = ("queued", "scheduled", "deferred")


def cancel(client: FlaskClient, job_id: str) -> Any:
    return client.post("/cancel", query_string={"job_id": job_id})


def status_of(client: FlaskClient, job_id: str) -> str:
    status: str = json_of(client.get("/check_status", query_string={"job_id": job_id}))["job_status"]
    return status


@pytest.mark.parametrize("state", WAITING)
def test_cancel_ends_a_job_that_waits(client: FlaskClient, redis: Any, state: str) -> None:
    job_id = job_in_state(client, redis, state)
    answer = cancel(client, job_id)
    status = json_of(answer)
    assert (answer.status_code, status["job_status"]) == (200, "canceled")
    assert "Retry-After" not in answer.headers
    assert status["ended_at"]
    assert list(status)[:2] == ["job_id", "job_status"]
    assert status == json_of(client.get(status["links"]["check_status"]))
    assert not redis.exists("rq:queue:default", "rq:scheduled:default", "rq:deferred:default")
    assert redis.zscore("rq:canceled:default", job_id)


@pytest.mark.parametrize("state", WAITING)
def test_canceled_job_is_not_kept_for_ever(client: FlaskClient, redis: Any, state: str) -> None:
    job_id = job_in_state(client, redis, state)
    cancel(client, job_id)
    assert redis.ttl(f"rq:job:{job_id}") == just_set(7 * 24 * 3600)  # FAILURE_TTL


def test_cancel_prefers_the_jobs_own_failure_ttl(client: FlaskClient, redis: Any) -> None:
    job_id = enqueue_echo(client, failure_ttl=50)
    cancel(client, job_id)
    assert redis.ttl(f"rq:job:{job_id}") == just_set(50)


def test_cancel_is_the_link_that_the_status_names(client: FlaskClient) -> None:
    status = json_of(client.post("/enqueue/echo", json=1))
    assert json_of(client.post(status["links"]["cancel"]))["job_status"] == "canceled"


def test_cancel_of_a_running_job_is_accepted_and_the_worker_stops_the_job(client: FlaskClient, redis: Any) -> None:
    job_id = enqueue_echo(client)
    run = take_job(redis)
    answer = cancel(client, job_id)
    assert (answer.status_code, json_of(answer)["job_status"]) == (202, "started")
    assert answer.headers["Retry-After"]
    assert cancel(client, job_id).status_code == 202  # it may be repeated
    assert end_run(redis, run, value="too late") == "stopped"
    assert json_of(cancel(client, job_id))["job_status"] == "stopped"
    problem = problem_of(client.get(f"/get_result?job_id={job_id}"), 409, "job-stopped")
    assert problem["error"] == {"type": "JobStopped", "message": "The job was stopped on request."}


def test_cancel_sends_the_worker_rqs_own_stop_command(client: FlaskClient, redis: Any) -> None:
    job_id = enqueue_echo(client)
    run = take_job(redis)
    with redis.pubsub() as listener:
        listener.subscribe("rq:pubsub:w")
        cancel(client, job_id)
        heard = [message for _ in range(3) if (message := listener.get_message(timeout=1))]
    commands = [json.loads(message["data"]) for message in heard if message["type"] == "message"]
    # The command also names its run. RQ ignores that field.
    assert commands == [{"command": "stop-job", "job_id": job_id, "execution": run.execution}]


@pytest.mark.parametrize("state", ["canceled", "stopped"])
def test_cancel_leaves_a_canceled_or_stopped_job_as_it_is(client: FlaskClient, redis: Any, state: str) -> None:
    job_id = job_in_state(client, redis, state)
    before = client.get(f"/check_status?job_id={job_id}").json
    answer = cancel(client, job_id)
    assert (answer.status_code, answer.json) == (200, before)


@pytest.mark.parametrize("state", ["finished", "failed"])
def test_cancel_of_an_ended_job_changes_nothing(client: FlaskClient, redis: Any, state: str) -> None:
    job_id = job_in_state(client, redis, state)
    before = redis.hgetall(f"rq:job:{job_id}")
    problem = problem_of(cancel(client, job_id), 409, "job-already-ended")
    assert (problem["job_id"], problem["job_status"]) == (job_id, state)
    assert redis.hgetall(f"rq:job:{job_id}") == before


def test_cancel_covers_every_status() -> None:
    assert (
        {*WAITING, "started", "canceled", "stopped", "finished", "failed"}
        == set(STATES)
        == {status.value for status in JobStatus} - {"created", "rate_limited", "ready_to_enqueue"}
    )  # these belong to RQ's own rate limits and rows


def test_canceled_job_never_runs_though_it_stays_in_a_long_list(client: FlaskClient, redis: Any) -> None:
    first = [enqueue_echo(client) for _ in range(2)]
    in_the_middle = enqueue_echo(client)
    # Cancel searches fewer entries than these, from either end.
    redis.lpush("rq:queue:default", *[f"before-{number}" for number in range(1000)])
    redis.rpush("rq:queue:default", *[f"behind-{number}" for number in range(1000)])
    assert json_of(cancel(client, in_the_middle))["job_status"] == "canceled"
    assert redis.lpos("rq:queue:default", in_the_middle) == 1002
    redis.ltrim("rq:queue:default", 1000, 1002)
    assert [take_job(redis).job_id for _ in range(2)] == first
    assert redis.llen("rq:queue:default") == 1
    assert status_of(client, in_the_middle) == "canceled"


@pytest.mark.parametrize("position", [0, -1])
def test_cancel_takes_a_job_out_of_the_list_if_it_is_near_an_end(
    client: FlaskClient, redis: Any, position: int
) -> None:
    redis.rpush("rq:queue:default", *[f"id-{number}" for number in range(2500)])
    job_id = enqueue_echo(client, at_front=str(position == 0).lower())
    cancel(client, job_id)
    assert redis.lpos("rq:queue:default", job_id) is None
    assert redis.llen("rq:queue:default") == 2500


def test_cancel_frees_a_place_in_a_full_queue(client: FlaskClient, enqueuer: Enqueuer) -> None:
    enqueuer.settings = enqueuer.settings.model_copy(update={"max_queue_length": 1})
    job_id = enqueue_echo(client)
    problem_of(client.post("/enqueue/echo", json=1), 503, "queue-full")
    cancel(client, job_id)
    enqueue_echo(client)


def test_cancel_ends_a_started_job_that_no_worker_runs(client: FlaskClient, redis: Any) -> None:
    job_id = enqueue_echo(client)
    run = take_job(redis)
    redis.delete(f"rq:execution:{job_id}:{run.execution}")  # its lease expired, and no worker recovered the job
    answer = cancel(client, job_id)
    assert (answer.status_code, json_of(answer)["job_status"]) == (200, "stopped")
    assert end_run(redis, run, value="from the dead") == "lost"
    assert status_of(client, job_id) == "stopped"


def test_cancel_wakes_waiting_clients(client: FlaskClient, redis: Any) -> None:
    job_id = enqueue_echo(client)
    last = redis.xrevrange("rq:api:events", count=1)[0][0]
    cancel(client, job_id)
    (entry,) = redis.xrange("rq:api:events", min=b"(" + last)
    assert entry[1] == {b"job_id": job_id.encode(), b"status": b"canceled"}


@pytest.mark.parametrize("job_id", ["x", "0b5f2f7e-3c1d-4a9b-8e57-1f6f3c9d2a10", "../../etc", "\x00", "*", "é" * 300])
def test_cancel_of_an_unknown_job_is_404(client: FlaskClient, redis: Any, job_id: str) -> None:
    assert problem_of(cancel(client, job_id), 404, "job-not-found")["job_id"] == job_id
    assert not [key for key in redis.scan_iter() if key != b"rq:api:secret"]


def test_cancel_of_an_expired_job_is_410(client: FlaskClient, redis: Any) -> None:
    job_id = enqueue_echo(client)
    redis.delete(f"rq:job:{job_id}")
    problem_of(cancel(client, job_id), 410, "result-expired")


@pytest.mark.parametrize("query", ["", "?job_id=", "?job_id=a&job_id=b", "?job_id=a&x=1", "?job_id=a&wait=1"])
def test_cancel_with_a_bad_query_is_422(client: FlaskClient, query: str) -> None:
    assert problem_of(client.post(f"/cancel{query}"), 422, "invalid-request")["errors"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_cancel_wants_post(client: FlaskClient, method: str) -> None:
    answer = client.open("/cancel?job_id=x", method=method)
    problem_of(answer, 405, "method-not-allowed")
    assert "POST" in answer.headers["Allow"]


@pytest.mark.parametrize("fields", [{"status": "nonsense"}, {"status": "nonsense", "failure_ttl": "x", "origin": ""}])
def test_cancel_works_on_a_corrupt_job(client: FlaskClient, redis: Any, fields: dict[str, str]) -> None:
    job_id = enqueue_echo(client)
    redis.hset(f"rq:job:{job_id}", mapping=fields)
    assert json_of(cancel(client, job_id))["job_status"] == "canceled"
