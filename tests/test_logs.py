"""The log: one event a line, which names its job and its request. It has no payload, result, key or query."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fakeredis
import pytest
import requests
from flask.testing import FlaskClient
from redis import Redis

from app.config import Settings
from app.core.transitions import Run
from app.jobs.jobs import Jobs
from app.logs import JsonLines, TextLines, process_members
from app.main import create_app
from app.start.supervisor import Supervisor
from tests.processes import (
    ROOT,
    Process,
    environment,
    gunicorn,
    json_of,
    problem_of,
    python,
    running,
    wait_until,
    worker,
)

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
CANARY = "canary-7d1f"


def record(text: str, *args: object, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("app.x", logging.ERROR, "x.py", 1, text, args, None)
    made.__dict__.update(extra)
    return made


RUN = Run("j1", "e1", "default", "w1", "r1")

# A line


def test_json_line_is_an_object_that_names_its_job_and_request() -> None:
    line = json.loads(JsonLines().format(record("%s %s", RUN, "finished")))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {
        "level": "error",
        "logger": "app.x",
        "message": "default: job j1 finished",
        "job_id": "j1",
        "queue": "default",
        "request_id": "r1",
    }


def test_json_line_has_a_traceback_as_one_member() -> None:
    text = JsonLines().format(record("%s raised", RUN, trace="Traceback\n  File\nValueError: x\n"))
    assert "\n" not in text
    assert json.loads(text)["exception"] == "Traceback\n  File\nValueError: x"


def test_text_line_names_its_job_and_request_once() -> None:
    assert TextLines().format(record("%s finished", RUN))[9:] == "error: default: job j1 finished request_id=r1"
    process_members["job_id"] = "j2"
    try:
        assert TextLines().format(record("hello"))[9:] == "error: hello job_id=j2"
    finally:
        process_members.clear()


@pytest.mark.parametrize("shape", [JsonLines(), TextLines()])
@pytest.mark.parametrize(
    "hostile", ["a\n12:00:00 error: forged", "a\r\nb", "\x1b[31mred", "a\x00b", "a\x85b", "a\u2028b"]
)
def test_no_text_can_forge_a_line(shape: logging.Formatter, hostile: str) -> None:
    lines = shape.format(record("%s", hostile)).splitlines()
    assert all(line.startswith("    ") for line in lines[1:])
    assert not re.search(r"[\x00-\x1f]", "".join(lines))


# The id of a request


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X-Request-ID": "abc-1.2_3"}, "abc-1.2_3"),
        ({"X-Request-ID": "a" * 64, "traceparent": TRACEPARENT}, "a" * 64),
        ({"traceparent": TRACEPARENT}, TRACE_ID),
        ({"traceparent": f"cc-{TRACE_ID}-00f067aa0ba902b7-01-later"}, TRACE_ID),
    ],
)
def test_request_id_is_the_id_that_the_client_sent(client: FlaskClient, headers: dict[str, str], expected: str) -> None:
    assert client.get("/", headers=headers).headers["X-Request-ID"] == expected


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Request-ID": ""},
        {"X-Request-ID": "a" * 65},
        {"X-Request-ID": "a b"},
        {"X-Request-ID": 'a"b'},
        {"X-Request-ID": "\u00e4"},
        {"X-Request-ID": "$(reboot)"},
        {"X-Request-ID": "a,b"},
        {"traceparent": f"ff-{TRACE_ID}-00f067aa0ba902b7-01"},
        {"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"},
        {"traceparent": f"00-{TRACE_ID}-{'0' * 16}-01"},
        {"traceparent": TRACEPARENT.upper()},
        {"traceparent": "00"},
    ],
)
def test_request_id_is_new_if_the_client_sent_no_valid_id(client: FlaskClient, headers: dict[str, str]) -> None:
    ids = {client.get("/", headers=headers).headers["X-Request-ID"] for _ in range(2)}
    assert len(ids) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


@pytest.mark.parametrize("path", ["/nope", "/check_status?job_id=x", "/check_status", "/healthz"])
def test_request_id_stands_on_errors_too(client: FlaskClient, path: str) -> None:
    assert client.get(path, headers={"X-Request-ID": "r1"}).headers["X-Request-ID"] == "r1"


def test_request_id_goes_with_the_job(client: FlaskClient, redis: "Redis") -> None:
    job_id = json_of(client.post("/enqueue/echo", json=1, headers={"X-Request-ID": "r1"}))["job_id"]
    assert redis.hget(f"rq:job:{job_id}", "request_id") == b"r1"
    batch = json_of(client.post("/enqueue_many/echo", json=[1, 2], headers={"X-Request-ID": "r2"}))
    assert {redis.hget(f"rq:job:{job_id}", "request_id") for job_id in batch["job_ids"]} == {b"r2"}


def test_bug_is_answered_with_the_request_id_that_is_in_the_log(
    client: FlaskClient, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def raise_bug(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(jobs, "read_status", raise_bug)
    problem = problem_of(client.get("/check_status?job_id=x", headers={"X-Request-ID": "r9"}), 500, "internal-error")
    assert problem["request_id"] == "r9"
    (logged,) = [json.loads(JsonLines().format(each)) for each in caplog.records if each.name == "app.web.responses"]
    assert "RuntimeError: a bug" in logged["exception"]
    assert "r9" in logged["message"]


def test_access_log_has_a_line_for_each_request_without_its_query(caplog: pytest.LogCaptureFixture) -> None:
    keys = json.dumps([{"name": "alice", "key": "alice's long key"}])
    app = create_app(Settings(access_log=True, api_keys=keys), fakeredis.FakeRedis(server=fakeredis.FakeServer()))
    with caplog.at_level(logging.INFO, "app.web.request_ids"):
        headers = {"Authorization": "Bearer alice's long key", "X-Request-ID": "r1"}
        app.test_client().get(f"/check_status?job_id={CANARY}", headers=headers)
        app.test_client().get("/jobs")
    first, second = [
        json.loads(JsonLines().format(each)) for each in caplog.records if each.name == "app.web.request_ids"
    ]
    assert re.fullmatch(r"GET /check_status 404 in [\d.]+ ms", first["message"])
    assert (first["key"], first["status"], first["method"], first["path"]) == ("alice", 404, "GET", "/check_status")
    assert ("key" in second, second["status"]) == (False, 401)


# Real processes


class Logged(NamedTuple):
    """Web and worker with JSON logs."""

    url: str
    web: Process
    worker: Process

    def lines(self) -> list[dict[str, Any]]:
        """All lines up to now. Each is an object."""
        return [json.loads(line) for log in (self.web.log, self.worker.log) for line in log.splitlines()]

    def about(self, **members: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if members.items() <= line.items()]


@pytest.fixture
def logged(redis_url: str, tmp_path: Path) -> Iterator[Logged]:
    env = environment(redis_url, LOG_FORMAT="json", ACCESS_LOG="true")
    with (
        gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, web_process),
        worker(env, tmp_path / "worker.log") as worker_process,
    ):
        yield Logged(url, web_process, worker_process)


def test_one_id_leads_from_the_request_to_the_functions_own_lines(logged: Logged) -> None:
    url = f"{logged.url}/enqueue/log_something?wait=20"
    answer = requests.post(url, json="hello", headers={"traceparent": TRACEPARENT}, timeout=30)
    assert (answer.status_code, answer.headers["X-Request-ID"]) == (200, TRACE_ID)
    job_id = answer.json()["job_id"]
    wait_until(lambda: f"job {job_id} finished" in logged.worker.log)
    found = [
        (line["logger"], line["message"])
        for log in (logged.web.log, logged.worker.log)
        for line in (json.loads(text) for text in log.splitlines() if text != "printed")
        # The worker logs that a job runs only if the job takes a while, as on a busy machine.
        if line.get("request_id") == TRACE_ID and line["message"] != f"default: job {job_id}, log_something, runs"
    ]
    assert found[1:] == [
        ("mine", "from the function: hello"),
        ("mine.too", "from its thread"),
        ("rq.worker", f"default: job {job_id} finished"),
    ]
    assert found[0][0] == "app.web.request_ids"


def test_json_logs_are_an_object_a_line_whatever_happens(logged: Logged) -> None:
    for payload in (f"{CANARY} one", f"{CANARY}\ntwo\x1b[31m"):
        answer = requests.post(f"{logged.url}/enqueue/fail?wait=20", json=payload, timeout=30)
        assert answer.json()["job_status"] == "failed"
    requests.post(f"{logged.url}/enqueue/die?wait=20", json={"how": "exit"}, timeout=30)
    raised = [line for line in logged.lines() if "raised ValueError" in line["message"]]
    assert len(raised) == 2
    assert all(line["exception"].startswith("Traceback (most recent call last):") for line in raised)
    assert all(line["job_id"] and line["request_id"] for line in raised)
    assert {line["level"] for line in logged.about(logger="gunicorn.error")} == {"info"}


@pytest.mark.slow
def test_no_payload_result_key_or_query_is_logged(redis_url: str, tmp_path: Path) -> None:
    keys = json.dumps([{"name": "alice", "key": f"the key {CANARY}"}])
    env = environment(redis_url, LOG_LEVEL="debug", ACCESS_LOG="true", API_KEYS=keys)
    with (
        gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, web_process),
        worker(env, tmp_path / "worker.log") as worker_process,
    ):
        headers = {"Authorization": f"Bearer the key {CANARY}"}
        payload = {CANARY: CANARY}
        done = requests.post(f"{url}/enqueue/echo?wait=20", json=payload, headers=headers, timeout=30)
        assert done.json()["result"] == payload
        for bad in ({"headers": {"Authorization": f"Bearer wrong {CANARY}"}}, {"headers": headers, "data": CANARY}):
            requests.post(f"{url}/enqueue/count_words", timeout=30, **bad)
        requests.post(f"{url}/enqueue/count_words", json=payload, headers=headers, timeout=30)
        requests.post(f"{url}/enqueue?nope={CANARY}", json=payload, headers=headers, timeout=30)
        requests.get(f"{url}/get_result?job_id={CANARY}", headers=headers, timeout=30)
        requests.post(f"{url}/enqueue/die?wait=20", json={"how": "exit", "x": CANARY}, headers=headers, timeout=30)
        assert "POST /enqueue/count_words 422" in web_process.log
        assert CANARY not in web_process.log
        assert CANARY not in worker_process.log


@pytest.mark.slow
def test_log_level_is_the_least_that_is_logged(redis_url: str, tmp_path: Path) -> None:
    env = environment(redis_url, LOG_LEVEL="warning")
    with (
        gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, web_process),
        running(python("rq.cli", "worker"), env, tmp_path / "worker.log") as worker_process,
    ):
        answer = requests.post(f"{url}/enqueue/log_something?wait=30", json="hello", timeout=40)
        assert answer.json()["job_status"] == "finished"
        assert web_process.log == ""
        wait_until(lambda: "printed" in worker_process.log)
        line, _ = worker_process.log.splitlines()
        assert "from the function: hello" in line


def test_start_keeps_json_lines_and_wraps_printed_text() -> None:
    output = io.StringIO()
    supervisor = Supervisor(output, kill_after=1, log_format="json")
    code = 'import json; print(json.dumps({"time": "x", "message": "mine"})); print("printed \\u2192")'
    supervisor.add("child", [sys.executable, "-c", code])
    supervisor.run({}, lambda: None)
    first, second = [json.loads(line) for line in output.getvalue().splitlines()]
    assert first == {"time": "x", "message": "mine"}
    assert (second["logger"], second["message"]) == ("child", "printed \u2192")


# Sentry


def test_sentry_gets_errors_if_it_is_installed(redis_url: str, tmp_path: Path) -> None:
    """A stand-in for its package writes down each call."""
    (tmp_path / "sentry_sdk.py").write_text(
        "import pathlib, os\n"
        "def _note(text):\n"
        f"    with open({str(tmp_path / 'noted')!r}, 'a') as file: file.write(text + '\\n')\n"
        "def init(): _note('init ' + os.environ['SENTRY_DSN'])\n"
        "def capture_exception(error): _note(repr(error))\n"
    )
    env = environment(redis_url, SENTRY_DSN="https://k@sentry.example/1", PYTHONPATH=f"{ROOT}:{tmp_path}")
    with (
        gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, _),
        worker(env, tmp_path / "worker.log"),
    ):
        requests.post(f"{url}/enqueue/fail?wait=20", json="boom", timeout=30)
    noted = (tmp_path / "noted").read_text().splitlines()
    assert noted.count("init https://k@sentry.example/1") == 3  # web, worker, work-horse
    assert "ValueError('boom')" in noted


def test_sentry_that_is_not_installed_is_one_warning(redis_url: str, tmp_path: Path) -> None:
    env = environment(redis_url, SENTRY_DSN="https://k@sentry.example/1")
    with gunicorn(env, tmp_path / "web.log", "app.main:app") as (_, process):
        assert process.log.count("SENTRY_DSN is set, but the package sentry-sdk is not installed") == 1
        assert "sentry.example" not in process.log
