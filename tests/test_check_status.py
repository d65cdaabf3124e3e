import json
import re
from typing import Any
from unittest.mock import patch

import pytest
from flask.testing import FlaskClient
from redis import Redis

from app.core import transitions
from app.core.scripts import TERMINAL
from tests.processes import STATES, end_run, enqueue_echo, job_in_state, json_of, problem_of, take_job

RFC_3339_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


def check(client: FlaskClient, job_id: str, **headers: str) -> Any:
    return client.get("/check_status", query_string={"job_id": job_id}, headers=headers)


@pytest.mark.parametrize("state", STATES)
def test_check_status_shows_each_state(client: FlaskClient, redis: "Redis", state: str) -> None:
    job_id = job_in_state(client, redis, state, value="secret")
    answer = check(client, job_id)
    status = answer.json
    assert answer.status_code == 200
    assert list(status)[:2] == ["job_id", "job_status"]
    assert (status["job_id"], status["job_status"]) == (job_id, state)
    assert ("Retry-After" in answer.headers) == (state not in TERMINAL)
    assert answer.headers["Cache-Control"] == "private, no-cache"
    assert "secret" not in answer.text

    def is_time(name: str) -> bool:
        return status[name] is not None and RFC_3339_UTC.fullmatch(status[name]) is not None

    assert is_time("enqueued_at")
    assert is_time("started_at") if state in {"started", "finished", "failed", "stopped"} else not status["started_at"]
    assert is_time("ended_at") if state in TERMINAL else status["ended_at"] is None
    assert (status["error"] is not None) == (state in {"failed", "stopped"})


def test_check_status_has_all_the_fields_and_no_others(client: FlaskClient) -> None:
    status = check(client, enqueue_echo(client)).json
    fields = {"job_id", "job_status", "function", "queue", "enqueued_at", "started_at", "ended_at", "progress",
              "retries_left", "error", "links"}  # fmt: skip
    assert set(status) == fields


def test_check_status_links_work(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "finished", 5)
    links = check(client, job_id).json["links"]
    assert json_of(client.get(links["check_status"]))["job_id"] == job_id
    assert client.get(links["get_result"]).json == 5


def test_check_status_shows_a_failure_without_its_traceback(client: FlaskClient, redis: "Redis") -> None:
    answer = check(client, job_in_state(client, redis, "failed"))
    assert answer.json["error"] == {"type": "ValueError", "message": "boom"}
    assert "Traceback" not in answer.text


def test_check_status_shows_progress(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)
    progress = '{"done": 3, "total": 10, "message": "step 3"}'
    assert transitions.renew(redis, take_job(redis), 30, progress) == "held"
    assert check(client, job_id).json["progress"] == {"done": 3, "total": 10, "message": "step 3"}


def test_check_status_counts_the_retries_that_are_left(client: FlaskClient, redis: "Redis") -> None:
    status = check(client, job_in_state(client, redis, "scheduled")).json
    assert (status["retries_left"], status["error"], status["ended_at"]) == (1, None, None)


def test_check_status_passes_on_a_status_of_a_later_rq(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)
    redis.hset(f"rq:job:{job_id}", "status", "hibernating")
    answer = check(client, job_id)
    assert (answer.json["job_status"], "Retry-After" in answer.headers) == ("hibernating", True)


def test_check_status_costs_the_same_with_a_large_payload(client: FlaskClient, redis: "Redis") -> None:
    small, large = (enqueue_echo(client, payload) for payload in ("", "x" * 1_000_000))
    with patch.object(redis, "execute_command", wraps=redis.execute_command) as execute:
        answers = [check(client, job_id) for job_id in (small, large)]
    assert len(answers[0].data) == len(answers[1].data)
    assert [(call.args[0], "data" in call.args) for call in execute.call_args_list] == [("HMGET", False)] * 2


def test_check_status_answers_304_while_nothing_changes(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)
    tag = check(client, job_id).headers["ETag"]
    same = check(client, job_id, **{"If-None-Match": tag})
    assert (same.status_code, same.data, same.headers["ETag"]) == (304, b"", tag)
    assert "Retry-After" in same.headers
    assert check(client, job_id, **{"If-None-Match": f'"other", {tag}'}).status_code == 304
    assert check(client, job_id, **{"If-None-Match": "*"}).status_code == 304

    take_job(redis)
    changed = check(client, job_id, **{"If-None-Match": tag})
    assert (changed.status_code, changed.json["job_status"]) == (200, "started")
    assert changed.headers["ETag"] != tag


@pytest.mark.parametrize("tag", ["", "x", '"', "W/", ",,,", "é", '"5d1f"'])
def test_check_status_ignores_other_etags(client: FlaskClient, tag: str) -> None:
    assert check(client, enqueue_echo(client), **{"If-None-Match": tag}).status_code == 200


def test_check_status_may_be_asked_twice(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "finished")
    first, second = check(client, job_id), check(client, job_id)
    assert (first.data, first.headers["ETag"]) == (second.data, second.headers["ETag"])


def test_check_status_answers_head_without_a_body(client: FlaskClient) -> None:
    path = f"/check_status?job_id={enqueue_echo(client)}"
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.data) == (200, b"")
    assert [head.headers[name] for name in ("ETag", "Content-Length")] == [got.headers["ETag"], str(len(got.data))]


# The next tests are the same for both routes that read a job.

READS = pytest.mark.parametrize("route", ["/check_status", "/get_result"])
#: Texts that the service never issued as ids.
UNKNOWN_IDS = [
    "abc", "0", "None", "null", "..", "../../etc/passwd", "a b", " ", "\x00", "é", "\U0001d518", "x" * 255, "x" * 256,
    "x" * 5000,
    "00000000-0000-0000-0000-000000000000", "0b5f2f7e-3c1d-4a9b-8e57-1f6f3c9d2a10", "rq:job:abc", "a\r\nX-Injected: 1",
    "*", "{}", "%", "[1]", "' OR 1=1 --", "\ufffd",
]  # fmt: skip


@READS
@pytest.mark.parametrize("job_id", UNKNOWN_IDS)
def test_check_status_and_get_result_of_an_unknown_job_are_404(client: FlaskClient, route: str, job_id: str) -> None:
    answer = client.get(route, query_string={"job_id": job_id})
    assert problem_of(answer, 404, "job-not-found")["job_id"] == job_id
    assert "X-Injected" not in answer.headers


@READS
def test_check_status_and_get_result_survive_bytes_that_are_not_text(client: FlaskClient, route: str) -> None:
    problem_of(client.get(f"{route}?job_id=%FF%ED%A0%80"), 404, "job-not-found")


@READS
@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("", "job_id"), ("job_id", "job_id"), ("job_id=", "job_id"), ("id=abc", "job_id"), ("JOB_ID=abc", "job_id"),
        ("job_id=abc&wait=-1", "wait"), ("job_id=abc&wait=60.1", "wait"), ("job_id=abc&wait=x", "wait"),
        ("job_id=abc&wait=", "wait"), ("job_id=abc&wait=nan", "wait"), ("job_id=abc&wait=inf", "wait"),
        ("job_id=abc&wiat=1", "wiat"), ("job_id=abc&timeout=1", "timeout"),
    ],
)  # fmt: skip
def test_check_status_and_get_result_refuse_a_query_and_name_the_place(
    client: FlaskClient, route: str, query: str, name: str
) -> None:
    problem = problem_of(client.get(f"{route}?{query}"), 422, "invalid-request")
    assert ["query", name] in [error["loc"] for error in problem["errors"]]
    assert all(error["msg"] for error in problem["errors"])


@READS
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_check_status_and_get_result_refuse_other_methods(client: FlaskClient, route: str, method: str) -> None:
    answer = client.open(f"{route}?job_id={enqueue_echo(client)}", method=method)
    problem_of(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


@READS
def test_check_status_and_get_result_distinguish_expired_jobs_from_unknown_ones(
    client: FlaskClient, redis: "Redis", route: str
) -> None:
    job_id = job_in_state(client, redis, "finished")
    redis.delete(f"rq:job:{job_id}", f"rq:results:{job_id}")  # as their TTL does
    answer = client.get(route, query_string={"job_id": job_id})
    assert problem_of(answer, 410, "result-expired")["job_id"] == job_id
    forged = job_id[:-1] + ("0" if job_id[-1] != "0" else "1")
    problem_of(client.get(route, query_string={"job_id": forged}), 404, "job-not-found")
    problem_of(client.get(route, query_string={"job_id": job_id.upper()}), 404, "job-not-found")


@READS
def test_check_status_and_get_result_do_not_take_half_a_hash_for_a_job(
    client: FlaskClient, redis: "Redis", route: str
) -> None:
    # A stock worker's late heartbeat creates an expired hash again (rq#1450).
    job_id = enqueue_echo(client)
    redis.delete(f"rq:job:{job_id}")
    redis.hset(f"rq:job:{job_id}", "last_heartbeat", "2026-11-23T10:00:00.000000Z")
    problem_of(client.get(route, query_string={"job_id": job_id}), 410, "result-expired")


@READS
def test_check_status_and_get_result_do_not_show_another_owners_job(
    client: FlaskClient, redis: "Redis", route: str
) -> None:
    job_id = job_in_state(client, redis, "finished")
    redis.hset(f"rq:job:{job_id}", "owner", "somebody")
    problem_of(client.get(route, query_string={"job_id": job_id}), 404, "job-not-found")


def test_check_status_of_a_finished_job_with_a_result_ttl_of_zero_is_410(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)
    redis.hset(f"rq:job:{job_id}", "result_ttl", 0)  # in RQ this means: keep nothing
    assert end_run(redis, take_job(redis), value=1) == "finished"
    problem_of(check(client, job_id), 410, "result-expired")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("progress", "{"),
        ("progress", '{"done": NaN, "total": 1, "message": ""}'),
        ("retries_left", "x"),
        ("error", "{"),
    ],
)
def test_check_status_tolerates_bad_fields_written_by_others(
    client: FlaskClient, redis: "Redis", field: str, value: str
) -> None:
    job_id = job_in_state(client, redis, "failed")
    redis.hset(f"rq:job:{job_id}", field, value)
    status = check(client, job_id).json
    assert status["job_status"] == "failed"
    assert status[field] in (None, {"type": "Error", "message": ""}, {"type": "ValueError", "message": "boom"})
    assert client.get(f"/get_result?job_id={job_id}").status_code == 409


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", "soon"), ("data", "{"), ("data", "[1, null, [], {}]"), ("created_at", "then")]
)
def test_check_status_tolerates_a_corrupt_job_without_the_name_of_its_function(
    client: FlaskClient, redis: "Redis", field: str, value: str
) -> None:
    job_id = job_in_state(client, redis, "queued")
    redis.hdel(f"rq:job:{job_id}", "function")
    redis.hset(f"rq:job:{job_id}", field, value)
    assert check(client, job_id).json["function"] is None


@pytest.mark.parametrize("data", ['["\\ud800.f", null, [1], {}]', '["m.f\\udfff", null, [1], {}]'])
def test_status_of_a_foreign_job_with_a_name_that_is_not_unicode_can_be_read(
    client: FlaskClient, redis: "Redis", data: str
) -> None:
    fields: dict[Any, Any] = {
        "status": "queued",
        "created_at": "2026-11-23T10:00:00.000000Z",
        "data": data,
        "origin": "default",
    }
    redis.hset("rq:job:foreign", mapping=fields)
    answer = client.get("/check_status?job_id=foreign")
    assert (answer.status_code, json_of(answer)["job_status"]) == (200, "queued")


def test_list_shows_a_job_whose_id_is_not_utf8(client: FlaskClient, redis: "Redis") -> None:
    redis.hset(b"rq:job:\xff", mapping={"status": "queued", "created_at": "2026-11-23T10:00:00.000000Z"})
    redis.zadd("rq:api:jobs::queued", {b"\xff": 1})
    (listed,) = json_of(client.get("/jobs"))["jobs"]
    assert listed["job_id"] == "?"


def test_list_shows_a_job_whose_status_is_empty(client: FlaskClient, redis: "Redis") -> None:
    job_ids = [enqueue_echo(client) for _ in range(2)]
    redis.hset(f"rq:job:{job_ids[0]}", "status", "")
    listed = json_of(client.get("/jobs"))["jobs"]
    assert {job["job_id"]: job["job_status"] for job in listed} == {job_ids[0]: "", job_ids[1]: "queued"}


def test_ids_are_410_before_and_after_redis_lost_its_data(client: FlaskClient, redis: "Redis") -> None:
    """All parts of a process share one secret, and write it to Redis again."""
    lost = enqueue_echo(client)
    redis.flushall()
    problem_of(check(client, lost), 410, "result-expired")
    job_id = enqueue_echo(client)
    redis.delete(f"rq:job:{job_id}")
    problem_of(check(client, job_id), 410, "result-expired")


@pytest.mark.parametrize("text", ["\u2028", "\u0085", "é"])
def test_status_is_ascii(client: FlaskClient, redis: "Redis", text: str) -> None:
    """Some clients of /events also split lines at characters where the standard does not."""
    job_id = enqueue_echo(client)
    progress = json.dumps({"done": 1, "total": 2, "message": text})
    redis.hset(f"rq:job:{job_id}", "progress", progress)
    answer = check(client, job_id)
    assert answer.data.isascii()
    assert json_of(answer)["progress"]["message"] == text
