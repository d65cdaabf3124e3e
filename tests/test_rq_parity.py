"""Compare the writes of each script with those of RQ for the same transition, key by key.

If an upgrade of RQ writes something else, a test fails. `DIFFERENT` lists the intended differences, with reasons.
"""

import base64
import contextlib
import json
import os
import re
import subprocess
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import rq
from redis import Redis
from rq.executions import Execution
from rq.group import Group
from rq.job import Job, Retry
from rq.serializers import JSONSerializer
from rq.utils import now

from app.core import transitions
from app.core.queue import Queue
from app.core.scripts import Failure
from app.core.transitions import Ending, Run, Taken
from app.functions import count_words
from tests.processes import environment, python, running, wait_until, worker

#: Pairs of a key and a field that only one side writes, and why.
DIFFERENT = {
    ("rq:api:.*", ".*"): "our event log and doorbell",
    ("rq:job:.*", "function"): "the name that the API shows; RQ has it only in `data`, with the payload",
    ("rq:job:j", "error"): "class and text of the exception, so that no status poll reads a traceback",
    ("rq:execution:.*", "lease_until"): "the lease; RQ's is the score in its started registry",
    ("rq:results:j", "is_json"): "our mark that the value is strict JSON",
    ("rq:worker:w", "last_heartbeat"): "a heartbeat a second, not with each transition",
    ("rq:job:j", "started_at"): "a job that waits again has not started: RQ leaves the time of its last run",
    ("rq:job:j", "worker_name"): "the same: it has no worker",
    ("rq:job:j", "ended_at"): "the same: it has no end",
}

#: The same for one transition only.
DIFFERENT_IN = {
    "_cancel": {("rq:job:j", r"\(expires\)"): "RQ keeps canceled jobs for ever (RQ3.md)"},
    "_cancel_a_scheduled_job": {("rq:job:j", r"\(expires\)"): "the same"},
    "_enqueue_group": {("rq:group:g", r"\(expires\)"): "RQ keeps a group until a worker has seen its last job go"},
    "_requeue": {
        ("rq:job:j", r"\(expires\)"): "RQ lets the failure's TTL run on: the job may vanish while it waits",
        ("rq:job:j", "exc_info"): "RQ's own deprecated field, which it writes empty",
    },
}

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z|(?<!\w)\d{10}(\.\d+)?(?!\w)")


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        with contextlib.suppress(zlib.error):
            value = zlib.decompress(value)
        value = value.decode()
    text = str(value)
    return TIME.sub("<time>", text)


def _read(connection: Any, key: bytes) -> dict[str, str]:
    """A key's content as fields and values, with its times replaced."""
    match connection.type(key):
        case b"hash":
            return {_plain(name): _plain(value) for name, value in connection.hgetall(key).items()}
        case b"list":
            return {str(index): _plain(value) for index, value in enumerate(connection.lrange(key, 0, -1))}
        case b"string":
            return {"": _plain(connection.get(key))}
        case b"set":
            return {_plain(value): "" for value in connection.smembers(key)}
        case b"zset":
            return {_plain(member): _plain(score) for member, score in connection.zrange(key, 0, -1, withscores=True)}
        case b"stream":
            entries: Any = connection.xrange(key)
            return {_plain(name): _plain(value) for _, entry in entries for name, value in entry.items()}
        case kind:
            raise AssertionError(f"{key!r} is a {kind!r}")


def _dump(connection: Any, execution: str) -> dict[str, dict[str, str]]:
    found = {}
    for key in connection.scan_iter():
        fields = _read(connection, key)
        fields["(expires)"] = str(connection.ttl(key) >= 0)
        fields = {name.replace(execution, "<execution>"): value.replace(execution, "<execution>")
                  for name, value in fields.items()}  # fmt: skip
        found[key.decode().replace(execution, "<execution>")] = fields
    return found


def _is_on_purpose(key: str, field: str, transition: str) -> bool:
    different = DIFFERENT | DIFFERENT_IN.get(transition, {})
    return any(re.fullmatch(own, key) and re.fullmatch(name, field) for own, name in different)


def _differences(theirs: dict[str, dict[str, str]], ours: dict[str, dict[str, str]], transition: str) -> list[str]:
    return [
        f"{key} {field}: RQ {theirs.get(key, {}).get(field)!r}, we {ours.get(key, {}).get(field)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        for field in sorted(theirs.get(key, {}).keys() | ours.get(key, {}).keys())
        if theirs.get(key, {}).get(field) != ours.get(key, {}).get(field) and not _is_on_purpose(key, field, transition)
    ]


ENQUEUE: dict[str, Any] = {
    "job_id": "j", "job_timeout": 100, "result_ttl": 500, "failure_ttl": 600, "description": "count_words",
    "meta": {"a": 1},
}  # fmt: skip
LATER = datetime(2030, 1, 1, tzinfo=UTC)
TRACE = 'Traceback (most recent call last):\n  File "x.py", line 1, in f\nValueError: boom\n'


class Rq:
    """RQ's own classes, called as its worker calls them."""

    def __init__(self, connection: "Redis") -> None:
        self.queue = rq.Queue("default", connection=connection, serializer=JSONSerializer)
        self.worker = rq.Worker([self.queue], name="w", connection=connection, serializer=JSONSerializer)
        self.execution = "none"

    def enqueue(self, **options: Any) -> None:
        self.queue.enqueue(count_words, {"text": "a"}, **ENQUEUE, **options)

    def start(self) -> None:
        self.queue.connection.lpop(self.queue.key)
        self.job = Job.fetch("j", connection=self.queue.connection, serializer=JSONSerializer)
        self.run: Execution = self.worker.prepare_execution(self.job)
        self.execution = self.run.id
        self.worker.prepare_job_execution(self.job)

    def finish(self, value: Any) -> None:
        self.job.ended_at = now()
        self.job._result = value
        self.worker.handle_job_success(self.job, self.queue, self.queue.started_job_registry, self.run)

    def fail(self) -> None:
        self.job.ended_at = now()
        self.worker.handle_job_failure(self.job, self.queue, exc_string=TRACE, execution=self.run)

    def stop(self) -> None:
        self.worker._stopped_job_id = "j"
        self.fail()

    def enqueue_later(self) -> None:
        self.queue.enqueue_at(LATER, count_words, {"text": "a"}, **ENQUEUE)

    def enqueue_group(self) -> None:
        options = {**ENQUEUE, "timeout": ENQUEUE["job_timeout"]}
        del options["job_timeout"]
        data = rq.Queue.prepare_data(count_words, ({"text": "a"},), **options)
        Group(self.queue.connection, "g").enqueue_many(self.queue, [data])

    def cancel(self) -> None:
        Job.fetch("j", connection=self.queue.connection, serializer=JSONSerializer).cancel()

    def requeue(self) -> None:
        self.queue.failed_job_registry.requeue("j")


class Ours:
    """The same calls, made with our scripts."""

    execution = "our-execution"
    run = Run("j", execution, "default", "w")

    def __init__(self, connection: "Redis") -> None:
        self.queue = Queue("default", connection=connection)

    def enqueue(self, **options: Any) -> None:
        self.queue.enqueue(count_words, {"text": "a"}, **ENQUEUE, **options, unique=True)

    def start(self) -> None:
        assert isinstance(transitions.take(self.queue.connection, "w", self.execution, 30, ["default"]), Taken)

    def finish(self, value: Any) -> None:
        text = base64.b64encode(json.dumps(value).encode()).decode() if value is not None else ""
        self._end(Ending("finished", 1, 1, return_value=text))

    def fail(self, outcome: Any = "failed") -> None:
        trace = base64.b64encode(zlib.compress(TRACE.encode())).decode()
        self._end(Ending(outcome, 1, 1, failure=Failure(trace, '{"type": "ValueError", "message": "boom"}')))

    def stop(self) -> None:
        self.fail("stopped")

    def enqueue_later(self) -> None:
        self._enqueue(at=LATER.timestamp())

    def enqueue_group(self) -> None:
        self._enqueue(group="g", group_ttl=100)

    def _enqueue(self, **options: Any) -> None:
        job = Job.create(
            count_words,
            ({"text": "a"},),
            connection=self.queue.connection,
            serializer=JSONSerializer,
            origin="default",
            id="j",
            timeout=ENQUEUE["job_timeout"],
            group_id=options.get("group"),
            **{name: ENQUEUE[name] for name in ("result_ttl", "failure_ttl", "description", "meta")},
        )
        transitions.enqueue(self.queue.connection, "default", {"j": {}}, job.to_dict(), limit=9, **options)

    def cancel(self) -> None:
        assert transitions.cancel(self.queue.connection, "j", None, 100) == "canceled"

    def requeue(self) -> None:
        assert transitions.retry(self.queue.connection, "j", None, 9) == "queued"

    def _end(self, ending: Ending) -> None:
        transitions.finish(self.queue.connection, self.run, ending)


Side = Rq | Ours


def _enqueue(side: Side) -> None:
    side.enqueue()


def _enqueue_in_front_with_ttl(side: Side) -> None:
    side.queue.enqueue(count_words, {"text": "b"}, job_id="other", unique=True, description="x")
    side.enqueue(at_front=True, ttl=50)


def _start(side: Side) -> None:
    side.enqueue(ttl=50)
    side.start()


def _finish(side: Side) -> None:
    side.enqueue()
    side.start()
    side.finish({"words": [["a", 1]]})


def _finish_with_null(side: Side) -> None:
    side.enqueue()
    side.start()
    side.finish(None)


def _fail(side: Side) -> None:
    side.enqueue()
    side.start()
    side.fail()


def _stop(side: Side) -> None:
    side.enqueue()
    side.start()
    side.stop()


def _retry(side: Side) -> None:
    side.enqueue(retry=Retry(max=2))
    side.start()
    side.fail()


def _retry_after_a_pause(side: Side) -> None:
    side.enqueue(retry=Retry(max=2, interval=[10, 20]))
    side.start()
    side.fail()


def _enqueue_later(side: Side) -> None:
    side.enqueue_later()


def _enqueue_group(side: Side) -> None:
    side.enqueue_group()


def _cancel(side: Side) -> None:
    side.enqueue()
    side.cancel()


def _cancel_a_scheduled_job(side: Side) -> None:
    side.enqueue_later()
    side.cancel()


def _requeue(side: Side) -> None:
    side.enqueue()
    side.start()
    side.fail()
    side.requeue()


TRANSITIONS = [
    _enqueue, _enqueue_in_front_with_ttl, _start, _finish, _finish_with_null, _fail, _stop, _retry,
    _retry_after_a_pause, _enqueue_later, _enqueue_group, _cancel, _cancel_a_scheduled_job, _requeue,
]  # fmt: skip


@pytest.mark.parametrize("transition", TRANSITIONS, ids=lambda transition: transition.__name__.strip("_"))
def test_scripts_write_what_rq_writes(real_redis: "Redis", transition: Callable[[Side], None]) -> None:
    dumps = []
    for kind in (Rq, Ours):
        real_redis.flushall()
        registered = rq.Worker([rq.Queue("default", connection=real_redis)], name="w", connection=real_redis)
        registered.register_birth()  # type: ignore[no-untyped-call]  # RQ has no annotation there
        side: Side = kind(real_redis)
        transition(side)
        found = _dump(real_redis, side.execution)
        # These fields do not belong to the transition: they describe the worker, or ours writes them in heartbeats.
        for field in ("ip_address", "pid", "total_working_time", "successful_job_count", "failed_job_count"):
            found["rq:worker:w"].pop(field, None)
        dumps.append(found)
    theirs, ours = dumps
    assert _differences(theirs, ours, transition.__name__) == []


@pytest.fixture
def run_job(real_redis: "Redis", redis_url: str, tmp_path: Path) -> Callable[[Job], None]:
    """Let our own worker run the waiting jobs."""

    def run(job: Job) -> None:
        with worker(environment(redis_url), tmp_path / "worker.log"):
            wait_until(lambda: job.get_status() in ("finished", "failed"))

    return run


def test_rq_reads_a_job_that_our_worker_finished(real_redis: "Redis", run_job: Callable[[Job], None]) -> None:
    queue = Queue(connection=real_redis)
    job = queue.enqueue(count_words, {"text": "b a b"})
    run_job(job)
    fetched: Any = Job.fetch(job.id, connection=real_redis, serializer=JSONSerializer)
    assert fetched.return_value() == {"words": [["b", 2], ["a", 1]], "total": 3}
    assert fetched.latest_result().type.name == "SUCCESSFUL"
    assert fetched.enqueued_at <= fetched.started_at <= fetched.ended_at
    assert queue.finished_job_registry.get_job_ids() == [job.id]
    assert queue.started_job_registry.get_job_ids() == queue.job_ids == []
    found: Any = queue.fetch_job(job.id)
    assert found.args == [{"text": "b a b"}]


def test_rq_reads_a_job_that_our_worker_failed(real_redis: "Redis", run_job: Callable[[Job], None]) -> None:
    queue = Queue(connection=real_redis)
    job = queue.enqueue("tests.job_functions.fail", "no such image")
    run_job(job)
    result: Any = job.latest_result()
    assert result.type.name == "FAILED"
    assert result.exc_string.endswith("ValueError: no such image\n")
    assert queue.failed_job_registry.get_job_ids() == [job.id]


def test_our_worker_runs_jobs_that_plain_rq_enqueued(real_redis: "Redis", run_job: Callable[[Job], None]) -> None:
    plain = rq.Queue(connection=real_redis, serializer=JSONSerializer)
    job = plain.enqueue(count_words, {"text": "a"})
    run_job(job)
    assert job.return_value() == {"words": [["a", 1]], "total": 1}


def test_our_worker_enqueues_dependents_of_a_finished_job(real_redis: "Redis", run_job: Callable[[Job], None]) -> None:
    queue = Queue(connection=real_redis)
    first = queue.enqueue("tests.job_functions.echo", 1)
    second = queue.enqueue("tests.job_functions.echo", 2, depends_on=first)
    assert second.get_status() == "deferred"
    run_job(second)
    assert (first.return_value(), second.return_value()) == (1, 2)


def test_our_worker_handles_a_failed_job_with_dependents_as_rq_does(
    real_redis: "Redis", run_job: Callable[[Job], None]
) -> None:
    queue = Queue(connection=real_redis)
    first = queue.enqueue("tests.job_functions.fail", "no")
    queue.enqueue("tests.job_functions.echo", 2, depends_on=first)
    run_job(first)
    assert first.get_status() == "failed"
    result: Any = first.latest_result()
    assert result.exc_string.endswith("ValueError: no\n")


def test_a_stock_worker_runs_our_jobs(real_redis: "Redis", redis_url: str, tmp_path: Path) -> None:
    job = Queue(connection=real_redis).enqueue("tests.job_functions.echo", {"a": [1]})
    env = {name: value for name, value in os.environ.items() if not name.startswith("RQ_")}
    command = python("rq.cli", "worker", "-S", "json", "--burst", "--url", redis_url)
    with running(command, env, tmp_path / "stock.log") as stock:
        assert stock.popen.wait(30) == 0
    assert job.return_value() == {"a": [1]}


def test_rq_info_counts_our_jobs_and_workers(real_redis: "Redis", redis_url: str, tmp_path: Path) -> None:
    queue = Queue(connection=real_redis)
    env = environment(redis_url, WORKER_SHUTDOWN_SECONDS=1)
    with worker(env, tmp_path / "worker.log"):
        done = queue.enqueue("tests.job_functions.echo", 1)
        wait_until(lambda: done.get_status() == "finished")
        running_job = queue.enqueue("tests.job_functions.sleep_for", 60)
        wait_until(lambda: running_job.get_status() == "started")
        (key,) = real_redis.smembers("rq:workers")
        wait_until(lambda: real_redis.hget(key, "successful_job_count") == b"1")  # sent with the heartbeat
        queue.enqueue("tests.job_functions.echo", 2)
        shown = subprocess.run(python("rq.cli", "info", "--raw"), env=env, capture_output=True, text=True, check=True)
    assert "queue default 1, 1 executing, 1 finished, 0 failed" in shown.stdout
    assert re.search(r"^worker .* busy default\. jobs: 1 finished, 0 failed$", shown.stdout, re.MULTILINE)
