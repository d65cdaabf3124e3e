import logging
from typing import Any
from unittest.mock import patch

import pytest
from flask.testing import FlaskClient
from redis import Redis, exceptions

from app.jobs import problems
from tests.processes import job_in_state, json_of, problem_of

# The pages


@pytest.mark.parametrize("name", sorted(problems.PROBLEMS))
def test_problems_explains_each_problem(client: FlaskClient, name: str) -> None:
    answer = client.get(f"/problems/{name}")
    problem = problems.PROBLEMS[name]
    assert (answer.status_code, answer.mimetype) == (200, "text/plain")
    assert answer.text.startswith(f"{problem.title} ({problem.status})\n")
    assert answer.text.count(".") >= 1


def test_problems_include_all_of_the_contract() -> None:
    expected = {
        "invalid-request": 422, "job-not-found": 404, "function-not-found": 404, "invalid-json": 400,
        "unsupported-media-type": 415, "payload-too-large": 413, "not-found": 404, "method-not-allowed": 405,
        "queue-full": 503, "redis-unavailable": 503, "internal-error": 500, "result-not-ready": 409,
        "job-failed": 409, "job-stopped": 409, "job-canceled": 409, "result-expired": 410,
    }  # fmt: skip
    assert expected.items() <= {name: problem.status for name, problem in problems.PROBLEMS.items()}.items()


@pytest.mark.parametrize("name", ["nope", "JobNotFound", "job-not-found%00", "problem"])
def test_problems_with_an_unknown_name_is_404(client: FlaskClient, name: str) -> None:
    problem_of(client.get(f"/problems/{name}"), 404, "not-found")


def test_problems_refuses_other_methods(client: FlaskClient) -> None:
    answer = client.post("/problems/job-not-found")
    problem_of(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"


@pytest.mark.parametrize("path", ["/nope", "/problems", "/problems/", "/check_status/", "/Enqueue", "/%00"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_unknown_route_is_a_problem(client: FlaskClient, path: str, method: str) -> None:
    problem_of(client.open(path, method=method), 404, "not-found")


# Redis is away or refuses a command. The texts are Redis' own. In a script's error the word (READONLY) comes later.

OUTAGES: list[exceptions.RedisError] = [
    exceptions.ConnectionError("Connection refused"),
    exceptions.ConnectionError("max number of clients reached"),
    exceptions.TimeoutError("Timeout reading from socket"),
    exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
    exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
    exceptions.ResponseError("OOM command not allowed when used memory > 'maxmemory'. script: 1f, on @user_script:1."),
    exceptions.ReadOnlyError("You can't write against a read only replica."),
    exceptions.ResponseError(
        "Error running script: @user_script:5: -READONLY You can't write against a read only one."
    ),
    exceptions.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"),
    exceptions.ResponseError("BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."),
    exceptions.ResponseError("NOREPLICAS Not enough good replicas to write."),
    exceptions.MasterDownError("Link with MASTER is down and replica-serve-stale-data is set to 'no'."),
    exceptions.ClusterDownError("The cluster is down"),
    exceptions.AuthenticationError("Authentication required."),
    exceptions.AuthenticationError("invalid username-password pair or user is disabled."),
    exceptions.NoPermissionError("this user has no permissions to run the 'evalsha' command"),
]
ROUTES = [("POST", "/enqueue/echo"), ("GET", "/check_status"), ("GET", "/get_result"), ("GET", "/get_result?wait=1")]


def ask(client: FlaskClient, redis: "Redis", method: str, path: str, error: Exception) -> Any:
    job_id = job_in_state(client, redis, "queued")
    query = {} if method == "POST" else {"job_id": job_id}
    path, _, option = path.partition("?")
    if option:
        query["wait"] = option.partition("=")[2]
    # A pipeline executes by itself, not through `execute_command`.
    with (
        patch.object(type(redis), "execute_command", side_effect=error),
        patch("redis.client.Pipeline.execute", side_effect=error),
    ):
        return client.open(path, method=method, query_string=query, json=1 if method == "POST" else None)


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[path for _, path in ROUTES])
@pytest.mark.parametrize("error", OUTAGES, ids=lambda error: f"{type(error).__name__}: {str(error)[:20]}")
def test_redis_outage_is_a_503(
    client: FlaskClient,
    redis: "Redis",
    method: str,
    path: str,
    error: exceptions.RedisError,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = ask(client, redis, method, path, error)
    problem_of(answer, 503, "redis-unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert str(error) not in answer.text
    assert str(error) in caplog.text


# Bugs


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[path for _, path in ROUTES])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the secret is 42"),
        KeyError("secret"),
        exceptions.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of secret"),
        exceptions.ResponseError("Error compiling script: secret"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bug_is_a_500_and_is_logged_with_its_request_id(
    client: FlaskClient, redis: "Redis", method: str, path: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = ask(client, redis, method, path, error)
    problem = problem_of(answer, 500, "internal-error")
    assert set(problem) == {"type", "title", "status", "detail", "request_id"}
    assert "secret" not in answer.text
    assert type(error).__name__ not in answer.text
    logged = [record for record in caplog.records if problem["request_id"] in record.getMessage()]
    assert len(logged) == 1
    assert logged[0].exc_info
    assert logged[0].exc_info[1] is error


def test_bug_gets_another_request_id_each_time(client: FlaskClient, redis: "Redis") -> None:
    asked = [ask(client, redis, "GET", "/check_status", RuntimeError("x")) for _ in range(2)]
    assert json_of(asked[0])["request_id"] != json_of(asked[1])["request_id"]
