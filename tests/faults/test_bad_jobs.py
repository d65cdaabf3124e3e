"""Jobs that harm their process, that are unreadable, or that return bad results. Each ends and harms no other job."""

import json
import os
import random
import re
import resource
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from app.core.scripts import EVENTS_KEY, TERMINAL
from tests.faults.conftest import Rounds, Row
from tests.faults.ledger import Job, Run, Tally
from tests.faults.site import FRAGILE, Clients, Site, Staff
from tests.processes import problem_of, wait_until
from tests.test_worker import POISON, WHERE, good_hash, is_running


@pytest.fixture
def max_crashes(long: bool) -> int:
    """How often a job is run again after its process died: the setting's default, or fewer times to be quicker."""
    return 3 if long else 1


def error_of(clients: Clients, job_id: str) -> dict[str, str]:
    """The error of a job that has failed."""
    answer = requests.get(f"{clients.site.url}/check_status", params={"job_id": job_id}, timeout=30).json()
    assert answer["job_status"] == "failed", answer
    error: dict[str, str] = answer["error"]
    return error


def assert_died(clients: Clients, job_id: str, job: Job, times: int, reason: str) -> None:
    """Assert that the job's process died this number of times, the last time for this reason."""
    assert (len(job.runs), job.crashes) == (times, times), job
    error = error_of(clients, job_id)
    assert error["type"] == "WorkHorseDied"
    assert f"died {times} times" in error["message"]
    assert reason in error["message"]


def assert_finished_once(tally: Tally, job_ids: list[str]) -> None:
    """Assert that each of these harmless jobs ran once and finished."""
    for job_id in job_ids:
        job = tally.jobs[job_id]
        assert (job.status, len(job.runs), job.crashes) == ("finished", 1, 0), job


def enqueue_misdeed(clients: Clients, how: str, queue: str = FRAGILE, **options: Any) -> str:
    return clients.enqueue_one(function="misbehave", payload={"how": how}, seconds=60, queue=queue, **options)


@pytest.mark.fault("12", "jobs that eat memory until WORKER_MAX_MEMORY, at each try", timeout=600, takes=30)
def test_job_that_eats_all_memory_fails_after_the_crash_limit_and_its_neighbours_finish(
    clients: Clients, row: Row, site: Site, long: bool, max_crashes: int
) -> None:
    greedy, neighbours = [], []
    for _ in range(8 if long else 1):
        # The job stops at this size to protect the machine, in case nothing else stops it.
        payload = {"size": 600 * 2**20}
        greedy.append(clients.enqueue_one(function="devour_memory", payload=payload, seconds=60, queue=FRAGILE))
        neighbours += [clients.enqueue_one(queue=FRAGILE, seconds=0.1) for _ in range(10)]
    with site.fragile_staff(2, WORKER_LEASE=30, WORKER_MAX_MEMORY="300MiB", MAX_CRASHES=max_crashes):
        start = time.monotonic()
        tally = clients.ledger.settle(200)
        seconds = time.monotonic() - start
    row.close(tally, seconds, may_run_again=dict.fromkeys(greedy, max_crashes))
    for job_id in greedy:
        assert_died(clients, job_id, tally.jobs[job_id], max_crashes + 1, "WORKER_MAX_MEMORY")
    assert_finished_once(tally, neighbours)


def limit_memory(staff: Staff, size: int) -> None:
    """Limit all processes of the workers, later ones too, as if the workers were started under `ulimit -v`."""
    for worker in staff.workers.values():
        for process in (psutil.Process(worker.popen.pid), *psutil.Process(worker.popen.pid).children(recursive=True)):
            resource.prlimit(process.pid, resource.RLIMIT_AS, (size, size))


def enqueue_surely(clients: Clients, **options: Any) -> str:
    """Enqueue a job, though jobs that eat memory may leave Redis little of the machine; returns its id."""
    answer = clients.enqueue_until_answered(os.urandom(8).hex(), queue=FRAGILE, **options)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["job_id"]
    return job_id


@pytest.mark.fault("12b", "jobs that eat memory until RLIMIT_AS, at each try", timeout=600, takes=30)
def test_job_that_gets_no_more_memory_fails_and_its_neighbours_finish(
    clients: Clients, row: Row, site: Site, long: bool, max_crashes: int
) -> None:
    raising: list[str] = []
    killed: list[str] = []
    neighbours = []
    with site.fragile_staff(2, WORKER_LEASE=30, MAX_CRASHES=max_crashes) as staff:
        limit_memory(staff, 400 * 2**20)
        start = time.monotonic()
        for _ in range(8 if long else 1):
            for job_ids in (raising, killed):
                payload = {"size": 2**30, "is_killed": job_ids is killed}
                job_ids.append(enqueue_surely(clients, function="devour_memory", payload=payload))
                neighbours += [enqueue_surely(clients, seconds=0.1) for _ in range(5)]
        tally = clients.ledger.settle(200)
        seconds = time.monotonic() - start
    row.close(tally, seconds, may_run_again=dict.fromkeys(killed, max_crashes))
    for job_id in raising:  # MemoryError is an exception like any other: the job is not run again
        assert (len(tally.jobs[job_id].runs), tally.jobs[job_id].crashes) == (1, 0)
        assert error_of(clients, job_id)["type"] == "MemoryError"
    for job_id in killed:
        assert_died(clients, job_id, tally.jobs[job_id], max_crashes + 1, "signal 9 (SIGKILL)")
    assert_finished_once(tally, neighbours)


#: The ways in which a job can end its process, and the reason that the error names.
DEATHS = {"exit": "exit code 0", "segfault": "signal 11 (SIGSEGV)", "kill": "signal 9 (SIGKILL)"}


@pytest.mark.fault("13", "jobs that end their process, or swallow their timeout", timeout=600, takes=40)
def test_job_that_ends_its_process_or_swallows_its_timeout_fails_with_a_true_message(
    clients: Clients, row: Row, site: Site, long: bool, max_crashes: int
) -> None:
    dying: dict[str, str] = {}
    exiting, late, neighbours = [], [], []
    for _ in range(6 if long else 1):
        dying |= {enqueue_misdeed(clients, how): reason for how, reason in DEATHS.items()}
        exiting.append(enqueue_misdeed(clients, "sys.exit"))
        if long:  # it takes six seconds
            late.append(enqueue_misdeed(clients, "swallow the timeout", timeout=1))
        neighbours += [clients.enqueue_one(queue=FRAGILE) for _ in range(5)]
    with site.fragile_staff(2, WORKER_LEASE=30, MAX_CRASHES=max_crashes):
        start = time.monotonic()
        tally = clients.ledger.settle(200)
        seconds = time.monotonic() - start
    row.close(tally, seconds, may_run_again=dict.fromkeys(dying, max_crashes))
    for job_id, reason in dying.items():
        assert_died(clients, job_id, tally.jobs[job_id], max_crashes + 1, reason)
    for job_id in exiting:
        assert error_of(clients, job_id) == {"type": "SystemExit", "message": "3"}
    message = "The job ran longer than its limit of 1 s, and its process was killed."
    for job_id in late:
        assert error_of(clients, job_id) == {"type": "JobTimeoutException", "message": message}
    assert_finished_once(tally, neighbours)


def start_deaf_job(clients: Clients, queue: str) -> tuple[str, Run]:
    """Start a job that runs for a minute and ignores SIGTERM; returns the job and its run."""
    job_id = enqueue_misdeed(clients, "ignore SIGTERM", queue)
    (run,) = wait_until(lambda: clients.ledger.runs().get(job_id, []), what=f"the run of {job_id}")
    wait_until(lambda: ignores_sigterm(run.pid), what="a job that ignores SIGTERM")
    return job_id, run


def ignores_sigterm(pid: int) -> bool:
    (ignored,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(ignored, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.fault("13b", "jobs that ignore SIGTERM, canceled", timeout=600, share=1)
def test_job_that_ignores_sigterm_is_stopped_by_a_cancel(clients: Clients, row: Row, rounds: Rounds) -> None:
    slowest = 0.0
    for _ in rounds(20):
        job_id, run = start_deaf_job(clients, "default")
        os.kill(run.pid, signal.SIGTERM)
        start = time.monotonic()
        clients.stop(job_id)
        wait_until(lambda job_id=job_id: clients.status_of(job_id) in TERMINAL, 30, "its end")  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - start)
        wait_until(lambda pid=run.pid: not is_running(pid), what="the end of its process")  # type: ignore[misc]
    tally = clients.ledger.settle()
    row.close(tally, slowest)
    assert {(job.status, len(job.runs)) for job in tally.jobs.values()} == {("stopped", 1)}


@pytest.mark.fault("13c", "jobs that ignore SIGTERM, their workers stopped by SIGTERM", timeout=600, share=1)
def test_job_that_ignores_sigterm_is_put_back_by_a_stopping_worker(
    clients: Clients, row: Row, site: Site, long: bool, rounds: Rounds
) -> None:
    slowest = 0.0
    with site.fragile_staff(2, WORKER_LEASE=30, WORKER_SHUTDOWN_SECONDS=1 if long else 0) as staff:
        for number in rounds(5):
            if number:
                staff.hire()
                staff.await_start()
            job_id, run = start_deaf_job(clients, FRAGILE)
            worker = staff.workers.pop(clients.redis.hget(f"rq:job:{job_id}", "worker_name").decode())
            os.kill(run.pid, signal.SIGTERM)  # systemd also sends it to all processes
            start = time.monotonic()
            assert worker.stop() == 0
            assert not is_running(run.pid)
            # The other worker runs it now, so it was not lost.
            wait_until(lambda job_id=job_id: len(clients.ledger.runs()[job_id]) == 2, what="its second run")  # type: ignore[misc]
            slowest = max(slowest, time.monotonic() - start)
            clients.stop(job_id)
        tally = clients.ledger.settle()
    row.close(tally, slowest, may_run_again=dict.fromkeys(tally.jobs, 1))
    for job in tally.jobs.values():
        assert (job.status, len(job.runs), job.crashes) == ("stopped", 2, 0)


#: Hashes that are no jobs, or jobs that must not run.
BAD_HASHES = [
    # A bad `failure_ttl` may be read as one second; then the job would expire before the test looks.
    *(good_hash() | fields for fields in POISON.values() if "failure_ttl" not in fields),
    good_hash() | {"failure_ttl": "long", "status": "nonsense"},
    {name: value for name, value in good_hash().items() if name != "data"},
    {"data": "x"},
    good_hash() | {"data": b'["os.getpid", null, [], {}]'},
    good_hash() | {"data": b'["no.such.function", null, [1], {}]'},
]


def write_poison(clients: Clients) -> tuple[list[str], list[str]]:
    """Write bad keys to Redis, as mistakes do; returns the ids of the bad hashes, and of the keys of other types."""
    prefix = f"poison-{os.urandom(4).hex()}"
    hashes = [f"{prefix}-{number}" for number in range(len(BAD_HASHES))]
    others = [f"{prefix}-{kind}" for kind in ("string", "list")]
    for job_id, fields in zip(hashes, BAD_HASHES, strict=True):
        clients.redis.hset(f"rq:job:{job_id}", mapping=fields)
    clients.redis.set(f"rq:job:{others[0]}", "x")
    clients.redis.rpush(f"rq:job:{others[1]}", "x")
    return hashes, others


def remove_poison(clients: Clients, job_ids: list[str]) -> None:
    """Remove the bad jobs: no client got an acknowledgement of them, so the ledger must not see them."""
    assert clients.redis.delete(*(f"rq:job:{job_id}" for job_id in job_ids)) == len(job_ids)
    clients.redis.zrem(f"rq:failed:{FRAGILE}", *job_ids)


@pytest.mark.fault("14", "poison in front of good jobs", timeout=600)
def test_poison_in_front_of_good_jobs_is_set_aside_and_logged(
    clients: Clients, row: Row, site: Site, long: bool
) -> None:
    good = [clients.enqueue_one(queue=FRAGILE) for _ in range(1000 if long else 100)]
    hashes, others = [], []
    for _ in range(20 if long else 1):
        more_hashes, more_others = write_poison(clients)
        hashes += more_hashes
        others += more_others
    random.shuffle(poison := hashes + others)
    clients.redis.lpush(f"rq:queue:{FRAGILE}", *poison)
    with site.fragile_staff(1, WORKER_LEASE=30) as staff:
        start = time.monotonic()
        tally = clients.ledger.settle(120)
        seconds = time.monotonic() - start
        (log,) = [worker.log for worker in staff.workers.values()]
    for job_id in others:
        assert f"job {job_id} set aside" in log
    for job_id in hashes:
        assert f"job {job_id} set aside" in log or f"job {job_id} raised" in log
        status, error = clients.redis.hmget(f"rq:job:{job_id}", "status", "error")
        assert (status, bool(json.loads(error)["message"])) == (b"failed", True)
    # Each bad hash is in one place; the keys of other types are in none.
    assert set(clients.redis.zrange(f"rq:failed:{FRAGILE}", 0, -1)) >= {job_id.encode() for job_id in hashes}
    assert clients.redis.llen(f"rq:queue:{FRAGILE}") == clients.redis.zcard(f"rq:wip:{FRAGILE}") == 0
    remove_poison(clients, poison)
    row.close(clients.ledger.count(), seconds, note=f"{len(poison)} poisons")
    assert_finished_once(tally, good)


def read_events(clients: Clients) -> dict[str, list[str]]:
    """The recent statuses of each job, in order."""
    statuses = defaultdict(list)
    for _, event in clients.redis.xrange(EVENTS_KEY):
        statuses[event[b"job_id"].decode()].append(event[b"status"].decode())
    return statuses


@pytest.mark.fault("15", "return values that are not JSON, NaN, or too large", timeout=600)
def test_job_whose_return_value_cannot_be_kept_fails_with_the_reason(
    clients: Clients, row: Row, site: Site, long: bool
) -> None:
    too_large = "The return value has 1001 bytes as JSON; 1000 are allowed."
    reasons: dict[str | int, tuple[str, str]] = {kind: ("ResultNotJSON", where) for kind, where in WHERE.items()}
    reasons[999] = ("ResultTooLarge", too_large)
    wrong: dict[str, tuple[str, str]] = {}
    with site.fragile_staff(1, WORKER_LEASE=30, MAX_RESULT_BYTES=1000):
        start = time.monotonic()
        for _ in range(20 if long else 1):
            for kind, reason in reasons.items():
                options = {"function": "return_badly", "queue": FRAGILE}
                wrong[clients.enqueue_one(payload={"kind": kind}, **options)] = reason
            just_fits = clients.enqueue_one(payload={"kind": 998}, **options)
        tally = clients.ledger.settle()
        seconds = time.monotonic() - start
    row.close(tally, seconds)
    events = read_events(clients)
    for job_id, (kind_of_error, text) in wrong.items():
        error = error_of(clients, job_id)
        assert error["type"] == kind_of_error
        assert text in error["message"]
        assert events[job_id] == ["queued", "started", "failed"]
        answer = requests.get(f"{site.url}/get_result", params={"job_id": job_id}, timeout=30)
        assert problem_of(answer, 409, "job-failed")["error"] == error
    assert tally.jobs[just_fits].status == "finished"
