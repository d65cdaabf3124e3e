"""How many jobs a second one worker runs, beside its peers: `pipenv run bench workers` (some ten minutes).

A job does nothing, and its result is kept in Redis. All jobs are enqueued before the worker starts. The time is that
from the first result to the last (peers/client.py), so neither the worker's start nor the speed of enqueuing counts.
The peers are installed into virtualenvs of their own in `.bench/` on first use.
"""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from redis import Redis

from app.core.queue import Queue
from benchmarks.job_functions import compute
from benchmarks.measure import Figures, ratios, spread, take_turns
from benchmarks.report import Section, Target
from tests.processes import ROOT, Process, environment, running, valkey_server, wait_until, worker

ROUNDS = 5
#: The limit for a client in seconds. A client gives up earlier by itself.
LONGEST_TURN = 200.0
#: The jobs that compute, for one worker and for two: their number, and the processor seconds of each.
COMPUTE_JOBS, COMPUTE_SECONDS = 80, 0.05

_PEERS = ROOT / "benchmarks" / "peers"
_OWN = {"FUNCTION_MODULES": "benchmarks.job_functions", "BENCHMARK_FUNCTION": "noop"}


class Contestant(NamedTuple):
    """A worker, and the client that enqueues for it."""

    #: the name of its module in benchmarks/peers
    name: str
    #: the number of jobs for a turn of some four seconds
    jobs: int
    #: the worker's command, after `python -m`
    command: str
    setup: str
    #: the file in benchmarks/peers with the packages of its virtualenv; without it, the virtualenv of this process
    requirements: str = ""
    #: environment variables
    settings: Mapping[str, str] = {}  # never changed

    def with_settings(self, jobs: int, **settings: str) -> "Contestant":
        """The same with more settings and another number of jobs."""
        return self._replace(jobs=jobs, settings={**self.settings, **settings})


OURS, STOCK, HUEY, CELERY = "this service", "`rq worker`", "Huey", "Celery"
SHIPPED = Contestant("own", 4000, "rq.cli worker", "as shipped", settings=_OWN)
_DRAMATIQ = Contestant(
    "dramatiq",
    1000,
    "dramatiq benchmarks.peers.dramatiq_jobs --processes 1 --threads 1",
    "`RedisBroker`, `Results` with `RedisBackend`; takes two jobs ahead, its default for one thread",
    "requirements.txt",
)
CONTESTANTS = {
    OURS: SHIPPED,
    "this service, three queues": SHIPPED.with_settings(4000, QUEUES="high,default,low")._replace(
        setup="in the order of their priority, a third of the jobs in each"
    ),
    HUEY: Contestant(
        "huey",
        5000,
        "huey.bin.huey_consumer benchmarks.peers.huey_jobs.huey",
        "`RedisHuey`; one thread, its default; jobs leave the queue before they run",
        "requirements.txt",
    ),
    "Dramatiq": _DRAMATIQ,
    # Its consumer sleeps when it has taken as many jobs as it may, so with one thread it mostly sleeps.
    "Dramatiq, 16 ahead": _DRAMATIQ.with_settings(6000, dramatiq_queue_prefetch="16")._replace(
        setup="the same with `dramatiq_queue_prefetch` 16, its default for its default of eight threads"
    ),
    "SAQ": Contestant(
        "saq", 3000, "saq benchmarks.peers.saq_jobs.settings", "async job, `concurrency` 1", "requirements-saq.txt"
    ),
    "Taskiq": Contestant(
        "taskiq",
        4000,
        "taskiq worker benchmarks.peers.taskiq_jobs:broker --workers 1 --max-async-tasks 1",
        "async job, `RedisStreamBroker`, `RedisAsyncResultBackend`",
        "requirements.txt",
    ),
    CELERY: Contestant(
        "celery",
        2000,
        "celery -A benchmarks.peers.celery_jobs worker --pool prefork --concurrency 1 --loglevel INFO",
        "prefork, `task_acks_late`, `worker_prefetch_multiplier` 1",
        "requirements.txt",
    ),
    "`rq worker -w rq.SimpleWorker`": Contestant(
        "rq", 1000, "rq.cli worker --worker-class rq.SimpleWorker --serializer json", "no work-horse"
    ),
    STOCK: Contestant("rq", 250, "rq.cli worker --serializer json", "a forked process for each job"),
}


@cache
def interpreter_of(requirements: str) -> str:
    """The Python of a virtualenv with the packages of this file of benchmarks/peers. A changed file gets a new one."""
    if not requirements:
        return sys.executable
    wanted = (_PEERS / requirements).read_text()
    folder = ROOT / ".bench" / Path(requirements).stem
    installed, interpreter = folder / "installed.txt", str(folder / "bin" / "python")
    if not installed.exists() or installed.read_text() != wanted:
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "-r", _PEERS / requirements], check=True)
        installed.write_text(wanted)
    return interpreter


def versions_of(requirements: str) -> dict[str, str]:
    """The version of each package that the file pins."""
    lines = (line.partition("==") for line in (_PEERS / requirements).read_text().splitlines() if "==" in line)
    return {name.partition("[")[0]: version for name, _, version in lines}


@contextmanager
def running_group(command: list[str], env: dict[str, str], log: Path) -> Iterator[Process]:
    """A process that is killed at the end with all its children, because the end of a peer is not measured."""
    process = Process(command, env, log)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.popen.pid, signal.SIGKILL)
        process.popen.wait()


def run_jobs(contestant: Contestant, port: int) -> float:
    """Empty the Valkey at this port and run one turn on it; returns the jobs/s.

    Raises:
        RuntimeError: a job's result was wrong or missing, or the worker ended.
    """
    with Redis(port=port) as connection:
        connection.flushall()
    url = f"redis://127.0.0.1:{port}"
    env = environment(url, **contestant.settings)
    if contestant.name != SHIPPED.name:  # plain RQ must not get our classes, which .env names
        env = {name: value for name, value in env.items() if not name.startswith("RQ_")}
    env["RQ_REDIS_URL"] = url
    python = interpreter_of(contestant.requirements)
    client = [python, "-m", "benchmarks.peers.client", f"benchmarks.peers.{contestant.name}_jobs", str(contestant.jobs)]
    with tempfile.TemporaryDirectory() as name, running(client, env, Path(name, "client.log")) as timer:
        timer.wait_for_log("enqueued", LONGEST_TURN)
        command = [python, "-m", *contestant.command.split()]
        with running_group(command, env, Path(name, "worker.log")) as process:
            ends = [timer.popen, process.popen]
            wait_until(lambda: any(popen.poll() is not None for popen in ends), LONGEST_TURN, "the last result")
            if timer.popen.poll() != 0:
                raise RuntimeError(f"{contestant.command}: {timer.log}\n{process.log[-5000:]}")
        return float(timer.log.split()[-1])


def run_compute(port: int, workers: int) -> float:
    """Jobs/s of this number of idle workers that get computing jobs, by Redis' clock."""
    with ExitStack() as stack:
        connection = stack.enter_context(Redis(port=port))
        connection.flushall()
        env = environment(f"redis://127.0.0.1:{port}", **_OWN)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number in range(workers):
            stack.enter_context(worker(env, folder / f"{number}.log"))
        queue = Queue(connection=connection)
        jobs = [queue.enqueue(compute, COMPUTE_SECONDS) for _ in range(COMPUTE_JOBS)]
        wait_until(lambda: jobs[-1].is_finished and all(job.is_finished for job in jobs), LONGEST_TURN, "the jobs")
        assert all((job.return_value() or 0) >= COMPUTE_SECONDS for job in jobs)
        kept = [queue.fetch_job(job.id) for job in jobs]
        begun = [job.started_at for job in kept if job and job.started_at]
        ended = [job.ended_at for job in kept if job and job.ended_at]
        return COMPUTE_JOBS / (max(ended) - min(begun)).total_seconds()


def find_guarantees(plain: int, everysec: int, always: int) -> dict[str, tuple[Contestant, int]]:
    """The shipped worker, alone and with each further guarantee, each with the port of the Valkey that it uses."""
    return {
        OURS: (SHIPPED, plain),
        "each job reports progress ten times": (
            SHIPPED.with_settings(3500, BENCHMARK_FUNCTION="noop_with_progress"),
            plain,
        ),
        "`WORKER_MAX_MEMORY=1GiB`": (SHIPPED.with_settings(4000, WORKER_MAX_MEMORY="1GiB"), plain),
        "`WORKER_FRESH_PROCESS=true`": (SHIPPED.with_settings(200, WORKER_FRESH_PROCESS="true"), plain),
        "Valkey with `appendonly yes`, `appendfsync everysec`": (SHIPPED, everysec),
        "Valkey with `appendonly yes`, `appendfsync always`": (SHIPPED.with_settings(2500), always),
    }


def rank(figures: Figures) -> dict[str, float]:
    """The median of each contestant, the best first."""
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return dict(sorted(medians.items(), key=lambda item: -item[1]))


def compare_to(figures: Figures, other: str, factor: float) -> Target:
    """The target that this service runs `factor` times the jobs/s of another one."""
    found = ratios(figures, OURS, other)
    return Target(
        f"jobs/s of one worker, to those of {other}",
        f"at least {factor:g} times",
        spread(found),
        statistics.median(found) >= factor,
    )


def run() -> Section:
    """Measure."""
    with ExitStack() as stack:
        ports = []
        for config in (
            {},
            {"appendonly": "yes", "appendfsync": "everysec"},
            {"appendonly": "yes", "appendfsync": "always"},
        ):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            ports.append(stack.enter_context(valkey_server(folder, save="", **config)).port)
        plain = ports[0]
        with Redis(port=plain) as connection:
            valkey = connection.info("server").get("valkey_version", "?")

        figures = take_turns({name: partial(run_jobs, each, plain) for name, each in CONTESTANTS.items()}, ROUNDS)
        guarantees = {name: partial(run_jobs, *each) for name, each in find_guarantees(*ports).items()}
        costs = take_turns(guarantees, ROUNDS)
        computed = take_turns({str(workers): partial(run_compute, plain, workers) for workers in (1, 2)}, ROUNDS)

    beside = [
        (name, CONTESTANTS[name].setup, spread(figures[name], 0), spread(ratios(figures, OURS, name)))
        for name in rank(figures)
    ]
    beside.insert(0, ("one worker", "set up with", "jobs/s", "this service to it"))
    cost = [(name, spread(costs[name], 0), spread(ratios(costs, name, OURS))) for name in guarantees]
    cost.insert(0, ("what a guarantee costs", "jobs/s", "to as shipped"))
    speed_up = ratios(computed, "2", "1")
    saq = versions_of("requirements-saq.txt")
    return Section(
        title="Jobs a second of one worker (they do nothing; results kept in Redis)",
        text="One worker runs jobs that do nothing, one at a time, and their results are kept in Redis. The jobs wait "
        "in one queue before the worker starts, and are timed from the moment that the first one's result can be read "
        "to the moment that the last one's can, so without the worker's start; then each result is checked. All use "
        f"the same Valkey, which writes nothing to its disk; medians of {ROUNDS} rounds. Each contestant is set up as "
        "its own documentation has it, with hiredis. The second table is of this service alone; its first line is "
        "a Valkey that writes nothing to its disk, where `pipenv run start` has `everysec`. The third is of "
        f"{COMPUTE_JOBS} jobs that each use {COMPUTE_SECONDS * 1000:.0f} ms of the processor, given to idle workers.",
        tables=[
            beside,
            cost,
            [
                ("jobs that compute", "jobs/s"),
                ("one worker", spread(computed["1"], 1)),
                ("two workers", spread(computed["2"], 1)),
                ("ratio", spread(speed_up)),
            ],
        ],
        targets=[
            compare_to(figures, STOCK, 30),
            compare_to(figures, CELERY, 2.5),
            compare_to(figures, HUEY, 1.7),
            Target(
                "jobs/s that compute, of two workers to one",
                "at least 1.8 times on two cores",
                spread(speed_up),
                statistics.median(speed_up) >= 1.8,
            ),
        ],
        versions={
            "Valkey": valkey,
            **{name: metadata.version(name) for name in ("rq", "redis")},
            **{name: version for name, version in versions_of("requirements.txt").items() if name != "redis"},
            f"saq {saq['saq']} with redis": saq["redis"],
        },
        bars=rank(figures),
    )
