"""gunicorn's settings: `gunicorn app.main:app` reads this file by itself."""

from gevent import monkey

# Before anything else is imported: many clients wait in one process, each in a greenlet.
monkey.patch_all()

import mmap  # noqa: E402  # see above
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402

# Before `prometheus_client` and the settings are imported: each process keeps what it measures in files there, so that
# whichever is asked tells of all of them.
_own_folder = None
if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    _own_folder = os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")

from gunicorn.glogging import Logger  # noqa: E402
from gunicorn.http.body import ChunkedReader  # noqa: E402
from gunicorn.http.errors import InvalidChunkSize, ParseException  # noqa: E402
from prometheus_client import multiprocess  # noqa: E402

from app.config import get_settings, is_loopback  # noqa: E402
from app.logs import configure_logs, start_sentry  # noqa: E402

_settings = get_settings()


class logger_class(Logger):  # type: ignore[misc]  # noqa: N801  # gunicorn's name for the setting; it has no types
    """Lines as all other loggers write them. (With `logconfig_dict` gunicorn writes a line for each request, too.)"""

    def setup(self, cfg: Any) -> None:
        """As gunicorn's, and then ours."""
        super().setup(cfg)
        configure_logs("gunicorn.error")

    def exception(self, msg: Any, *args: Any, **kwargs: Any) -> None:
        """As gunicorn's; but a client that was silent for too long is no error of ours, with its traceback."""
        tell = self.debug if isinstance(sys.exc_info()[1], TimeoutError) else super().exception
        tell(msg, *args, **kwargs)


bind = _settings.address
workers = _settings.web_concurrency
worker_class = "gevent"
worker_connections = _settings.max_connections
# Each of them is an open file, of which a process may have 1024 on most systems, unless it asks for more.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
if _soft != resource.RLIM_INFINITY:
    _most = worker_connections + 500
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(_soft, _most if _hard == resource.RLIM_INFINITY else min(_most, _hard)), _hard)
    )
# A request in flight has this long to end on a shutdown: a little more than the longest wait.
graceful_timeout = _settings.max_wait + 5
# What a head may have: some 260 kB, which take a tenth of a second at worst.
limit_request_fields = 64
limit_request_field_size = 4094
keepalive = 5
#: Seconds that a client may be silent in the middle of a request, or take to read a part of its answer; app/fairness.py
#: gives large answers more.
SILENCE = 30
#: Pieces that a chunked body may have however short they are; if there are more, so many bytes on the average.
MANY_PIECES, LEAST_PIECE = 20_000, 16
# No header changes a request's path or scheme. gunicorn takes SCRIPT_NAME from a proxy on this machine, and so from any
# client of it: `SCRIPT_NAME: /x` would make `/queues` of `/x/queues`, which the proxy may let through.
forwarder_headers = ""
forwarded_allow_ips = ""
# gunicorn 25's control socket is one file per user: a second instance on the machine would take it from the first.
control_socket_disable = True


def on_starting(server: Any) -> None:
    """Refuse to be open to everybody by accident, with `--bind` too."""
    for address in server.cfg.address:
        is_open = isinstance(address, tuple) and not is_loopback(address[0])
        if is_open and not (_settings.api_keys or _settings.allow_anonymous):
            raise SystemExit(f"Listening on {address[0]} wants API_KEYS, or ALLOW_ANONYMOUS=true.")


def when_ready(server: Any) -> None:
    """On SIGTERM say so first: `/readyz` says no and nobody waits any more, while all else is served for a while."""
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
    """Let the app know when its process is about to end."""
    # Not in the floors of the benchmarks, which are other apps, or none of Flask's.
    if waiting := getattr(worker.wsgi, "extensions", {}).get("waiting"):
        waiting.is_draining = lambda: worker.draining[0] == 1


def pre_fork(server: Any, worker: Any) -> None:
    """Let each process have the shared memory."""
    worker.draining = server.draining


def post_fork(server: Any, worker: Any) -> None:
    """Tell Sentry of errors from now on."""
    start_sentry(_settings)


def pre_request(worker: Any, req: Any) -> None:
    """Wait for a client for a while, not for ever (see app/fairness.py)."""
    req.unreader.sock.settimeout(SILENCE)
    if isinstance(req.body.reader, ChunkedReader):
        req.body.reader.parser = _in_turns(req.body.reader.parser)


def _in_turns(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces of a chunked body, while others go on: gunicorn gives way to nobody as long as there are bytes."""
    count = size = 0
    for piece in pieces:
        if piece:
            count, size = count + 1, size + len(piece)
        if count % 100 == 99:  # gunicorn takes 10 µs for each
            if count > MANY_PIECES and size < count * LEAST_PIECE:
                raise InvalidChunkSize(b"chunks of few bytes each")
            gevent.sleep(0.001)
        yield piece


def post_request(worker: Any, req: Any, environ: Any, resp: Any) -> None:
    """Read what is left of a body that was refused, so that its client comes to read why; others go on meanwhile.

    gunicorn's own reading gives way to nobody as long as there are bytes: a client that sends fast held up the process.
    """
    has_body = environ.get("CONTENT_LENGTH", "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ
    if not has_body or resp is None or not resp.headers_sent or resp.should_close():
        return
    with gevent.Timeout(keepalive, False):  # type: ignore[arg-type]  # False: it says nothing
        try:
            while req.body.read(2**16):
                gevent.sleep(0.001)
        except (OSError, ParseException):
            req.force_close()
        return
    req.force_close()


def worker_exit(server: Any, worker: Any) -> None:
    """End gunicorn when the app will not start, as with a job function's bad default: it would try again for ever."""
    reason = sys.exc_info()[1]
    if not worker.booted and isinstance(reason, SystemExit) and isinstance(reason.code, str):
        print(reason.code, file=sys.stderr, flush=True)
        raise SystemExit(3)  # gunicorn's own word for it, Arbiter.WORKER_BOOT_ERROR


def child_exit(server: Any, worker: Any) -> None:
    """Its requests are counted on, but none of them waits any more."""
    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]  # it has no annotations


def on_exit(server: Any) -> None:
    """Leave nothing behind; unless a new gunicorn (SIGUSR2) has taken over, and the folder with it."""
    if _own_folder and not server.reexec_pid:
        shutil.rmtree(_own_folder, ignore_errors=True)
