"""How soon waiting requests are answered, and what they cost: `pipenv run bench waiting` (minutes).

First one client enqueues and waits; its peer is the shortest way to another process and back. Then thousands of
requests wait in one web process, which other clients use for something else, until a worker ends the jobs one by one.
"""

import asyncio
import json
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from http.client import HTTPConnection
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import psutil
from redis import Redis

from benchmarks.measure import percentile, ratios, spread, take_turns
from benchmarks.report import Rows, Section, Target
from tests.processes import environment, gunicorn, python, running, valkey_server, wait_until, worker

ROUNDS, REQUESTS = 9, 300
CROWD_ROUNDS, CROWD, OTHERS, WARM_UP = 3, 2000, 500, 100
#: Seconds between two requests of the crowd, and between two requests of the other clients.
CROWD_PAUSE, PAUSE = 0.004, 0.01

_JSON = {"Content-Type": "application/json"}


class Client:
    """One client over a connection that is kept alive."""

    def __init__(self, url: str) -> None:
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=30)

    def ask(self, path: str, body: str | None = None) -> Any:
        """The answer's body: data if it is JSON, else text.

        Raises:
            AssertionError: the answer was an error.
        """
        self._connection.request("GET" if body is None else "POST", path, body, _JSON)
        answer = self._connection.getresponse()
        text = answer.read().decode()
        assert answer.status < 300, text
        return json.loads(text) if answer.headers.get_content_type() == "application/json" else text


class Latencies:
    """Requests that each wait for another process, one after another."""

    def __init__(self, url: str, path: str) -> None:
        self._url, self._path = url, path
        #: ms
        self.p95s: list[float] = []

    def take_turn(self) -> float:
        """The median in ms."""
        client, taken = Client(self._url), []  # new: the last turn's connection may have been idle for too long
        for number in range(REQUESTS):
            start = time.perf_counter()
            answer = client.ask(self._path, json.dumps({"number": number}))
            taken.append((time.perf_counter() - start) * 1000)
            result = answer["result"] if "job_id" in answer else answer
            assert result == {"number": number}, answer
        self.p95s.append(percentile(taken, 95))
        return statistics.median(taken)


class Waiter(asyncio.Protocol):
    """A client that enqueues one job and waits for its end, on a connection of its own."""

    def __init__(self, number: int) -> None:
        self.number, self.answer, self.arrived = number, b"", 0.0
        self.is_done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.Transport)
        body = json.dumps(self.number)
        head = "Host: localhost\r\nConnection: close\r\nContent-Type: application/json"
        request = f"POST /enqueue/echo?wait=60 HTTP/1.1\r\n{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        transport.write(request.encode())

    def data_received(self, data: bytes) -> None:
        """Note when the last part of the answer arrived."""
        self.answer += data
        self.arrived = time.time()

    def connection_lost(self, error: Exception | None) -> None:
        """The answer is complete."""
        self.is_done.set_result(None)

    def read_end(self) -> float:
        """The time of the job's end, in seconds since 1970.

        Raises:
            AssertionError: the answer is not that of a job that finished with its payload as its result.
        """
        head, _, body = self.answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), self.answer
        status = json.loads(body)
        assert (status["job_status"], status["result"]) == ("finished", self.number), status
        return datetime.fromisoformat(status["ended_at"]).timestamp()


async def _wait_in_crowd(url: str) -> list[Waiter]:
    """Run the crowd; returns the waiters once each has its answer."""
    host, _, port = urlsplit(url).netloc.partition(":")
    loop = asyncio.get_running_loop()
    waiters = []
    for number in range(CROWD):
        _, waiter = await loop.create_connection(partial(Waiter, number), host, int(port))
        waiters.append(waiter)
        await asyncio.sleep(CROWD_PAUSE)
    await asyncio.gather(*(waiter.is_done for waiter in waiters))
    return waiters


class Crowd(NamedTuple):
    """The cost of a crowd of waiting requests, and its answers; times in ms."""

    #: MB by which the web process grew
    memory: float
    #: p99 of other requests during the wait
    poll: float
    other: float
    #: jobs/s that ended
    rate: float
    #: from the end of a job to the arrival of the answer
    lag_median: float
    lag_p99: float
    lag_most: float


def _ask_meanwhile(url: str) -> tuple[float, float]:
    """The p99 in ms of other clients' polls and of `GET /`, each measured from the time at which it was due."""
    client = Client(url)
    job_id = client.ask("/enqueue/echo", "0")["job_id"]
    taken: dict[str, list[float]] = {f"/check_status?job_id={job_id}": [], "/": []}
    due = time.perf_counter()
    for _ in range(OTHERS):
        for path, values in taken.items():
            due += PAUSE
            time.sleep(max(0, due - time.perf_counter()))
            answer = client.ask(path)
            values.append((time.perf_counter() - due) * 1000)
            assert answer == "Running!" if path == "/" else answer["job_status"] == "queued", answer
    poll, other = (percentile(values, 99) for values in taken.values())
    return poll, other


def _measure_crowd() -> Crowd:
    """Let a crowd wait in a new web process, send it other requests, and then let the crowd's jobs end."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(valkey_server(folder / "valkey", save=""))
        redis = stack.enter_context(Redis(port=server.port))
        env = environment(f"redis://127.0.0.1:{server.port}/0")
        pool = stack.enter_context(ThreadPoolExecutor(1))  # ends after the web server, whose end closes its connections
        url, process = stack.enter_context(gunicorn(env, folder / "web.log", "app.main:app"))
        web = psutil.Process(process.popen.pid).children()[0]
        stack.callback(web.kill)  # after a failure a normal end would take a minute, because requests still wait
        client = Client(url)
        for _ in range(WARM_UP):
            job_id = client.ask("/enqueue/echo?wait=0.001", "0")["job_id"]
            client.ask(f"/check_status?job_id={job_id}")
        memory = web.memory_info().rss
        crowd = pool.submit(asyncio.run, _wait_in_crowd(url))
        wait_until(lambda: crowd.done() or redis.llen("rq:queue:default") == WARM_UP + CROWD, what="the crowd's jobs")
        time.sleep(1)  # until the last one waits, and all are in their long pauses
        poll, other = _ask_meanwhile(url)
        memory = web.memory_info().rss - memory
        stack.enter_context(worker(env, folder / "worker.log"))
        waiters = crowd.result(60)
        ends = [waiter.read_end() for waiter in waiters]
        lags = [(waiter.arrived - end) * 1000 for waiter, end in zip(waiters, ends, strict=True)]
    return Crowd(
        memory=memory / 1e6,
        poll=poll,
        other=other,
        rate=(CROWD - 1) / (max(ends) - min(ends)),
        lag_median=statistics.median(lags),
        lag_p99=percentile(lags, 99),
        lag_most=max(lags),
    )


def measure_latency() -> tuple[Rows, list[Target], str]:
    """Rows for our service and the shortest way, the targets, and the version of Valkey."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(valkey_server(folder / "valkey", save=""))
        with Redis(port=server.port) as redis:
            valkey = redis.info("server").get("valkey_version", "?")
        env = environment(f"redis://127.0.0.1:{server.port}/0")
        url, _ = stack.enter_context(gunicorn(env, folder / "web.log", "app.main:app"))
        stack.enter_context(worker(env, folder / "worker.log"))
        echo_url, _ = stack.enter_context(gunicorn(env, folder / "echo.log", "benchmarks.apps.echo:app"))
        stack.enter_context(running(python("benchmarks.apps.echo"), env, folder / "echo_process.log"))
        ours, echo = Latencies(url, "/enqueue/echo?wait=10"), Latencies(echo_url, "/echo")
        sides = {"ours": ours.take_turn, "echo": echo.take_turn}
        take_turns(sides, 1)  # to warm up
        ours.p95s.clear()
        echo.p95s.clear()
        figures = take_turns(sides, ROUNDS)
    found = ratios(figures, "ours", "echo")
    median = figures["ours"]
    rows = [
        ("`POST /enqueue/echo?wait=10`, until the result is there", spread(median), spread(ours.p95s)),
        ("an echo by `LPUSH`, `BLMOVE`, `LPUSH`, `BLPOP`", spread(figures["echo"]), spread(echo.p95s)),
    ]
    targets = [
        Target("enqueue with `wait` to result, p50, ms", "≤ 5", spread(median), statistics.median(median) <= 5),
        Target("the same to a bare echo by lists", "≤ 2", spread(found), statistics.median(found) <= 2),
    ]
    return rows, targets, valkey


#: The reported figures of a crowd: the title of each, and its limit for the worst round.
CROWD_FIGURES = {
    "memory": ("memory of the web process above idle, MB", 60),
    "poll": ("p99 of others' `GET /check_status` meanwhile, ms", 100),
    "other": ("p99 of others' `GET /` meanwhile, ms", 100),
    "lag_most": ("from a job's end to its answer, most, ms", 250),
    "lag_p99": ("the same, p99", None),
    "lag_median": ("the same, median", None),
    "rate": ("jobs/s that ended then", None),
}


def measure_crowd() -> tuple[Rows, list[Target]]:
    """Rows for the cost of a crowd of waiting requests, and the targets."""
    rounds = [_measure_crowd() for _ in range(CROWD_ROUNDS)]
    rows, targets = [], []
    for name, (title, most) in CROWD_FIGURES.items():
        values = [getattr(each, name) for each in rounds]
        rows.append((title, spread(values, 1)))
        if most is not None:
            figure = f"{CROWD} requests waiting: {title}"
            targets.append(Target(figure, f"≤ {most} in each round", spread(values, 1), max(values) <= most))
    return rows, targets


def allow_files(count: int) -> None:
    """Let this process and its children have `count` files and sockets open.

    Raises:
        SystemExit: the system allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise SystemExit(f"This benchmark opens {count} files; the system allows {hard} (`ulimit -Hn`).")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def run() -> Section:
    """Measure."""
    allow_files(2 * CROWD)
    latency_rows, latency_targets, valkey = measure_latency()
    crowd_rows, crowd_targets = measure_crowd()
    return Section(
        title="Waiting",
        text=f"One client, one worker and nobody else: ms from the request to the result, {ROUNDS} rounds of {REQUESTS}"
        f" requests one after another over one connection; beside it a Flask app under the same gunicorn settings that"
        f" hands the payload to another process and waits for the answer by Redis' lists alone. Then {CROWD} requests"
        f" that come {1 / CROWD_PAUSE:.0f} a second and wait for their jobs in one web process, {CROWD_ROUNDS} times,"
        " each in a new one: what they take of memory, what other clients' requests take meanwhile"
        f" ({OTHERS} of each kind, {1 / PAUSE:.0f} a second, from when they were due), and, once one worker comes and"
        " runs the jobs as fast as it can, the time from `ended_at` of a job to the arrival of its answer.",
        tables=[
            [("one request", "p50, ms", "p95, ms"), *latency_rows],
            [(f"{CROWD} requests", "in the rounds"), *crowd_rows],
        ],
        targets=[*latency_targets, *crowd_targets],
        versions={"Valkey": valkey, **{name: version(name) for name in ("gunicorn", "gevent", "flask", "rq", "redis")}},
    )
