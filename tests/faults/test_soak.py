"""Very many short jobs while workers come and go. Afterwards Redis and the processes must be as small as before."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from tests.faults.conftest import Form, Row
from tests.faults.ledger import RUNS_KEY, Job, Tally
from tests.faults.site import Clients, Site, ask_until_answered
from tests.processes import wait_until

JOBS = 200_000
#: The jobs that are enqueued, run and counted before the next wave, and how many of them are of each kind.
WAVE = 5_000
FAILING, RETRIED, DELAYED, CANCELED, SINGLE = 250, 250, 250, 100, 50
#: All other jobs finish at once. They come in batches of this size.
BATCH = 1000
BATCHES = 5 + (WAVE - FAILING - RETRIED - DELAYED - CANCELED - SINGLE) // BATCH
#: The requests of a wave that have a key.
KEYS = BATCHES + SINGLE
ENDS = {"finished": WAVE - FAILING - RETRIED - CANCELED, "failed": FAILING + RETRIED, "canceled": CANCELED}

#: Seconds that jobs are kept after their end. A wave takes much less, so that all of its jobs are counted.
TTL = 120
#: Seconds between two looks of a worker at its registries (`rq worker --maintenance-interval`; RQ's default is 600).
MAINTENANCE = 30

#: The keys that stay for ever. Each belongs to a queue or to all jobs, and not to a job, a batch or a worker.
PERMANENT = re.compile(
    r"""rq:(
        queues | workers | workers:\w+ | groups                # the names of queues, workers and groups
      | (finished|failed|canceled|scheduled|deferred|wip):\w+  # RQ's registries, one a queue and status
      | api:(events|doorbell)                                  # streams of bounded length
      | api:(secret|sweep|owners|metrics)
      | api:jobs::\w+                                          # the index of /jobs, one a status
    )""",
    re.VERBOSE,
)
#: Keys that are kept longer than the jobs on purpose: the marks of batches (60 days), and idempotency keys (a day, a
#: batch's 60 days). They cost the same for each batch and key; the row's note has the cost.
KEPT = ("rq:api:group:ID", "rq:api:key:ID")
#: The event log is cut at 10 000 entries or some more. The first wave alone makes as many.
BOUNDED = "rq:api:events"
#: Bytes that the other keys may grow by: workers with other names, registries that still have an entry.
SLACK = 10_000
#: Bytes that memory outside of keys may grow by: scripts, and the table of the keys, which shrinks late.
ELSEWHERE = 2_000_000


class Memory(NamedTuple):
    """The memory of Redis: bytes by family of keys (the id of a job or batch is ID), and the keys that never expire."""

    families: Counter[str]
    permanent: set[str]
    #: all memory except the buffers of clients and of the append-only file
    used: int

    @property
    def lasting(self) -> int:
        """The bytes that must not grow with the jobs."""
        return sum(size for name, size in self.families.items() if name not in (*KEPT, BOUNDED))

    @property
    def elsewhere(self) -> int:
        """The bytes that belong to no key."""
        return self.used - self.families.total()


def read_memory(redis: Any) -> Memory:
    """Measure key by key, because Redis' own sum includes the slack of the allocator and the table, which varies."""
    families: Counter[str] = Counter()
    permanent = set()
    keys = list(redis.scan_iter(count=1000))
    for start in range(0, len(keys), 1000):
        part = keys[start : start + 1000]
        with redis.pipeline(transaction=False) as pipeline:
            for key in part:
                pipeline.ttl(key)
                pipeline.memory_usage(key, samples=0)
            answers = pipeline.execute()
        for key, ttl, size in zip(part, answers[::2], answers[1::2], strict=True):
            name = key.decode()
            families[re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", name)] += size or 0
            if ttl == -1:
                permanent.add(name)
    info = redis.info("memory")
    return Memory(families, permanent, info["used_memory"] - info["mem_clients_normal"] - info["mem_aof_buffer"])


def resident(pid: int) -> int:
    """The process's resident memory in kB."""
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


def only_child_of(pid: int) -> int:
    """The only process that a worker or its fork server has started."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


class Crowd:
    """Clients that enqueue waves of jobs of all kinds. Each request has a key, so that it can be sent again."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._requests = 0

    def _next_key(self) -> str:
        self._requests += 1
        return f"soak-{self._requests}"

    def _enqueue_many(self, clients: Clients, count: int, *, fails: bool = False, **options: Any) -> list[str]:
        headers = {"Connection": "close", "Idempotency-Key": self._next_key()}
        answer = ask_until_answered(
            lambda: requests.post(
                f"{self._site.url}/enqueue_many/leave_trace",
                params=options,
                json=[{"trace_to": RUNS_KEY, "fails": fails}] * count,
                headers=headers,
                timeout=30,
            )
        )
        assert answer.status_code == 202, answer.text
        job_ids: list[str] = answer.json()["job_ids"]
        for job_id in job_ids:
            clients.ledger.acknowledge(job_id, 1 + options.get("retries", 0))
        return job_ids

    def enqueue_wave(self) -> Clients:
        """Enqueue a wave, the longest jobs first."""
        clients = Clients(self._site)
        self._enqueue_many(clients, RETRIED, fails=True, retries=1)
        self._enqueue_many(clients, DELAYED, delay=1)
        canceled = self._enqueue_many(clients, CANCELED, delay=3600)
        self._enqueue_many(clients, FAILING, fails=True)
        for _ in range(SINGLE):
            assert clients.enqueue_until_answered(self._next_key()).status_code == 202
        left = WAVE - FAILING - RETRIED - DELAYED - CANCELED - SINGLE
        while left:
            left -= len(self._enqueue_many(clients, min(left, BATCH)))
        for job_id in canceled:
            answer = clients.cancel(job_id)
            assert answer.status_code == 200, answer.text
        return clients

    def has_no_job(self) -> bool:
        """Whether no job waits or runs."""
        with self._site.redis.pipeline() as pipeline:
            pipeline.llen("rq:queue:default")
            pipeline.zcard("rq:scheduled:default")
            pipeline.zcard("rq:wip:default")
            return not any(pipeline.execute())

    def settle(self, clients: Clients) -> Tally:
        """Wait for the end of the wave, and count its jobs before they expire."""
        wait_until(self.has_no_job, 180, "the end of a wave")
        tally = clients.ledger.settle()
        self._site.redis.delete(RUNS_KEY)
        tally.check()
        assert Counter(job.status for job in tally.jobs.values()) == ENDS
        return tally


@pytest.fixture
def own_site(tmp_path: Path, stock: bool) -> Iterator[Site]:
    with ExitStack() as stack:
        site = Site(stack, tmp_path, stock=stock, RESULT_TTL=TTL, FAILURE_TTL=TTL)
        site.redis.config_set("appendfsync", "everysec")  # the shipped setting
        yield site


def replace_worker(site: Site, elder: str) -> None:
    """Stop the worker that is not `elder` with SIGTERM during its work, and start a new one."""
    (name,) = site.staff.workers.keys() - {elder}
    assert site.staff.workers.pop(name).stop() == 0
    site.staff.hire(1, "--maintenance-interval", str(MAINTENANCE))


@pytest.mark.fault("24", "short jobs with workers recycled, then idle", timeout=1800, form=Form.LONG)
def test_very_many_jobs_leave_nothing_behind(own_site: Site, row: Row) -> None:
    site, crowd = own_site, Crowd(own_site)
    for name in list(site.staff.workers):
        assert site.staff.workers.pop(name).stop() == 0
    # Delete the lock of the stopped workers. It keeps others from cleaning groups for RQ's default interval.
    site.redis.delete("rq:clean_groups")
    site.staff.hire(2, "--maintenance-interval", str(MAINTENANCE))
    site.staff.await_start()
    start = read_memory(site.redis)

    crowd.settle(crowd.enqueue_wave())  # after it all processes have loaded what they need
    elder = next(iter(site.staff.workers))
    pids = {"worker": site.staff.workers[elder].popen.pid}
    pids["fork server"] = only_child_of(pids["worker"])
    pids["work-horse"] = only_child_of(pids["fork server"])
    pids |= {f"web {number}": pid for number, pid in enumerate(site.web_processes(), 1)}
    before = {name: resident(pid) for name, pid in pids.items()}

    jobs: dict[str, Job] = {}
    busy, recycled = 0.0, 0
    while len(jobs) < JOBS:
        begin = time.monotonic()
        clients = crowd.enqueue_wave()
        replace_worker(site, elder)
        recycled += 1
        wait_until(crowd.has_no_job, 180, "the end of a wave")
        busy += time.monotonic() - begin
        jobs |= crowd.settle(clients).jobs
    site.staff.await_start()
    site.staff.check()
    peak = read_memory(site.redis)

    # Stay idle until all keys have expired, and each worker has looked at its registries after that.
    waves = 1 + len(jobs) // WAVE
    # The marks that keep a run from leaving two traces expire after two minutes.
    wait_until(lambda: site.redis.dbsize() < waves * (2 * BATCHES + KEYS) + 100, TTL + 120, "the end of the TTLs")
    limit, deadline = start.lasting + SLACK, time.monotonic() + 2 * MAINTENANCE
    while (end := read_memory(site.redis)).lasting > limit and time.monotonic() < deadline:
        time.sleep(1)
    after = {name: resident(pid) for name, pid in pids.items()}

    used = ", ".join(f"{memory.used / 1e6:.1f}" for memory in (start, peak, end))
    group, key = (end.families[name] // (waves * count) for name, count in zip(KEPT, (BATCHES, KEYS), strict=True))
    growth = ", ".join(f"{name} {after[name] / before[name] - 1:+.1%} of {before[name] // 1024} MB" for name in pids)
    note = f"{len(jobs) / busy:.0f} jobs/s, {recycled} workers recycled; Redis {used} MB; {growth}"
    note += f"; kept {group} bytes a batch, {key} an idempotency key"
    row.close(Tally(jobs, len(jobs), 0, {}, {}, set()), note=note)
    assert not {key for key in end.permanent if not PERMANENT.fullmatch(key)}
    assert end.lasting <= limit, end.families
    assert end.elsewhere < start.elsewhere + ELSEWHERE
    assert all(after[name] < 1.1 * before[name] for name in pids), (before, after)
