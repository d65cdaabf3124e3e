"""The checker of all faults. It compares the answers that clients got with what happened to their jobs."""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from app.core.scripts import TERMINAL

#: The list in which each run of a job of the fault suite leaves its trace.
RUNS_KEY = "faults:runs"

#: The one place of a job in each status: its queue, or one of RQ's registries.
_PLACE_OF = {
    "queued": "queue",
    "scheduled": "scheduled",
    "deferred": "deferred",
    "started": "wip",
    "finished": "finished",
    "failed": "failed",
    "stopped": "failed",
    "canceled": "canceled",
}
_REGISTRIES = sorted(set(_PLACE_OF.values()) - {"queue"})


class Run(NamedTuple):
    """One run of a job, from its trace: when it began by Redis' clock, and in which work-horse."""

    at: float
    pid: int


class Job(NamedTuple):
    """A job as Redis has it."""

    status: str | None
    places: list[str]
    runs: list[Run]
    crashes: int


class Tally(NamedTuple):
    """A count of the acknowledged jobs: those whose enqueue was answered with success."""

    jobs: Mapping[str, Job]
    terminal: int
    waiting: int
    #: jobs that neither ended nor wait, or that are in more than one place, or that ended without a run
    lost: Mapping[str, Job]
    #: jobs whose functions ran too often, and the number of runs too many
    twice: Mapping[str, int]
    #: jobs that exist although no client got an acknowledgement
    strangers: set[str]

    def check(self, may_run_again: Mapping[str, int] | None = None) -> None:
        """Check the suite's rule. `may_run_again` names jobs that may run more often, and how many times more."""
        allowed = may_run_again or {}
        assert not self.lost
        assert not self.strangers
        assert not {job_id: times for job_id, times in self.twice.items() if times > allowed.get(job_id, 0)}
        assert (self.terminal, self.waiting) == (len(self.jobs), 0)


class Ledger:
    """The acknowledged jobs. Several clients may write to it at once."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._planned_runs: dict[str, int] = {}
        self._older = self._all_jobs()
        # Some of the jobs that ran before have expired.
        self._older |= self.runs().keys()

    def acknowledge(self, job_id: str, runs: int = 1) -> None:
        """Note that a client got an acknowledgement of this job, and how many times its function has to run."""
        self._planned_runs[job_id] = runs

    def _all_jobs(self) -> set[str]:
        return {key.decode().removeprefix("rq:job:") for key in self._redis.scan_iter("rq:job:*", count=1000)}

    def runs(self) -> dict[str, list[Run]]:
        """All runs so far, by job."""
        return self._read_runs(self._redis.lrange(RUNS_KEY, 0, -1))

    def _read_runs(self, lines: list[bytes]) -> dict[str, list[Run]]:
        found = defaultdict(list)
        for line in lines:
            job_id, at, pid = line.decode().split()
            if job_id not in self._older:
                found[job_id].append(Run(float(at), int(pid)))
        return found

    def count(self) -> Tally:
        """Count all jobs at one moment."""
        queues = [key.decode().removeprefix("rq:queue:") for key in self._redis.smembers("rq:queues")]
        job_ids = list(self._planned_runs)
        with self._redis.pipeline() as pipeline:
            for queue in queues:
                pipeline.lrange(f"rq:queue:{queue}", 0, -1)
                for registry in _REGISTRIES:
                    pipeline.zrange(f"rq:{registry}:{queue}", 0, -1)
            for job_id in job_ids:
                pipeline.hmget(f"rq:job:{job_id}", "status", "crashes")
            pipeline.lrange(RUNS_KEY, 0, -1)
            answers = iter(pipeline.execute())
        places = defaultdict(list)
        for _ in queues:
            for place in ("queue", *_REGISTRIES):
                for entry in next(answers):
                    places[entry.decode().partition(":")[0]].append(place)  # in `wip`: JOB:EXECUTION
        hashes = {job_id: next(answers) for job_id in job_ids}
        runs = self._read_runs(next(answers))
        jobs = {
            job_id: Job(status and status.decode(), places[job_id], runs.get(job_id, []), int(crashes or 0))
            for job_id, (status, crashes) in hashes.items()
        }
        return self._judge(jobs)

    def _judge(self, jobs: dict[str, Job]) -> Tally:
        terminal, waiting, lost, twice = 0, 0, {}, {}
        for job_id, job in jobs.items():
            planned = self._planned_runs[job_id]
            has_run = len(job.runs) >= planned or job.status not in ("finished", "failed")
            if job.status not in _PLACE_OF or job.places != [_PLACE_OF[job.status]] or not has_run:
                lost[job_id] = job
            elif job.status in TERMINAL:
                terminal += 1
            else:
                waiting += 1
            if len(job.runs) > planned:
                twice[job_id] = len(job.runs) - planned
        return Tally(jobs, terminal, waiting, lost, twice, self._all_jobs() - self._older - jobs.keys())

    def settle(self, seconds: float = 60) -> Tally:
        """Wait until no job waits or this time has passed, and count."""
        deadline = time.monotonic() + seconds
        while (tally := self.count()).waiting and time.monotonic() < deadline:
            time.sleep(0.1)
        return tally
