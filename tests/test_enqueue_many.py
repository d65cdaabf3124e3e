import json
import time
from typing import Any

import pytest
from flask.testing import FlaskClient
from rq.group import Group
from rq.job import Job
from rq.serializers import JSONSerializer

from app.config import Settings
from app.core import transitions
from app.jobs.enqueue import GROUP_TTL, Enqueuer
from app.main import create_app
from tests.processes import end_run, json_of, just_set, problem_of, take_job


def enqueue_many(client: FlaskClient, payloads: Any, function: str = "echo", **options: Any) -> Any:
    return client.post(f"/enqueue_many/{function}", json=payloads, query_string=options)


def waiting(redis: Any, queue: str = "default") -> list[str]:
    return [job_id.decode() for job_id in redis.lrange(f"rq:queue:{queue}", 0, -1)]


def payloads_of(redis: Any, job_ids: list[str]) -> list[Any]:
    return [Job.fetch(job_id, connection=redis, serializer=JSONSerializer).args[0] for job_id in job_ids]


def check_group(client: FlaskClient, group_id: str) -> Any:
    return client.get("/check_group", query_string={"group_id": group_id})


@pytest.fixture
def settings() -> Settings:
    return Settings(queues=("default", "low"), max_batch=1000)


@pytest.mark.parametrize("number", [1, 2, 1000])
def test_enqueue_many_makes_a_job_of_each_payload_in_their_order(client: FlaskClient, redis: Any, number: int) -> None:
    answer = enqueue_many(client, list(range(number)))
    group = json_of(answer)
    assert answer.status_code == 202
    assert list(group) == ["group_id", "job_ids"]
    assert answer.headers["Location"] == f"/check_group?group_id={group['group_id']}"
    assert answer.headers["Retry-After"]
    assert waiting(redis) == group["job_ids"]
    assert len(set(group["job_ids"])) == number
    assert payloads_of(redis, group["job_ids"][:5]) == list(range(number))[:5]
    assert json_of(check_group(client, group["group_id"])) == {
        "group_id": group["group_id"], "total": number, "counts": {"queued": number},
    }  # fmt: skip


def test_jobs_of_a_batch_are_jobs_like_any_other(client: FlaskClient, redis: Any) -> None:
    _first, second = json_of(enqueue_many(client, ["a", "b"]))["job_ids"]
    assert json_of(client.get(f"/check_status?job_id={second}"))["function"] == "echo"
    assert json_of(client.post(f"/cancel?job_id={second}"))["job_status"] == "canceled"
    assert json_of(client.post(f"/retry?job_id={second}"))["job_status"] == "queued"


def test_enqueue_many_is_one_round_trip(
    client: FlaskClient, enqueuer: Enqueuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue_many(client, [0])  # loads the script and the secret
    sent: list[Any] = []
    execute: Any = enqueuer.connection.execute_command

    def watch(*args: Any, **options: Any) -> Any:
        sent.append(args[0])
        return execute(*args, **options)

    monkeypatch.setattr(enqueuer.connection, "execute_command", watch)
    assert enqueue_many(client, list(range(500))).status_code == 202
    assert sent == ["EVALSHA"]


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"timeout": 7}, {b"timeout": b"7"}),
        ({"result_ttl": 8, "failure_ttl": 9}, {b"result_ttl": b"8", b"failure_ttl": b"9"}),
        ({"retries": 2}, {b"retries_left": b"2"}),
        ({"queue": "low"}, {b"origin": b"low"}),
    ],
)
def test_enqueue_many_takes_the_options_of_enqueue(
    client: FlaskClient, redis: Any, options: dict[str, Any], fields: dict[bytes, bytes]
) -> None:
    for job_id in json_of(enqueue_many(client, [1, 2], **options))["job_ids"]:
        assert redis.hgetall(f"rq:job:{job_id}").items() >= fields.items()


def test_enqueue_many_in_front_keeps_the_order(client: FlaskClient, redis: Any) -> None:
    behind = json_of(enqueue_many(client, [0]))["job_ids"]
    ahead = json_of(enqueue_many(client, [1, 2, 3], at_front="true"))["job_ids"]
    assert waiting(redis) == ahead + behind


def test_enqueue_many_with_a_delay_schedules_all(client: FlaskClient, redis: Any) -> None:
    group = json_of(enqueue_many(client, [1, 2, 3], delay=100, ttl=50))
    assert json_of(check_group(client, group["group_id"]))["counts"] == {"scheduled": 3}
    assert redis.zcard("rq:scheduled:default") == 3
    assert [redis.ttl(f"rq:job:{job_id}") for job_id in group["job_ids"]] == [just_set(150)] * 3


@pytest.mark.parametrize("at_front", ["true", "false"])
def test_enqueue_many_with_a_delay_keeps_the_order(client: FlaskClient, redis: Any, at_front: str) -> None:
    group = json_of(enqueue_many(client, list(range(20)), delay=0.01, at_front=at_front))
    time.sleep(0.02)
    assert transitions.promote(redis, ["default"]).jobs == 20
    assert waiting(redis) == group["job_ids"]


def test_each_job_of_a_batch_has_its_own_jitter(client: FlaskClient, redis: Any) -> None:
    ids = json_of(enqueue_many(client, list(range(20)), retries=3))["job_ids"]
    assert len({redis.hget(f"rq:job:{job_id}", "retry_intervals") for job_id in ids}) > 10


# All or none


def test_bad_payload_is_named_by_its_index_and_nothing_is_enqueued(client: FlaskClient, redis: Any) -> None:
    payloads = [{"text": "a"}, {"text": 5}, {"text": "b"}, {"n": 0, "text": "c"}, "x"]
    problem = problem_of(enqueue_many(client, payloads, "count_words"), 422, "invalid-request")
    assert [error["loc"][:2] for error in problem["errors"]] == [["body", 1], ["body", 3], ["body", 4]]
    assert problem["errors"][0]["loc"] == ["body", 1, "text"]
    assert not redis.keys("rq:[jqg]*")


def test_answer_names_a_bounded_number_of_errors(client: FlaskClient) -> None:
    problem = problem_of(enqueue_many(client, ["x"] * 1000, "count_words"), 422, "invalid-request")
    assert len(problem["errors"]) == 100


def test_batch_that_does_not_fit_into_the_queue_is_refused_whole(
    client: FlaskClient, redis: Any, enqueuer: Enqueuer
) -> None:
    enqueuer.settings = enqueuer.settings.model_copy(update={"max_queue_length": 5})
    assert enqueue_many(client, [1, 2, 3]).status_code == 202
    answer = enqueue_many(client, [1, 2, 3])
    assert problem_of(answer, 503, "queue-full")["queue"] == "default"
    assert answer.headers["Retry-After"]
    assert len(waiting(redis)) == 3
    assert enqueue_many(client, [1, 2]).status_code == 202


@pytest.mark.parametrize("body", ["{}", "null", '"text"', "1", "[]", "true", json.dumps([1] * 1001)])
def test_body_that_is_not_a_batch_is_422(client: FlaskClient, redis: Any, body: str) -> None:
    answer = client.post("/enqueue_many/echo", data=body, content_type="application/json")
    problem = problem_of(answer, 422, "invalid-request")
    assert problem["errors"] == [{"loc": ["body"], "msg": "It must be an array of 1 to 1000 payloads."}]
    assert not waiting(redis)


@pytest.mark.parametrize("body", [b"", b"[1,", b"[NaN]", b"\xff", b'["\\ud800"]', b"[" * 200 + b"]" * 200])
def test_body_that_is_not_json_is_400(client: FlaskClient, body: bytes) -> None:
    answer = client.post("/enqueue_many/echo", data=body, content_type="application/json")
    problem_of(answer, 400, "invalid-json")


def test_enqueue_many_needs_a_json_content_type(client: FlaskClient) -> None:
    problem_of(client.post("/enqueue_many/echo", data=b"[1]"), 415, "unsupported-media-type")


def test_body_over_the_limit_is_413(redis: Any) -> None:
    client = create_app(Settings(max_payload_bytes=100), redis).test_client()
    assert problem_of(enqueue_many(client, ["x" * 100]), 413, "payload-too-large")["limit_bytes"] == 100


def test_enqueue_many_of_an_unknown_function_is_404(client: FlaskClient) -> None:
    assert "echo" in problem_of(enqueue_many(client, [1], "nope"), 404, "function-not-found")["known"]


@pytest.mark.parametrize("options", [{"wait": 1}, {"queue": "x"}, {"timeout": 0}, {"delay": 1, "at": "x"}, {"x": 1}])
def test_enqueue_many_with_a_bad_option_is_422(client: FlaskClient, options: dict[str, Any]) -> None:
    problem_of(enqueue_many(client, [1], **options), 422, "invalid-request")


@pytest.mark.parametrize("path", ["/enqueue_many/echo", "/check_group"])
def test_wrong_method_is_405(client: FlaskClient, path: str) -> None:
    problem_of(client.put(path), 405, "method-not-allowed")


def test_enqueue_many_needs_a_function(client: FlaskClient) -> None:
    problem_of(client.post("/enqueue_many", json=[1]), 404, "not-found")


# Groups


def test_check_group_counts_its_jobs_by_status(client: FlaskClient, redis: Any) -> None:
    group = json_of(enqueue_many(client, list(range(6))))
    end_run(redis, take_job(redis))
    end_run(redis, take_job(redis))
    end_run(redis, take_job(redis), "failed")
    take_job(redis)
    client.post(f"/cancel?job_id={group['job_ids'][4]}")
    answer = check_group(client, group["group_id"])
    assert answer.status_code == 200
    assert json_of(answer) == {
        "group_id": group["group_id"],
        "total": 6,
        "counts": {"canceled": 1, "failed": 1, "finished": 2, "queued": 1, "started": 1},
    }


@pytest.mark.parametrize("is_cleaned_by_rq", [False, True])
def test_jobs_that_are_gone_count_as_expired(client: FlaskClient, redis: Any, is_cleaned_by_rq: bool) -> None:
    group = json_of(enqueue_many(client, [1, 2, 3]))
    redis.delete(*[f"rq:job:{job_id}" for job_id in group["job_ids"][:2]])
    if is_cleaned_by_rq:
        Group.clean_registries(redis)
    counts = json_of(check_group(client, group["group_id"]))
    assert (counts["total"], counts["counts"]) == (3, {"expired": 2, "queued": 1})


def test_group_is_a_group_of_rq(client: FlaskClient, redis: Any) -> None:
    group = json_of(enqueue_many(client, [1, 2]))
    (found,) = Group.all(redis)
    assert found.name == group["group_id"]
    assert {job_id.decode() for job_id in redis.smembers(found.key)} == set(group["job_ids"])
    jobs = [Job.fetch(job_id, connection=redis, serializer=JSONSerializer) for job_id in group["job_ids"]]
    assert {job.group_id for job in jobs} == {found.name}


def test_admin_sees_the_group_of_a_key_that_is_gone(redis: Any) -> None:
    def client_of(name: str, *names: str) -> tuple[FlaskClient, dict[str, str]]:
        keys = [{"name": each, "key": f"the long key of {each}", "admin": each == "ops"} for each in names]
        app = create_app(Settings(api_keys=json.dumps(keys)), redis)
        return app.test_client(), {"Authorization": f"Bearer the long key of {name}"}

    alice, headers = client_of("alice", "alice", "ops")
    group_id = json_of(alice.post("/enqueue_many/echo", json=[1], headers=headers))["group_id"]
    ops, headers = client_of("ops", "bob", "ops")
    assert ops.get(f"/check_group?group_id={group_id}", headers=headers).status_code == 200
    bob, headers = client_of("bob", "bob", "ops")
    problem_of(bob.get(f"/check_group?group_id={group_id}", headers=headers), 404, "group-not-found")


def test_group_made_by_rq_can_be_read(client: FlaskClient, redis: Any) -> None:
    redis.sadd("rq:group:theirs", "a", "b")
    redis.hset("rq:job:a", "status", "queued")
    assert json_of(check_group(client, "theirs")) == {
        "group_id": "theirs", "total": 2, "counts": {"expired": 1, "queued": 1},
    }  # fmt: skip


def test_groups_are_not_kept_for_ever(client: FlaskClient, redis: Any) -> None:
    group_id = json_of(enqueue_many(client, [1]))["group_id"]
    assert [redis.ttl(f"rq:{kind}:{group_id}") for kind in ("group", "api:group")] == [just_set(GROUP_TTL)] * 2
    redis.delete(f"rq:group:{group_id}", f"rq:api:group:{group_id}")
    problem_of(check_group(client, group_id), 410, "result-expired")


def test_group_is_not_a_job_and_a_job_is_not_a_group(client: FlaskClient) -> None:
    group = json_of(enqueue_many(client, [1]))
    problem_of(check_group(client, group["job_ids"][0]), 404, "group-not-found")
    problem_of(client.get(f"/check_status?job_id={group['group_id']}"), 404, "job-not-found")


@pytest.mark.parametrize("group_id", ["x", "0b5f2f7e-3c1d-4a9b-8e57-1f6f3c9d2a10", "*", "\x00", "../x"])
def test_check_group_of_an_unknown_group_is_404(client: FlaskClient, group_id: str) -> None:
    assert problem_of(check_group(client, group_id), 404, "group-not-found")["group_id"] == group_id


@pytest.mark.parametrize("query", ["", "?group_id=", "?group_id=a&group_id=b", "?group_id=a&job_id=b"])
def test_check_group_with_a_bad_query_is_422(client: FlaskClient, query: str) -> None:
    problem_of(client.get(f"/check_group{query}"), 422, "invalid-request")
