import re
from typing import Any

import jsonschema_rs
import pytest
from apiflask import APIFlask
from flask.testing import FlaskClient

from app.config import Settings
from app.main import create_app
from tests.processes import job_in_state, json_of, problem_of


@pytest.fixture
def document(client: FlaskClient) -> Any:
    answer = client.get("/openapi.json")
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    return json_of(answer)


def operations(document: Any) -> dict[str, Any]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_openapi_is_version_3_1_and_names_every_route(document: Any, app: APIFlask) -> None:
    assert document["openapi"].startswith("3.1")
    served = {
        f"{method} {rule.rule.replace('<', '{').replace('>', '}')}"
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        if method not in {"HEAD", "OPTIONS"}
        and not rule.rule.startswith(("/docs", "/openapi", "/static", "/dashboard"))
    }
    routes = ("/enqueue", "/enqueue_many")
    functions = {f"POST {route}/{name}" for route in routes for name in app.extensions["enqueuer"].functions}
    assert set(operations(document)) == served - {f"POST {route}/{{function}}" for route in routes} | functions


def test_openapi_has_a_unique_id_and_a_summary_for_each_operation(document: Any) -> None:
    found = list(operations(document).values())
    ids = [operation["operationId"] for operation in found]
    assert len(ids) == len(set(ids))
    assert all(operation["summary"] and operation["responses"] and operation["tags"] for operation in found)


#: Generated clients name their methods after these. A release may add some, and must not change any.
OPERATION_IDS = {
    "get_index", "enqueue", "enqueue_count_words", "enqueue_many_count_words", "get_check_status", "get_get_result",
    "get_get_payload", "get_list_functions", "get_explain_problem", "get_control_check_group", "get_control_events",
    "get_control_list_jobs", "get_control_list_webhooks", "post_control_cancel", "post_control_retry",
    "post_control_redeliver", "get_ops_healthz", "get_ops_readyz", "get_ops_queues", "get_ops_metrics",
}  # fmt: skip


def test_openapi_keeps_the_operation_ids_of_earlier_releases(document: Any) -> None:
    assert {operation["operationId"] for operation in operations(document).values()} >= OPERATION_IDS


def test_openapi_allows_new_members_in_each_answer(document: Any) -> None:
    assert document["components"]["schemas"]
    for name, schema in document["components"]["schemas"].items():
        assert schema.get("additionalProperties", True) is True, name


def test_openapi_has_no_dangling_references(document: Any) -> None:
    def references(node: Any) -> Any:
        if isinstance(node, dict):
            if "$id" in node:  # a document of its own
                return
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    found = set(references(document))
    assert found
    for reference in found:
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]


def test_openapi_has_the_schema_of_each_payload(document: Any, client: FlaskClient) -> None:
    for function in json_of(client.get("/functions"))["functions"]:
        operation = document["paths"][f"/enqueue/{function['name']}"]["post"]
        schema = dict(operation["requestBody"]["content"]["application/json"]["schema"])
        schema.pop("$id", None)
        assert schema == function["payload_schema"]
        assert operation["description"] == function["description"]


def test_openapi_has_the_options_with_their_configured_bounds() -> None:
    app = create_app(
        Settings(queues=("a", "b"), job_timeout=7, max_job_timeout=77, result_ttl=8, failure_ttl=8, max_ttl=88)
    )
    document = json_of(app.test_client().get("/openapi.json"))
    parameters = {found["name"]: found for found in document["paths"]["/enqueue"]["post"]["parameters"]}
    assert set(parameters) == {
        "wait", "queue", "at_front", "timeout", "result_ttl", "failure_ttl", "ttl", "retries", "delay", "at", "Prefer",
        "Idempotency-Key", "webhook",
    }  # fmt: skip
    assert all(not parameter["required"] and "description" in str(parameter) for parameter in parameters.values())
    text = {name: str(parameter["schema"]) for name, parameter in parameters.items()}
    assert "'maximum': 77" in text["timeout"]
    assert all("'maximum': 88" in text[name] for name in ("result_ttl", "failure_ttl", "ttl"))
    assert "['a', 'b']" in text["queue"]


def test_openapi_marks_the_job_id_as_required(document: Any) -> None:
    for path in ("/check_status", "/get_result"):
        required = [found["name"] for found in document["paths"][path]["get"]["parameters"] if found["required"]]
        assert required == ["job_id"]


def test_openapi_examples_fit_their_schemas(document: Any) -> None:
    checked = 0
    for operation in operations(document).values():
        for answer in operation["responses"].values():
            for content in answer.get("content", {}).values():
                examples = [found["value"] for found in content.get("examples", {}).values()]
                for example in examples + ([content["example"]] if "example" in content else []):
                    schema = {**content["schema"], "components": document["components"]}
                    jsonschema_rs.validate(schema, example)
                    checked += 1
    assert checked > 20


@pytest.mark.parametrize("state", ["queued", "started", "finished", "failed", "canceled"])
def test_openapi_describes_the_status_object_as_it_is(
    document: Any, client: FlaskClient, redis: Any, state: str
) -> None:
    status = json_of(client.get("/check_status", query_string={"job_id": job_in_state(client, redis, state)}))
    schema = {"$ref": "#/components/schemas/StatusObject", "components": document["components"]}
    jsonschema_rs.validate(schema, status)
    assert set(document["components"]["schemas"]["StatusObject"]["required"]) == set(status)


@pytest.mark.parametrize(
    ("route", "statuses"),
    [
        ("POST /enqueue", {"200", "202", "400", "404", "413", "415", "422", "500", "503"}),
        ("POST /enqueue/echo", {"200", "202", "400", "404", "413", "415", "422", "500", "503"}),
        ("GET /check_status", {"200", "304", "404", "410", "422", "500", "503"}),
        ("GET /get_result", {"200", "404", "409", "410", "422", "500", "503"}),
        ("GET /readyz", {"200", "503"}),
    ],
)
def test_openapi_names_the_answers(document: Any, route: str, statuses: set[str]) -> None:
    responses = operations(document)[route]["responses"]
    assert statuses <= set(responses)
    for status, answer in responses.items():
        if int(status) >= 400:
            assert list(answer["content"]) == ["application/problem+json"]


# The page


def test_docs_page_loads_nothing_from_other_hosts(client: FlaskClient) -> None:
    answer = client.get("/docs")
    assert (answer.status_code, answer.mimetype) == (200, "text/html")
    loaded = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)""", answer.text)
    assert len(loaded) >= 4
    # The one absolute address of the page is a link in a comment of the script.
    assert [address for address in loaded if not re.match(r"/[^/]", address)] == []


def test_docs_loads_only_what_is_served(client: FlaskClient) -> None:
    page = client.get("/docs").text
    types = {}
    for address in re.findall(r"""(?:src|href)\s*=\s*"([^"]+)""", page):
        with client.get(address) as answer:
            types[address] = answer.status_code, answer.mimetype
            assert answer.data
    assert types == {
        "/docs/swagger-ui.css": (200, "text/css"),
        "/docs/favicon-32x32.png": (200, "image/png"),
        "/docs/swagger-ui-bundle.js": (200, "text/javascript"),
        "/docs/swagger-ui-standalone-preset.js": (200, "text/javascript"),
    }
    assert 'url: "/openapi.json"' in page


@pytest.mark.parametrize(
    "name", ["nope.js", "..", "../../app/main.py", "%2e%2e/flask_swagger_ui.py", "//etc/passwd", "x%00.js", "a/b/c"]
)
def test_docs_serves_nothing_else(client: FlaskClient, name: str) -> None:
    problem_of(client.get(f"/docs/{name}", follow_redirects=True), 404, "not-found")


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/docs/swagger-ui.css"])
def test_docs_refuse_other_methods(client: FlaskClient, path: str) -> None:
    answer = client.post(path)
    problem_of(answer, 405, "method-not-allowed")
    assert "GET" in answer.headers["Allow"]
