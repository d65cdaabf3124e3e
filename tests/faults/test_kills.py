"""Kill or stop workers and work-horses at each moment of a job's way through them."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.conftest import Form, Rounds, Row
from tests.faults.ledger import Tally
from tests.faults.site import FRAGILE, Clients, Site, Staff
from tests.processes import ROOT, wait_until

#: Seconds until a dead worker's job is run again at the latest, with the shipped settings.
RECOVERED_WITHIN = 60
#: Of this many random kills, at least one hits a worker that has a job.
ENOUGH_TO_HIT_A_JOB = 20
#: The seconds of the lease in the long form, and in the others.
LEASES = {True: 30, False: 3}


def crashes_of(tally: Tally) -> dict[str, int]:
    """The jobs that may have run again, and how often: each crash is counted at its job."""
    return {job_id: job.crashes for job_id, job in tally.jobs.items() if job.crashes}


def kill(pid: int) -> None:
    """Kill a process with SIGKILL, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def load(clients: Clients, *queues: str, jobs: int, seconds: float = 0.01) -> Iterator[None]:
    """Keep this number of short jobs waiting in all queues together."""
    stop = False

    def enqueue() -> None:
        while not stop:
            if sum(clients.redis.llen(f"rq:queue:{queue}") for queue in queues) < jobs:
                clients.enqueue_one(queue=random.choice(queues), seconds=random.uniform(0, 2 * seconds))
            else:
                time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        clerks = [pool.submit(enqueue) for _ in range(2)]
        try:
            yield
        finally:
            stop = True
        for clerk in clerks:
            clerk.result()


def kill_run(clients: Clients, job_id: str, number: int) -> float:
    """Kill the work-horse during this run of the job; returns the seconds between the starts of the last two runs."""
    wait_until(lambda: len(clients.ledger.runs().get(job_id, [])) == number, what=f"run {number}")
    runs = clients.ledger.runs()[job_id]
    kill(runs[-1].pid)
    return runs[-1].at - runs[-2].at if number > 1 else 0.0


@pytest.mark.fault("1", "SIGKILL of the work-horse in the middle of a job", timeout=600, share=1)
def test_job_whose_work_horse_is_killed_is_run_again_at_once(
    clients: Clients, row: Row, rounds: Rounds, tmp_path: Path
) -> None:
    slowest, unlucky = 0.0, []
    for number in rounds(15):
        end = tmp_path / f"end-{number}"  # the job does not end before the kill, even if the kill is late
        once, always = clients.enqueue_one(until=end), clients.enqueue_one(seconds=60)
        unlucky.append(always)
        kill_run(clients, once, 1)
        end.touch()
        slowest = max(slowest, *(kill_run(clients, always, run) for run in range(1, 5)))
    tally = clients.ledger.settle()
    for job_id, job in tally.jobs.items():
        assert (job.status, job.crashes) == (("failed", 4) if job_id in unlucky else ("finished", 1)), job
    for job_id in unlucky:
        error = clients.redis.hget(f"rq:job:{job_id}", "error").decode()
        assert "died 4 times, more often than it may; the last time: signal 9 (SIGKILL)" in error
    row.close(tally, slowest, may_run_again=crashes_of(tally))
    assert slowest < 10


@pytest.mark.fault(
    "2", "SIGKILL of worker and work-horse in the middle of a job, another one idle", timeout=600, takes=60
)
def test_job_whose_worker_is_killed_is_run_again_by_another(
    clients: Clients, row: Row, site: Site, long: bool, tmp_path: Path
) -> None:
    count = 4 if long else 1
    with site.fragile_staff(count, WORKER_LEASE=LEASES[long]) as staff:
        end = tmp_path / "end"
        jobs = [clients.enqueue_one(queue=FRAGILE, until=end) for _ in range(count)]
        wait_until(lambda: len(clients.ledger.runs()) == count, what="all to run")
        runs = clients.ledger.runs()
        staff.hire()  # the idle worker
        for name in list(staff.workers)[:count]:
            staff.kill(name)
        for job_id in jobs:
            kill(runs[job_id][0].pid)
        end.touch()
        start = time.monotonic()
        wait_until(
            lambda: all(len(found) == 2 for found in clients.ledger.runs().values()),
            RECOVERED_WITHIN,
            "the second runs",
        )
        recovery = time.monotonic() - start
        tally = clients.ledger.settle(RECOVERED_WITHIN)
    assert {(job.status, job.crashes) for job in tally.jobs.values()} == {("finished", 1)}
    row.close(tally, recovery, may_run_again=crashes_of(tally))


def await_work(site: Site, staff: Staff, name: str) -> None:
    """Wait until a worker has asked for a job. Before that RQ handles no signals."""
    key = f"rq:worker:{name}"
    wait_until(lambda: site.redis.hget(key, "state") in (b"busy", b"idle"), what=staff.workers[name].log)


def kill_at_random(staff: Staff, site: Site, rounds: Iterator[int]) -> float:
    """In each round kill a worker at a random moment and start a new one; returns the time of the last kill."""
    for _ in rounds:
        name = random.choice(sorted(staff.workers))
        await_work(site, staff, name)
        # These jobs spend most of their time in the worker: it takes, sends, runs and ends one in milliseconds.
        time.sleep(random.uniform(0, 0.1))
        staff.kill(name)
        staff.hire()
    return time.monotonic()


@pytest.mark.parametrize("queues", [(FRAGILE,), (FRAGILE, "second", "third")], ids=["one queue", "three queues"])
@pytest.mark.fault("3", "SIGKILL of workers at random moments", timeout=1800, share=5)
def test_no_job_is_lost_when_workers_are_killed(
    clients: Clients, row: Row, site: Site, long: bool, rounds: Rounds, queues: tuple[str, ...]
) -> None:
    with site.fragile_staff(3 if long else 2, *queues[1:], WORKER_LEASE=LEASES[long]) as staff:
        with load(clients, *queues, jobs=30):
            last = kill_at_random(staff, site, rounds(200, 2))
        staff.await_start()
        tally = clients.ledger.settle(RECOVERED_WITHIN)
        recovery = time.monotonic() - last
    row.close(tally, recovery, note=f"{rounds.begun} times, {len(queues)} queues", may_run_again=crashes_of(tally))
    # For an instant a worker has two jobs: it takes the next one before it reports the end of the last.
    assert (rounds.begun >= ENOUGH_TO_HIT_A_JOB) <= sum(crashes_of(tally).values()) <= 2 * rounds.begun


@pytest.mark.fault("4", "SIGKILL of worker and work-horse after the take, before the run", timeout=600, takes=60)
def test_job_that_was_taken_and_never_begun_is_run(
    clients: Clients, row: Row, site: Site, long: bool, tmp_path: Path
) -> None:
    count = 4 if long else 1
    with site.fragile_staff(count, WORKER_LEASE=LEASES[long]) as staff:
        shown = tmp_path / "shown"
        warm = [clients.enqueue_one(queue=FRAGILE, until=shown) for _ in range(count)]
        wait_until(lambda: len(clients.ledger.runs()) == count, what="the work-horses to show themselves")
        shown.touch()
        horses = {run.pid for runs in clients.ledger.runs().values() for run in runs}
        assert len(horses) == count
        wait_until(lambda: all(clients.status_of(job_id) == "finished" for job_id in warm))
        # A stopped work-horse does not begin the job that it gets.
        for pid in horses:
            os.kill(pid, signal.SIGSTOP)
        jobs = [clients.enqueue_one(queue=FRAGILE) for _ in range(len(horses))]
        wait_until(lambda: all(clients.status_of(job_id) == "started" for job_id in jobs), what="all to be taken")
        for name in list(staff.workers):
            staff.kill(name)
        for pid in horses:
            kill(pid)
        start = time.monotonic()
        staff.hire()
        tally = clients.ledger.settle(RECOVERED_WITHIN)
        recovery = time.monotonic() - start
    assert {len(job.runs) for job in tally.jobs.values()} == {1}
    row.close(tally, recovery)


@pytest.mark.fault("5", "SIGTERM under load", timeout=1200, share=4)
def test_worker_that_is_stopped_loses_and_repeats_no_job(
    clients: Clients, row: Row, site: Site, rounds: Rounds
) -> None:
    with site.fragile_staff(3, WORKER_LEASE=30) as staff:
        with load(clients, FRAGILE, jobs=30, seconds=0.05):
            for _ in rounds(100, 2):
                name = random.choice(sorted(staff.workers))
                await_work(site, staff, name)
                time.sleep(random.uniform(0, 0.1))
                process = staff.workers.pop(name)
                assert process.stop() == 0, process.log
                staff.hire()
            staff.await_start()
        tally = clients.ledger.settle()
    row.close(tally, note=f"{rounds.begun} times")
    assert {(job.status, job.crashes) for job in tally.jobs.values()} == {("finished", 0)}


#: Deaths of work-horses in a round; and in the long form, all below one fork server.
DEATHS, ALL_DEATHS = 1000, 20_000


@pytest.mark.fault("1b", "SIGKILL the work-horse at any moment of the fork server's loop", timeout=1800, share=1)
def test_no_death_of_a_work_horse_is_missed(row: Row, form: Form, rounds: Rounds) -> None:
    """Before a signal woke the server, it missed 4 of 17 937 deaths, and each time the worker waited a minute."""
    deaths = ALL_DEATHS if form is Form.LONG else DEATHS
    for _ in rounds(ALL_DEATHS // deaths):
        run = [sys.executable, "-m", "tests.faults.fork_race", str(deaths), str(random.random())]
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr
    row.note(f"{rounds.begun * deaths} deaths, all of them reported")
