"""A real `rq worker` while its work-horse loads the job functions. The test decides how long that takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis
from rq.command import send_stop_job_command
from rq.serializers import JSONSerializer

from tests.processes import ROOT, Process, environment, wait_until, worker
from tests.test_worker import Bench

GATED = """
import time
from pathlib import Path
while Path({gate!r}).exists():
    time.sleep(0.02)
"""
#: Seconds of the lease.
LEASE = 3


@pytest.fixture
def own(real_redis: Redis, redis_url: str) -> Bench:
    return Bench(real_redis, redis_url)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """As long as this file exists, no work-horse becomes ready."""
    path = tmp_path / "gate"
    (tmp_path / "gated.py").write_text(GATED.format(gate=str(path)))
    return path


@contextmanager
def gated_worker(own: Bench, gate: Path) -> Iterator[Process]:
    """A worker whose first work-horse has run a job. No other one becomes ready for it."""
    settings: dict[str, Any] = {"WORKER_LEASE": LEASE, "MAX_CRASHES": 0, "PYTHONPATH": f"{ROOT}:{gate.parent}"}
    settings["WORKER_SHUTDOWN_SECONDS"] = 600  # so that a worker that ends within seconds did not end by this limit
    settings["FUNCTION_MODULES"] = "tests.job_functions,gated"
    with worker(environment(own.url, **settings), gate.parent / "worker.log") as process:
        assert own.result_of(own.enqueue("echo", 1)) == 1
        gate.touch()
        yield process
        gate.unlink(missing_ok=True)


def wait_for_horse(process: Process) -> None:
    """Make the worker wait for a work-horse while it has no job."""
    (server,) = psutil.Process(process.popen.pid).children()
    (horse,) = server.children()
    horse.kill()
    process.wait_for_log("the idle work-horse died")


def lease_of(own: Bench, job_id: str) -> float:
    (key,) = own.redis.keys(f"rq:execution:{job_id}:*")
    return float(own.redis.hget(key, "lease_until"))


@pytest.mark.slow
def test_job_keeps_its_lease_while_its_work_horse_loads(own: Bench, gate: Path) -> None:
    with gated_worker(own, gate):
        job_id = own.enqueue("use_fresh_process")
        own.wait_for(job_id, "started")
        first = lease_of(own, job_id)
        wait_until(lambda: lease_of(own, job_id) > first + LEASE, what="a lease that was renewed more than once")
        gate.unlink()
        own.result_of(job_id)
    assert "crashes" not in own.read(job_id)


@pytest.mark.slow
def test_worker_that_waits_for_its_work_horse_keeps_its_heartbeat(own: Bench, gate: Path) -> None:
    with gated_worker(own, gate) as process:
        wait_for_horse(process)
        (name,) = own.workers()
        beats = set()

        def goes_on() -> bool:
            beats.add(own.redis.hget(name, "last_heartbeat"))
            return len(beats) > 3

        wait_until(goes_on, what="more heartbeats")
        gate.unlink()
        assert own.result_of(own.enqueue("echo", 2)) == 2


@pytest.mark.parametrize("has_job", [True, False], ids=["with a job", "idle"])
def test_sigterm_ends_a_worker_that_waits_for_its_work_horse(own: Bench, gate: Path, has_job: bool) -> None:
    with gated_worker(own, gate) as process:
        if has_job:
            job_id = own.enqueue("use_fresh_process")
            own.wait_for(job_id, "started")
        else:
            wait_for_horse(process)
            job_id = own.enqueue("echo", 2)
        assert process.stop() == 0
    job = own.read(job_id)
    assert (job["status"], job.get("crashes")) == ("queued", None)
    assert own.redis.lrange("rq:queue:default", 0, -1) == [job_id.encode()]
    assert own.workers() == set()


def test_stop_command_ends_a_job_whose_work_horse_loads(own: Bench, gate: Path) -> None:
    with gated_worker(own, gate):
        job_id = own.enqueue("use_fresh_process")
        own.wait_for(job_id, "started")

        def is_stopped() -> bool:
            # Send it repeatedly: Redis says `started` a moment before the worker knows, and RQ does not keep messages.
            send_stop_job_command(own.redis, job_id, serializer=JSONSerializer)
            return bool(own.read(job_id)["status"] == "stopped")

        wait_until(is_stopped)
