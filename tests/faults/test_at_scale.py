"""Tests of the suite that run with small numbers elsewhere, here with the promised ones."""

import signal
from pathlib import Path

import pytest
from redis import Redis

from tests.faults.conftest import Form, Row
from tests.processes import watch_stalls
from tests.test_deploy import roll
from tests.test_event_stream import listen_in_a_crowd
from tests.test_sentinel import Cluster, cluster, fail_over

__all__ = ["cluster"]  # a fixture

LISTENERS = 1000


@pytest.mark.fault("5b", "five rolling restarts under load", timeout=600, form=Form.LONG)
def test_rolling_restarts(real_redis: Redis, redis_url: str, tmp_path: Path, row: Row) -> None:
    jobs = roll(real_redis, redis_url, tmp_path, 5)
    row.note(f"{jobs} jobs, each once; no request failed")


@pytest.mark.fault(
    "8b", "a Sentinel's master stalls and comes back as a replica", timeout=600, takes=40, form=Form.BUDGET
)
def test_failover_from_a_master_that_stalls(cluster: Cluster, tmp_path: Path, row: Row) -> None:
    fail_over(cluster, tmp_path, signal.SIGSTOP)
    row.note("web and worker went on with the new one")


@pytest.mark.fault(
    "17d", f"{LISTENERS} listeners in one web process, which then disconnect", timeout=600, takes=30, form=Form.BUDGET
)
def test_listeners(redis_url: str, real_redis: Redis, tmp_path: Path, row: Row) -> None:
    with watch_stalls() as stalls:
        size, seconds = listen_in_a_crowd(redis_url, real_redis, tmp_path, LISTENERS)
    row.note(f"{size / 1000:.1f} kB each; {LISTENERS // 10} of them got the end of a job in {seconds * 1000:.0f} ms")
    assert size * LISTENERS < 40 * 2**20
    assert seconds < 5 + stalls.within(seconds)
