"""The checker itself: it has to detect lost, repeated and unknown jobs."""

from collections.abc import Callable

import pytest
from flask.testing import FlaskClient
from redis import Redis

from tests.faults.ledger import RUNS_KEY, Ledger
from tests.processes import end_run, enqueue_echo, take_job


@pytest.fixture
def ledger(redis: "Redis") -> Ledger:
    return Ledger(redis)


def run_next(redis: "Redis", job_id: str) -> None:
    redis.rpush(RUNS_KEY, f"{job_id} 1.5 77")
    assert end_run(redis, take_job(redis)) == "finished"


@pytest.fixture
def job_id(client: FlaskClient, redis: "Redis", ledger: Ledger) -> str:
    """A job that was acknowledged and has finished."""
    job_id = enqueue_echo(client)
    ledger.acknowledge(job_id)
    run_next(redis, job_id)
    return job_id


def test_ledger_counts_ended_and_waiting_jobs(client: FlaskClient, redis: "Redis", ledger: Ledger, job_id: str) -> None:
    ledger.count().check()
    later = enqueue_echo(client, delay=50)
    ledger.acknowledge(later)
    tally = ledger.count()
    assert (len(tally.jobs), tally.terminal, tally.waiting) == (2, 1, 1)
    assert [(run.at, run.pid) for run in tally.jobs[job_id].runs] == [(1.5, 77)]
    with pytest.raises(AssertionError):
        tally.check()


def test_ledger_leaves_out_older_jobs(redis: "Redis", job_id: str) -> None:
    Ledger(redis).count().check()


LOSSES: dict[str, Callable[["Redis", str], object]] = {
    "its hash is gone": lambda redis, job_id: redis.delete(f"rq:job:{job_id}"),
    "its status is none": lambda redis, job_id: redis.hset(f"rq:job:{job_id}", "status", "nonsense"),
    "it is in no place": lambda redis, job_id: redis.zrem("rq:finished:default", job_id),
    "it is in two places": lambda redis, job_id: redis.rpush("rq:queue:default", job_id),
    "it is in one place twice": lambda redis, job_id: redis.zadd(
        "rq:wip:default", {f"{job_id}:e": 1, f"{job_id}:f": 1}
    ),
    "it never ran": lambda redis, _: redis.delete(RUNS_KEY),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_ledger_sees_a_lost_job(
    redis: "Redis", ledger: Ledger, job_id: str, lose: Callable[["Redis", str], object]
) -> None:
    lose(redis, job_id)
    tally = ledger.count()
    assert list(tally.lost) == [job_id]
    with pytest.raises(AssertionError):
        tally.check()


def test_ledger_sees_a_job_that_ran_twice(redis: "Redis", ledger: Ledger, job_id: str) -> None:
    redis.rpush(RUNS_KEY, f"{job_id} 2.5 78")
    tally = ledger.count()
    assert tally.twice == {job_id: 1}
    with pytest.raises(AssertionError):
        tally.check()
    tally.check(may_run_again={job_id: 1})


def test_ledger_sees_a_job_without_an_acknowledgement(
    client: FlaskClient, redis: "Redis", ledger: Ledger, job_id: str
) -> None:
    stranger = enqueue_echo(client)
    run_next(redis, stranger)
    tally = ledger.count()
    assert tally.strangers == {stranger}
    with pytest.raises(AssertionError):
        tally.check()
