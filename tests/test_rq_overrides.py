"""The methods of RQ 3.0.0 that our worker overrides: a test shows, for each override, the behaviour that it replaces.

If a test fails after an upgrade of RQ, an override may no longer be needed, or may be wrong.
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

#: The first digits of the SHA-256 of each method's source in RQ 3.0.0, which we read to write the overrides.
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
    """The methods of RQ that our worker replaces, by name."""
    names = {name for own in (ResilientWorker, Worker) for name, value in vars(own).items() if callable(value)}
    return {name: getattr(rq.Worker, name) for name in names if hasattr(rq.Worker, name)}


#: RQ's own methods on which our overrides rely.
RELIED_ON = (
    "_shutdown", "handle_job_failure", "handle_job_success", "register_birth", "request_force_stop",
    "request_stop_execution", "wait_for_horse",
)  # fmt: skip


def test_overridden_methods_still_exist_in_rq() -> None:
    assert overridden().keys() | set(RELIED_ON) == READ.keys()


@pytest.mark.parametrize("name", sorted(READ))
def test_rqs_own_method_is_unchanged(name: str) -> None:
    found = hashlib.sha256(inspect.getsource(getattr(rq.Worker, name)).encode()).hexdigest()[:12]
    assert found == READ[name], f"RQ changed rq.Worker.{name}: read it, then our override, then note {found!r}"


def test_overrides_say_which_behaviour_of_rq_they_replace() -> None:
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
    """A client of a Redis that does not exist."""
    return Redis(port=free_port(), retry=redis_py.retry.Retry(redis_py.backoff.NoBackoff(), 0))


def test_rq_pickles_by_default() -> None:
    """`__init__` forces JSON."""
    assert resolve_serializer(None) in (PickleSerializer, resolve_serializer("pickle"))


def test_rq_waits_minutes_for_an_answer(redis: "Redis") -> None:
    """`_set_connection` makes it seconds."""
    assert stock_worker(redis).connection_timeout > 400


def test_rqs_pop_from_several_queues_leaves_the_job_nowhere(real_redis: "Redis") -> None:
    """`dequeue_job_and_maintain_ttl` calls `take`, which pops the job and notes its worker in one step."""
    job = enqueue(real_redis)
    queues = [rq.Queue(name, connection=real_redis, serializer=JSONSerializer) for name in ("high", "default")]
    found = rq.Queue.dequeue_any(queues, None, connection=real_redis, serializer=JSONSerializer)
    assert found
    # If the worker is killed now, nobody else knows of the job.
    assert job.get_status(refresh=True) == JobStatus.QUEUED
    ids = {key: real_redis.type(key) for key in real_redis.keys("*") if job.id.encode() not in key}
    for key, kind in ids.items():
        assert kind != b"list"
        assert kind != b"zset"
        if kind == b"set":
            assert job.id.encode() not in real_redis.smembers(key)


def test_rqs_cleanup_fails_the_job_of_a_dead_worker(redis: "Redis") -> None:
    """`clean_registries` cleans only what `recover` does not handle."""
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
    """`clean_registries` lets canceled jobs expire."""
    job = enqueue(redis)
    job.cancel()
    CanceledJobRegistry(connection=redis, serializer=JSONSerializer).cleanup()
    assert redis.ttl(job.key) == -1


def test_rq_kills_its_own_process_group_where_there_is_no_work_horse(
    redis: "Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill_horse` kills only the work-horse and what it started."""
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: killed.append((group, number)))
    stock_worker(redis).kill_horse()
    assert killed == [(os.getpgid(0), signal.SIGKILL)]


def test_rqs_stop_command_kills_a_later_job(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    """`handle_payload` stops one run only. Between RQ's check and its kill the worker may begin another job."""
    worker = stock_worker(redis)
    monkeypatch.setattr(worker, "get_current_job_id", lambda: "j")
    seen = []
    monkeypatch.setattr(worker, "kill_horse", lambda *_: seen.append("killed"))
    worker.handle_payload({"data": b'{"command": "stop-job", "job_id": "j", "execution": "an older one"}'})
    assert seen == ["killed"]


def test_rq_asks_redis_which_job_runs(redis: "Redis") -> None:
    """`get_current_job_id` looks into the process's own memory."""
    worker = stock_worker(redis)
    redis.sadd(f"{worker.key}:executions", "j:e")
    stamp = now().timestamp()
    redis.hset("rq:execution:j:e", mapping={"id": "e", "job_id": "j", "created_at": stamp, "last_heartbeat": stamp})
    assert worker.get_current_job_id() == "j"


def test_rqs_subscription_ends_on_a_timeout(redis: "Redis") -> None:
    """`_pubsub_exception_handler` keeps it alive."""
    with pytest.raises(RuntimeError):  # RQ's bare `raise`, outside of a handler
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
    """An outage in one of these calls ends RQ's worker. Our overrides do the work later, or try again."""
    worker = stock_worker(redis)
    worker._shutdown_requested_date = now()
    worker.connection = away
    for queue in worker.queues:
        queue.connection = away
    with pytest.raises(redis_py.exceptions.ConnectionError):
        call(worker)


def test_rqs_heartbeat_is_three_commands(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    """`heartbeat` is one round trip a second, instead of three commands five times a job."""
    worker, execute, sent = stock_worker(redis), cast("Any", redis.execute_command), list[str]()

    def note_and_execute(*args: Any, **options: Any) -> Any:
        sent.append(args[0])
        return execute(*args, **options)

    monkeypatch.setattr(redis, "execute_command", note_and_execute)
    worker.heartbeat()
    worker.heartbeat()
    assert len(sent) == 6


def test_rqs_scheduler_lets_a_job_run_twice(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> None:
    """`work` starts no scheduler: `promote` does the scheduler's work in one script."""
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
    assert redis.lrange("rq:queue:default", 0, -1) == [job.id.encode()]  # although it is running
