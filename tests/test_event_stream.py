"""`GET /events?job_id=`: the events of a job as they happen, in the form that a browser's `EventSource` reads."""

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import psutil
import pytest
import requests
from flask.testing import FlaskClient
from redis import Redis

import app.jobs.events
import app.jobs.waiting
from app.config import Settings
from app.core import transitions
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
    take_job,
    wait_until,
    watch_stalls,
    worker,
)
from tests.test_auth import ALICE, BOB, KEYS


class Event(NamedTuple):
    kind: str
    id: str
    data: Any


def parse(text: str) -> list[Event | str]:
    """Parse events as the standard says, and keep comments as they are."""
    found: list[Event | str] = []
    for block in text.strip("\n").split("\n\n"):
        if block.startswith(":"):
            found.append(block)
            continue
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        if "data" in fields:
            found.append(Event(fields["event"], fields["id"], json.loads(fields["data"])))
    return found


def events_of(client: FlaskClient, job_id: str, last: str | None = None) -> list[Event]:
    headers = {"Last-Event-ID": last} if last else {}
    answer = client.get("/events", query_string={"job_id": job_id}, headers=headers)
    assert (answer.status_code, answer.mimetype) == (200, "text/event-stream")
    return [event for event in parse(answer.text) if isinstance(event, Event)]


pytestmark = pytest.mark.usefixtures("quick_reader")


@pytest.fixture
def redis(real_redis: "Redis") -> "Redis":
    return real_redis


@pytest.mark.parametrize("state", ["finished", "failed", "stopped", "canceled"])
def test_events_of_a_job_that_has_ended_are_its_status_and_the_end(
    client: FlaskClient, redis: "Redis", state: str
) -> None:
    job_id = job_in_state(client, redis, state)
    status, end = events_of(client, job_id)
    polled = client.get(f"/check_status?job_id={job_id}")
    assert (status.kind, end.kind) == ("status", "end")
    assert status.data == end.data == json_of(polled)
    assert f'"{status.id}"' == polled.headers["ETag"]


def test_events_show_each_change_of_status_and_progress_as_it_happens(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client)
    answer = client.get("/events", query_string={"job_id": job_id}, buffered=False)
    chunks = iter(answer.response)

    def next_event() -> Event:
        while True:
            chunk = next(chunks)
            for event in parse(chunk.decode() if isinstance(chunk, bytes) else str(chunk)):
                if isinstance(event, Event):
                    return event

    assert next_event().data["job_status"] == "queued"
    run = take_job(redis)
    assert next_event().data["job_status"] == "started"
    transitions.renew(redis, run, 30, json.dumps({"done": 1, "total": 2, "message": "half"}))
    assert next_event().data["progress"] == {"done": 1, "total": 2, "message": "half"}
    end_run(redis, run)
    status, end = next_event(), next_event()
    assert (status.kind, status.data["job_status"], end.kind) == ("status", "finished", "end")
    assert next(chunks, None) is None


def test_events_are_not_sent_again_to_a_client_that_has_them(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "finished")
    status, end = events_of(client, job_id)
    assert events_of(client, job_id, status.id) == [end]
    gone = client.get("/events", query_string={"job_id": job_id}, headers={"Last-Event-ID": end.id})
    assert (gone.status_code, gone.data) == (204, b"")
    for unknown in ("nonsense", "1-1", "x" * 200, "\u00e4"):
        assert events_of(client, job_id, unknown) == [status, end]


def test_events_refuses_an_unknown_job_and_a_bad_request(client: FlaskClient) -> None:
    problem_of(client.get("/events?job_id=nope"), 404, "job-not-found")
    problem_of(client.get("/events"), 422, "invalid-request")
    problem_of(client.post("/events?job_id=nope"), 405, "method-not-allowed")


def test_events_of_a_job_are_hidden_from_other_owners(redis: "Redis") -> None:
    client = create_app(Settings(api_keys=json.dumps(KEYS)), redis).test_client()
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in (ALICE, BOB))
    job_id = json_of(client.post("/enqueue/echo", json=1, headers=alice))["job_id"]
    client.post(f"/cancel?job_id={job_id}", headers=alice)
    problem_of(client.get(f"/events?job_id={job_id}", headers=bob), 404, "job-not-found")
    problem_of(client.get(f"/events?job_id={job_id}"), 401, "unauthorized")
    assert client.get(f"/events?job_id={job_id}", headers=alice).status_code == 200


def test_events_over_max_waiting_are_only_the_present_status(redis: "Redis") -> None:
    client = create_app(
        Settings(max_waiting=0, function_modules=("app.functions", "tests.job_functions")), redis
    ).test_client()
    (status,) = events_of(client, enqueue_echo(client))
    assert status.data["job_status"] == "queued"


def test_events_have_a_sign_of_life(client: FlaskClient, redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.jobs.waiting, "SIGN_OF_LIFE", 0.1)
    monkeypatch.setattr(app.jobs.waiting, "LOOK_EVERY", 0.1)
    chunks = iter(client.get("/events", query_string={"job_id": enqueue_echo(client)}, buffered=False).response)
    seen = [next(chunks) for _ in range(4)]
    assert str(seen[-1]).count("still here") == 1
    end_run(redis, take_job(redis))
    assert any("event: end" in str(chunk) for chunk in chunks)


def test_events_of_a_job_that_vanishes_end(
    client: FlaskClient, redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.jobs.waiting, "LOOK_EVERY", 0.1)
    job_id = enqueue_echo(client)
    chunks = iter(client.get("/events", query_string={"job_id": job_id}, buffered=False).response)
    assert "event: status" in str(next(chunks)) + str(next(chunks))
    redis.delete(f"rq:job:{job_id}")
    assert list(chunks) == []


# Real processes


def listen(url: str, job_id: str, last: str | None = None) -> Iterator[Event]:
    """Yield each event as it comes."""
    headers = {"Last-Event-ID": last} if last else {}
    with requests.get(f"{url}/events", {"job_id": job_id}, headers=headers, stream=True, timeout=40) as answer:
        block = ""
        for line in answer.iter_lines(decode_unicode=True):
            block += line + "\n"
            if not line:
                yield from (event for event in parse(block) if isinstance(event, Event))
                block = ""


def test_events_reach_a_client_of_the_real_server_at_once(service: Service, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    payload = {"done": 1, "total": 2, "message": "step 1", "until": str(go_on)}
    job_id = requests.post(f"{service.url}/enqueue/report?delay=1000", json=payload, timeout=10).json()["job_id"]
    found: list[Event] = []
    for event in listen(service.url, job_id):
        if not found:  # the job begins once the client listens
            service.redis.zadd("rq:scheduled:default", {job_id: 1})
        if event.data["progress"]:  # the job ends once the client has its progress
            go_on.touch()
        found.append(event)
    assert [event.kind for event in found[-2:]] == ["status", "end"]
    statuses = [event.data["job_status"] for event in found]
    assert (statuses[0], statuses[-1]) == ("scheduled", "finished")
    assert "started" in statuses
    assert {event.data["progress"]["message"] for event in found if event.data["progress"]} == {"step 1"}
    assert len({event.id for event in found}) == len(found)


def test_events_after_a_crash_of_the_server_miss_no_end(redis_url: str, real_redis: "Redis", tmp_path: Path) -> None:
    env = environment(redis_url)
    with worker(env, tmp_path / "worker.log"):
        with gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, process):
            go_on = tmp_path / "go-on"
            job_id = requests.post(f"{url}/enqueue/wait_for_file", json=str(go_on), timeout=10).json()["job_id"]
            heard = []
            with suppress(requests.RequestException):
                for event in listen(url, job_id):
                    heard.append(event)
                    if event.data["job_status"] == "started":
                        os.killpg(process.popen.pid, signal.SIGKILL)
            assert heard[-1].kind == "status"
        go_on.touch()
        wait_until(lambda: real_redis.hget(f"rq:job:{job_id}", "status") == b"finished")
        with gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, _):
            status, end = listen(url, job_id, heard[-1].id)
            assert (status.data["job_status"], end.kind) == ("finished", "end")


def listen_in_a_crowd(redis_url: str, real_redis: "Redis", tmp_path: Path, listeners: int) -> tuple[float, float]:
    """Open this many listeners, which share one connection to Redis.

    Return the bytes that each listener takes, and the seconds until all listeners of one job have its end.
    """
    env = environment(redis_url)
    with gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, process):
        port = int(url.rpartition(":")[2])
        (web,) = psutil.Process(process.popen.pid).children()
        requests.get(f"{url}/functions", timeout=10)
        session = requests.Session()
        job_ids = [session.post(f"{url}/enqueue/echo", json=1, timeout=10).json()["job_id"] for _ in range(10)]
        before, clients = web.memory_info().rss, len(real_redis.client_list())
        sockets = []
        for number in range(listeners):
            listener = socket.create_connection(("127.0.0.1", port))
            listener.sendall(f"GET /events?job_id={job_ids[number % 10]} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            sockets.append(listener)
        try:

            def count() -> float:
                time.sleep(0.1)  # a scrape costs as much as several listeners
                text = session.get(f"{url}/metrics", timeout=30).text
                return float(text.partition("\nhttp_listeners ")[2].partition("\n")[0])

            wait_until(lambda: count() == listeners, 60, "all listeners")
            taken = web.memory_info().rss - before
            assert len(real_redis.client_list()) <= clients + 100  # the pool opens these in the burst
            end_run(real_redis, take_job(real_redis))
            start = time.monotonic()
            for listener in sockets[::10]:  # those of the first job
                listener.settimeout(30)
                text = b""
                while b"event: end" not in text:
                    text += listener.recv(65536)
            seconds = time.monotonic() - start
        finally:
            for listener in sockets:
                listener.close()
        wait_until(lambda: count() == 0, 60, "the end of the listeners that vanished")
    return taken / listeners, seconds


@pytest.mark.slow
def test_listeners_share_a_connection_and_are_dropped_when_they_vanish(
    redis_url: str, real_redis: "Redis", tmp_path: Path
) -> None:
    """`pipenv run faults` opens 1 000 listeners and limits their memory."""
    with watch_stalls() as stalls:
        _, seconds = listen_in_a_crowd(redis_url, real_redis, tmp_path, 50)
    assert seconds < 5 + stalls.within(seconds)


def test_a_listener_that_reads_nothing_is_dropped(client: FlaskClient, redis: "Redis") -> None:
    """Gunicorn writes to this socket. A write that takes longer than this timeout raises."""
    connection = Mock()
    job_id = job_in_state(client, redis, "finished")
    client.get(f"/events?job_id={job_id}", environ_overrides={"gunicorn.socket": connection})
    connection.settimeout.assert_called_with(10)
