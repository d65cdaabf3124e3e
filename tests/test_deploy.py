"""A deploy: processes are told to end and others take their place, while clients go on."""

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


def test_gunicorn_that_is_told_to_end_lets_nobody_wait_for_long(redis_url: str, tmp_path: Path) -> None:
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
        assert time.monotonic() - start < 30  # it would have waited for 60


class Balancer:
    """What a load balancer does: it asks each server whether it is ready, and sends requests to those that are."""

    def __init__(self) -> None:
        self.servers: list[str] = []
        self.ready: list[str] = []
        self.is_over = self.is_closed = False

    def look(self) -> None:
        """Go on until the last client has its last answer: one that finds nothing ready waits for what comes next."""
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
    """Enqueues and polls on connections that are kept open; notes what was acknowledged and what went wrong."""

    def __init__(self, balancer: Balancer, path: Path) -> None:
        super().__init__(daemon=True)
        self.balancer, self.path = balancer, path
        self.acknowledged: list[str] = []
        self.failures: list[str] = []

    def _choose(self) -> str:
        """One that is ready; where none is for a moment, as gunicorn loads the app anew, the request waits."""
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
    """No request failed, and each job ran once; how many there were."""
    assert [failure for client in clients for failure in client.failures] == []
    jobs = [job_id for client in clients for job_id in client.acknowledged]
    assert len(jobs) > 20
    wait_until(lambda: all(redis.hget(f"rq:job:{job_id}", "status") == b"finished" for job_id in jobs), 60)
    lines = Counter(path.read_text().splitlines())
    assert (len(lines), set(lines.values())) == (len(jobs), {1})
    return len(jobs)


def roll(real_redis: Redis, redis_url: str, tmp_path: Path, restarts: int) -> int:
    """Put new processes in the place of old ones so often, under load; how many jobs there were."""
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
    """Five times, with `pipenv run faults`."""
    roll(real_redis, redis_url, tmp_path, 1)


def test_reload_of_gunicorn_fails_no_request(real_redis: Redis, redis_url: str, tmp_path: Path) -> None:
    """SIGHUP: new processes with the new code, and the old ones end when they have answered."""
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
    """The floors of the benchmarks."""
    with gunicorn(environment(redis_url), tmp_path / "web.log", f"benchmarks.apps.floors:{app}") as (url, _):
        assert status_of(f"{url}/healthz") == 200
