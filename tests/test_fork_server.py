"""The processes of work-horses: the worker's fork server forks them, and they are replaced now and then."""

import logging
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from redis import Redis

from app.config import get_settings
from app.worker.channel import Channel
from app.worker.fork_server import ForkServerDied
from app.worker.horses import WorkHorseHandle, WorkHorses
from app.worker.worker import Worker
from tests.processes import ROOT, Process, environment, wait_until, worker
from tests.test_worker import Bench, is_running, lines_of


@pytest.fixture
def own(real_redis: Redis, redis_url: str) -> Bench:
    return Bench(real_redis, redis_url)


def family(process: Process) -> tuple[psutil.Process, psutil.Process, psutil.Process]:
    """The worker, its fork server and its work-horse."""
    found = psutil.Process(process.popen.pid)
    (server,) = found.children()
    wait_until(server.children)
    return found, server, server.children()[0]


def processes_of(own: Bench, function: str, count: int) -> list[Any]:
    """Run this many jobs, and return the process id of each."""
    jobs = [own.enqueue(function) for _ in range(count)]
    results = [own.result_of(job_id) for job_id in jobs]
    return [result["pid"] if isinstance(result, dict) else result for result in results]


def test_work_horse_has_no_connection_of_its_worker(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        parent, server, horse = family(process)
        assert parent.net_connections("tcp")
        assert server.net_connections("tcp") == horse.net_connections("tcp") == []
        # Otherwise the work-horse could write to the worker's connections, or keep them open.
        assert own.result_of(own.enqueue("current_job_reads_redis")) is True


def test_fork_server_survives_the_signals_that_end_a_service(own: Bench, tmp_path: Path) -> None:
    """The signals go to each process, as systemd sends them. The work-horse may die, and the worker handles that."""
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        _, server, horse = family(process)
        server.terminate()
        server.send_signal(signal.SIGINT)
        horse.terminate()
        assert own.result_of(own.enqueue("use_fresh_process")) != horse.pid
        assert server.is_running()
        assert Path(f"/proc/{server.pid}/fd/0").readlink() == Path("/dev/null")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_worker_that_ended_leaves_no_process(own: Bench, tmp_path: Path, number: signal.Signals) -> None:
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        pids = [each.pid for each in family(process)]
        process.signal(number)
        process.popen.wait(30)
        wait_until(lambda: not any(map(is_running, pids)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_job_that_lets_no_thread_run_ends_with_its_worker(own: Bench, tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "pid"
    with worker(environment(own.url, WORKER_SHUTDOWN_SECONDS=0), tmp_path / "worker.log") as process:
        own.enqueue("hold_the_interpreter", {"path": str(path)})
        pid = int(wait_until(lambda: lines_of(path))[0])
        process.signal(number)
        wait_until(lambda: not is_running(pid))


@pytest.mark.slow
def test_worker_whose_fork_server_died_puts_its_job_back_and_ends(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        _, server, horse = family(process)
        job_id = own.enqueue("sleep_for", 30)
        own.wait_for(job_id, "started")
        server.kill()
        process.popen.wait(30)
        assert process.popen.returncode != 0
        wait_until(lambda: not is_running(horse.pid))
    job = own.read(job_id)
    # The job may have killed the fork server. It must not end one worker after the other for ever.
    assert (job["status"], job.get("crashes")) == ("queued", "1")
    with worker(environment(own.url, WORKER_SHUTDOWN_SECONDS=0), tmp_path / "another.log"):
        own.wait_for(job_id, "started")


def test_fork_server_without_a_free_file_descriptor_says_so_and_goes_on(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url), tmp_path / "worker.log") as process:
        _, server, _ = family(process)
        processes_of(own, "use_model", 1)
        limits = server.rlimit(psutil.RLIMIT_NOFILE)
        server.rlimit(psutil.RLIMIT_NOFILE, (3, limits[1]))
        job_id = own.enqueue("use_fresh_process")
        process.wait_for_log("Too many open files; trying again")
        server.rlimit(psutil.RLIMIT_NOFILE, limits)
        own.result_of(job_id)
        assert "crashes" not in own.read(job_id)


def test_job_is_not_put_back_before_its_work_horse_is_killed(own: Bench) -> None:
    job_id = own.enqueue("echo", 1)
    rq_worker = Worker(["default"], connection=own.redis)
    ours, its = socket.socketpair()
    channel = Channel(ours)
    horse = Mock(spec=WorkHorseHandle, channel=channel, crash_limits={}, fresh=frozenset(), is_spent=False, jobs=0)
    horse.has_died.side_effect = [False, False, ForkServerDied]
    seen = []
    horse.kill.side_effect = lambda *_: seen.append(own.read(job_id)["status"])
    rq_worker._horses.horse = horse
    taken = rq_worker.dequeue_job_and_maintain_ttl(None)
    assert taken
    with ours, its, pytest.raises(ForkServerDied):
        rq_worker.execute_job(*taken)
    assert seen == ["started"]
    job = own.read(job_id)
    assert (job["status"], job["crashes"]) == ("queued", "1")


def test_close_kills_the_work_horses_if_the_fork_server_died() -> None:
    horses = WorkHorses(get_settings(), logging.getLogger("test"), Mock())
    horses.horse, horses._next = both = [Mock(spec=WorkHorseHandle), Mock(spec=WorkHorseHandle)]
    for horse in both:
        horse.reap.side_effect = ForkServerDied
    horses.close()
    for horse in both:
        horse.kill.assert_called_once()


@pytest.mark.parametrize(
    ("function", "settings"), [("use_model", {"WORKER_FRESH_PROCESS": "true"}), ("use_fresh_process", {})]
)
def test_job_runs_in_a_fresh_process_if_configured(
    own: Bench, tmp_path: Path, function: str, settings: dict[str, Any]
) -> None:
    with worker(environment(own.url, **settings), tmp_path / "worker.log") as process:
        others = processes_of(own, "use_model", 1)
        found = processes_of(own, function, 5)
        others += processes_of(own, "use_model", 1)
        assert len({*found, *others}) == 7
        assert process.popen.poll() is None


def test_work_horse_is_replaced_after_its_job_limit_without_a_wait(own: Bench, tmp_path: Path) -> None:
    with worker(environment(own.url, WORKER_MAX_JOBS=5), tmp_path / "worker.log"):
        found: list[int] = []

        def was_replaced() -> bool:
            found.extend(processes_of(own, "use_model", 20))
            return len(set(found)) > 2

        wait_until(was_replaced, 60, "a second successor")
    *whole, _ = Counter(found).values()
    assert len(whole) >= 1
    assert min(whole) >= 5


def test_work_horse_goes_on_if_its_successor_cannot_load_the_functions(own: Bench, tmp_path: Path) -> None:
    module = tmp_path / "edited.py"
    function = (
        "import os\nfrom app.job_function import job_function\n@job_function()\ndef pid(payload): return os.getpid()\n"
    )

    def write(text: str) -> None:
        """Replace the file in one step. A successor that reads half of it would load no function."""
        whole = tmp_path / "whole"
        whole.write_text(text)
        whole.replace(module)

    write(function)
    settings = {"FUNCTION_MODULES": "edited", "WORKER_MAX_JOBS": 1, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    settings["PYTHONDONTWRITEBYTECODE"] = 1
    with worker(environment(own.url, **settings), tmp_path / "worker.log") as process:
        (first,) = processes_of(own, "edited.pid", 1)
        write("not Python")
        wait_until(lambda: processes_of(own, "edited.pid", 1) and "no new work-horse" in process.log)
        before = processes_of(own, "edited.pid", 3)
        assert len(set(before)) == 1
        write(function)
        wait_until(lambda: processes_of(own, "edited.pid", 1) != before[:1])
    assert first
