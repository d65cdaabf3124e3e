"""A deploy: new processes replace old ones while clients go on."""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests
from redis import Redis

from tests.processes import Process, environment, gunicorn, problem_of, wait_until, worker

pytestmark = pytest.mark.slow


def status_of(url: str, timeout: float = 10) -> int:
    return requests.get(url, timeout=timeout).status_code


def test_gunicorn_says_that_it_drains_before_it_stops(redis_url: str, tmp_path: Path) -> None:
    env = environment(redis_url, DRAIN_SECONDS=8)
    with (
        worker(env, tmp_path / "worker.log"),
        gunicorn(env, tmp_path / "web.log", "app.main:app", "--workers", "2") as (url, process),
    ):
        wait_until(lambda: status_of(f"{url}/readyz") == 200)
        process.signal(signal.SIGTERM)
        wait_until(lambda: status_of(f"{url}/readyz") == 503)
        problem = problem_of(requests.get(f"{url}/readyz", timeout=10), 503, "not-ready")
        assert problem["checks"] == {"web": "draining", "redis": "ok", "queue default": "ok"}
        assert requests.post(f"{url}/enqueue/echo", json=1, timeout=10).status_code == 202
        assert status_of(f"{url}/healthz") == 200
        assert process.popen.wait(60) == 0


def test_gunicorn_answers_waiting_requests_soon_after_sigterm(redis_url: str, tmp_path: Path) -> None:
    with gunicorn(environment(redis_url), tmp_path / "web.log", "app.main:app") as (url, process):
        answers: list[requests.Response] = []
        waiting = threading.Thread(
            target=lambda: answers.append(requests.post(f"{url}/enqueue/echo?wait=60", json=1, timeout=70))
        )
        waiting.start()
        wait_until(lambda: "http_waiting_requests 1.0" in requests.get(f"{url}/metrics", timeout=10).text)
        start = time.monotonic()
        assert process.stop() == 0
        waiting.join()
        assert (answers[0].status_code, answers[0].json()["job_status"]) == (202, "queued")
        assert time.monotonic() - start < 30  # the request could wait for 60


class Balancer:
    """A load balancer: it asks each server whether it is ready, and sends requests to the ready ones."""

    def __init__(self) -> None:
        self.servers: list[str] = []
        self.ready: list[str] = []
        self.is_over = self.is_closed = False

    def look(self) -> None:
        """Ask until the last client has its last answer, because a client without a ready server waits for one."""
        while not self.is_closed:
            ready = []
            for url in list(self.servers):
                try:
                    if status_of(f"{url}/readyz", timeout=2) == 200:
                        ready.append(url)
                except requests.RequestException:  # it is gone
                    continue
            self.ready = ready
            time.sleep(0.05)


class Client(threading.Thread):
    """A client that enqueues and polls on open connections, and keeps the acknowledged jobs and the failures."""

    def __init__(self, balancer: Balancer, path: Path) -> None:
        super().__init__(daemon=True)
        self.balancer, self.path = balancer, path
        self.acknowledged: list[str] = []
        self.failures: list[str] = []

    def _choose(self) -> str:
        """Choose a ready server. Wait if there is none for a moment, while gunicorn loads the app again."""
        return random.choice(wait_until(lambda: self.balancer.ready, 60))

    def run(self) -> None:
        session = requests.Session()
        while not self.balancer.is_over:
            url = self._choose()
            payload = {"path": str(self.path), "line": f"{id(self)}-{len(self.acknowledged)}", "seconds": "0.005"}
            try:
                answer = session.post(f"{url}/enqueue/append_line", json=payload, timeout=60)
                assert answer.status_code == 202, answer.text
                self.acknowledged.append(answer.json()["job_id"])
                url = self._choose()
                poll = session.get(f"{url}/check_status?job_id={self.acknowledged[-1]}&wait=2", timeout=60)
                assert poll.status_code == 200, poll.text
            except (requests.RequestException, AssertionError) as error:
                self.failures.append(repr(error))


@contextmanager
def load(balancer: Balancer, path: Path, clients: int) -> Iterator[list[Client]]:
    prober = threading.Thread(target=balancer.look, daemon=True)
    prober.start()
    wait_until(lambda: balancer.ready)
    running = [Client(balancer, path) for _ in range(clients)]
    for each in running:
        each.start()
    try:
        yield running
    finally:
        balancer.is_over = True
        try:
            for client in running:
                client.join()
        finally:
            balancer.is_closed = True
            prober.join()


def check(redis: "Redis", clients: list[Client], path: Path) -> int:
    """Check that no request failed and that each job ran once. Return the number of jobs."""
    assert [failure for client in clients for failure in client.failures] == []
    jobs = [job_id for client in clients for job_id in client.acknowledged]
    assert len(jobs) > 20
    wait_until(lambda: all(redis.hget(f"rq:job:{job_id}", "status") == b"finished" for job_id in jobs), 60)
    lines = Counter(path.read_text().splitlines())
    assert (len(lines), set(lines.values())) == (len(jobs), {1})
    return len(jobs)


def roll(real_redis: Redis, redis_url: str, tmp_path: Path, restarts: int) -> int:
    """Replace old processes by new ones this many times, under load. Return the number of jobs."""
    env = environment(redis_url, DRAIN_SECONDS=5)
    balancer = Balancer()
    with ExitStack() as stack:

        def start_pair(number: int) -> tuple[str, Process, Process]:
            """A web server and a worker of the service's next version."""
            new_worker = stack.enter_context(worker(env, tmp_path / f"worker{number}.log"))
            url, web = stack.enter_context(gunicorn(env, tmp_path / f"web{number}.log", "app.main:app"))
            balancer.servers.append(url)
            wait_until(lambda: url in balancer.ready or balancer.is_over or len(balancer.servers) == 1)
            return url, web, new_worker

        pairs = [start_pair(0)]
        with load(balancer, tmp_path / "lines", 4) as clients:
            pairs.append(start_pair(1))
            for number in range(2, 2 + restarts):
                url, web, old_worker = pairs.pop(0)
                pairs.append(start_pair(number))
                old_worker.signal(signal.SIGTERM)
                web.signal(signal.SIGTERM)
                assert web.popen.wait(60) == 0
                assert old_worker.popen.wait(60) == 0
                balancer.servers.remove(url)
        return check(real_redis, clients, tmp_path / "lines")


def test_rolling_restart_fails_no_request_and_loses_no_job(real_redis: Redis, redis_url: str, tmp_path: Path) -> None:
    """`pipenv run faults` does five restarts."""
    roll(real_redis, redis_url, tmp_path, 1)


def test_reload_of_gunicorn_fails_no_request(real_redis: Redis, redis_url: str, tmp_path: Path) -> None:
    """SIGHUP starts processes with the new code. The old ones end once they have answered."""
    env, processes = environment(redis_url), 2
    balancer = Balancer()
    with (
        worker(env, tmp_path / "worker.log"),
        gunicorn(env, tmp_path / "web.log", "app.main:app", "--workers", str(processes)) as (url, process),
    ):
        balancer.servers.append(url)
        with load(balancer, tmp_path / "lines", 3) as clients:
            for number in range(1, 3):
                process.signal(signal.SIGHUP)
                process.wait_for_log("Handling signal: hup")
                ended = number * processes
                wait_until(lambda ended=ended: process.log.count("Worker exiting") == ended)  # type: ignore[misc]
        check(real_redis, clients, tmp_path / "lines")
        process.signal(signal.SIGTERM)
        assert process.popen.wait(20) == 0


@pytest.mark.parametrize("app", ["bare", "app"])
def test_gunicorn_takes_other_apps_with_our_settings(redis_url: str, tmp_path: Path, app: str) -> None:
    """These apps are the floors of the benchmarks."""
    with gunicorn(environment(redis_url), tmp_path / "web.log", f"benchmarks.apps.floors:{app}") as (url, _):
        assert status_of(f"{url}/healthz") == 200
