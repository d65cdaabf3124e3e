"""`Idempotency-Key` on `/enqueue` and `/enqueue_many`. The races between two processes are in tests/faults."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask.testing import FlaskClient

from app.config import Settings
from app.core.job_ids import JobIds
from app.jobs.enqueue import KEY_TTL, Enqueuer
from app.main import create_app
from tests.processes import STATES, end_run, json_of, just_set, problem_of, take_job

REPLAYED = "Idempotent-Replayed"


def send(client: FlaskClient, key: str, payload: Any = 1, path: str = "/enqueue/echo", **options: Any) -> Any:
    return client.post(path, json=payload, query_string=options, headers={"Idempotency-Key": key})


def job_ids(redis: Any) -> list[str]:
    return [job_id.decode() for job_id in redis.lrange("rq:queue:default", 0, -1)]


def test_first_request_with_a_key_enqueues_as_usual(client: FlaskClient, redis: Any) -> None:
    answer = send(client, "k")
    assert answer.status_code == 202
    assert REPLAYED not in answer.headers
    assert job_ids(redis) == [json_of(answer)["job_id"]]


def test_same_request_again_is_answered_with_the_same_job(client: FlaskClient, redis: Any) -> None:
    first, *others = [send(client, "k", {"a": 1, "b": [2]}) for _ in range(4)]
    assert [other.json for other in others] == [first.json] * 3
    assert [other.headers[REPLAYED] for other in others] == ["true"] * 3
    assert {other.headers["Location"] for other in others} == {first.headers["Location"]}
    assert len(job_ids(redis)) == 1


@pytest.mark.parametrize("state", [state for state in STATES if state != "deferred"])
def test_replay_shows_the_present_status(client: FlaskClient, redis: Any, state: str) -> None:
    options: dict[str, Any] = {"delay": 100} if state == "scheduled" else {}
    job_id = json_of(send(client, "k", **options))["job_id"]
    if state in ("started", "finished", "failed", "stopped"):
        run = take_job(redis)
        if state != "started":
            end_run(redis, run, state, value=1)  # type: ignore[arg-type]  # one of the outcomes
    elif state == "canceled":
        client.post(f"/cancel?job_id={job_id}")
    answer = send(client, "k", **options)
    status = json_of(answer)
    assert (answer.status_code, status["job_id"], status["job_status"]) == (202, job_id, state)
    assert answer.headers[REPLAYED] == "true"
    assert job_ids(redis) == ([job_id] if state == "queued" else [])


def test_replay_can_wait_for_the_result(client: FlaskClient, redis: Any) -> None:
    send(client, "k")
    end_run(redis, take_job(redis), value={"x": 1})
    answer = send(client, "k", wait=5)
    assert (answer.status_code, json_of(answer)["result"]) == (200, {"x": 1})
    assert answer.headers[REPLAYED] == "true"


@pytest.mark.parametrize(
    ("payload", "path", "options"),
    [
        (2, "/enqueue/echo", {}),
        (1.5, "/enqueue/echo", {}),
        ("1", "/enqueue/echo", {}),
        (True, "/enqueue/echo", {}),
        (1, "/enqueue/return_bytes_of", {}),
        (1, "/enqueue/echo", {"timeout": 5}),
        (1, "/enqueue/echo", {"delay": 5}),
        (1, "/enqueue/echo", {"at": "2026-11-23T10:00:00Z"}),
        (1, "/enqueue/echo", {"at_front": "true"}),
        (1, "/enqueue/echo", {"retries": 1}),
    ],
)
def test_same_key_for_anything_else_is_refused(
    client: FlaskClient, redis: Any, payload: Any, path: str, options: dict[str, Any]
) -> None:
    send(client, "k", 1)
    answer = send(client, "k", payload, path, **options)
    problem_of(answer, 422, "idempotency-key-reused")
    assert REPLAYED not in answer.headers
    assert len(job_ids(redis)) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"options": {"wait": 0}}, {"options": {}}),
        ({"options": {"timeout": "5"}}, {"options": {"timeout": "005"}}),
        ({"options": {"at": "2026-11-23T10:00:00Z"}}, {"options": {"at": "2026-11-23T11:00:00+01:00"}}),
        ({"body": b'{"a":1,"b":[2]}'}, {"body": b' {"b": [2],\n "a": 1}'}),
        ({"body": b'"\\u00e9"'}, {"body": '"é"'.encode()}),
        ({"path": "/enqueue"}, {"path": "/enqueue/some_long_function"}),
        ({"key": "k"}, {"key": '"k"'}),
        ({"key": 'a"b'}, {"key": '"a\\"b"'}),
    ],
)
def test_requests_with_the_same_meaning_are_the_same_request(
    client: FlaskClient, redis: Any, first: dict[str, Any], second: dict[str, Any]
) -> None:
    answers = [
        client.post(
            request.get("path", "/enqueue/echo"),
            data=request.get("body", b"1"),
            content_type="application/json",
            query_string=request.get("options", {}),
            headers={"Idempotency-Key": request.get("key", "k")},
        )
        for request in (first, second)
    ]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json == answers[1].json
    assert len(job_ids(redis)) == 1


def test_each_key_makes_its_own_job(client: FlaskClient, redis: Any) -> None:
    keys = ["a", "A", "a ".strip() + "b", "x" * 255, "!", "~", '"a,b"', "é".encode().hex(), "a:b", "0"]
    assert len({json_of(send(client, key))["job_id"] for key in keys}) == len(keys) == len(job_ids(redis))


@pytest.mark.parametrize(
    "key", ["", '""', "x" * 256, "a b", "é", '"', '"a', '"a" b', '"a"b"', '"a\\c"', "\x7f", "a\tb"]
)
def test_malformed_key_is_422(client: FlaskClient, redis: Any, key: str) -> None:
    problem = problem_of(send(client, key), 422, "invalid-request")
    assert problem["errors"][0]["loc"] == ["header", "Idempotency-Key"]
    assert job_ids(redis) == []


def test_replay_comes_before_the_limit_of_the_queue(client: FlaskClient, redis: Any, enqueuer: Enqueuer) -> None:
    job_id = json_of(send(client, "k"))["job_id"]
    enqueuer.settings = enqueuer.settings.model_copy(update={"max_queue_length": 1})
    problem_of(send(client, "other"), 503, "queue-full")
    answer = send(client, "k")
    assert (answer.status_code, json_of(answer)["job_id"]) == (202, job_id)


def test_refused_request_does_not_use_its_key_up(client: FlaskClient, redis: Any, enqueuer: Enqueuer) -> None:
    settings = enqueuer.settings
    enqueuer.settings = settings.model_copy(update={"max_queue_length": 1})
    send(client, "first")
    problem_of(send(client, "k"), 503, "queue-full")
    enqueuer.settings = settings
    answer = send(client, "k", 2)  # even with another payload
    assert answer.status_code == 202
    assert REPLAYED not in answer.headers


def test_invalid_payload_does_not_use_its_key_up(client: FlaskClient) -> None:
    problem_of(send(client, "k", {"text": 1}, "/enqueue/count_words"), 422, "invalid-request")
    assert send(client, "k", {"text": "a"}, "/enqueue/count_words").status_code == 202


def test_key_is_remembered_for_a_day_though_its_job_is_gone(client: FlaskClient, redis: Any) -> None:
    job_id = json_of(send(client, "k"))["job_id"]
    take_job(redis)
    redis.delete(f"rq:job:{job_id}")
    assert KEY_TTL >= 24 * 3600
    assert redis.ttl(f"rq:api:key:{job_id}") == just_set(KEY_TTL)
    answer = send(client, "k")
    problem_of(answer, 410, "result-expired")
    assert answer.headers[REPLAYED] == "true"
    problem_of(send(client, "k", 2), 422, "idempotency-key-reused")
    assert job_ids(redis) == []


def test_key_is_remembered_as_long_as_its_job(client: FlaskClient, redis: Any) -> None:
    job_id = json_of(send(client, "k"))["job_id"]
    redis.delete(f"rq:api:key:{job_id}")
    assert json_of(send(client, "k"))["job_id"] == job_id
    problem_of(send(client, "k", 2), 422, "idempotency-key-reused")
    problem_of(send(client, "k", [1], "/enqueue_many/echo"), 422, "idempotency-key-reused")
    assert len(job_ids(redis)) == 1


@pytest.mark.parametrize("at", ["0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00Z"])
def test_key_works_with_the_earliest_times(client: FlaskClient, at: str) -> None:
    for replayed in (None, "true"):
        answer = client.post("/enqueue/echo", json=1, query_string={"at": at}, headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.headers.get(REPLAYED)) == (202, replayed), answer.text


def test_key_given_twice_is_refused(client: FlaskClient, redis: Any) -> None:
    for given in ("d", '"d"'):
        headers = [("Idempotency-Key", given)] * 2
        problem_of(client.post("/enqueue/echo", json=1, headers=headers), 422, "invalid-request")
    assert job_ids(redis) == []


def test_owners_have_their_own_keys(redis: Any) -> None:
    keys = [{"name": name, "key": f"the long key of {name}"} for name in ("alice", "bob")]
    client = create_app(Settings(api_keys=json.dumps(keys)), redis).test_client()
    answers = [
        client.post(
            "/enqueue/echo",
            json=name,
            headers={"Idempotency-Key": "k", "Authorization": f"Bearer the long key of {name}"},
        )
        for name in ("alice", "bob")
    ]
    assert [answer.status_code for answer in answers] == [202, 202]
    assert len({json_of(answer)["job_id"] for answer in answers}) == 2


def test_all_processes_derive_the_same_id_though_redis_lost_its_secret(redis: Any) -> None:
    old, new = JobIds(redis), JobIds(redis)
    old.derive("", "k")
    redis.flushall()
    assert new.derive("", "k") == old.derive("", "k")


def test_derived_ids_can_be_verified_like_other_ids(redis: Any) -> None:
    ids = JobIds(redis)
    job_id = ids.derive("alice", "k")
    assert ids.is_ours(job_id, "alice")
    assert not ids.is_ours(job_id, "bob")
    assert (
        len({ids.derive(*names) for names in [("a", "b"), ("", "ab"), ("ab", ""), ("a", "b", ""), ("", "a", "b")]}) == 5
    )


def test_identical_requests_at_once_make_one_job(client: FlaskClient, redis: Any) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: send(client.application.test_client(), "k"), range(40)))
    assert {json_of(answer)["job_id"] for answer in answers} == set(job_ids(redis))
    assert len(job_ids(redis)) == 1
    assert sum(REPLAYED not in answer.headers for answer in answers) == 1


# Batches


def test_batch_sent_again_is_answered_with_the_same_jobs(client: FlaskClient, redis: Any) -> None:
    first, second = (send(client, "k", [1, 2, 3], "/enqueue_many/echo") for _ in range(2))
    assert first.status_code == second.status_code == 202
    assert first.json == second.json
    assert (REPLAYED in first.headers, second.headers.get(REPLAYED)) == (False, "true")
    assert job_ids(redis) == json_of(first)["job_ids"]


@pytest.mark.parametrize("payloads", [[1, 2], [2, 1, 3], [1, 2, 3, 4]])
def test_batch_with_a_used_key_and_other_payloads_is_refused(
    client: FlaskClient, redis: Any, payloads: list[int]
) -> None:
    send(client, "k", [1, 2, 3], "/enqueue_many/echo")
    problem_of(send(client, "k", payloads, "/enqueue_many/echo"), 422, "idempotency-key-reused")
    assert len(job_ids(redis)) == 3


@pytest.mark.parametrize(("first", "second"), [("enqueue", "enqueue_many"), ("enqueue_many", "enqueue")])
def test_key_stands_for_one_request_on_both_routes(client: FlaskClient, redis: Any, first: str, second: str) -> None:
    assert send(client, "k", [1], f"/{first}/echo").status_code == 202
    problem_of(send(client, "k", [1], f"/{second}/echo"), 422, "idempotency-key-reused")
    assert len(job_ids(redis)) == 1


@pytest.mark.parametrize("lost", ["marks", "marks and the first job"])
def test_batch_is_never_overwritten_even_if_its_key_expired(client: FlaskClient, redis: Any, lost: str) -> None:
    first = json_of(send(client, "k", [1, 2], "/enqueue_many/echo"))
    redis.delete(*redis.keys("rq:api:key:*"), *redis.keys("rq:api:group:*"))
    if lost == "marks":
        assert json_of(send(client, "k", [1, 2], "/enqueue_many/echo")) == first
    else:
        redis.delete(f"rq:job:{first['job_ids'][0]}")
        problem_of(send(client, "k", [1, 2], "/enqueue_many/echo"), 422, "idempotency-key-reused")
    assert len(job_ids(redis)) == 2
