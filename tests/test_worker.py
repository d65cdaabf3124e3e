"""Real `rq worker` processes on a real server: the jobs they run and refuse, and the failures they survive."""

import json
import os
import pickle
import pkgutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from base64 import b64decode
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
from redis import Redis
from redis.exceptions import RedisError
from rq import Callback, Retry
from rq.command import send_stop_job_command
from rq.exceptions import StopRequested
from rq.job import Dependency, Job
from rq.serializers import JSONSerializer

import app
from app.config import get_settings
from app.core import scripts, transitions
from app.core.job_ids import JobIds
from app.core.queue import Queue
from app.core.scripts import EVENTS_KEY, TERMINAL
from app.jobs.jobs import Jobs
from app.worker.channel import Channel
from app.worker.horses import WorkHorseHandle
from app.worker.take_ahead import PendingFinish
from app.worker.worker import Worker
from tests.processes import ROOT, Process, environment, python, running, valkey_server, wait_until, worker

SETTINGS: dict[str, Any] = {
    "WORKER_LEASE": 3,
    "MAX_CRASHES": 1,
    "MAX_RESULT_BYTES": 1000,
    "QUEUES": "high,default,low",
}


class Bench(NamedTuple):
    """A server, with helpers for tests. `redis` is `Any`: redis-py annotates commands with unions of all answers."""

    redis: Any
    url: str

    def enqueue(self, function: str, payload: Any = None, queue: str = "default", **options: Any) -> str:
        path = function if "." in function else f"tests.job_functions.{function}"
        return Queue(queue, connection=self.redis).enqueue(path, payload, **options).id

    def read(self, job_id: str) -> dict[str, Any]:
        """The job's hash, with the exception as `error`."""
        job: dict[str, Any] = {
            name.decode(): value.decode(errors="replace")
            for name, value in self.redis.hgetall(f"rq:job:{job_id}").items()
        }
        return job | {"error": json.loads(job.get("error", "{}"))}

    def wait_for(self, job_id: str, *statuses: str, seconds: float = 30) -> dict[str, Any]:
        """Wait until the job has one of these statuses; returns the job."""

        def has_it() -> bool:
            status = self.redis.hget(f"rq:job:{job_id}", "status")
            return status is not None and status.decode() in statuses

        wait_until(has_it, seconds, f"{job_id} {' or '.join(statuses)}: {self.read(job_id)}")
        return self.read(job_id)

    def end_of(self, job_id: str, status: str, seconds: float = 30) -> dict[str, Any]:
        """Wait until the job has ended, with exactly this status; returns the job."""
        job = self.wait_for(job_id, *TERMINAL, seconds=seconds)
        assert job["status"] == status, job
        return job

    def result_of(self, job_id: str) -> Any:
        """Wait until the job has finished; returns its return value."""
        self.end_of(job_id, "finished")
        ((_, result),) = self.redis.xrevrange(f"rq:results:{job_id}", count=1)
        return json.loads(b64decode(result.get(b"return_value", b"bnVsbA==")))

    def workers(self) -> set[bytes]:
        return set(self.redis.smembers("rq:workers"))


class Shop:
    """A bench and a worker that several tests share. A worker that a test killed is replaced for the next test."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.env = environment(bench.url, **SETTINGS)
        self._log = folder / "worker.log"
        self._worker = ExitStack()
        self.worker: Process | None = None

    def open(self) -> None:
        if self.worker is None:
            self.bench.redis.flushall()
            self.worker = self._worker.enter_context(worker(self.env, self._log))

    def close(self) -> None:
        if self.worker:
            self.worker.kill()
        self._worker.close()
        self.worker = None

    def check(self) -> None:
        """Assert that the worker is alive and runs jobs."""
        assert self.worker
        try:
            assert self.worker.popen.poll() is None, self.worker.log
            job_id = self.bench.enqueue("echo", "alive")
            assert self.bench.end_of(job_id, "finished")
        except AssertionError:
            self.close()
            raise


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    with valkey_server(folder) as server, Redis(port=server.port) as connection:
        shop = Shop(Bench(connection, f"redis://127.0.0.1:{server.port}/0"), folder)
        yield shop
        if shop.worker:
            assert shop.worker.stop() == 0
        shop.close()


@pytest.fixture
def bench(shop: Shop) -> Iterator[Bench]:
    """The shared server; the worker behind it must survive the test."""
    shop.open()
    yield shop.bench
    shop.check()


@pytest.fixture
def own(real_redis: Redis, redis_url: str) -> Bench:
    """An empty server without a worker, for tests that start and end their own."""
    return Bench(real_redis, redis_url)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def start_gated(bench: Bench, folder: Path) -> tuple[str, int, Path]:
    """Start a job that runs until a file exists; returns the job, its process and the file."""
    path, gate = folder / "pid", folder / "gate"
    job_id = bench.enqueue("write_pid_and_wait", {"path": str(path), "until": str(gate)})
    # Redis says `started` a moment before the worker knows of it.
    return job_id, int(wait_until(lambda: lines_of(path))[-1]), gate


def is_running(pid: int) -> bool:
    """Whether this process exists and is no zombie that its parent could reap."""
    try:
        # A process whose first thread has ended cannot be reaped while it has other threads.
        has_threads = len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
        return has_threads or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# Jobs that it runs


def test_worker_runs_jobs_in_the_order_of_its_queues(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    busy, _, gate = start_gated(bench, tmp_path)
    for queue in ("low", "default", "high", "low", "default", "high"):
        last = bench.enqueue("append_line", {"path": str(path), "line": queue}, queue)
    assert bench.read(busy)["status"] == "started"
    gate.touch()
    bench.end_of(last, "finished")
    wait_until(lambda: len(lines_of(path)) == 6)
    assert lines_of(path) == ["high", "high", "default", "default", "low", "low"]


def test_worker_keeps_data_that_a_function_loaded(bench: Bench) -> None:
    first, *others = (bench.result_of(bench.enqueue("use_model")) for _ in range(3))
    assert first["loads"] == 1
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    ("function", "payload", "result"),
    [
        ("echo", {"ä": [1, 2.5, None, True, "\0"]}, {"ä": [1, 2.5, None, True, "\0"]}),
        ("echo", None, None),
        ("sleep_async", [1], [1]),
        ("current_job_reads_redis", 1, True),
        ("use_types", {"day": "2026-02-03", "tags": ["b", "a"]}, {"type": "date", "year": 2026, "tags": ["a", "b"]}),
        ("app.functions.count_words", {"text": "a b a", "n": 1}, {"words": [["a", 2]], "total": 3}),
    ],
)
def test_worker_stores_the_return_value(bench: Bench, function: str, payload: Any, result: Any) -> None:
    assert bench.result_of(bench.enqueue(function, payload)) == result


def test_function_knows_its_job(bench: Bench) -> None:
    job_id = bench.enqueue("current_job", {"a": 1}, "low", job_timeout=77)
    expected = {"id": job_id, "origin": "low", "timeout": 77, "args": [{"a": 1}]}
    assert bench.result_of(job_id) == {**expected, "func": "tests.job_functions.current_job"}


def test_progress_is_seen_while_the_job_runs_and_after(bench: Bench, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    job_id = bench.enqueue("report", {"done": 3, "total": 10, "message": "half", "until": str(gate)})
    wait_until(lambda: bench.redis.hexists(f"rq:job:{job_id}", "progress"))
    job = bench.read(job_id)
    assert job["status"] == "started"
    assert json.loads(job["progress"]) == {"done": 3, "total": 10, "message": "half"}
    gate.touch()
    assert json.loads(bench.end_of(job_id, "finished")["progress"])["done"] == 3
    logged = [event for _, event in bench.redis.xrange(EVENTS_KEY) if event[b"job_id"] == job_id.encode()]
    assert [event[b"status"] for event in logged] == [b"queued", b"started", b"started", b"finished"]


def test_late_progress_of_an_earlier_job_is_not_shown_at_the_next_one(bench: Bench) -> None:
    bench.end_of(bench.enqueue("report_too_late"), "finished")
    assert "progress" not in bench.end_of(bench.enqueue("sleep_for", 0.5), "finished")


def test_last_progress_of_a_quick_job_is_kept(bench: Bench) -> None:
    job_id = bench.enqueue("report", {"done": 9, "total": 10})
    assert json.loads(bench.end_of(job_id, "finished")["progress"])["done"] == 9


# Jobs that it refuses


@pytest.mark.parametrize(
    "function",
    ["os.system", "builtins.eval", "subprocess.call", "tests.job_functions._load_model", "no.such.module.function"],
)
def test_worker_runs_nothing_but_job_functions(bench: Bench, tmp_path: Path, function: str) -> None:
    trace = tmp_path / "trace"
    payload = f"open({str(trace)!r}, 'w')" if function == "builtins.eval" else f"touch {trace}"
    job = bench.end_of(bench.enqueue(function, payload), "failed")
    assert job["error"] == {"type": "UnknownFunction", "message": f"{function!r} is not a job function here."}
    assert not trace.exists()


@pytest.mark.parametrize("hook", ["on_success", "on_failure", "on_stopped"])
@pytest.mark.parametrize("has_dependents", [False, True])
def test_worker_fails_a_job_with_a_callback_without_running_it(
    bench: Bench, tmp_path: Path, hook: str, has_dependents: bool
) -> None:
    path = tmp_path / "lines"
    # Prepare the job in a queue without a worker, and only then give it to the worker.
    callback: dict[str, Any] = {hook: Callback("os.getcwd")}
    job_id = bench.enqueue("append_line", {"path": str(path), "line": "ran"}, "aside", **callback)
    if has_dependents:
        bench.enqueue("echo", 1, depends_on=job_id)
    bench.redis.lmove("rq:queue:aside", "rq:queue:default")
    job = bench.end_of(job_id, "failed")
    assert job["error"]["type"] == "UnreadableJob"
    assert "callback" in job["error"]["message"]
    assert lines_of(path) == []


def good_hash() -> dict[str, Any]:
    data = zlib.compress(json.dumps(["tests.job_functions.echo", None, [1], {}]).encode())
    return {"status": "queued", "origin": "default", "data": data, "created_at": "2026-11-23T10:00:00.000000Z"}


POISON: dict[str, dict[str, Any]] = {
    "unknown status": {"status": "nonsense"},
    "empty status": {"status": ""},
    "status not UTF-8": {"status": b"\xff"},
    "data not JSON": {"data": zlib.compress(b"{")},
    "data not UTF-8": {"data": b"\xff\xfe\xfd"},
    "data empty": {"data": b""},
    "data null": {"data": b"null"},
    "data too short": {"data": b"[1]"},
    "data without a list": {"data": b'["tests.job_functions.echo", null, 5, {}]'},
    "data without a dict": {"data": b'["tests.job_functions.echo", null, [1], 5]'},
    "data with a list as function": {"data": b"[[], null, [1], {}]"},
    "data too deep": {"data": b"[" * 100_000},
    "pickled data": {"data": zlib.compress(pickle.dumps(("os.getpid", None, (), {})))},
    "timeout no number": {"timeout": "soon"},
    "timeout not UTF-8": {"timeout": b"\xff"},
    "timeout too large": {"timeout": "1" + "0" * 30},
    "enqueued_at no time": {"enqueued_at": "yesterday"},
    "enqueued_at not UTF-8": {"enqueued_at": b"\xff"},
    "crashes no number": {"crashes": "few"},
    "retries_left no number": {"retries_left": "many", "status": "nonsense"},
    "failure_ttl no number": {"failure_ttl": "1.5", "status": "nonsense"},
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
def test_worker_fails_a_job_that_cannot_be_read_and_goes_on(bench: Bench, poison: dict[str, Any]) -> None:
    job_id = f"poison-{time.monotonic_ns()}"
    bench.redis.hset(f"rq:job:{job_id}", mapping=good_hash() | poison)
    bench.redis.rpush("rq:queue:default", job_id)
    good = bench.enqueue("echo", "good")
    assert bench.result_of(good) == "good"
    job = bench.end_of(job_id, "failed")
    assert job["error"]["message"]
    assert bench.redis.zscore("rq:failed:default", job_id)


def test_worker_sets_a_key_of_another_type_aside_and_goes_on(bench: Bench, shop: Shop) -> None:
    bench.redis.set("rq:job:text", "x")
    bench.redis.rpush("rq:queue:default", "text", "gone")
    assert bench.result_of(bench.enqueue("echo", "good")) == "good"
    assert bench.redis.get("rq:job:text") == b"x"
    assert shop.worker
    assert "job text set aside" in shop.worker.log


@pytest.mark.parametrize(
    ("key", "members"),
    [("rq:scheduled:default", ["text", "gone"]), ("rq:wip:default", ["text:e", "gone:e", "nonsense", "corrupt:e"])],
)
def test_worker_is_not_held_up_by_poison_in_a_registry(bench: Bench, key: str, members: list[str]) -> None:
    bench.redis.set("rq:job:text", "x")
    bench.redis.hset("rq:job:corrupt", mapping={"crashes": "1.5", "status": "started"})
    bench.redis.hset("rq:execution:corrupt:e", mapping={"lease_until": "1"})
    bench.redis.zadd(key, dict.fromkeys(members, 1))
    # The worker looks at the registry in each tick.
    wait_until(lambda: bench.redis.zcard(key) == 0)
    bench.redis.delete("rq:job:text", "rq:job:corrupt", "rq:execution:corrupt:e")


WHERE = {
    "nan": "$.a[1] is nan",
    "infinity": "$ is inf",
    "datetime": "$.when is a datetime",
    "bytes": "$ is a bytes",
    "set": "$.a is a set",
    "int key": "$.a has the key 1, which is not a string",
    "surrogate": "$[0] has a lone surrogate",
    "surrogate key": "a key of $ has a lone surrogate",
    "object": "$ is a object",
    "huge integer": "4300",
    "cycle": "nested too deeply",
}


@pytest.mark.parametrize(("kind", "where"), WHERE.items())
def test_worker_fails_a_return_value_that_is_not_json(bench: Bench, kind: str, where: str) -> None:
    job_id = bench.enqueue("return_unjsonable", kind)
    job = bench.end_of(job_id, "failed")
    assert job["error"]["type"] == "ResultNotJSON"
    assert where in job["error"]["message"]


def test_worker_fails_a_return_value_that_is_too_large(bench: Bench) -> None:
    assert bench.result_of(bench.enqueue("return_bytes_of", 998)) == "x" * 998
    error = bench.end_of(bench.enqueue("return_bytes_of", 999), "failed")["error"]
    assert error == {
        "type": "ResultTooLarge",
        "message": "The return value has 1001 bytes as JSON; 1000 are allowed.",
    }


# Jobs that fail


@pytest.mark.parametrize(
    ("function", "payload", "error"),
    [
        ("fail", "no such image", {"type": "ValueError", "message": "no such image"}),
        ("die", {"how": "sys.exit"}, {"type": "SystemExit", "message": "3"}),
    ],
)
def test_exception_fails_the_job_with_its_class_and_text(
    bench: Bench, function: str, payload: Any, error: dict[str, str]
) -> None:
    job_id = bench.enqueue(function, payload)
    assert bench.end_of(job_id, "failed")["error"] == error
    job: Any = Job.fetch(job_id, connection=bench.redis, serializer=JSONSerializer)
    assert error["type"] in job.latest_result().exc_string


def test_payload_that_does_not_fit_fails_the_job(bench: Bench) -> None:
    error = bench.end_of(bench.enqueue("sleep_for", -1), "failed")["error"]
    assert error["type"] == "ValidationError"
    assert "greater than or equal to 0" in error["message"]


def test_stop_command_for_an_earlier_run_does_not_stop_a_later_run(bench: Bench, shop: Shop, tmp_path: Path) -> None:
    (name,) = wait_until(bench.workers)
    channel = f"rq:pubsub:{name.decode().removeprefix('rq:worker:')}"
    job_id, _, gate = start_gated(bench, tmp_path)
    assert bench.redis.publish(channel, json.dumps({"command": "stop-job", "job_id": job_id, "execution": "older"}))
    assert shop.worker
    shop.worker.wait_for_log(f"does not run job {job_id}")
    gate.touch()
    bench.end_of(job_id, "finished")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("exit", "exit code 0"),
        ("segfault", "SIGSEGV"),
        ("kill", "signal 9 (SIGKILL)"),
        ("real-time", "signal 40."),  # which has no name
    ],
)
def test_job_whose_process_dies_is_run_again_up_to_the_limit(
    bench: Bench, tmp_path: Path, how: str, reason: str
) -> None:
    path = tmp_path / "lines"
    job = bench.end_of(bench.enqueue("die", {"how": how, "path": str(path)}), "failed")
    assert lines_of(path) == [how] * (SETTINGS["MAX_CRASHES"] + 1)
    assert job["error"]["type"] == "WorkHorseDied"
    assert "died 2 times" in job["error"]["message"]
    assert reason in job["error"]["message"]


@pytest.mark.parametrize("has_dependents", [False, True], ids=["alone", "with a dependent"])
@pytest.mark.parametrize("function", ["die_once", "größe"])
def test_job_that_must_not_run_twice_is_failed_at_the_first_crash(
    bench: Bench, tmp_path: Path, function: str, has_dependents: bool
) -> None:
    path = tmp_path / "lines"
    # A crash is no exception, so retries do not apply, not even in RQ's own code.
    job_id = bench.enqueue(function, {"how": "kill", "path": str(path)}, "aside", retry=Retry(max=2))
    if has_dependents:
        bench.enqueue("echo", 1, depends_on=job_id)
    bench.redis.lmove("rq:queue:aside", "rq:queue:default")
    job = bench.end_of(job_id, "failed")
    assert lines_of(path) == ["kill"]
    assert job["crashes"] == "1"
    assert job["error"]["message"] == ("The job's process died, and the job may not be run again: signal 9 (SIGKILL).")


@pytest.mark.slow
def test_job_that_must_not_run_twice_is_failed_by_a_worker_that_never_ran_it(own: Bench, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    env = environment(own.url, WORKER_LEASE=3)
    with worker(env, tmp_path / "first.log") as first:
        job_id = own.enqueue("die_once", {"how": "sleep", "path": str(path)})
        wait_until(lambda: lines_of(path))
        first.kill()
    with worker(env, tmp_path / "second.log"):
        message = own.end_of(job_id, "failed", 40)["error"]["message"]
    assert lines_of(path) == ["sleep"]
    assert "may not be run again: its worker, " in message


def first_sigterm(own: Bench, process: Process) -> None:
    """Send SIGTERM and wait until the worker has seen it, because the kernel merges two pending signals into one."""
    (name,) = own.workers()
    process.signal(signal.SIGTERM)
    wait_until(lambda: own.redis.hexists(name, "shutdown_requested_date"))


@pytest.mark.parametrize("signals", [1, 2])
def test_job_that_must_not_run_twice_is_not_put_back_on_sigterm(own: Bench, tmp_path: Path, signals: int) -> None:
    path = tmp_path / "lines"
    seconds = 1 if signals == 1 else 60
    with worker(environment(own.url, WORKER_SHUTDOWN_SECONDS=seconds), tmp_path / "worker.log") as process:
        job_id = own.enqueue("die_once", {"how": "sleep", "path": str(path)})
        wait_until(lambda: lines_of(path))
        if signals == 2:
            first_sigterm(own, process)
            time.sleep(1.1)  # RQ counts two signals within a second as one
        process.stop()
    assert "may not be run again: its worker was stopped" in own.end_of(job_id, "failed", 1)["error"]["message"]
    assert own.redis.llen("rq:queue:default") == 0


@pytest.fixture
def stand_in() -> Iterator[tuple[Mock, Channel]]:
    """A fake work-horse, and its end of the channel."""
    ours, its = (Channel(end) for end in socket.socketpair())
    horse = Mock(spec=WorkHorseHandle, channel=ours, crash_limits={}, fresh=frozenset(), is_spent=False, jobs=0)
    horse.has_died.return_value = False
    yield horse, its
    ours.close()
    its.close()


def test_job_that_was_lost_before_it_began_is_not_run(real_redis: "Redis") -> None:
    """Such a job was taken ahead, and its worker was busy with other things for longer than the lease."""
    bench = Bench(real_redis, "")
    job_id = bench.enqueue("echo", 1)
    first = Worker(["default"], connection=real_redis)
    horse = Mock(spec=WorkHorseHandle, channel=Mock(), crash_limits={}, fresh=frozenset(), is_spent=False, jobs=0)
    first._horses.horse = horse
    horse.has_died.return_value = False
    taken = first.dequeue_job_and_maintain_ttl(None)
    assert taken
    (execution,) = (key.decode() for key in real_redis.scan_iter(f"rq:execution:{job_id}:*"))
    run = transitions.Run(job_id, execution.rpartition(":")[2], "default", first.name)
    failure = scripts.describe_failure("WorkHorseDied", "lost")
    assert transitions.release(real_redis, run, crashed=True, limit=3, failure=failure, failure_ttl=9) == "queued"
    first._runs[0]._taken_since -= 2  # seconds
    first.execute_job(*taken)
    assert not horse.channel.send.called
    assert bench.read(job_id)["status"] == "queued"


@pytest.mark.parametrize("is_taken", [False, True])
def test_job_does_not_begin_once_the_worker_has_to_stop(
    real_redis: "Redis", monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    """The signal comes while the work-horse becomes ready, before or after the job was taken."""
    bench = Bench(real_redis, "")
    job_id = bench.enqueue("echo", 1)
    ending = Worker(["default"], connection=real_redis)
    horse = Mock(spec=WorkHorseHandle, channel=Mock(), crash_limits={}, fresh=frozenset(), is_spent=False, jobs=0)

    def get_ready(*_: Any, **__: Any) -> WorkHorseHandle:
        ending._stop_requested = bool(bench.read(job_id)["status"] == ("started" if is_taken else "queued"))
        return horse

    monkeypatch.setattr(ending._horses, "get_ready", get_ready)
    if is_taken:
        taken = ending.dequeue_job_and_maintain_ttl(None)
        assert taken
        ending.execute_job(*taken)
    else:
        with pytest.raises(StopRequested):
            ending.dequeue_job_and_maintain_ttl(None)
    assert not horse.channel.send.called
    assert real_redis.lrange("rq:queue:default", 0, -1) == [job_id.encode()]
    job = bench.read(job_id)
    assert (job["status"], job.get("crashes")) == ("queued", None)
    assert real_redis.zcard("rq:wip:default") == 0


def test_outcome_that_was_sent_just_before_the_work_horse_died_counts(
    real_redis: "Redis", stand_in: tuple[Mock, Channel]
) -> None:
    """It arrives after the worker found the channel empty, and before it finds the process dead."""
    horse, its = stand_in

    def die() -> bool:
        if horse.jobs:
            its.send({"outcome": "finished"}, b"1")
        return bool(horse.jobs)

    horse.has_died.side_effect = die
    bench = Bench(real_redis, "")
    job_id = bench.enqueue("echo", 1)
    the_worker = Worker(["default"], connection=real_redis)
    the_worker._horses.horse = horse
    taken = the_worker.dequeue_job_and_maintain_ttl(None)
    assert taken
    the_worker.execute_job(*taken)
    the_worker._ahead.confirm_last_finish()
    assert bench.result_of(job_id) == 1
    assert "crashes" not in bench.read(job_id)


def test_recover_goes_on_if_a_later_part_of_the_tick_fails(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    """A full Redis fails like this. `recover` is held back only after a time without any answer."""
    the_worker = Worker(["default"], connection=redis)
    recovered: list[str] = []

    def recover(*_: Any) -> list[Any]:
        recovered.append("once")
        return []

    def promote(*_: Any) -> None:
        raise RedisError("full")

    monkeypatch.setattr(transitions, "recover", recover)
    monkeypatch.setattr(transitions, "promote", promote)
    for _ in range(3):
        the_worker._next_tick = 0.0
        with pytest.raises(RedisError):
            the_worker._tick()
        the_worker._last_tick -= 100  # seconds
    assert len(recovered) == 1
    the_worker._last_tick = the_worker._trusts_leases_from = time.monotonic()
    for _ in range(3):
        the_worker._next_tick = 0.0
        with pytest.raises(RedisError):
            the_worker._tick()
    assert len(recovered) == 4


def test_child_of_a_job_ends_with_the_worker(own: Bench, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        own.enqueue("leave_child", {"path": str(path)})
        pid = int(wait_until(lambda: lines_of(path))[0])
        process.kill()
        wait_until(lambda: not is_running(pid), what="its child's end")


@pytest.mark.parametrize("data", [b'["a\\qb", null, [1], {}]', b'["\xff", null, [1], {}]', b'["a\nb", null, [1], {}]'])
def test_worker_survives_a_function_path_that_is_not_json(bench: Bench, data: bytes) -> None:
    job_id = bench.enqueue("echo", 1, "aside")
    bench.redis.hset(f"rq:job:{job_id}", "data", data)
    bench.redis.lmove("rq:queue:aside", "rq:queue:default")
    assert bench.end_of(job_id, "failed")["error"]["type"] in ("UnreadablePayload", "UnknownFunction")


def test_crash_of_a_job_that_rq_cannot_read_is_not_retried(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "lines"
    job_id = bench.enqueue("die_once", {"how": "kill", "path": str(path)}, "aside", retry=Retry(max=3))
    bench.enqueue("echo", 1, depends_on=job_id)
    bench.redis.hset(f"rq:job:{job_id}", "created_at", "no date")
    bench.redis.lmove("rq:queue:aside", "rq:queue:default")
    assert bench.end_of(job_id, "failed")["crashes"] == "1"
    assert lines_of(path) == ["kill"]


@pytest.mark.parametrize("poison", ["dependents are a text", "dependent has no date"])
def test_job_with_poisoned_dependents_ends_and_the_worker_goes_on(bench: Bench, poison: str) -> None:
    job_id = bench.enqueue("echo", 1, "aside")
    if poison == "dependents are a text":
        bench.redis.set(f"rq:job:{job_id}:dependents", "text")
    else:
        dependent = bench.enqueue("echo", 1, depends_on=job_id)
        bench.redis.hset(f"rq:job:{dependent}", "created_at", "no date")
    bench.redis.lmove("rq:queue:aside", "rq:queue:default")
    bench.end_of(job_id, "finished")
    assert bench.result_of(bench.enqueue("echo", 2)) == 2


def test_memory_limit_that_is_too_small_stops_the_start(own: Bench, tmp_path: Path) -> None:
    env = environment(own.url, WORKER_MAX_MEMORY="16MiB")
    with running(python("rq.cli", "worker"), env, tmp_path / "worker.log") as process:
        assert process.popen.wait(30) == 1
        assert "WORKER_MAX_MEMORY is too little" in process.log


@pytest.mark.parametrize("where", ["itself", "child"])
def test_job_that_uses_too_much_memory_is_ended_with_that_reason(own: Bench, tmp_path: Path, where: str) -> None:
    env = environment(own.url, WORKER_MAX_MEMORY="150MiB", MAX_CRASHES=1)
    with worker(env, tmp_path / "worker.log") as process:
        job = own.end_of(own.enqueue("eat_memory", {"bytes": 300 * 2**20, "where": where}), "failed")
        assert own.end_of(own.enqueue("eat_memory", {"bytes": 2**20, "where": where}), "finished")
    assert job["error"]["type"] == "WorkHorseDied"
    assert job["error"]["message"].endswith("it used more memory than WORKER_MAX_MEMORY allows, 150.0MiB.")
    assert job["crashes"] == "2"
    assert process.popen.returncode == 0


@pytest.mark.slow
def test_memory_that_jobs_leave_behind_ends_the_work_horse_and_no_job(own: Bench, tmp_path: Path) -> None:
    # On a slow machine a leaking job itself may be killed while it runs, so many crashes are allowed.
    env = environment(own.url, WORKER_MAX_MEMORY="150MiB", MAX_CRASHES=100)
    path = tmp_path / "pids"
    with worker(env, tmp_path / "worker.log"):
        for _ in range(3):
            leaking = own.enqueue("leak_memory", {"bytes": 120 * 2**20, "path": str(path)}, "aside")
            blameless = own.enqueue("sleep_for", 0.3, "aside")  # longer than the time between two checks of the memory
            own.redis.rename("rq:queue:aside", "rq:queue:default")
            own.end_of(leaking, "finished")
            assert "crashes" not in own.end_of(blameless, "finished")
    assert len(set(lines_of(path))) > 1


def test_death_of_a_work_horse_is_seen_although_its_child_lives_on(bench: Bench) -> None:
    error = bench.end_of(bench.enqueue("die_beside_a_child", job_timeout=600), "failed")["error"]
    assert "exit code 7" in error["message"]


@pytest.mark.parametrize(("how", "code"), [("return", 0), ("raise", 1)])
def test_process_that_a_function_forked_ends_with_the_function(bench: Bench, how: str, code: int) -> None:
    before, after, found = bench.result_of(bench.enqueue("fork", how, job_timeout=10))
    assert (before, found) == (after, code)


def test_death_of_an_idle_work_horse_is_counted_at_no_job(bench: Bench, shop: Shop, tmp_path: Path) -> None:
    assert shop.worker
    process, line = shop.worker, "the idle work-horse died"
    path = tmp_path / "pid"
    bench.end_of(bench.enqueue("write_pid", {"path": str(path)}), "finished")
    deaths = process.log.count(line)
    os.kill(int(path.read_text()), signal.SIGKILL)
    # The worker checks each second. A job that it sends before the fork server reports the death counts as begun.
    wait_until(lambda: process.log.count(line) > deaths, what=line)
    job_id = bench.enqueue("echo", 1)
    assert "crashes" not in bench.end_of(job_id, "finished")


def test_timeout_is_raised_inside_the_function(bench: Bench) -> None:
    job = bench.end_of(bench.enqueue("sleep_for", 30, job_timeout=1), "failed", 25)
    assert job["error"] == {"type": "JobTimeoutException", "message": "The job ran longer than its limit of 1 s."}


@pytest.mark.slow
def test_function_that_swallows_its_timeout_is_killed(bench: Bench) -> None:
    job = bench.end_of(bench.enqueue("swallow_timeout", 60, job_timeout=1), "failed", 40)
    message = "The job ran longer than its limit of 1 s, and its process was killed."
    assert job["error"] == {"type": "JobTimeoutException", "message": message}


def test_retries_run_the_job_again_at_once_or_after_a_pause(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.enqueue("fail", "again", retry=Retry(max=2, interval=[0, 1]))
    job = bench.end_of(job_id, "failed")
    assert job["retries_left"] == "0"
    assert [event[b"status"] for _, event in bench.redis.xrange(EVENTS_KEY) if event[b"job_id"] == job_id.encode()] == [
        *[b"queued", b"started", b"queued", b"started", b"scheduled", b"queued", b"started", b"failed"],
    ]


# Stopping a job


@pytest.mark.parametrize("has_dependents", [False, True])
def test_stop_command_ends_the_running_job(bench: Bench, tmp_path: Path, has_dependents: bool) -> None:
    path = tmp_path / "pid"
    job_id = bench.enqueue("write_pid", {"path": str(path), "seconds": 50})
    if has_dependents:
        bench.enqueue("echo", 1, depends_on=job_id)
    wait_until(lambda: lines_of(path))  # Redis says `started` a moment before the worker knows of it
    send_stop_job_command(bench.redis, job_id, serializer=JSONSerializer)
    assert bench.end_of(job_id, "stopped")["error"]["type"] == "JobStopped"
    assert bench.redis.zscore("rq:failed:default", job_id)


def test_cancel_of_a_running_job_ends_the_run(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    job_id = bench.enqueue("write_pid", {"path": str(path), "seconds": 50})
    pid = int(wait_until(lambda: lines_of(path))[0])
    Job.fetch(job_id, connection=bench.redis, serializer=JSONSerializer).cancel()
    wait_until(lambda: not is_running(pid))
    assert bench.result_of(bench.enqueue("echo", "next")) == "next"
    assert bench.read(job_id)["status"] == "canceled"
    assert not bench.redis.exists(f"rq:results:{job_id}")


def cancel(bench: Bench, job_id: str) -> str:
    return transitions.cancel(bench.redis, job_id, None, 100)


def test_cancel_through_the_api_ends_the_run_at_once(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    job_id = bench.enqueue("write_pid", {"path": str(path), "seconds": 50})
    pid = int(wait_until(lambda: lines_of(path))[0])
    assert cancel(bench, job_id) == "started"
    assert bench.end_of(job_id, "stopped")["error"]["type"] == "JobStopped"
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("payload", "status", "pause"),
    [
        ({"how": "give up"}, "failed", 0),
        ({"how": "again", "after": 500}, "scheduled", 500),
        ({"how": "again"}, "scheduled", 300),
    ],
)
def test_function_decides_about_another_try(
    bench: Bench, shop: Shop, payload: dict[str, Any], status: str, pause: int
) -> None:
    start = time.time()
    # The API writes the `retries` of a job function. This job is enqueued with RQ's own code, so it needs RQ's `retry`.
    job_id = bench.enqueue("foresee", payload, retry=Retry(max=3, interval=300))
    job = bench.wait_for(job_id, status, *TERMINAL)
    assert job["status"] == status
    if status == "scheduled":
        assert job["retries_left"] == "2"
        due = bench.redis.zscore("rq:scheduled:default", job_id)
        assert due is not None
        assert start <= due - pause <= time.time()
        assert cancel(bench, job_id) == "canceled"
    else:
        assert job["retries_left"] == "3"
        assert job["error"] == {"type": "GiveUp", "message": "no such user"}


def test_malformed_commands_do_not_deafen_the_worker(bench: Bench) -> None:
    (name,) = wait_until(bench.workers)
    channel = f"rq:pubsub:{name.decode().removeprefix('rq:worker:')}"
    wait_until(lambda: bench.redis.pubsub_channels() == [channel.encode()])
    for garbage in (b"x", b"\xff", b"[]", b"{}", b'{"command": "stop-job"}', b'{"command": "stop-job", "job_id": [1]}'):
        bench.redis.publish(channel, garbage)
    job_id = bench.enqueue("sleep_for", 50)
    bench.wait_for(job_id, "started")

    def is_stopped() -> bool:
        # Send it repeatedly: Redis says `started` a moment before the worker knows, and RQ does not keep messages.
        assert bench.redis.publish(channel, json.dumps({"command": "stop-job", "job_id": job_id})) == 1
        return bool(bench.read(job_id)["status"] == "stopped")

    wait_until(is_stopped)


def test_stop_is_not_lost_while_an_earlier_job_is_being_ended(
    real_redis: "Redis", stand_in: tuple[Mock, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the later job runs, RQ's code ends the earlier one, which was canceled and has a dependent."""
    horse, its = stand_in
    horse.kill.side_effect = lambda *_: its.close()
    bench = Bench(real_redis, "")
    busy = Worker(["default"], connection=real_redis)
    busy._horses.horse = horse
    earlier = bench.enqueue("echo", 1)
    bench.enqueue("echo", 1, depends_on=earlier)
    transitions.take(real_redis, busy.name, "e", 30, ["default"])
    assert cancel(bench, earlier) == "started"
    later = bench.enqueue("echo", 2)
    taken = busy.dequeue_job_and_maintain_ttl(None)
    assert taken
    busy._ahead.pending = PendingFinish(
        transitions.Run(earlier, "e", "default", busy.name),
        transitions.Ending("finished", 9, 9),
        has_unread_answer=False,
    )
    finish = transitions.finish

    def finish_as_a_stop_comes(*args: Any) -> str:
        busy.handle_payload({"data": json.dumps({"command": "stop-job", "job_id": later}).encode()})
        return finish(*args)

    monkeypatch.setattr(transitions, "finish", finish_as_a_stop_comes)
    busy.execute_job(*taken)
    assert [bench.read(job_id)["status"] for job_id in (earlier, later)] == ["stopped", "stopped"]


def test_stopped_job_does_not_keep_other_jobs_from_running(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "ran"
    stopped = [bench.enqueue("sleep_for", 0.02) for _ in range(10)]
    neighbours = [bench.enqueue("append_line", {"path": str(path), "line": str(number)}) for number in range(10)]
    for job_id in stopped:
        bench.wait_for(job_id, "started", *TERMINAL)
        cancel(bench, job_id)
    for job_id in neighbours:
        bench.end_of(job_id, "finished")
    assert sorted(lines_of(path)) == sorted(map(str, range(10)))


def test_delayed_job_runs_when_it_is_due(bench: Bench) -> None:
    jobs: dict[str, Any] = {"later": {"data": Job.create("tests.job_functions.echo", (1,), connection=bench.redis,
                                                         serializer=JSONSerializer).to_dict()["data"]}}  # fmt: skip
    before = time.time()
    enqueued = transitions.enqueue(bench.redis, "default", jobs, {"origin": "default"}, limit=100, delay=1.3)
    assert isinstance(enqueued, transitions.Created)
    assert enqueued.status == "scheduled"
    job = bench.end_of("later", "finished")
    assert datetime.fromisoformat(job["started_at"]).timestamp() >= before + 1.3


def test_worker_lets_jobs_that_rq_canceled_expire(own: Bench, tmp_path: Path) -> None:
    canceled, gone, ours = (own.enqueue("echo", 1) for _ in range(3))
    for job_id in (canceled, gone):
        Job.fetch(job_id, connection=own.redis, serializer=JSONSerializer).cancel()
    own.redis.delete(f"rq:job:{gone}")
    assert cancel(own, ours) == "canceled"
    assert own.redis.ttl(f"rq:job:{canceled}") == -1
    with worker(environment(own.url, FAILURE_TTL=500), tmp_path / "worker.log"):
        wait_until(lambda: own.redis.ttl(f"rq:job:{canceled}") > 0)
        wait_until(lambda: own.redis.zscore("rq:canceled:default", gone) is None)
    assert own.redis.ttl(f"rq:job:{canceled}") <= 500
    assert own.redis.ttl(f"rq:job:{ours}") <= 100
    assert own.redis.zcard("rq:canceled:default") == 2


def test_worker_skips_a_long_row_of_canceled_jobs(bench: Bench) -> None:
    with bench.redis.pipeline() as pipeline:
        pipeline.rpush("rq:queue:default", *[f"gone-{number}" for number in range(2500)])
        pipeline.execute()
    assert bench.result_of(bench.enqueue("echo", "next")) == "next"


def test_suspended_worker_takes_nothing_until_resumed(bench: Bench, shop: Shop) -> None:
    subprocess.run(python("rq.cli", "suspend"), env=shop.env, cwd=ROOT, check=True, capture_output=True)
    (name,) = bench.workers()
    wait_until(lambda: bench.redis.hget(name, "state") == b"suspended")
    job_id = bench.enqueue("echo", 1)
    # The worker checks each second whether it may go on.
    time.sleep(1.2)
    assert bench.read(job_id)["status"] == "queued"
    subprocess.run(python("rq.cli", "resume"), env=shop.env, cwd=ROOT, check=True, capture_output=True)
    assert bench.result_of(job_id) == 1


def test_worker_signs_on_again_after_a_flush(bench: Bench) -> None:
    names = bench.workers()
    assert len(names) == 1
    bench.redis.flushall()
    wait_until(lambda: bench.workers() == names)
    (name,) = names
    fields = bench.redis.hkeys(name)
    assert {b"birth", b"queues", b"pid", b"hostname"} <= set(fields)
    assert bench.redis.ttl(name) > 0
    assert bench.redis.smembers("rq:workers:high") == names


# The end of a worker


def start_write_pid(own: Bench, path: Path, seconds: float, **options: Any) -> tuple[str, int]:
    """Start a job; returns its id and the process of the work-horse."""
    job_id = own.enqueue("write_pid", {"path": str(path), "seconds": seconds}, **options)
    return job_id, int(wait_until(lambda: lines_of(path))[-1])


def test_sigterm_lets_the_running_job_end(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        job_id, _, gate = start_gated(own, tmp_path)
        waiting = own.enqueue("echo", 1)
        first_sigterm(own, process)
        gate.touch()
        assert process.popen.wait(30) == 0
        assert own.read(job_id)["status"] == "finished"
        assert own.read(waiting)["status"] == "queued"
        assert own.redis.lrange("rq:queue:default", 0, -1) == [waiting.encode()]
        assert own.workers() == set()


def put_back(own: Bench, job_id: str, pid: int) -> None:
    assert own.redis.lrange("rq:queue:default", 0, -1) == [job_id.encode()]
    job = own.read(job_id)
    assert job["status"] == "queued"
    assert "crashes" not in job
    assert own.redis.zcard("rq:wip:default") == 0
    assert not is_running(pid)
    assert own.workers() == set()


def test_sigterm_puts_a_job_back_that_runs_too_long(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url, WORKER_SHUTDOWN_SECONDS=1), tmp_path / "worker.log") as process:
        job_id, pid = start_write_pid(own, tmp_path / "pid", 50)
        assert process.stop() == 0
        put_back(own, job_id, pid)


def test_second_sigterm_puts_the_job_back_at_once(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url, WORKER_SHUTDOWN_SECONDS=600), tmp_path / "worker.log") as process:
        job_id, pid = start_write_pid(own, tmp_path / "pid", 50)
        first_sigterm(own, process)
        time.sleep(1.1)  # RQ counts two signals within a second as one
        process.stop()
        put_back(own, job_id, pid)


def test_death_of_a_worker_ends_its_work_horse_and_another_runs_the_job_again(own: Bench, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    env = environment(own.url, WORKER_LEASE=3)
    with worker(env, tmp_path / "first.log") as first:
        job_id, pid, gate = start_gated(own, tmp_path)
        first.kill()
        wait_until(lambda: not is_running(pid))
        gate.touch()
        with worker(env, tmp_path / "second.log"):
            wait_until(lambda: len(lines_of(path)) == 2, 40, "the second run")
            job = own.end_of(job_id, "finished")
    assert job["crashes"] == "1"
    assert len(set(lines_of(path))) == 2


def test_burst_worker_runs_the_retry_of_its_last_job(own: Bench, tmp_path: Path) -> None:
    job_id = own.enqueue("foresee", {"how": "again"}, retry=Retry(max=2))
    with running(python("rq.cli", "worker", "--burst"), environment(own.url), tmp_path / "worker.log") as process:
        assert process.popen.wait(30) == 0
    job = own.read(job_id)
    assert (job["status"], job["retries_left"]) == ("failed", "0")


def test_closed_stdout_does_not_harm_the_next_job(own: Bench, tmp_path: Path) -> None:
    path = tmp_path / "pids"
    write_pid = "write_pid", {"path": str(path), "seconds": 0}
    jobs = [
        own.enqueue(*write_pid),
        own.enqueue("close_stdout"),
        own.enqueue("log_something", "x"),
        own.enqueue(*write_pid),
    ]
    with running(python("rq.cli", "worker", "--burst"), environment(own.url), tmp_path / "worker.log") as process:
        assert process.popen.wait(30) == 0
    for job in map(own.read, jobs):
        assert job["status"] == "finished"
        assert "crashes" not in job
    assert len(set(lines_of(path))) == 1  # and no new process was started


def test_burst_worker_ends_when_the_queues_are_empty(own: Bench, tmp_path: Path) -> None:
    jobs = [own.enqueue("echo", number) for number in range(3)]
    with running(python("rq.cli", "worker", "--burst"), environment(own.url), tmp_path / "worker.log") as process:
        assert process.popen.wait(30) == 0
    assert [own.result_of(job_id) for job_id in jobs] == [0, 1, 2]


def test_worker_for_one_job_leaves_the_next_to_others(own: Bench, tmp_path: Path) -> None:
    """The worker takes the next job in the round trip that ends the first, and has to give it back."""
    first, second = (own.enqueue("echo", number) for number in range(2))
    command = python("rq.cli", "worker", "--max-jobs", "1")
    with running(command, environment(own.url), tmp_path / "worker.log") as process:
        assert process.popen.wait(30) == 0
    assert own.read(first)["status"] == "finished"
    assert own.read(second)["status"] == "queued"
    assert "crashes" not in own.read(second)
    assert own.redis.lrange("rq:queue:default", 0, -1) == [second.encode()]


def assert_hears_commands(own: Bench) -> None:
    """Assert that the worker still gets RQ's commands, which come over a subscription that must have been renewed."""
    job_id = own.enqueue("sleep_for", 50)
    own.wait_for(job_id, "started")

    def stop() -> bool:
        send_stop_job_command(own.redis, job_id, serializer=JSONSerializer)
        return bool(own.read(job_id)["status"] == "stopped")

    wait_until(stop, what="the command to be heard")


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_worker_survives_the_death_of_redis(tmp_path: Path, busy: bool) -> None:
    with valkey_server(tmp_path / "valkey", appendonly="yes", appendfsync="always") as server:
        port = server.port
        with Redis(port=port) as connection:
            own = Bench(connection, f"redis://127.0.0.1:{port}/0")
            with worker(environment(own.url), tmp_path / "worker.log") as process:
                assert own.result_of(own.enqueue("echo", "before")) == "before"
                path = tmp_path / "pid"
                job_id = start_write_pid(own, path, 1.5)[0] if busy else ""
                server.terminate()
                process.wait_for_log("trying again")
                server.start(timeout=60)

                def answers() -> bool:
                    try:
                        return bool(connection.ping())
                    except RedisError:
                        return False

                wait_until(answers)
                if busy:
                    own.end_of(job_id, "finished")
                    assert len(lines_of(path)) == 1
                assert own.result_of(own.enqueue("echo", "after")) == "after"
                assert_hears_commands(own)
                assert process.stop() == 0


@pytest.mark.slow
def test_worker_hears_commands_after_redis_stalled(own: Bench, tmp_path: Path) -> None:
    """RQ's subscription ends for good on a timeout; RQ renews only a lost connection (worker/base.py)."""
    with worker(environment(own.url), tmp_path / "worker.log"):
        assert own.result_of(own.enqueue("echo", "before")) == "before"
        # The pause is longer than the worker waits for an answer when it subscribes again.
        with own.redis.pipeline(transaction=False) as pipeline:
            pipeline.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            pipeline.execute_command("CLIENT", "PAUSE", 6500)
            pipeline.execute()
        wait_until(own.redis.ping)
        assert_hears_commands(own)


# Start


@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ("no.such.module", "there is no module 'no.such.module'"),
        ("broken_functions", "this module is broken"),
        ("app.functions,twice", "Two job functions are named count_words"),
    ],
)
def test_worker_that_cannot_load_the_functions_ends_with_a_sentence(
    own: Bench, tmp_path: Path, modules: str, sentence: str
) -> None:
    (tmp_path / "broken_functions.py").write_text("raise ImportError('this module is broken')\n")
    (tmp_path / "twice.py").write_text(
        "from app.job_function import job_function\n@job_function()\ndef count_words(payload): ...\n"
    )
    env = environment(own.url, FUNCTION_MODULES=modules, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    with running(python("rq.cli", "worker"), env, tmp_path / "worker.log") as process:
        assert process.popen.wait(30) not in (0, None)
        assert sentence in process.log
        assert "The work-horse cannot load the job functions" in process.log
    assert own.workers() == set()


@pytest.mark.parametrize("module", ["app.worker", "app.worker.work_horse", "app.functions", "app.job_function"])
def test_no_web_framework_is_loaded_with(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'flask', 'apiflask', 'werkzeug', 'gevent'}} & set(sys.modules)))"
    # Coverage would load gevent into the process.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


WATCH = """
import importlib, sys, threading
sys.addaudithook(lambda event, args: print(module, event) if event in {
    "socket.connect", "socket.bind", "_thread.start_new_thread", "os.fork", "subprocess.Popen"} else None)
for module in sys.argv[1:]:
    importlib.import_module(module)
print(threading.active_count())
"""


def test_import_of_any_module_opens_no_connection_and_starts_no_thread() -> None:
    modules = ["app", *(module.name for module in pkgutil.walk_packages(app.__path__, "app."))]
    done = subprocess.run([sys.executable, "-c", WATCH, *modules], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


# Attacks that a review found


def test_job_that_names_a_webhook_of_rq_is_failed_and_nothing_is_sent(bench: Bench) -> None:
    with socket.create_server(("127.0.0.1", 0)) as receiver:
        receiver.settimeout(1)
        job_id = bench.enqueue("echo", 1, "aside")
        url = f"http://127.0.0.1:{receiver.getsockname()[1]}/"
        hook = {"url": url, "job_status": "failed", "method": "GET", "timeout": 5}
        bench.redis.hset(f"rq:job:{job_id}", "webhooks", json.dumps([hook]))
        bench.redis.lmove("rq:queue:aside", "rq:queue:default")
        assert bench.end_of(job_id, "failed")["error"]["type"] == "UnreadableJob"
        with pytest.raises(TimeoutError):
            receiver.accept()


def test_stop_commands_without_a_running_job_do_no_harm(bench: Bench, shop: Shop) -> None:
    (name,) = wait_until(bench.workers)
    channel = f"rq:pubsub:{name.decode().removeprefix('rq:worker:')}"
    for command in ("kill-horse", "stop-job", "kill-horse"):
        job_id = bench.enqueue("sleep_for", 0.01)
        for _ in range(20):
            bench.redis.publish(channel, json.dumps({"command": command, "job_id": job_id}))
        bench.wait_for(job_id, *TERMINAL)
    assert shop.worker
    log = shop.worker
    # Wait for all commands, so that none hits a job of the next test. `bench` then checks that the worker works.
    wait_until(lambda: log.log.count("Received kill horse command") >= 40 or log.popen.poll() is not None)


def test_worker_runs_a_job_whose_other_keys_have_another_type(bench: Bench) -> None:
    job_id = bench.enqueue("echo", 1, "aside")
    for name in ("executions", "results"):
        bench.redis.set(f"rq:{name}:{job_id}", "text")
    bench.redis.lmove("rq:queue:aside", "rq:queue:default")
    assert bench.result_of(job_id) == 1


@pytest.mark.parametrize("key", ["rq:queue:default", "rq:wip:default"])
def test_worker_survives_an_id_that_is_not_utf8(bench: Bench, key: str) -> None:
    if key == "rq:queue:default":
        bench.redis.hset(b"rq:job:\xff", mapping={"status": "queued", "data": "x", "origin": "default"})
        bench.redis.rpush(key, b"\xff")
        wait_until(lambda: bench.redis.hget(b"rq:job:\xff", "status") == b"failed")
    else:
        bench.redis.zadd(key, {b"\xff:\xfe": 1})
        wait_until(lambda: not bench.redis.zcard(key))
    assert bench.result_of(bench.enqueue("echo", "next")) == "next"


@pytest.mark.slow
def test_worker_survives_a_full_redis(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        jobs = [own.enqueue("sleep_for", 0.5) for _ in range(4)]
        own.wait_for(jobs[0], "started", "finished")
        own.redis.config_set("maxmemory", 1)
        try:
            process.wait_for_log("command not allowed when used memory > 'maxmemory'")
        finally:
            own.redis.config_set("maxmemory", 0)
        for job_id in jobs:
            own.end_of(job_id, "finished")
        assert process.popen.poll() is None


def test_worker_starts_no_scheduler_of_rq(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url), tmp_path / "worker.log", "--with-scheduler") as process:
        assert "needs no scheduler" in process.log
        own.end_of(own.enqueue("echo"), "finished")
        assert not own.redis.keys("rq:scheduler*")


@pytest.mark.slow
def test_work_horse_that_does_not_read_is_replaced(own: Bench, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with worker(environment(own.url), tmp_path / "worker.log"):
        own.end_of(own.enqueue("write_pid", {"path": str(path)}), "finished")
        os.kill(int(path.read_text()), signal.SIGSTOP)
        job_id = own.enqueue("echo", "x" * 3_000_000)
        job = own.end_of(job_id, "finished")
        assert job["crashes"] == "1"


def test_retried_job_with_a_dependent_that_finishes_shows_no_error(own: Bench, tmp_path: Path) -> None:
    path = tmp_path / "runs"
    first = own.enqueue("fail_once", {"path": str(path)}, retry=Retry(max=1))
    second = own.enqueue("echo", 2, depends_on=first)
    with worker(environment(own.url), tmp_path / "worker.log"):
        own.end_of(second, "finished")
    own.end_of(first, "finished")
    jobs = Jobs(get_settings(), own.redis, JobIds(own.redis))
    assert jobs.read_status(first, None).error is None


def test_crash_limit_of_a_job_with_dependents_is_handled_as_rq_does(own: Bench, tmp_path: Path) -> None:
    first = own.enqueue("die", {"how": "exit"})
    allowed = Dependency(jobs=[first], allow_failure=True)
    second = own.enqueue("echo", 2, depends_on=allowed)
    with worker(environment(own.url, MAX_CRASHES=0), tmp_path / "worker.log"):
        own.end_of(second, "finished")
    assert own.end_of(first, "failed")["error"]["type"] == "WorkHorseDied"


def test_worker_truncates_long_texts_of_a_function(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url), tmp_path / "worker.log"):
        job_id = own.enqueue("report", {"done": 1, "total": 2, "message": "x" * 100_000})
        progress = json.loads(own.end_of(job_id, "finished")["progress"])
        assert progress["message"] == "x" * 500
        own.end_of(own.enqueue("fail", "y" * 300_000), "failed")
    assert len((tmp_path / "worker.log").read_text()) < 100_000
