"""`pipenv run start`: run web server, workers and, if no Redis is configured, Valkey; one Ctrl-C ends all in order."""

import argparse
import io
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from urllib.parse import urlsplit

from redis.exceptions import RedisError

from app.config import Settings, get_settings
from app.core.connections import connect
from app.core.scripts import WEBHOOKS
from app.start.demo import call, run_demo
from app.start.embedded_valkey import READY_WITHIN, RunningRedis, embedded_valkey
from app.start.supervisor import Supervisor, python


@contextmanager
def provide_redis(settings: Settings) -> Iterator[RunningRedis]:
    """Check that the configured Redis answers; or run a private one until the end of the `with` block.

    Raises:
        SystemExit: Redis cannot be reached, or the private one cannot start.
    """
    if not settings.redis_is_configured:
        with embedded_valkey() as redis:
            yield redis
        return
    try:
        connect(settings).ping()
    except RedisError as error:
        where = urlsplit(settings.redis_address)
        name = f"{where.scheme}://{where.hostname or ''}{f':{where.port}' if where.port else ''}{where.path}"
        place = "" if settings.redis_sentinels else f" at {name}"
        raise SystemExit(f"Redis{place} cannot be reached: {error}") from None
    yield RunningRedis("", lambda: None)


def check_port(settings: Settings) -> None:
    """Check, before anything is started, that no other process listens on the port.

    Raises:
        SystemExit: another process does.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise SystemExit(f"Cannot listen on {settings.address} ({error.strerror}): set PORT or HOST.") from None


def base_url(settings: Settings) -> str:
    """The URL at which a client on this machine reaches the API."""
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104  # compared with, not bound to
    host = anywhere.get(settings.host, settings.address.rpartition(":")[0])
    return f"http://{host}:{settings.port}"


def wait_until_ready(url: str) -> bool:
    """Wait until `/readyz` answers 200; False if it takes longer than READY_WITHIN."""
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        try:
            call(f"{url}/readyz")
        except OSError:  # not listening yet, or 503
            time.sleep(0.1)
        else:
            return True
    return False


def show_welcome(url: str, redis_url: str, workers: int) -> None:
    """Print where the service is, and three commands to try."""
    shown = redis_url or "as configured"
    print(
        f"\nReady: {url}, {workers} worker{'s' * (workers != 1)}, Redis {shown}\n"
        f"Look at it: {url}/dashboard, its documentation: {url}/docs\n"
        f"Try it:\n"
        f"  curl -X POST -H 'Content-Type: application/json' -d '{{\"hello\":\"world\"}}' {url}/enqueue\n"
        f"  curl '{url}/check_status?job_id=JOB_ID&wait=15'\n"
        f"  curl '{url}/get_result?job_id=JOB_ID'\n",
        flush=True,
    )


def run_all(settings: Settings, redis: RunningRedis, workers: int, demo: bool) -> int:
    """Run web server and workers until a signal ends them. Start a process again if it ends by itself.

    Returns:
        The exit code: 1 if a process ended before all were ready, or during the demo, or if the demo failed.
    """
    # The variables of .env, since without pipenv nothing has loaded it; and the address of a private Redis.
    env = (
        os.environ
        | ({"REDIS_URL": redis.url, "RQ_REDIS_URL": redis.url} if redis.url else {})
        | {
            "RQ_CONFIG": "app.redis_resc",
            "RQ_WORKER_CLASS": "app.worker.Worker",
            "RQ_QUEUE_CLASS": "app.redis_resc.Queue",
            "PYTHONUNBUFFERED": "1",
        }
    )
    output = io.StringIO() if demo else sys.stdout
    # Workers end the running job within WORKER_SHUTDOWN_SECONDS.
    supervisor = Supervisor(output, kill_after=settings.worker_shutdown_seconds + 5, log_format=settings.log_format)
    supervisor.add("web", python("gunicorn", "app.main:app"))
    for number in range(1, workers + 1):
        supervisor.add(f"worker.{number}", python("rq.cli", "worker", *settings.queues))
    if settings.webhook_secrets:  # a worker of its own, so that a slow receiver delays no job
        supervisor.add("webhooks", python("rq.cli", "worker", WEBHOOKS))

    url = base_url(settings)
    failure = ""

    def after_start() -> None:
        nonlocal failure
        try:
            if not wait_until_ready(url):
                failure = f"Not ready after {READY_WITHIN:.0f} s."
            elif demo:
                run_demo(url)
            else:
                supervisor.restarts = True
                show_welcome(url, redis.url, workers)
        except (OSError, KeyError, ValueError, HTTPException) as error:
            failure = f"The demo failed: {error!r}."
        if demo or failure:
            supervisor.end()

    threading.Thread(target=after_start, daemon=True).start()
    supervisor.run(env, redis.keep_alive)
    failure = supervisor.failure or failure
    if failure:
        print(output.getvalue() if isinstance(output, io.StringIO) else "", failure, file=sys.stderr)
    return 1 if failure else 0


def main() -> int:
    """Parse the command line and run all processes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="start", description=__doc__)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="number of worker processes (default 1)")
    parser.add_argument("--demo", action="store_true", help="enqueue one job, show its progress and result, and end")
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error("--workers must be at least 1")
    settings = get_settings()
    # Until the supervisor handles signals, SIGTERM ends this process like Ctrl-C, so that Valkey is stopped, too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
            signal.signal(number, lambda *_: sys.exit(143))
    check_port(settings)
    try:
        with provide_redis(settings) as redis:
            return run_all(settings, redis, arguments.workers, arguments.demo)
    except KeyboardInterrupt:  # before the processes have started, or after they have ended
        return 130


if __name__ == "__main__":
    sys.exit(main())
