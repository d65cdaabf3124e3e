"""The memory of the idle processes, and the time from start to the first result: `pipenv run bench size` (a minute)."""

import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import psutil
import requests

from benchmarks.measure import spread
from benchmarks.report import Section, Target
from tests.processes import environment, free_port, running, valkey_server, wait_until, web, worker

ROUNDS = 5
#: The number of jobs, and of requests to each route, before a process is measured.
CALLS = 20
#: Seconds without a request before a process is measured.
IDLE = 2.0
PAYLOAD = {"text": "a b a"}
RESULT = {"words": [["a", 2], ["b", 1]], "total": 3}

ARBITER, API, API_DOCS = "gunicorn's arbiter", "its web process", "its web process, once it has made `/openapi.json`"
WORKER, SERVER, HORSE = "`rq worker`", "the fork server of its work-horses", "its work-horse"
ALL = "these three together"

#: RSS and PSS, in MB: all pages in memory; and each page divided by the number of processes that share it.
Memory = tuple[float, float]

#: `python -m app.start`, with its data in a folder of the benchmark's.
_START = (
    "import sys, pathlib, app.start.embedded_valkey as valkey; from app.start.__main__ import main; "
    "valkey.DATA = pathlib.Path(sys.argv.pop()); sys.exit(main())"
)


def memory_of(process: psutil.Process) -> Memory:
    """The present memory of a process."""
    full = process.memory_full_info()
    return full.rss / 10**6, full.pss / 10**6


def run_job(url: str) -> None:
    """Run a job, and check its status and result."""
    answer = requests.post(f"{url}/enqueue/count_words?wait=30", json=PAYLOAD, timeout=60)
    assert answer.status_code == 200, answer.text
    for link in ("check_status", "get_result"):
        answer = requests.get(url + answer.json()["links"][link], timeout=10)
    assert answer.json() == RESULT, answer.text


def measure_memory() -> dict[str, Memory]:
    """The memory of a new API process and a new worker with the shipped settings, idle after some jobs."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(valkey_server(folder))
        env = environment(f"redis://127.0.0.1:{server.port}", FUNCTION_MODULES="app.functions")
        own = psutil.Process(stack.enter_context(worker(env, folder / "worker.log")).popen.pid)
        url = stack.enter_context(web(env, folder / "web.log"))
        arbiter = next(process for process in psutil.Process().children() if "gunicorn" in process.cmdline())
        for _ in range(CALLS):
            run_job(url)
        time.sleep(IDLE)
        (web_process,), (server_process,) = arbiter.children(), own.children()
        (horse,) = server_process.children()
        found = {ARBITER: memory_of(arbiter), API: memory_of(web_process)}
        work = {WORKER: memory_of(own), SERVER: memory_of(server_process), HORSE: memory_of(horse)}
        found |= {**work, ALL: (sum(rss for rss, _ in work.values()), sum(pss for _, pss in work.values()))}
        assert requests.get(f"{url}/openapi.json", timeout=10).ok
        return {**found, API_DOCS: memory_of(web_process)}


def measure_start() -> float:
    """Seconds from the start of everything, with no data, to the result of the first job."""
    env = {name: value for name, value in environment("", PORT=free_port()).items() if "REDIS_" not in name}
    url = f"http://127.0.0.1:{env['PORT']}"
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        with running([sys.executable, "-c", _START, f"{name}/data"], env, Path(name, "log")) as process:

            def has_run_job() -> bool:
                assert process.popen.poll() is None, process.log
                try:
                    run_job(url)
                except requests.ConnectionError:  # the service does not listen yet
                    return False
                return True

            wait_until(has_run_job, 60, "the first job")
            return time.perf_counter() - start


def run() -> Section:
    """Measure."""
    memories = [measure_memory() for _ in range(ROUNDS)]
    starts = [measure_start() for _ in range(ROUNDS)]
    rss = {name: [memory[name][0] for memory in memories] for name in memories[0]}
    pss = {name: [memory[name][1] for memory in memories] for name in memories[0]}

    def at_most(figure: str, most: float, unit: str, values: list[float], besides: str = "") -> Target:
        return Target(figure, f"at most {most} {unit}", spread(values) + besides, statistics.median(values) <= most)

    return Section(
        title="Size, and time to start",
        text=f"Memory of each process as shipped, started anew {ROUNDS} times: idle, after {CALLS} jobs were enqueued, "
        "waited for, looked at and their results fetched, one after the other. RSS is all of its pages in memory; PSS "
        "divides each page by the number of processes that share it, whatever they are. The start is that of "
        "`python -m app.start` with an empty data folder, compiled files being there, to the result of its first job, "
        f"{ROUNDS} times.",
        tables=[
            [("process", "RSS, MB", "PSS, MB"), *((name, spread(rss[name], 1), spread(pss[name], 1)) for name in rss)],
            [("start", "seconds"), ("to the first job's result", spread(starts))],
        ],
        targets=[
            at_most("RSS of an idle API process", 75, "MB", rss[API]),
            at_most(
                "RSS of an idle worker, its fork server and its work-horse, added up",
                60,
                "MB",
                rss[ALL],
                f"; of their PSS {spread(pss[ALL])}",
            ),
            at_most("start to the first job's result", 4, "s", starts),
        ],
        versions={name: metadata.version(name) for name in ("gunicorn", "gevent", "rq")},
    )
