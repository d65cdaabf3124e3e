import os
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from redis import Redis
from redis.connection import SSLConnection, UnixDomainSocketConnection

from app.config import Settings, get_settings
from app.core.connections import connect
from tests.processes import ROOT

#: The variables that the environment of the test run may have.
ALL = [name.upper() for name in Settings.model_fields] + ["RQ_REDIS_URL"]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ALL:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def settings_of(environment: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        environment.setenv(name, value)
    return get_settings.__wrapped__()


BAD = [
    ("REDIS_PORT", "0"), ("REDIS_PORT", "65536"), ("REDIS_PORT", "x"), ("REDIS_DB", "-1"), ("REDIS_SSL", "maybe"),
    ("PORT", "0"), ("PORT", "65536"), ("PORT", "80a"), ("DRAIN_SECONDS", "-1"), ("DRAIN_SECONDS", "301"),
    ("LOG_FORMAT", "xml"), ("LOG_LEVEL", "loud"), ("ACCESS_LOG", "perhaps"),
    ("WEB_CONCURRENCY", "0"), ("WEB_CONCURRENCY", "65"),
    ("QUEUES", "a b"), ("QUEUES", "a,,b"), ("QUEUES", ","), ("QUEUES", "a,a"), ("QUEUES", "x" * 65), ("QUEUES", "a:b"),
    ("QUEUES", "é"), ("FUNCTION_MODULES", "app.functions,"), ("FUNCTION_MODULES", "1x"),
    ("FUNCTION_MODULES", "a/b"), ("FUNCTION_MODULES", "a,a"),
    ("SOME_LONG_FUNCTION_SECONDS", "-1"), ("SOME_LONG_FUNCTION_SECONDS", "nan"), ("SOME_LONG_FUNCTION_SECONDS", "3601"),
    ("JOB_TIMEOUT", "0"), ("JOB_TIMEOUT", "-1"), ("JOB_TIMEOUT", "2592001"), ("JOB_TIMEOUT", "1.5"),
    ("JOB_TIMEOUT", "1h"), ("MAX_JOB_TIMEOUT", "0"), ("MAX_JOB_TIMEOUT", "2592001"), ("RESULT_TTL", "0"),
    ("RESULT_TTL", "-1"), ("RESULT_TTL", "2592001"), ("FAILURE_TTL", "0"), ("FAILURE_TTL", "2592001"),
    ("MAX_TTL", "0"), ("MAX_TTL", "2592001"), ("MAX_CRASHES", "-1"), ("MAX_CRASHES", "101"),
    ("WORKER_MAX_MEMORY", "1MiB"), ("WORKER_MAX_MEMORY", "much"),
    ("MAX_RETRIES", "-1"), ("MAX_RETRIES", "101"), ("MAX_DELAY", "0"), ("MAX_DELAY", "2592001"),
    ("MAX_BATCH", "0"), ("MAX_BATCH", "10001"),
    ("MAX_QUEUE_LENGTH", "0"), ("MAX_PAYLOAD_BYTES", "0"), ("MAX_PAYLOAD_BYTES", "536870913"),
    ("MAX_PAYLOAD_VALUES", "0"), ("MAX_PAYLOAD_VALUES", "100000001"),
    ("MAX_RESULT_BYTES", "0"), ("MAX_RESULT_BYTES", "268435457"), ("MAX_WAIT", "-1"), ("MAX_WAIT", "61"),
    ("MAX_WAITING", "-1"), ("MAX_WAITING", "100001"), ("WORKER_LEASE", "2"), ("WORKER_LEASE", "3601"),
    ("WORKER_SHUTDOWN_SECONDS", "-1"), ("WORKER_SHUTDOWN_SECONDS", "3601"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_config_refuses_a_bad_value_in_one_sentence(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        settings_of(environment, **{name: value})
    sentence = str(stopped.value)
    shown, _, allowed = sentence.partition(": ")
    assert shown.startswith(f"Bad setting {name}=")
    # For a list, the sentence shows the one bad name.
    assert any(repr(part) in shown for part in (value, *value.split(",")))
    assert len(allowed) > 10
    assert "\n" not in sentence
    assert sentence.endswith(".")


@pytest.mark.parametrize("name", ["REDIS_URL", "RQ_REDIS_URL"])
@pytest.mark.parametrize(
    "value",
    ["localhost:6379", "http://:secret@h", "", "redis//:secret@h", "redis://:secret@h:port", "redis://:secret@h:99999",
     "redis://h?socket_timeout=secret", "rediss://:secret@h?ssl_ca_cert=ca.pem", "redis://:secret@h?ssl_ca_certs=/",
     "rediss://:secret@h?ssl_ca_certs=/nowhere", "rediss://:secret@h?ssl_cert_reqs=maybe", "redis://:secret@h?protocol=9"],
)  # fmt: skip
def test_config_refuses_a_bad_redis_url_without_showing_it(
    environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    if not value:
        assert settings_of(environment, **{name: value}).redis_address == "redis://localhost:6379/0"
        return
    with pytest.raises(SystemExit) as stopped:
        connect(settings_of(environment, **{name: value}))
    sentence = str(stopped.value)
    assert f"Bad setting {name}=" in sentence
    assert "secret" not in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, value in BAD if value in {"0", "-1", "61", "2"}])
def test_config_table_names_settings_that_exist(name: str, value: str) -> None:
    assert name.lower() in Settings.model_fields


def test_config_table_has_a_bad_value_for_every_number() -> None:
    numbers = {name.upper() for name, field in Settings.model_fields.items() if field.annotation in (int, float)}
    assert numbers <= {name for name, _ in BAD}


@pytest.mark.parametrize(
    ("variables", "attribute", "expected"),
    [
        ({"QUEUES": "high, low"}, "queues", ("high", "low")),
        ({"QUEUES": "x" * 64}, "queues", ("x" * 64,)),
        ({"QUEUES": ""}, "queues", ("default",)),
        ({"MAX_JOB_TIMEOUT": "2592000"}, "max_job_timeout", 2592000),
        ({"MAX_WAIT": "0"}, "max_wait", 0),
        ({"MAX_WAITING": "0"}, "max_waiting", 0),
        ({"MAX_CRASHES": "0"}, "max_crashes", 0),
        ({"REDIS_SSL": "true"}, "redis_ssl", True),
        ({"SOME_LONG_FUNCTION_SECONDS": "0.5"}, "some_long_function_seconds", 0.5),
        ({"job_timeout": "5"}, "job_timeout", 5),
    ],
)
def test_config_reads_the_environment(
    environment: pytest.MonkeyPatch, variables: dict[str, str], attribute: str, expected: Any
) -> None:
    assert getattr(settings_of(environment, **variables), attribute) == expected


def test_config_describes_every_setting() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def test_config_cannot_be_changed_and_does_not_show_the_password() -> None:
    settings = Settings(redis_password="hunter2")
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]  # the test is about this error
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "redis://localhost:6379/0"),
        ({"REDIS_HOST": "h", "REDIS_PORT": "1", "REDIS_DB": "2"}, "redis://h:1/2"),
        ({"REDIS_HOST": "::1"}, "redis://[::1]:6379/0"),
        ({"REDIS_SSL": "1", "REDIS_HOST": "h"}, "rediss://h:6379/0"),
        ({"REDIS_PASSWORD": "a/b@c:d#e?f %41"}, "redis://:a%2Fb%40c%3Ad%23e%3Ff%20%2541@localhost:6379/0"),
        ({"REDIS_URL": "redis://u:p@h:1/3", "REDIS_HOST": "other", "REDIS_PASSWORD": "x"}, "redis://u:p@h:1/3"),
        ({"RQ_REDIS_URL": "redis://h1", "REDIS_URL": "redis://h2"}, "redis://h1"),
        ({"REDIS_URL": "unix:///tmp/r.sock?db=2"}, "unix:///tmp/r.sock?db=2"),
    ],
)
def test_config_makes_the_address_of_redis(
    environment: pytest.MonkeyPatch, variables: dict[str, str], address: str
) -> None:
    assert settings_of(environment, **variables).redis_address == address


@pytest.mark.parametrize(
    ("variables", "expected", "kind"),
    [
        ({"REDIS_PASSWORD": "a/b@c:d#e?f %41é", "REDIS_DB": "3"}, {"password": "a/b@c:d#e?f %41é", "db": 3}, None),
        ({"REDIS_HOST": "::1", "REDIS_PORT": "7"}, {"host": "::1", "port": 7}, None),
        ({"REDIS_URL": "redis://[::1]:7/2"}, {"host": "::1", "port": 7, "db": 2}, None),
        ({"REDIS_URL": "rediss://u:p%40@h"}, {"host": "h", "username": "u", "password": "p@"}, SSLConnection),
        ({"REDIS_SSL": "true"}, {"host": "localhost"}, SSLConnection),
        ({"REDIS_URL": "unix:///tmp/r.sock?db=2"}, {"path": "/tmp/r.sock", "db": 2}, UnixDomainSocketConnection),
    ],
)
def test_config_connects_to_the_configured_address(
    environment: pytest.MonkeyPatch, variables: dict[str, str], expected: dict[str, Any], kind: type | None
) -> None:
    pool = connect(settings_of(environment, **variables)).connection_pool
    assert {name: pool.connection_kwargs[name] for name in expected} == expected
    assert kind is None or issubclass(pool.connection_class, kind)


def test_config_password_reaches_redis(valkey: Any) -> None:
    password = "a/b@c:d#e?f %41"
    with Redis(port=valkey.port) as admin:
        admin.config_set("requirepass", password)
        try:
            with connect(Settings(redis_port=valkey.port, redis_password=password), socket_timeout=10) as connection:
                assert connection.ping()
        finally:
            admin.config_set("requirepass", "")


@pytest.mark.parametrize(
    ("variables", "configured"),
    [
        ({}, False), ({"REDIS_URL": "redis://h"}, True), ({"RQ_REDIS_URL": "redis://h"}, True),
        ({"REDIS_HOST": "localhost"}, True), ({"REDIS_PORT": "6379"}, True), ({"REDIS_URL": ""}, False),
        ({"JOB_TIMEOUT": "5"}, False),
    ],
)  # fmt: skip
def test_config_knows_whether_redis_was_named(
    environment: pytest.MonkeyPatch, variables: dict[str, str], configured: bool
) -> None:
    assert settings_of(environment, **variables).redis_is_configured == configured


# Settings that stop the start


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"JOB_TIMEOUT": "soon"}, "Bad setting JOB_TIMEOUT='soon': "),
        ({"REDIS_URL": "redis://:secret@host:port"}, "Bad setting REDIS_URL="),
        ({"FUNCTION_MODULES": "app.nope"}, "FUNCTION_MODULES"),
    ],
)
def test_config_stops_the_start_with_one_sentence(variables: dict[str, str], sentence: str) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ALL} | variables
    done = subprocess.run(
        [sys.executable, "-c", "import app.main"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "most"),
    [("JOB_TIMEOUT", "MAX_JOB_TIMEOUT"), ("RESULT_TTL", "MAX_TTL"), ("FAILURE_TTL", "MAX_TTL")],
)
def test_config_refuses_a_default_beyond_its_own_limit(variable: str, most: str) -> None:
    small = {"MAX_JOB_TIMEOUT": {"job_timeout": 11}, "MAX_TTL": {"result_ttl": 10, "failure_ttl": 10}}[most]
    with pytest.raises(ValidationError, match=rf"{variable}=\d+ is more than {most}=\d+"):
        Settings.model_validate({**small, most.lower(): 10, variable.lower(): 11})
