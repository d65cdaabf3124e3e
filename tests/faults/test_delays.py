"""Delayed jobs and retries. No death of a process may lose, repeat, advance or delay one."""

import json
import random
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import pairwise

import pytest

from tests.faults.conftest import Row
from tests.faults.ledger import Tally
from tests.faults.site import FRAGILE, Clients, Site, Staff
from tests.processes import wait_until, watch_stalls

#: RQ stores the time of a retry in whole seconds, and so do we (finish.lua). It may be early by part of a second.
RETRY_IS_EARLY = 1.0


def dues_of(clients: Clients, tally: Tally, delays: dict[str, float]) -> dict[tuple[str, int], float]:
    """When each run of each job was due, by Redis' clock, without the jobs that a kill cut."""
    dues = {}
    for job_id, job in tally.jobs.items():
        created, intervals = clients.redis.hmget(f"rq:job:{job_id}", "created_at", "retry_intervals")
        if job.crashes:
            continue
        if job_id in delays:
            dues[job_id, 0] = datetime.fromisoformat(created.decode()).timestamp() + delays[job_id]
        for number, (run, pause) in enumerate(zip(job.runs, json.loads(intervals or b"[]"), strict=False), 1):
            dues[job_id, number] = run.at + pause
    return dues


def longest_idleness(begins: list[float], due: float, begin: float) -> float:
    """The longest time without the start of any job while this one was due. Each job takes only milliseconds."""
    between = begins[bisect_right(begins, due) : bisect_left(begins, begin)]
    return max(later - earlier for earlier, later in pairwise((due, *between, begin)))


def kill_all_but_one(staff: Staff) -> int:
    """Kill all workers but one with SIGKILL, and start as many new ones; returns how many."""
    names = random.sample(sorted(staff.workers), len(staff.workers) - 1)
    for name in names:
        staff.kill(name)
    staff.hire(len(names))
    return len(names)


@pytest.mark.fault("21", "all workers but one killed while delayed jobs and retries fall due", timeout=1200, takes=60)
def test_delayed_jobs_and_retries_run_once_and_in_time_though_workers_are_killed(
    clients: Clients, row: Row, site: Site, long: bool
) -> None:
    count, failing, bound, kills = (1000, 200, 2, 0) if long else (50, 3, 10, 0)
    delays: dict[str, float] = {}

    def enqueue_delayed(delay: float) -> None:
        delays[clients.enqueue_one(queue=FRAGILE, delay=delay)] = delay

    def enqueue_failing(number: int) -> None:
        clients.enqueue_one(queue=FRAGILE, fails=True, retries=1 + (long and number % 2))

    def runs() -> int:
        return sum(map(len, clients.ledger.runs().values()))

    # The lease is so long that no live worker lets it expire. Else more runs would be cut than there are kills.
    with (
        watch_stalls() as stalls,
        site.fragile_staff(4 if long else 2, WORKER_LEASE=8) as staff,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(enqueue_failing, number) for number in range(failing)]
        asked += [pool.submit(enqueue_delayed, random.uniform(0.5, 5 if long else 3)) for _ in range(count)]
        for part in (0.3, 0.6, 0.9) if long else (0.3,):
            wait_until(lambda part=part: runs() > part * (count + failing), what="jobs that fall due")  # type: ignore[misc]
            kills += kill_all_but_one(staff)
            staff.await_start()
        for each in asked:
            each.result()
        tally = clients.ledger.settle(120)

    # Each run that a kill cut is one more run. A worker has one job at a time.
    cut = {job_id: job.crashes for job_id, job in tally.jobs.items() if job.crashes}
    begins = sorted(run.at for job in tally.jobs.values() for run in job.runs)
    lateness, idleness = 0.0, 0.0
    for (job_id, number), due in dues_of(clients, tally, delays).items():
        begin = tally.jobs[job_id].runs[number].at
        assert begin > due - (RETRY_IS_EARLY if number else 0.001), (job_id, number, begin - due)
        lateness = max(lateness, begin - due)
        if begin > due:
            idleness = max(idleness, longest_idleness(begins, due, begin))
    row.close(tally, lateness, note=f"{kills} kills, idle {idleness:.1f} s", may_run_again=cut)
    assert sum(cut.values()) <= kills
    assert idleness < bound + stalls.within(idleness)
    assert {tally.jobs[job_id].status for job_id in delays} == {"finished"}
