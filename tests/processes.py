"""Real processes for tests: a Valkey server, `rq worker`s, gunicorn; and waiting for conditions with a deadline."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import requests

ROOT = Path(__file__).parent.parent
T = TypeVar("T")


def wait_until(condition: Callable[[], T], seconds: float = 30, what: str = "") -> T:
    """The condition's first true value; fails if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain{what and ' for '}{what}"
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(redis_url: str, **settings: Any) -> dict[str, str]:
    """The environment that pipenv would give, and settings that suit tests."""
    env = dict(os.environ)
    for line in (ROOT / ".env").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition("=")
            env[name] = value
    env |= {
        "REDIS_URL": redis_url,
        "FUNCTION_MODULES": "app.functions,tests.job_functions",
        "SOME_LONG_FUNCTION_SECONDS": "0.3",
        "PYTHONUNBUFFERED": "1",
    }
    return env | {name: str(value) for name, value in settings.items()}


class Process:
    """A process with its output in a file; killed at the latest when the test ends."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path, cwd: Path = ROOT) -> None:
        self.log_file = log
        with log.open("ab") as output:
            self.popen = subprocess.Popen(
                command, env=env, cwd=cwd, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait_for_log(self, text: str, seconds: float = 30) -> None:
        wait_until(lambda: text in self.log or self.popen.poll() is not None, seconds, f"{text!r} in the log")
        assert text in self.log, self.log

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM, and the exit code."""
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end {seconds} s after SIGTERM:\n{self.log}") from None

    def kill(self) -> None:
        """SIGKILL to it alone, as the kernel's out-of-memory killer does."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()


@contextmanager
def running(command: list[str], env: dict[str, str], log: Path) -> Iterator[Process]:
    process = Process(command, env, log)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.terminate()
            try:
                process.popen.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def python(*args: str) -> list[str]:
    return [sys.executable, "-m", *args]


@contextmanager
def worker(env: dict[str, str], log: Path, *args: str) -> Iterator[Process]:
    """An `rq worker` that has started to listen."""
    with running(python("rq.cli", "worker", *args), env, log) as process:
        process.wait_for_log("Listening on")
        yield process


@contextmanager
def web(env: dict[str, str], log: Path) -> Iterator[str]:
    """The API under gunicorn; gives its base URL once it answers."""
    port = free_port()
    with running(python("gunicorn", "app.main:app"), env | {"PORT": str(port)}, log) as process:
        url = f"http://127.0.0.1:{port}"

        def answers() -> bool:
            assert process.popen.poll() is None, process.log
            try:
                return requests.get(f"{url}/healthz", timeout=5).ok
            except requests.ConnectionError:
                return False

        wait_until(answers)
        yield url
