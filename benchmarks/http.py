"""Requests/s of the API beside a tutorial's app and beside floors: `pipenv run bench http` (minutes, 2 GB, wrk).

The server that is measured has one core for itself; wrk and Redis share the other one.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import requests
from redis import Redis

from app.config import Settings
from app.functions import count_words
from app.job_function import FUNCTIONS
from app.jobs.enqueue import Enqueuer
from app.main import create_app
from benchmarks.load import CONNECTIONS, find_wrk, send_load
from benchmarks.measure import on_core, ratios, spread, take_turns
from benchmarks.report import Section, Target
from tests.processes import end_run, environment, gunicorn, take_job, valkey_server

FUNCTION = FUNCTIONS[count_words.__name__]
ENQUEUE = f"/enqueue/{FUNCTION.name}"
PAYLOAD = {"text": "a word or two"}
RESULT = {"words": [["a", 1], ["word", 1]], "total": 4}
#: Use many short turns: within a minute the speed of a shared machine changes by more than the measured differences.
ROUNDS, SECONDS = 15, 1
QUEUED, BATCH = 1_000_000, 1000
SMALL, LARGE = 1000, 10_000_000


class Server(NamedTuple):
    """A web server, and its process that answers the requests."""

    url: str
    process: psutil.Process

    def ask(self, path: str, body: str | None = None) -> dict[str, Any]:
        """Send a GET, or a POST of this JSON; returns the JSON object of the answer."""
        kind = {"Content-Type": "application/json"}
        method = "GET" if body is None else "POST"
        answer = requests.request(method, self.url + path, data=body, headers=kind, timeout=9)
        assert answer.ok, answer.text
        return dict(answer.json())


class Turn(NamedTuple):
    """The result of a turn."""

    #: requests/s
    rate: float
    #: processor time of the server for one request
    microseconds: float
    #: the shares of a core that the server, wrk and Redis took
    shares: tuple[float, float, float]


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@dataclass
class Contestant:
    """A route under load."""

    server: Server
    redis: Redis
    #: makes the jobs that the requests need, and returns the path
    prepare: Callable[[], str]
    #: members that the answer must have
    expected: Mapping[str, Any]
    body: str | None = None
    #: whether each request makes a job
    enqueues: bool = False
    turns: list[Turn] = field(default_factory=list)

    def take_turn(self, seconds: int) -> float:
        """Run one turn; returns the requests/s.

        Raises:
            AssertionError: an answer was wrong, or the number of new jobs was.
        """
        path = self.prepare()
        answer = self.server.ask(path, self.body)
        assert self.expected.items() <= answer.items(), answer
        processes = self.server.process, psutil.Process(self.redis.info("server")["process_id"])
        queued, before = self._count(), [_cpu(process) for process in processes]
        load = send_load(self.server.url + path, seconds, self.body)
        server, redis = (_cpu(process) - then for process, then in zip(processes, before, strict=True))
        turn = Turn(
            rate=load.requests / load.seconds,
            microseconds=server / load.requests * 1e6,
            shares=(server / load.seconds, load.own_cpu / load.seconds, redis / load.seconds),
        )
        # A request that was under way when wrk ended makes a job without an answer.
        unknown = self._count_in_the_end() - queued - self.enqueues * load.requests
        assert 0 <= unknown <= self.enqueues * CONNECTIONS, f"{unknown} more jobs than answers"
        self.turns.append(turn)
        return turn.rate

    def _count(self) -> int:
        length: Any = self.redis.llen("rq:queue:default")
        return int(length)

    def _count_in_the_end(self) -> int:
        """Wait until no more jobs arrive, so that they do not disturb the next turn; returns their count."""
        before, count = -1, self._count()
        while count != before:
            time.sleep(0.2)
            before, count = count, self._count()
        return count

    def row(self) -> tuple[str, ...]:
        """The figures of this route for a table.

        On a busy machine the server's processor time for each request (µs) is more exact than the requests/s.
        """
        return (
            spread([turn.rate for turn in self.turns], 0),
            spread([turn.microseconds for turn in self.turns], 0),
            *(f"{statistics.median(share):.0%}" for share in zip(*(turn.shares for turn in self.turns), strict=True)),
        )


class Stage:
    """Starts servers. They end with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self._started = 0

    def _place(self) -> Path:
        self._started += 1
        return self._folder / str(self._started)

    def start_redis(self) -> Redis:
        """Start a Redis; returns its client."""
        server = self._stack.enter_context(valkey_server(self._place(), save=""))
        connection: Redis = self._stack.enter_context(Redis(port=server.port))
        return connection

    def start_web(self, redis: Redis, *args: str) -> Server:
        """Start gunicorn with these arguments on the other core."""
        port = redis.connection_pool.connection_kwargs["port"]
        env = environment(f"redis://127.0.0.1:{port}/0", MAX_QUEUE_LENGTH=10**9)
        with on_core(0):
            url, process = self._stack.enter_context(gunicorn(env, self._place(), *args))
        return Server(url, psutil.Process(process.popen.pid).children()[0])


def _empty(redis: Redis, path: str) -> str:
    redis.flushall()
    return path


def _poll_new(redis: Redis, server: Server, enqueue: str) -> str:
    """Enqueue the only job; returns the path that polls it."""
    redis.flushall()
    return f"/check_status?job_id={server.ask(enqueue, json.dumps(PAYLOAD))['job_id']}"


def _read_new(redis: Redis, server: Server) -> str:
    """Enqueue and end a job; returns the path of its result."""
    path = _poll_new(redis, server, ENQUEUE)
    assert end_run(redis, take_job(redis), value=RESULT) == "finished"
    return path.replace("check_status", "get_result")


def make_contestants(stage: Stage, redis: Redis, ours: Server) -> dict[str, Contestant]:
    """Our routes, the tutorial's, and the floors."""
    tutorial = stage.start_web(redis, "-c", "benchmarks/apps/threads_conf.py", "benchmarks.apps.tutorial:app")
    floors = stage.start_web(redis, "benchmarks.apps.floors:app")
    bare = stage.start_web(redis, "benchmarks.apps.floors:bare")
    queued, post = {"job_status": "queued"}, partial(Contestant, redis=redis, body=json.dumps(PAYLOAD))
    get = partial(Contestant, redis=redis)
    return {
        "POST /enqueue": post(ours, prepare=partial(_empty, redis, ENQUEUE), expected=queued, enqueues=True),
        "POST, tutorial": post(tutorial, prepare=partial(_empty, redis, "/enqueue"), expected={}, enqueues=True),
        "POST, one round trip": post(floors, prepare=partial(_empty, redis, "/ping"), expected=queued),
        "GET /check_status": get(ours, prepare=partial(_poll_new, redis, ours, ENQUEUE), expected=queued),
        "GET, tutorial": get(tutorial, prepare=partial(_poll_new, redis, tutorial, "/enqueue"), expected=queued),
        "GET, one round trip": get(floors, prepare=partial(_empty, redis, "/ping"), expected=queued),
        "GET /get_result": get(ours, prepare=partial(_read_new, redis, ours), expected=RESULT),
        "GET, a constant": get(floors, prepare=partial(_empty, redis, "/constant"), expected=queued),
        "GET, a constant, without Flask": get(bare, prepare=partial(_empty, redis, "/"), expected=queued),
    }


def _measure_flatness(name: str, little: Contestant, much: Contestant) -> tuple[tuple[str, ...], Target]:
    """A row and a target that compare a route with little and with much data; much must not cost more."""
    sides = {"little": partial(little.take_turn, SECONDS), "much": partial(much.take_turn, SECONDS)}
    take_turns(sides, 1)  # to warm up
    figures = take_turns(sides, ROUNDS)
    found = ratios(figures, "much", "little")
    row = (name, spread(figures["little"], 0), spread(figures["much"], 0), spread(found))
    return row, Target(
        f"{name}, requests/s, to the lesser one", "≥ 0.9", spread(found), statistics.median(found) >= 0.9
    )


def _poll_size(redis: Redis, server: Server, size: int, is_finished: bool) -> Contestant:
    """Polls of a job whose payload, and result if it has ended, have `size` bytes."""
    text = "x" * size
    job_id = server.ask("/enqueue/echo", json.dumps(text))["job_id"]
    if is_finished:
        assert end_run(redis, take_job(redis), value=text, ttl=3600) == "finished"
    path = f"/check_status?job_id={job_id}"
    return Contestant(server, redis, lambda: path, {"job_status": "finished" if is_finished else "queued"})


def _fill(redis: Redis) -> None:
    """Let QUEUED jobs wait."""
    enqueuer: Enqueuer = create_app(Settings(max_queue_length=10**9), redis).extensions["enqueuer"]
    for _ in range(QUEUED // BATCH):
        enqueuer.enqueue_many(FUNCTION, json.dumps([PAYLOAD] * BATCH).encode(), {})
    assert redis.llen("rq:queue:default") >= QUEUED


def measure_flatness(stage: Stage, redis: Redis, ours: Server) -> list[tuple[tuple[str, ...], Target]]:
    """Measure whether large jobs and long queues cost more."""
    found = []
    for is_finished in (True, False):
        redis.flushall()
        little, much = (_poll_size(redis, ours, size, is_finished) for size in (SMALL, LARGE))
        what = "payload and result" if is_finished else "payload"
        found.append(_measure_flatness(f"GET /check_status, {what} of 1 kB and 10 MB", little, much))
    full = stage.start_redis()
    theirs = stage.start_web(full, "app.main:app")
    poll = f"/check_status?job_id={theirs.ask(ENQUEUE, json.dumps(PAYLOAD))['job_id']}"
    _fill(full)
    queued, body = {"job_status": "queued"}, json.dumps(PAYLOAD)
    little = Contestant(ours, redis, partial(_poll_new, redis, ours, ENQUEUE), queued)
    much = Contestant(theirs, full, lambda: poll, queued)
    found.append(_measure_flatness("GET /check_status, 0 and 1,000,000 jobs queued", little, much))
    little = Contestant(ours, redis, partial(_empty, redis, ENQUEUE), queued, body, enqueues=True)
    much = Contestant(theirs, full, lambda: ENQUEUE, queued, body, enqueues=True)
    found.append(_measure_flatness("POST /enqueue, 0 and 1,000,000 jobs queued", little, much))
    return found


#: Our route, the one that it is compared with, and the least ratio of their requests/s.
TARGETS = [
    ("POST /enqueue", "POST, tutorial", 2.0),
    ("POST /enqueue", "POST, one round trip", 0.7),
    ("GET /check_status", "GET, tutorial", 2.5),
    ("GET /check_status", "GET, one round trip", 0.85),
]


def run() -> Section:
    """Measure."""
    find_wrk()
    with ExitStack() as stack:
        stack.enter_context(on_core(1))
        stage = Stage(stack)
        redis = stage.start_redis()
        ours = stage.start_web(redis, "app.main:app")
        contestants = make_contestants(stage, redis, ours)
        for contestant in contestants.values():  # to warm up
            contestant.take_turn(1)
            contestant.turns.clear()
        figures = take_turns({name: partial(each.take_turn, SECONDS) for name, each in contestants.items()}, ROUNDS)
        flat = measure_flatness(stage, redis, ours)
        valkey = redis.info("server").get("valkey_version", "?")
    targets = []
    for name, other, least in TARGETS:
        found = ratios(figures, name, other)
        aim, is_met = f"≥ {least:g}", statistics.median(found) >= least
        targets.append(Target(f"{name}, requests/s, to {other}", aim, spread(found), is_met))
    head = ("", "requests/s", "µs of the server's CPU a request", "server", "wrk", "Redis")
    return Section(
        title="Requests",
        text=f"Requests/s of one web process by wrk with {CONNECTIONS} connections that are kept alive, {ROUNDS} rounds"
        f" of {SECONDS} s each, Redis emptied before each turn; and the share of a core that each process took. The web"
        " server has one core for itself, wrk and Redis share the other: where the server took all of its core and the"
        " two others had room, it was the server that was measured. `POST /enqueue` is that of `count_words`. The"
        " tutorial is Flask and RQ as tutorials have it, under gunicorn with 8 threads; the floors answer a constant of"
        " the same size under our own gunicorn settings, some after a `PING` of Redis.",
        tables=[
            [head, *((name, *contestant.row()) for name, contestant in contestants.items())],
            [("", "requests/s, the lesser", "requests/s, the greater", "ratio"), *(row for row, _ in flat)],
            [
                ("the floor, one round trip", "requests/s, to the tutorial's", "the target of this service"),
                *(
                    (floor, spread(ratios(figures, floor, tutorial)), f"{least:g}")
                    for floor, (_, tutorial, least) in zip(
                        ("POST, one round trip", "GET, one round trip"), TARGETS[::2], strict=True
                    )
                ),
            ],
        ],
        targets=[*targets, *(target for _, target in flat)],
        versions={"Valkey": valkey, **{name: version(name) for name in ("gunicorn", "gevent", "flask", "rq", "redis")}},
        bars={name: statistics.median(found) for name, found in figures.items()},
    )
