from typing import Any

import jsonschema_rs
import pytest
from flask.testing import FlaskClient

from tests.processes import json_of, problem_of


@pytest.fixture
def functions(client: FlaskClient) -> dict[str, dict[str, Any]]:
    return {function["name"]: function for function in json_of(client.get("/functions"))["functions"]}


def test_functions_lists_them_by_name(client: FlaskClient) -> None:
    answer = client.get("/functions")
    names = [function["name"] for function in json_of(answer)["functions"]]
    assert answer.status_code == 200
    assert names == sorted(names)
    assert {"count_words", "estimate_pi", "some_long_function", "echo"} <= set(names)


def test_functions_describes_each(functions: dict[str, dict[str, Any]]) -> None:
    for function in functions.values():
        assert set(function) == {"name", "description", "payload_schema", "defaults"}
        assert function["description"]
        jsonschema_rs.meta.validate(function["payload_schema"])


def test_functions_shows_docstring_schema_and_defaults(functions: dict[str, dict[str, Any]]) -> None:
    pi = functions["estimate_pi"]
    assert pi["description"].startswith("Estimate pi by the Monte Carlo method")
    assert pi["defaults"] == {"timeout": 3600}
    assert pi["payload_schema"]["required"] == ["samples"]
    assert pi["payload_schema"]["properties"]["samples"]["minimum"] == 1
    assert functions["fail_with_retries"]["defaults"] == {"retries": 2}
    assert (functions["echo"]["payload_schema"], functions["echo"]["defaults"]) == ({}, {})


@pytest.mark.parametrize(
    ("name", "payload", "status"),
    [
        ("estimate_pi", {"samples": 1}, 202),
        ("estimate_pi", {"samples": 0}, 422),
        ("estimate_pi", {"samples": 1, "x": 1}, 422),
        ("count_words", {"text": "a"}, 202),
        ("count_words", {}, 422),
        ("sleep_for", 61, 422),
        ("fail", "x", 202),
    ],
)
def test_functions_schema_says_what_enqueue_accepts(
    client: FlaskClient, functions: dict[str, dict[str, Any]], name: str, payload: Any, status: int
) -> None:
    assert client.post(f"/enqueue/{name}", json=payload).status_code == status
    assert jsonschema_rs.is_valid(functions[name]["payload_schema"], payload) == (status == 202)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_functions_refuses_other_methods(client: FlaskClient, method: str) -> None:
    answer = client.open("/functions", method=method)
    problem_of(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"
