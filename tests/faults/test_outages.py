"""Redis itself fails: it is killed, it stalls, it is away for long, or it has no room for writes."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import requests

from app.core.scripts import TERMINAL
from tests.faults.conftest import Form, Rounds, Row
from tests.faults.ledger import Tally
from tests.faults.site import FRAGILE, OUTAGE, Clients, Site, ask_until_answered
from tests.faults.test_keys import Answers, Load, firsts_of, ids_of
from tests.processes import free_port, problem_of, wait_until, watch_stalls

#: Seconds until an outage is answered at the latest.
ANSWER_LIMIT = 3
#: Seconds after Redis' return until the API accepts a job at the latest.
WEB_RETURN_LIMIT = 5
#: Seconds after Redis' return until each free worker takes a job at the latest.
RETURN_LIMIT = 40


@pytest.fixture
def key() -> str:
    return os.urandom(8).hex()


@contextmanager
def redis_away(site: Site) -> Iterator[None]:
    """Kill Redis. It comes back at the end of the block, with the data on its disk."""
    site.kill_redis()
    try:
        yield
    finally:
        site.start_redis()


@contextmanager
def redis_stalled(site: Site) -> Iterator[None]:
    """Stall Redis until the block ends. It keeps its connections and has at least one unread enqueue."""
    try:
        wait_until(site.stop_redis_behind_an_enqueue, what="an enqueue that is held up")
        yield
    finally:
        site.signal_redis(signal.SIGCONT)


@contextmanager
def configured(redis: Any, **settings: Any) -> Iterator[None]:
    """Give Redis other settings until the block ends."""
    old = {name: redis.config_get(name)[name] for name in settings}
    for name, value in settings.items():
        redis.config_set(name, value)
    try:
        yield
    finally:
        for name, value in old.items():
            redis.config_set(name, value)


@contextmanager
def memory_full(site: Site) -> Iterator[None]:
    """Leave Redis no memory for more data."""
    with configured(site.redis, **{"maxmemory-policy": "noeviction", "maxmemory": 1}):
        yield


def save_snapshot(redis: Any) -> str:
    """Let Redis write a snapshot; returns the outcome, `ok` or `err`."""
    redis.bgsave()
    state = wait_until(lambda: (info := redis.info("persistence"))["rdb_bgsave_in_progress"] == 0 and info)
    outcome: str = state["rdb_last_bgsave_status"]
    return outcome


@contextmanager
def disk_full(site: Site) -> Iterator[None]:
    """Keep Redis from writing its snapshot. It refuses writes (MISCONF) until it can."""
    redis = site.redis
    snapshot = Path(site.server.data_dir) / redis.config_get("dbfilename")["dbfilename"]
    with configured(redis, **{"save": "3600 1", "stop-writes-on-bgsave-error": "yes"}):
        snapshot.mkdir()  # nobody can rename a file to a folder, not even root
        try:
            assert save_snapshot(redis) == "err"
            yield
        finally:
            snapshot.rmdir()
            assert save_snapshot(redis) == "ok"
            snapshot.unlink()


@contextmanager
def read_only(site: Site) -> Iterator[None]:
    """Make Redis a replica, as after a failover. It refuses writes (READONLY)."""
    site.redis.replicaof("127.0.0.1", free_port())  # there is no such master, so Redis keeps its data
    try:
        yield
    finally:
        site.redis.replicaof("NO", "ONE")


def read_job(clients: Clients, job_id: str, field: str) -> str:
    """A field of the job's hash."""
    return (clients.redis.hget(f"rq:job:{job_id}", field) or b"").decode()


def await_workers(clients: Clients, names: set[str], jobs: tuple[str, ...] = ()) -> float:
    """Wait until each worker has taken a new job after Redis came back; returns the seconds from now.

    A worker may instead take one of these `jobs`, whose runs the outage cut.
    """
    start = time.monotonic()
    with watch_stalls() as stalls:
        clients.enqueue_one(seconds=0.05, at_front=True)
    taken = time.monotonic() - start
    assert taken < WEB_RETURN_LIMIT + stalls.within(taken)
    taken_by: set[str] = set()
    while not taken_by >= names:
        new = [clients.enqueue_one(seconds=0.05, at_front=True) for _ in range(2 * len(names))]
        seconds = start + RETURN_LIMIT - time.monotonic()
        assert seconds > 0, "the enqueues took all of it"
        what = f"jobs of {names - taken_by}"
        wait_until(lambda new=new: all(clients.status_of(job) in TERMINAL for job in new), seconds, what)  # type: ignore[misc]
        again = [job for job in jobs if read_job(clients, job, "crashes")]
        taken_by |= {read_job(clients, job, "worker_name") for job in (*new, *again)}
    return time.monotonic() - start


def await_run(clients: Clients, job_id: str) -> str:
    """Wait until the function of the job has begun; returns the worker that runs it."""
    wait_until(lambda: job_id in clients.ledger.runs(), what=f"the run of {job_id}")
    return read_job(clients, job_id, "worker_name")


def await_results(clients: Clients, jobs: list[str], seconds: float) -> None:
    """Wait until the jobs have ended. Each must have the result of its last run."""
    for job_id in jobs:
        wait_until(lambda job_id=job_id: clients.status_of(job_id) in TERMINAL, seconds, f"the end of {job_id}")  # type: ignore[misc]
        answer = requests.get(f"{clients.site.url}/get_result", params={"job_id": job_id}, timeout=10)
        last = clients.ledger.runs()[job_id][-1]
        assert (answer.status_code, answer.json()) == (200, last.pid)


def crashes_of(tally: Tally) -> dict[str, int]:
    """How often each job may have run again, because its worker was out of reach for longer than its lease."""
    return {job_id: job.crashes for job_id, job in tally.jobs.items()}


class MixedLoad(Load):
    """Like `Load`, but some of the clients have no keys, and do not send a request again."""

    def __init__(self, clients: Clients, key: str) -> None:
        super().__init__(clients, key)
        self.keyless: Answers = []

    def _ask_on(self, client: int) -> None:
        if client % 4:
            super()._ask_on(client)
            return
        while not self._is_over.is_set():
            self.keyless.append(self._clients.enqueue())
            time.sleep(0.01)

    def acknowledge_unanswered(self) -> None:
        """Add the jobs of outages without a key, where nobody knows whether a job exists. Those that do have to run."""
        unanswered = [answer for answer in self.keyless if not answer.ok]
        found = self._clients.ledger.count().strangers
        assert len(found) <= len(unanswered)
        for job_id in found:
            self._clients.ledger.acknowledge(job_id)


@pytest.mark.fault("6", "SIGKILL of Redis under load", timeout=600, share=2)
def test_acknowledged_jobs_survive_a_redis_that_is_killed(
    clients: Clients, row: Row, site: Site, long: bool, rounds: Rounds, key: str
) -> None:
    slowest = 0.0
    with MixedLoad(clients, key) as load:
        for _ in rounds(5):
            enough = len(load.answers) + 50
            wait_until(lambda enough=enough: len(load.answers) > enough, what="answers")  # type: ignore[misc]
            outages = clients.answers.count(OUTAGE)
            with redis_away(site):
                wait_until(lambda outages=outages: clients.answers.count(OUTAGE) > outages, what="an outage's answer")  # type: ignore[misc]
                time.sleep(random.uniform(0, 5 if long else 0.5))
            slowest = max(slowest, await_workers(clients, set(site.staff.workers)))
    assert set(clients.answers) == {"202", OUTAGE}
    assert len(ids_of(load.answers)) == len(load.answers)
    load.acknowledge_unanswered()
    tally = clients.ledger.settle()
    note = f"{rounds.begun} kills, {clients.answers.count(OUTAGE)} answers of 503"
    row.close(tally, slowest, note, crashes_of(tally))


class OnceLoad(Load):
    """Like `Load`, on a queue without workers. A request that is answered with an outage is not sent again."""

    def __init__(self, clients: Clients, key: str) -> None:
        super().__init__(clients, key)
        self.by_key: dict[str, requests.Response] = {}

    def _ask_on(self, client: int) -> None:
        number = 0
        while not self._is_over.is_set():
            key = f"{self._key}-{client}-{number}"
            self.by_key[key] = self._clients.enqueue(key=key, queue=FRAGILE)
            number += 1
            time.sleep(0.01)


@pytest.mark.fault("7", "Redis stalls during enqueues", timeout=600, takes=20)
def test_enqueues_to_a_stalled_redis_are_answered_in_time_and_done_once(
    clients: Clients, row: Row, site: Site, long: bool, key: str
) -> None:
    clients.enqueue_one()  # Redis has the script then, so a later enqueue is one command
    with watch_stalls() as stalls, OnceLoad(clients, key) as load, redis_stalled(site):
        time.sleep(13 if long else 2)
    slowest = await_workers(clients, set(site.staff.workers))
    unanswered = [answer for answer in load.by_key.values() if not answer.ok]
    assert unanswered
    for answer in unanswered:
        problem_of(answer, 503, "redis-unavailable")
    taken = max(answer.elapsed.total_seconds() for answer in unanswered)
    assert taken < ANSWER_LIMIT + stalls.within(taken)
    assert set(clients.answers) == {"202", OUTAGE}

    keys = list(load.by_key)
    with ThreadPoolExecutor(20) as pool:
        again = list(pool.map(lambda key: ask_until_answered(lambda: clients.enqueue(key=key, queue=FRAGILE)), keys))
    assert {answer.status_code for answer in again} == {202}
    for key, answer in zip(keys, again, strict=True):
        if load.by_key[key].ok:
            assert answer.json()["job_id"] == load.by_key[key].json()["job_id"]
    # Redis executed the enqueues that it had, though their clients got no answer. So their second answers are replays.
    done = len(unanswered) - len(firsts_of(again))
    assert done > 0
    waiting = [entry.decode() for entry in clients.redis.lrange(f"rq:queue:{FRAGILE}", 0, -1)]
    assert sorted(waiting) == sorted(ids_of(again))
    assert len(waiting) == len(keys)
    with site.fragile_staff(1, WORKER_LEASE=30):
        tally = clients.ledger.settle()
    row.close(tally, slowest, note=f"{len(unanswered)} answers of 503, each in {taken:.1f} s; {done} were executed")


@pytest.mark.fault("8", "Redis away, workers busy and idle", timeout=600, takes=120)
def test_workers_live_through_a_long_outage_and_keep_their_jobs(
    clients: Clients, row: Row, site: Site, long: bool
) -> None:
    # Workers bear the shorter outage without a long pause between their tries.
    seconds, durations = (60, (30, 63)) if long else (1, (0.5,))
    with site.fragile_staff(1, "default", WORKER_LEASE=30) if long else nullcontext(site.staff) as staff:
        names = set(site.staff.workers) | set(staff.workers)
        jobs = tuple(clients.enqueue_one(seconds=duration) for duration in durations)
        busy = {await_run(clients, job_id) for job_id in jobs}
        assert len(busy) == len(jobs) < len(names)
        with redis_away(site):
            time.sleep(seconds)
        slowest = await_workers(clients, names, jobs)
        await_results(clients, list(jobs), 2 * max(durations) + RETURN_LIMIT)
        tally = clients.ledger.settle()
    row.close(tally, slowest, note=f"{seconds} s", may_run_again=crashes_of(tally))


def ask_readyz(site: Site) -> requests.Response:
    return requests.get(f"{site.url}/readyz", timeout=10)


def outlive_refused_writes(
    clients: Clients, site: Site, refused: Callable[[Site], AbstractContextManager[None]], end: Path, *, long: bool
) -> tuple[str, float, Tally]:
    """Let jobs run, and others wait, while Redis refuses writes. Check that the service reports it.

    During the outage the file `end` lets the jobs end.

    Returns:
        The status, during the outage, of a job whose function had returned; the seconds to recover; and the tally.
    """
    # A lease that does not expire between two renewals, even on a busy machine.
    with site.fragile_staff(2, WORKER_LEASE=8) if long else nullcontext():
        jobs = [clients.enqueue_one(until=end) for _ in range(4)]
        worker = site.staff.workers[await_run(clients, jobs[0])]
        if long:
            jobs.append(clients.enqueue_one(seconds=17, queue=FRAGILE))  # more than twice its lease
            await_run(clients, jobs[-1])
        logged = len(worker.log)
        with refused(site):
            answer = clients.enqueue(key=end.name)
            problem_of(answer, 503, "redis-unavailable")
            assert int(answer.headers["Retry-After"]) >= 1
            checks = problem_of(ask_readyz(site), 503, "not-ready")["checks"]
            assert list(checks) == ["redis"]
            assert checks["redis"] != "ok"
            end.touch()
            # Wait until the worker has written the end, or has failed to.
            wait_until(lambda: clients.status_of(jobs[0]) in TERMINAL or "; trying again in" in worker.log[logged:])
            status = clients.status_of(jobs[0])
            time.sleep(16 if long else 0.1)
        seconds = await_workers(clients, set(site.staff.workers))
        # The refused requests enqueued nothing.
        again = clients.enqueue(key=end.name)
        assert (again.status_code, firsts_of([again])) == (202, [again])
        checks = ask_readyz(site).json()["checks"]
        assert (checks["redis"], checks["queue default"]) == ("ok", "ok")
        await_results(clients, jobs, 40)
        return status, seconds, clients.ledger.settle()


@pytest.mark.fault("10", "Redis at maxmemory", timeout=600, takes=30)
def test_full_memory_is_reported_and_survived(
    clients: Clients, row: Row, site: Site, long: bool, key: str, tmp_path: Path
) -> None:
    status, seconds, tally = outlive_refused_writes(clients, site, memory_full, tmp_path / key, long=long)
    row.close(tally, seconds)  # no worker died, so no job may run again
    assert status == "finished"  # Redis executes a script that frees memory first


@pytest.mark.fault("11", "Redis' disk full (MISCONF)", timeout=600, takes=30)
def test_full_disk_is_reported_and_survived(
    clients: Clients, row: Row, site: Site, long: bool, key: str, tmp_path: Path
) -> None:
    status, seconds, tally = outlive_refused_writes(clients, site, disk_full, tmp_path / key, long=long)
    row.close(tally, seconds, may_run_again=crashes_of(tally))  # a lease that could not be renewed may have expired
    assert status == "started"


@pytest.mark.fault("11b", "Redis a replica that takes no writes (READONLY)", timeout=600, takes=30, form=Form.BUDGET)
def test_replica_is_reported_and_survived(
    clients: Clients, row: Row, site: Site, long: bool, key: str, tmp_path: Path
) -> None:
    status, seconds, tally = outlive_refused_writes(clients, site, read_only, tmp_path / key, long=long)
    row.close(tally, seconds, may_run_again=crashes_of(tally))
    assert status == "started"
