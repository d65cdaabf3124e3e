"""What of RQ 3.0.0 our worker overrides, and why: each of its behaviours that an override answers is seen here.

A test that fails after an upgrade of RQ says that an override has become needless, or may be wrong by now.
"""

import hashlib
import inspect
import os
import signal
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import redis as redis_py
import rq
from redis import Redis
from rq.exceptions import AbandonedJobError
from rq.job import Job, JobStatus
from rq.registry import CanceledJobRegistry, ScheduledJobRegistry, StartedJobRegistry
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer, PickleSerializer, resolve_serializer
from rq.utils import now

from app.core import transitions
from app.worker.rq_worker import ResilientWorker
from app.worker.worker import Worker
from tests.processes import free_port

#: What was read as the overrides were written: the first digits of the SHA-256 of the source of RQ 3.0.0.
READ = {
    "__init__": "86f83bb69582",
    "_pubsub_exception_handler": "5213e36c3b77",
    "_set_connection": "38ebd371028a",
    "_shutdown": "828be105b616",
    "bootstrap": "7197ad79c7ff",
    "check_for_suspension": "e8095ae1fcf9",
    "clean_registries": "e2c9790c8156",
    "dequeue_job_and_maintain_ttl": "2715cf34d9e3",
    "execute_job": "69165f532139",
    "get_current_job_id": "53c34e2f5437",
    "handle_job_failure": "7432afe53b9f",
    "handle_job_success": "9dda7c7d3ca1",
    "handle_payload": "123753585f88",
    "heartbeat": "63b1089fd146",
    "kill_horse": "2fefa0bd4db1",
    "register_birth": "4690ab4f7b74",
    "request_force_stop": "2d066de883f3",
    "request_stop": "f934e7e7e6ee",
    "request_stop_execution": "dd3faa037e89",
    "run_maintenance_tasks": "3d8a446b5354",
    "set_shutdown_requested_date": "022619a0feec",
    "teardown": "bfc2572817e5",
    "wait_for_horse": "08472169a63f",
    "work": "04b5cdf8e554",
}


def overridden() -> dict[str, Callable[..., Any]]:
    """RQ's methods that ours replace or go around, by name."""
    names = {name for own in (ResilientWorker, Worker) for name, value in vars(own).items() if callable(value)}
    return {name: getattr(rq.Worker, name) for name in names if hasattr(rq.Worker, name)}


#: Methods that are not overridden, but that ours lean on.
LEANED_ON = (
    "_shutdown", "handle_job_failure", "handle_job_success", "register_birth", "request_force_stop",
    "request_stop_execution", "wait_for_horse",
)  # fmt: skip


def test_no_override_is_of_a_method_that_rq_has_no_more() -> None:
    assert overridden().keys() | set(LEANED_ON) == READ.keys()


@pytest.mark.parametrize("name", sorted(READ))
def test_rqs_own_method_is_still_what_was_read_as_it_was_overridden(name: str) -> None:
    found = hashlib.sha256(inspect.getsource(getattr(rq.Worker, name)).encode()).hexdigest()[:12]
    assert found == READ[name], f"RQ changed rq.Worker.{name}: read it, then our override, then note {found!r}"


def test_each_override_says_what_it_answers() -> None:
    for own in (ResilientWorker, Worker):
        for name in overridden().keys() & vars(own).keys() - {"__init__"}:
            assert "RQ" in (vars(own)[name].__doc__ or ""), f"{own.__name__}.{name}"


def stock_worker(redis: "Redis") -> Any:
    return rq.Worker(["default"], connection=redis, serializer=JSONSerializer)


def enqueue(redis: "Redis", **options: Any) -> Job:
    queue = rq.Queue(connection=redis, serializer=JSONSerializer)
    return queue.enqueue("tests.job_functions.echo", 1, **options)


@pytest.fixture
def away() -> "Redis":
    """A client of a Redis that is not there."""
    return Redis(port=free_port(), retry=redis_py.retry.Retry(redis_py.backoff.NoBackoff(), 0))


def test_rq_pickles_unless_told_otherwise() -> None:
    """__init__: JSON is forced."""
    assert resolve_serializer(None) in (PickleSerializer, resolve_serializer("pickle"))


def test_rq_waits_minutes_for_an_answer(redis: "Redis") -> None:
    """_set_connection: seconds."""
    assert stock_worker(redis).connection_timeout > 400


def test_rqs_pop_from_several_queues_leaves_the_job_nowhere(real_redis: "Redis") -> None:
    """dequeue_job_and_maintain_ttl: `take` pops and notes who has it at once."""
    job = enqueue(real_redis)
    queues = [rq.Queue(name, connection=real_redis, serializer=JSONSerializer) for name in ("high", "default")]
    found = rq.Queue.dequeue_any(queues, None, connection=real_redis, serializer=JSONSerializer)
    assert found
    # A worker that is killed now was the only one that knew.
    assert job.get_status(refresh=True) == JobStatus.QUEUED
    ids = {key: real_redis.type(key) for key in real_redis.keys("*") if job.id.encode() not in key}
    for key, kind in ids.items():
        assert kind != b"list"
        assert kind != b"zset"
        if kind == b"set":
            assert job.id.encode() not in real_redis.smembers(key)


def test_rqs_cleanup_fails_the_job_of_a_dead_worker(redis: "Redis") -> None:
    """clean_registries: only what `recover` does not look after is cleaned."""
    job = enqueue(redis)
    job.set_status(JobStatus.STARTED)
    registry = StartedJobRegistry(connection=redis, serializer=JSONSerializer)
    redis.zadd(registry.key, {f"{job.id}:e": time.time() - 1})
    registry.cleanup()
    assert job.get_status(refresh=True) == JobStatus.FAILED
    result = job.latest_result()
    assert result
    assert AbandonedJobError.__name__ in str(result.exc_string)


def test_rqs_cancel_keeps_the_job_for_ever(redis: "Redis") -> None:
    """clean_registries: canceled jobs are given an end."""
    job = enqueue(redis)
    job.cancel()
    CanceledJobRegistry(connection=redis, serializer=JSONSerializer).cleanup()
    assert redis.ttl(job.key) == -1


def test_rq_kills_its_own_process_group_where_there_is_no_work_horse(
    redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill_horse: asks for the work-horse's process."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: killed.append((group, number)))
    stock_worker(redis).kill_horse()
    assert killed == [(os.getpgid(0), signal.SIGKILL)]


def test_rqs_stop_command_kills_whatever_runs_by_then(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    """handle_payload: a stop is for one run only. Between RQ's look and its kill the worker may go to another job."""
    worker = stock_worker(redis)
    monkeypatch.setattr(worker, "get_current_job_id", lambda: "j")
    seen = []
    monkeypatch.setattr(worker, "kill_horse", lambda *_: seen.append("killed"))
    worker.handle_payload({"data": b'{"command": "stop-job", "job_id": "j", "execution": "an older one"}'})
    assert seen == ["killed"]


def test_rq_asks_redis_which_job_runs(redis: "Redis") -> None:
    """get_current_job_id: in the process' own memory."""
    worker = stock_worker(redis)
    redis.sadd(f"{worker.key}:executions", "j:e")
    stamp = now().timestamp()
    redis.hset("rq:execution:j:e", mapping={"id": "e", "job_id": "j", "created_at": stamp, "last_heartbeat": stamp})
    assert worker.get_current_job_id() == "j"


def test_rqs_subscription_ends_on_a_timeout(redis: "Redis") -> None:
    """_pubsub_exception_handler: it never ends."""
    with pytest.raises(RuntimeError):  # its bare `raise`, outside of a handler
        stock_worker(redis)._pubsub_exception_handler(redis_py.exceptions.TimeoutError(), None, None)


@pytest.mark.parametrize(
    "call",
    [
        lambda worker: worker.set_shutdown_requested_date(),
        lambda worker: worker.heartbeat(),
        lambda worker: worker.check_for_suspension(burst=False),
        lambda worker: worker.run_maintenance_tasks(),
        lambda worker: worker.teardown(),
    ],
    ids=["set_shutdown_requested_date", "heartbeat", "check_for_suspension", "run_maintenance_tasks", "teardown"],
)
def test_rqs_loop_is_ended_by_an_outage(redis: "Redis", away: "Redis", call: Callable[[Any], None]) -> None:
    """These, and with them the worker: ours are put off, or tried again."""
    worker = stock_worker(redis)
    worker._shutdown_requested_date = now()
    worker.connection = away
    for queue in worker.queues:
        queue.connection = away
    with pytest.raises(redis_py.exceptions.ConnectionError):
        call(worker)


def test_rqs_heartbeat_is_three_commands(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    """heartbeat: one round trip a second, instead of three commands five times a job."""
    worker, execute, sent = stock_worker(redis), cast("Any", redis.execute_command), list[str]()

    def note_and_execute(*args: Any, **options: Any) -> Any:
        sent.append(args[0])
        return execute(*args, **options)

    monkeypatch.setattr(redis, "execute_command", note_and_execute)
    worker.heartbeat()
    worker.heartbeat()
    assert len(sent) == 6


def test_rqs_scheduler_lets_a_job_run_twice(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    """work: no scheduler is started, `promote` does its work in one script."""
    job, scheduled = enqueue(redis), cast("Any", ScheduledJobRegistry)
    redis.delete("rq:queue:default")
    job.set_status(JobStatus.SCHEDULED)
    registry = scheduled("default", connection=redis, serializer=JSONSerializer)
    redis.zadd(registry.key, {job.id: time.time() - 1})
    ask = ScheduledJobRegistry.get_jobs_to_schedule

    def ask_then_be_late(self: Any, *args: Any) -> Any:
        found = ask(self, *args)
        transitions.promote(redis, ["default"])
        assert isinstance(transitions.take(redis, "w", "e", 30, ["default"]), transitions.Taken)
        return found

    monkeypatch.setattr(ScheduledJobRegistry, "get_jobs_to_schedule", ask_then_be_late)
    scheduler: Any = RQScheduler(["default"], connection=redis, serializer=JSONSerializer)
    scheduler._scheduled_job_registries = [registry]
    scheduler.enqueue_scheduled_jobs()
    assert redis.lrange("rq:queue:default", 0, -1) == [job.id.encode()]  # though it runs
