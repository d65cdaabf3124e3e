import pytest
from flask.testing import FlaskClient

from tests.processes import problem_of


def test_index_says_that_the_app_is_up(client: FlaskClient) -> None:
    answer = client.get("/")
    assert (answer.status_code, answer.text, answer.mimetype) == (200, "Running!", "text/plain")


def test_index_answers_head_without_a_body(client: FlaskClient) -> None:
    answer = client.head("/")
    assert (answer.status_code, answer.data, answer.headers["Content-Length"]) == (200, b"", "8")


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_index_refuses_other_methods(client: FlaskClient, method: str) -> None:
    answer = client.open("/", method=method)
    problem_of(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD, OPTIONS"
