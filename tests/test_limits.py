"""The quota of an API key in a web process: a key may hold at most as much as is still free."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any
from unittest.mock import Mock

import pytest
from flask import Response
from flask.testing import FlaskClient
from redis import Redis

from app.config import LARGE, Settings
from app.jobs.status import EXAMPLE
from app.jobs.waiting import Look
from app.main import create_app
from app.web import responses
from app.web.limits import MAX_LARGE_BYTES, FairQuota, limit_send_time
from tests.processes import end_run, json_of, problem_of, take_job, wait_until
from tests.test_auth import ALICE, KEYS, OPS, _bearer


def test_a_key_gets_at_most_as_much_as_is_still_free() -> None:
    quota = FairQuota(100, several_keys=True)
    assert [quota.take("alice", 10) for _ in range(6)] == [True] * 5 + [False]
    assert [quota.take("bob", 10) for _ in range(4)] == [True, True, False, False]
    assert quota.take("carol", 15)
    quota.give_back("alice", 40)
    assert quota.take("bob", 10)


def test_without_several_keys_one_holder_gets_the_whole_quota() -> None:
    quota = FairQuota(100, several_keys=False)
    assert [quota.take("", 10) for _ in range(11)] == [True] * 10 + [False]
    quota.give_back("", 10)
    assert quota.take("", 10)


@pytest.fixture
def client(redis: "Redis") -> FlaskClient:
    return create_app(Settings(api_keys=json.dumps(KEYS)), redis).test_client()


def enqueue(client: FlaskClient, size: int, key: str = ALICE) -> Any:
    return client.post("/enqueue/echo", json="x" * size, headers=_bearer(key))


def test_large_bodies_of_one_key_leave_memory_to_the_others(client: FlaskClient, redis: "Redis") -> None:
    held = client.application.extensions["limits"].bytes
    assert held.take("alice", MAX_LARGE_BYTES // 2)
    answer = enqueue(client, LARGE)
    assert "large" in problem_of(answer, 429, "too-many-requests")["detail"]
    assert answer.headers["Retry-After"] == "5"
    assert not redis.keys("rq:job:*")
    assert enqueue(client, LARGE - 100).status_code == 202
    assert enqueue(client, LARGE, OPS).status_code == 202
    held.give_back("alice", 10 * LARGE)
    for _ in range(100):  # each request gives its bytes back
        assert enqueue(client, LARGE).status_code == 202


def test_large_answers_of_one_key_leave_memory_to_the_others(client: FlaskClient, redis: "Redis") -> None:
    job_id = json_of(enqueue(client, LARGE))["job_id"]
    assert end_run(redis, take_job(redis), value="x" * LARGE) == "finished"
    held = client.application.extensions["limits"].bytes
    assert held.take("alice", MAX_LARGE_BYTES // 2)
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


def test_large_result_that_may_not_be_sent_starts_no_timer(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer would run on, and end a later request of the same connection."""
    timed = Mock(side_effect=limit_send_time)
    monkeypatch.setattr(responses, "limit_send_time", timed)
    ended = EXAMPLE.model_copy(update={"job_status": "finished"})
    waiting = client.application.extensions["waiting"]
    monkeypatch.setattr(waiting, "wait_for_new", lambda *_: Look(ended, b'"%s"' % (b"x" * LARGE)))
    held = client.application.extensions["limits"].bytes

    def enqueue_and_wait() -> Any:
        return client.post("/enqueue/echo?wait=1", json=1, headers=_bearer(ALICE))

    with enqueue_and_wait() as answer:
        assert (json_of(answer)["result"], timed.call_count) == ("x" * LARGE, 1)
    assert held.take("alice", MAX_LARGE_BYTES // 2)
    answer = enqueue_and_wait()
    assert (answer.status_code, "result" in json_of(answer), timed.call_count) == (202, False, 1)


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


def test_an_answered_request_holds_no_quota(client: FlaskClient) -> None:
    """Nor does an answer that is discarded on the way. The framework discards its answer to a bad query."""
    limits = client.application.extensions["limits"]
    query = "&".join(f"{number:03}" for number in range(1000))
    keys = json.dumps({f"{number:030}": 1 for number in range(3000)})
    for path, body in ((f"/jobs?{query}", None), (f"/jobs?{query}&{query}", None), ("/enqueue/count_words", keys)):
        method = "POST" if body else "GET"
        answer = client.open(path, method=method, data=body, content_type="application/json", headers=_bearer(ALICE))
        assert len(problem_of(answer, 422, "invalid-request")["errors"]) == 100
        answer.close()
        assert (limits.bytes.held("alice"), limits.requests.held("alice")) == (0, 0)


def test_an_enqueued_job_is_answered_even_if_its_result_has_no_room(client: FlaskClient, redis: "Redis") -> None:
    held = client.application.extensions["limits"].bytes
    assert held.take("alice", MAX_LARGE_BYTES // 2)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.post, "/enqueue/echo?wait=20", json=1, headers=_bearer(ALICE))
        wait_until(lambda: redis.llen("rq:queue:default"))
        run = take_job(redis)
        assert end_run(redis, run, value="x" * LARGE) == "finished"
        answer = asked.result()
    assert (answer.status_code, json_of(answer)["job_status"]) == (202, "finished")
    assert "result" not in json_of(answer)
    payloads = [1] * 1000
    answer = client.post("/enqueue_many/echo", json=payloads, headers=_bearer(ALICE))
    assert (answer.status_code, len(json_of(answer)["job_ids"])) == (202, 1000)


def test_a_body_is_not_kept_while_its_client_waits(client: FlaskClient, redis: "Redis") -> None:
    kept: list[bool] = []

    def look() -> bool:
        frames = sys._current_frames().values()
        views = [frame for top in frames for frame in _callers(top) if frame.f_code.co_name == "wait_for_new"]
        kept.extend("payload" in view.f_back.f_locals for view in views if view.f_back)
        return bool(views)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(enqueue_and_wait, client)
        wait_until(look)
        assert end_run(redis, take_job(redis), value=1) == "finished"
        assert asked.result().status_code == 200
    assert kept == [False] * len(kept)


def enqueue_and_wait(client: FlaskClient) -> Any:
    return client.post("/enqueue/echo?wait=20", json="x" * LARGE, headers=_bearer(ALICE))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame:
        yield frame
        frame = frame.f_back


def test_a_large_answer_may_take_a_while_but_not_for_ever(client: FlaskClient) -> None:
    connection = Mock()
    with client.application.test_request_context(environ_overrides={"gunicorn.socket": connection}):
        for size, is_limited in ((LARGE, False), (LARGE + 1, True), (10 * LARGE, True)):
            answer = limit_send_time(Response(b"x" * size))
            limits = [getattr(close, "__self__") for close in answer._on_close]  # noqa: B009  # mypy does not know it
            assert [(limit.seconds, limit.pending) for limit in limits] == [(60 + size / 16384, True)] * is_limited
            answer.close()
            assert not any(limit.pending for limit in limits)
    assert [call.args for call in connection.settimeout.call_args_list] == [
        (60 + size / 16384,) for size in (LARGE + 1, 10 * LARGE)
    ]
