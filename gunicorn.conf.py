"""gunicorn's settings. `gunicorn app.main:app` reads this file by itself."""

from gevent import monkey

# Before every other import: many clients wait in one process, each in a greenlet.
monkey.patch_all()

import mmap  # noqa: E402  # see above
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

# Before the import of `prometheus_client` and of the settings, which read this variable. Each process keeps its metrics
# in files in this folder, so that any process can return the metrics of all.
_own_folder = None
if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    _own_folder = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")

from prometheus_client import multiprocess  # noqa: E402

from app.config import get_settings, is_loopback  # noqa: E402
from app.logs import start_sentry  # noqa: E402
from app.web.server import GunicornLogger, post_request, pre_request  # noqa: E402, F401  # gunicorn calls the two hooks

_settings = get_settings()

logger_class = GunicornLogger
bind = _settings.address
workers = _settings.web_concurrency
worker_class = "gevent"
worker_connections = _settings.max_connections
# Each connection is an open file. On most systems a process may have 1024 of them, until it raises its limit.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if _soft != resource.RLIM_INFINITY:
    _needed = worker_connections + 500
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(_soft, _needed if _hard == resource.RLIM_INFINITY else min(_needed, _hard)), _hard)
    )
# At a shutdown, open requests may run for this many seconds: a little more than the longest wait.
graceful_timeout = _settings.max_wait + 5
# The head of a request may have about 260 kB. gunicorn reads it without a pause, so it must not be longer.
limit_request_fields = 64
limit_request_field_size = 4094
keepalive = 5
# No header may change the path or the scheme of a request. By default gunicorn believes the header SCRIPT_NAME of a
# proxy on this machine, and so that of any client behind it. With `SCRIPT_NAME: /x` a client could ask for `/x/queues`,
# which the proxy may let through, and get `/queues`.
forwarder_headers = ""
forwarded_allow_ips = ""
# gunicorn's control socket (since gunicorn 25) is one file per user: a second instance on the machine would take it
# from the first.
control_socket_disable = True


def on_starting(server: Any) -> None:
    """Refuse to be open to everybody by accident, also with `--bind`."""
    for address in server.cfg.address:
        is_open = isinstance(address, tuple) and not is_loopback(address[0])
        if is_open and not (_settings.api_keys or _settings.allow_anonymous):
            raise SystemExit(f"To listen on {address[0]}, set API_KEYS or ALLOW_ANONYMOUS=true.")


def when_ready(server: Any) -> None:
    """Make SIGTERM drain the server first.

    `/readyz` fails, requests that wait are answered at once, and the server takes new ones for DRAIN_SECONDS. Then it
    ends.
    """
    server.draining = mmap.mmap(-1, 1)  # memory that all processes share
    end = server.handle_term

    def drain() -> None:
        server.draining[0] = 1
        if _settings.drain_seconds:
            server.log.info("Draining for %s s", _settings.drain_seconds)
            time.sleep(_settings.drain_seconds)
        end()

    server.handle_term = drain


def post_worker_init(worker: Any) -> None:
    """Let the app see that the server is draining."""
    # The benchmarks serve other apps, too. These have no `waiting`, and some are not Flask's.
    if waiting := getattr(worker.wsgi, "extensions", {}).get("waiting"):
        waiting.is_draining = lambda: worker.draining[0] == 1


def pre_fork(server: Any, worker: Any) -> None:
    """Hand the shared memory to the new process."""
    worker.draining = server.draining


def post_fork(server: Any, worker: Any) -> None:
    """Report errors of this process to Sentry, if SENTRY_DSN is set."""
    start_sentry(_settings)


def worker_exit(server: Any, worker: Any) -> None:
    """End gunicorn if the app refuses to start, for example because of a job function's bad default.

    gunicorn itself would start new processes for ever.
    """
    reason = sys.exc_info()[1]
    if not worker.booted and isinstance(reason, SystemExit) and isinstance(reason.code, str):
        print(reason.code, file=sys.stderr, flush=True)
        raise SystemExit(3)  # gunicorn's code for this case: Arbiter.WORKER_BOOT_ERROR


def child_exit(server: Any, worker: Any) -> None:
    """Drop the gauges of a process that ended, since none of its requests waits any more. Its counters stay."""
    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]  # it has no annotations


def on_exit(server: Any) -> None:
    """Remove the metrics folder, unless a new gunicorn (SIGUSR2) has taken over: it uses the same folder."""
    if _own_folder and not server.reexec_pid:
        shutil.rmtree(_own_folder, ignore_errors=True)
