"""Cancel a job while something else happens to the job or its worker."""

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import NamedTuple

import pytest
import requests

from app.core.scripts import TERMINAL
from tests.faults.conftest import Rounds, Row
from tests.faults.ledger import Job, Run
from tests.faults.site import FRAGILE, FRAGILE_USER, Clients, Site
from tests.processes import wait_until

#: The starts of the races, in turns. The outcome of the first twenty is open. The last three are decided before the
#: cancel comes, so that each outcome occurs without luck.
STARTS = (*("idle", "behind others", "idle", "behind others", "delayed") * 4, "waits", "runs", "has ended")


class Race(NamedTuple):
    """A job, the answer to its cancel, and its neighbours, which the cancel must not touch."""

    job_id: str
    answer: requests.Response
    neighbours: list[str]
    #: from the answer to the end of the job
    seconds: float


def run_race(clients: Clients, cancelers: ThreadPoolExecutor, start: str) -> Race:
    """Enqueue a job and cancel it, from two threads."""
    neighbours = []
    options, pause = {"seconds": random.uniform(0, 0.01)}, 0.0
    match start:
        case "idle":
            pause = random.uniform(0, 0.015)
        case "behind others":
            neighbours = [clients.enqueue_one(seconds=random.uniform(0, 0.01)) for _ in range(2)]
            pause = random.uniform(0, 0.015)
        case "delayed":
            # Longer than a worker's tick, so the worker knows of the job, and promotes it some milliseconds late.
            options["delay"] = 1.1
            pause = 1.1 + random.uniform(0, 0.05)
        case "waits":
            options["delay"] = 60
        case "runs":
            options["seconds"] = 60
    job_id = clients.enqueue_one(**options)
    if start in ("runs", "has ended"):
        status = "started" if start == "runs" else "finished"
        wait_until(lambda: clients.status_of(job_id) == status, what=f"{job_id} {status}")
    asked = cancelers.submit(cancel_after, pause, clients, job_id)
    # The worker takes this job next. A stop that comes too late would hit it.
    neighbours.append(clients.enqueue_one(seconds=random.uniform(0, 0.01)))
    answer = asked.result()
    begin = time.monotonic()
    wait_until(lambda: clients.status_of(job_id) in TERMINAL, what=f"the end of {job_id}")
    seconds = time.monotonic() - begin
    wait_until(lambda: all(clients.status_of(each) in TERMINAL for each in neighbours), what="their ends")
    return Race(job_id, answer, neighbours, seconds)


def cancel_after(seconds: float, clients: Clients, job_id: str) -> requests.Response:
    time.sleep(seconds)
    return clients.cancel(job_id)


def outcome_of(race: Race, job: Job, *, was_asked_again: bool) -> str:
    """Check that the answer was true; returns the outcome of the race."""
    body = race.answer.json()
    match race.answer.status_code:
        case 200 if was_asked_again and body["job_status"] == "stopped":  # at the first cancel the job was running
            assert job.status == "stopped", job
        case 200:
            assert body["job_status"] == "canceled", body
            assert (job.status, job.runs) == ("canceled", []), job
        case 202:
            assert body["job_status"] in ("started", "stopped"), body
            assert job.status == "stopped", job
        case 409:
            assert (body["type"], body["job_status"]) == ("/problems/job-already-ended", "finished"), body
            assert (job.status, len(job.runs)) == ("finished", 1), job
        case _:
            raise AssertionError(race.answer.text)
    assert job.crashes == 0
    return str(job.status)


@pytest.mark.fault("19", "cancel against start", timeout=1800, share=3)
def test_answer_to_a_cancel_is_true_whenever_it_comes(clients: Clients, row: Row, rounds: Rounds) -> None:
    # Use one thread per worker, or the queue would decide most races. The delayed jobs have threads of their own.
    with ThreadPoolExecutor(2) as racers, ThreadPoolExecutor(8) as patient, ThreadPoolExecutor(10) as cancelers:
        asked: list[Future[Race]] = []
        for _ in rounds(44, 3):
            asked += [
                (patient if start == "delayed" else racers).submit(run_race, clients, cancelers, start)
                for start in STARTS
            ]
            wait(asked[: -len(STARTS)])  # wait for the round before: its delayed jobs fall due during this round
        races = [each.result() for each in asked]
    tally = clients.ledger.settle()
    outcomes = Counter(
        outcome_of(race, tally.jobs[race.job_id], was_asked_again=race.job_id in clients.canceled_again)
        for race in races
    )
    for race in races:
        for neighbour in race.neighbours:
            job = tally.jobs[neighbour]
            assert (job.status, len(job.runs), job.crashes) == ("finished", 1, 0), job
    assert set(outcomes) == {"canceled", "stopped", "finished"}
    slowest = max(race.seconds for race in races if race.answer.status_code == 202)
    row.close(tally, slowest, note=", ".join(f"{times} {outcome}" for outcome, times in outcomes.items()))


def start_long_job(clients: Clients, **options: str) -> tuple[str, Run]:
    """Start a job that runs for a minute; returns the job and its run."""
    job_id = clients.enqueue_one(seconds=60, **options)
    (run,) = wait_until(lambda: clients.ledger.runs().get(job_id, []), what=f"the run of {job_id}")
    return job_id, run


def await_stopped(clients: Clients, job_id: str, since: float, seconds: float) -> float:
    """Wait until the job has stopped, as it must; returns the seconds since `since`."""
    wait_until(lambda: clients.status_of(job_id) in TERMINAL, seconds, f"the end of {job_id}")
    assert clients.status_of(job_id) == "stopped"
    return time.monotonic() - since


@pytest.mark.fault("19b", "cancel of a running job while worker and work-horse are killed", timeout=1200, share=2)
def test_canceled_job_whose_worker_is_killed_ends_stopped(
    clients: Clients, row: Row, site: Site, rounds: Rounds
) -> None:
    slowest = 0.0
    # On a busy machine the lease may have expired when the cancel comes. Then the cancel ends the job at once.
    with site.fragile_staff(2, WORKER_LEASE=10) as staff, ThreadPoolExecutor(1) as pool:
        for number in rounds(20):
            job_id, run = start_long_job(clients, queue=FRAGILE)
            name = clients.redis.hget(f"rq:job:{job_id}", "worker_name").decode()
            if number % 2 == 0:  # so that the worker cannot act on the stop command
                staff.workers[name].signal(signal.SIGSTOP)
            asked = pool.submit(clients.stop, job_id)
            time.sleep(random.uniform(0, 0.02))
            # Kill the worker first: it would put the job back if it saw the work-horse die.
            staff.kill(name)
            with suppress(ProcessLookupError):
                os.kill(run.pid, signal.SIGKILL)
            asked.result()
            start = time.monotonic()
            staff.hire()
            slowest = max(slowest, await_stopped(clients, job_id, start, 60))
            staff.await_start()
        tally = clients.ledger.settle()
    row.close(tally, slowest)
    assert {len(job.runs) for job in tally.jobs.values()} == {1}


@pytest.mark.fault("19c", "cancel of a running job whose worker does not get the message", timeout=600, share=1)
def test_canceled_job_whose_worker_missed_the_message_ends_stopped(
    clients: Clients, row: Row, site: Site, rounds: Rounds
) -> None:
    slowest = 0.0
    with site.fragile_staff(1) as staff:
        (name,) = staff.workers

        def listeners() -> int:
            ((_channel, count),) = clients.redis.pubsub_numsub(f"rq:pubsub:{name}")
            return int(count)

        wait_until(listeners, what="a worker that hears")
        # Without a right to any channel the user is disconnected, and cannot subscribe again.
        clients.redis.execute_command("ACL", "SETUSER", FRAGILE_USER, "resetchannels")
        try:
            for _ in rounds(20):
                job_id, _run = start_long_job(clients, queue=FRAGILE)
                assert listeners() == 0
                clients.stop(job_id)
                slowest = max(slowest, await_stopped(clients, job_id, time.monotonic(), 30))
                assert listeners() == 0
        finally:
            clients.redis.execute_command("ACL", "SETUSER", FRAGILE_USER, "allchannels")
        tally = clients.ledger.settle()
    row.close(tally, slowest)
    assert {len(job.runs) for job in tally.jobs.values()} == {1}
