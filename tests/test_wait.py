import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from apiflask import APIFlask
from flask.testing import FlaskClient
from redis import Redis
from rq.job import Job
from rq.serializers import JSONSerializer
from werkzeug.test import TestResponse

from app.config import Settings
from app.core import transitions
from app.jobs.waiting import Waiting
from app.main import create_app
from tests.conftest import Service
from tests.processes import (
    end_run,
    enqueue_echo,
    environment,
    gunicorn,
    job_in_state,
    json_of,
    problem_of,
    run_stock_worker,
    take_job,
    wait_until,
)

pytestmark = pytest.mark.usefixtures("quick_reader")


@pytest.fixture
def redis(real_redis: "Redis") -> "Redis":
    """Use a real server: blocking reads need one."""
    return real_redis


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(60) as executor:
        yield executor


def listeners(waiting: Waiting) -> int:
    return sum(map(len, list(waiting.events._subscriptions.values())))


@pytest.fixture
def ask(app: APIFlask, waiting: Waiting, pool: ThreadPoolExecutor) -> Callable[..., "Future[TestResponse]"]:
    """Send a request from another thread; the call returns once the request waits."""

    def start(path: str, job_id: str, wait: float = 20, **headers: str) -> "Future[TestResponse]":
        before = listeners(waiting)
        query = {"job_id": job_id, "wait": wait}
        future = pool.submit(lambda: app.test_client().get(path, query_string=query, headers=headers))
        wait_until(lambda: listeners(waiting) == before + 1 or future.done(), what="the waiting request")
        return future

    return start


Ask = Callable[..., "Future[TestResponse]"]
READS = pytest.mark.parametrize("path", ["/check_status", "/get_result"])


# The whole service


@pytest.mark.parametrize("value", [None, 0, "", [], {"a": [1]}])
def test_wait_on_enqueue_answers_status_and_result(service: Service, value: Any) -> None:
    answer = requests.post(
        f"{service.url}/enqueue/echo?wait=20",
        data=json.dumps(value),
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    status = answer.json()
    assert (answer.status_code, status["job_status"]) == (200, "finished")
    assert json.dumps(status["result"]) == json.dumps(value)
    assert "Retry-After" not in answer.headers
    assert answer.headers["Location"] == status["links"]["check_status"]


def test_wait_on_enqueue_answers_a_failure(service: Service) -> None:
    answer = requests.post(f"{service.url}/enqueue/fail?wait=20", json="no such image", timeout=30)
    status = answer.json()
    assert (answer.status_code, status["job_status"]) == (200, "failed")
    assert status["error"] == {"type": "ValueError", "message": "no such image"}
    assert "result" not in status


def test_wait_on_enqueue_that_is_too_short_answers_202(service: Service, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    try:
        answer = requests.post(f"{service.url}/enqueue/wait_for_file?wait=0.3", json=str(go_on), timeout=30)
        assert answer.status_code == 202
        assert answer.headers["Retry-After"] == "1"
        assert "result" not in answer.json()
        job_id = answer.json()["job_id"]
    finally:  # other tests use this worker, too
        go_on.touch()
    found = requests.get(f"{service.url}/get_result", params={"job_id": job_id, "wait": "20"}, timeout=30)
    assert (found.status_code, found.json()) == (200, None)


@READS
def test_wait_answers_as_soon_as_the_job_ends(service: Service, path: str) -> None:
    start = time.monotonic()
    job_id = requests.post(f"{service.url}/enqueue/sleep_for", json=1.5, timeout=30).json()["job_id"]
    answer = requests.get(service.url + path, params={"job_id": job_id, "wait": "30"}, timeout=40)
    took = time.monotonic() - start
    assert answer.status_code == 200
    assert answer.json() == 1.5 if path == "/get_result" else answer.json()["job_status"] == "finished"
    assert 1.5 <= took < 15


def test_wait_of_fifty_clients_is_answered_at_once(service: Service, pool: ThreadPoolExecutor) -> None:
    job_id = requests.post(f"{service.url}/enqueue/sleep_for", json=1.5, timeout=30).json()["job_id"]
    url = f"{service.url}/get_result?job_id={job_id}&wait=20"
    asked = [pool.submit(requests.get, url, timeout=30) for _ in range(50)]
    assert [future.result().status_code for future in asked] == [200] * 50
    # One is the reader of the events, the other one the worker's doorbell.
    assert sum(client["cmd"] == "xread" for client in service.redis.client_list()) <= 2


# Prefer


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("wait=10", "wait=10"), ("WAIT=10", "wait=10"), ("wait = 10", "wait=10"), ('wait="10"', "wait=10"),
        ("respond-async, wait=7", "wait=7"), ("wait=7, respond-async", "wait=7"), ("wait=7; x=1", "wait=7"),
        ("foo;wait=3, wait=4", "wait=4"), ("wait=0", "wait=0"), ("wait=60", "wait=60"), ("wait=61", "wait=60"),
        ("wait=999999999", "wait=60"), ("wait=1, wait=2", "wait=1"),
        ("", None), ("wait", None), ("wait=", None), ("wait=x", None), ("wait=-1", None), ("wait=1.5", None),
        ("waiting=5", None), ("respond-async", None), (",,;=", None), ('"wait=5"', None), ("handling=lenient", None),
        ("wait=" + "9" * 100, None), ("é", None),
    ],
)  # fmt: skip
def test_prefer_wait_is_applied_or_ignored(
    client: FlaskClient, redis: "Redis", prefer: str, applied: str | None
) -> None:
    job_id = job_in_state(client, redis, "finished", 1)
    answer = client.get("/check_status", query_string={"job_id": job_id}, headers={"Prefer": prefer})
    assert (answer.status_code, answer.headers.get("Preference-Applied")) == (200, applied)


def test_prefer_wait_is_capped_by_the_setting(redis: "Redis") -> None:
    client = create_app(Settings(max_wait=3), redis).test_client()
    job_id = job_in_state(client, redis, "finished", 1)
    answer = client.get("/check_status", query_string={"job_id": job_id}, headers={"Prefer": "wait=10"})
    assert answer.headers["Preference-Applied"] == "wait=3"


def test_prefer_wait_in_two_headers_is_read(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "finished", 1)
    headers = [("Prefer", "respond-async"), ("Prefer", "wait=5")]
    answer = client.get("/check_status", query_string={"job_id": job_id}, headers=headers)
    assert answer.headers["Preference-Applied"] == "wait=5"


@pytest.mark.parametrize("path", ["/check_status", "/get_result", "/enqueue/echo"])
def test_prefer_wait_waits_and_is_named_in_the_answer(client: FlaskClient, path: str) -> None:
    start = time.monotonic()
    if path == "/enqueue/echo":
        answer = client.post(path, json=1, headers={"Prefer": "wait=1"})
    else:
        answer = client.get(path, query_string={"job_id": enqueue_echo(client)}, headers={"Prefer": "wait=1"})
    assert 1 <= time.monotonic() - start < 15
    assert answer.status_code == {"/check_status": 200, "/get_result": 409, "/enqueue/echo": 202}[path]
    assert answer.headers["Preference-Applied"] == "wait=1"
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize("path", ["/check_status", "/get_result", "/enqueue/echo"])
def test_wait_option_wins_over_the_header(client: FlaskClient, path: str) -> None:
    start = time.monotonic()
    if path == "/enqueue/echo":
        answer = client.post(f"{path}?wait=0", json=1, headers={"Prefer": "wait=30"})
    else:
        query = {"job_id": enqueue_echo(client), "wait": 0}
        answer = client.get(path, query_string=query, headers={"Prefer": "wait=30"})
    assert time.monotonic() - start < 15
    assert "Preference-Applied" not in answer.headers


# Events that end a wait, and events that do not


@pytest.mark.parametrize("path", ["/check_status", "/get_result", "/enqueue/echo"])
def test_wait_that_runs_out_returns_the_normal_answer(client: FlaskClient, path: str) -> None:
    taken = []
    for _ in range(3):  # the machine may have been busy once or twice
        start = time.monotonic()
        if path == "/enqueue/echo":
            answer = client.post(f"{path}?wait=0.4", json=1)
        else:
            answer = client.get(path, query_string={"job_id": enqueue_echo(client), "wait": 0.4})
        taken.append(time.monotonic() - start)
    assert 0.4 <= min(taken) < 2.5
    assert answer.headers["Retry-After"] == "1"
    if path == "/get_result":
        assert problem_of(answer, 409, "result-not-ready")["job_status"] == "queued"
    else:
        assert (answer.status_code, json_of(answer)["job_status"]) == (202 if "enqueue" in path else 200, "queued")


@pytest.mark.parametrize(
    ("path", "state"),
    [
        ("/check_status", "finished"),
        ("/check_status", "stopped"),
        ("/get_result", "failed"),
        ("/get_result", "canceled"),
    ],
)
def test_wait_for_a_job_that_has_ended_answers_at_once(
    client: FlaskClient, redis: "Redis", path: str, state: str
) -> None:
    job_id = job_in_state(client, redis, state)
    start = time.monotonic()
    answer = client.get(path, query_string={"job_id": job_id, "wait": 30})
    assert time.monotonic() - start < 15
    assert answer.status_code == (200 if path == "/check_status" else 409)


@READS
def test_wait_for_an_unknown_job_answers_at_once(client: FlaskClient, path: str) -> None:
    start = time.monotonic()
    problem_of(client.get(path, query_string={"job_id": "nope", "wait": 30}), 404, "job-not-found")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("outcome", ["finished", "failed", "stopped"])
def test_wait_sees_how_the_job_ends(client: FlaskClient, redis: "Redis", ask: Ask, outcome: Any) -> None:
    job_id = enqueue_echo(client)
    asked, got = ask("/check_status", job_id), ask("/get_result", job_id)
    end_run(redis, take_job(redis), outcome, 5)
    assert json_of(asked.result(15))["job_status"] == outcome
    assert got.result(15).status_code == (200 if outcome == "finished" else 409)


DEEP: Any = 1
for _ in range(600):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    "value", [None, 0, -0.0, 1e16, 10**400, "\u2028 é \U0001f600", {"": []}, DEEP], ids=lambda value: str(value)[:10]
)
def test_wait_on_enqueue_returns_the_stored_result_byte_by_byte(
    app: APIFlask, redis: "Redis", pool: ThreadPoolExecutor, value: Any
) -> None:
    asked = pool.submit(lambda: app.test_client().post("/enqueue/echo?wait=30", json=1))
    wait_until(lambda: redis.llen("rq:queue:default"))
    end_run(redis, take_job(redis), value=value)
    answer = asked.result(30)
    text = json.dumps(value, ensure_ascii=False)
    assert (answer.status_code, answer.text.endswith(f',"result":{text}}}')) == (200, True)


def test_wait_is_ended_by_the_event_and_not_by_a_poll(
    client: FlaskClient, redis: "Redis", ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the events, the second poll would come after the end of the wait.
    monkeypatch.setattr("app.jobs.waiting.max", lambda *_: 100.0, raising=False)
    monkeypatch.setattr("app.jobs.waiting.min", lambda first, *_: first, raising=False)
    asked = ask("/check_status", enqueue_echo(client), wait=20)
    end_run(redis, take_job(redis), value=5)
    assert json_of(asked.result(15))["job_status"] == "finished"


def test_wait_goes_on_while_the_job_is_retried(client: FlaskClient, redis: "Redis", ask: Ask) -> None:
    job_id = json_of(client.post("/enqueue/fail_with_retries", json="boom"))["job_id"]
    asked = ask("/check_status", job_id)
    assert end_run(redis, take_job(redis), "failed") == "scheduled"
    redis.zadd("rq:scheduled:default", {job_id: 1})  # its pause is over
    assert transitions.promote(redis, ["default"]).jobs == 1
    run = take_job(redis)
    assert not asked.done()
    end_run(redis, run, value=1)
    assert json_of(asked.result(15))["job_status"] == "finished"


def test_wait_for_a_requeued_job_waits_for_its_second_end(client: FlaskClient, redis: "Redis", ask: Ask) -> None:
    job_id = job_in_state(client, redis, "failed")
    Job.fetch(job_id, connection=redis, serializer=JSONSerializer).requeue()
    asked = ask("/get_result", job_id)
    assert not asked.done()
    end_run(redis, take_job(redis), value="second")
    assert json_of(asked.result(15)) == "second"


def test_wait_sees_that_rq_canceled_the_job(client: FlaskClient, redis: "Redis", ask: Ask) -> None:
    job_id = enqueue_echo(client)
    asked = ask("/check_status", job_id)
    Job.fetch(job_id, connection=redis, serializer=JSONSerializer).cancel()
    assert json_of(asked.result(15))["job_status"] == "canceled"


def test_wait_sees_a_job_that_a_stock_worker_ran(client: FlaskClient, redis: "Redis", ask: Ask) -> None:
    job_id = enqueue_echo(client, "stock")
    asked = ask("/get_result", job_id)
    run_stock_worker(redis)
    assert json_of(asked.result(15)) == "stock"


@READS
def test_wait_sees_that_the_job_expired(client: FlaskClient, ask: Ask, path: str) -> None:
    asked = ask(path, enqueue_echo(client, ttl=1))
    problem_of(asked.result(15), 410, "result-expired")


def test_wait_on_enqueue_of_a_job_that_expires_answers_as_documented(client: FlaskClient) -> None:
    answer = client.post("/enqueue/echo?ttl=1&wait=4", json=1)
    document = json_of(client.get("/openapi.json"))
    assert str(answer.status_code) in document["paths"]["/enqueue/echo"]["post"]["responses"]


# The limit


def test_wait_over_the_limit_is_answered_at_once(redis: "Redis", pool: ThreadPoolExecutor) -> None:
    limited = create_app(Settings(max_waiting=1), redis)
    client, waiting = limited.test_client(), limited.extensions["waiting"]
    job_id = enqueue_echo(client)
    query = {"job_id": job_id, "wait": 30}
    first = pool.submit(lambda: limited.test_client().get("/check_status", query_string=query))
    wait_until(lambda: listeners(waiting) == 1, what="the first to wait")
    wait_until(lambda: waiting._places._value == 0, what="the only place to be taken")

    start = time.monotonic()
    second = client.get("/check_status", query_string=query)
    third = client.get("/get_result", query_string=query)
    fourth = client.post("/enqueue/echo?wait=20", json=1)
    assert time.monotonic() - start < 15
    assert [answer.status_code for answer in (second, third, fourth)] == [200, 409, 202]
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in (second, third, fourth))
    assert not first.done()

    end_run(redis, take_job(redis), value=1)
    assert json_of(first.result(15))["job_status"] == "finished"
    # The place is free again.
    start = time.monotonic()
    client.get("/check_status", query_string={"job_id": json_of(fourth)["job_id"], "wait": 0.5})
    assert time.monotonic() - start >= 0.5


def test_wait_with_a_limit_of_zero_never_waits(redis: "Redis") -> None:
    client = create_app(Settings(max_waiting=0), redis).test_client()
    start = time.monotonic()
    answer = client.post("/enqueue/echo?wait=20", json=1)
    assert time.monotonic() - start < 15
    assert (answer.status_code, answer.headers["Retry-After"]) == (202, "1")


def test_wait_of_fifty_clients_holds_one_connection(
    client: FlaskClient, redis: "Redis", ask: Ask, waiting: Waiting
) -> None:
    job_id = enqueue_echo(client)
    asked = [ask("/check_status", job_id) for _ in range(50)]
    assert listeners(waiting) == 50

    def reading() -> int:  # `b`: it is blocked, waiting for an answer
        return sum(found["cmd"] == "xread" and "b" in found["flags"] for found in redis.client_list())

    wait_until(lambda: reading() == 1, what="the reader")
    # The thread of an earlier reader that just stopped may still be alive.
    wait_until(lambda: sum(thread.name == "events" for thread in threading.enumerate()) == 1, what="only one reader")
    end_run(redis, take_job(redis), value=1)
    assert {json_of(future.result(15))["job_status"] for future in asked} == {"finished"}
    assert listeners(waiting) == 0


def test_wait_raises_the_limit_of_open_files(tmp_path: Path, redis_url: str) -> None:
    """Each waiting request needs an open file. The system's usual limit, 1024, is less than MAX_WAITING."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    try:
        with gunicorn(environment(redis_url), tmp_path / "web.log", "app.main:app") as (_, process):
            most, _ = psutil.Process(process.popen.pid).children()[0].rlimit(resource.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert most >= min(Settings().max_waiting + 1000, limits[1])
