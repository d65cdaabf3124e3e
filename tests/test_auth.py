import hashlib
import json
import re
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from flask.testing import FlaskClient
from pydantic import ValidationError

from app.config import Settings
from app.main import create_app
from app.web.auth import PUBLIC, PUBLIC_BELOW
from tests.processes import json_of, problem_of

ALICE, BOB, OPS = ("alice's long key", "bob's own long key", "the operator's key")
KEYS: list[dict[str, Any]] = [
    {"name": "alice", "key": ALICE},
    {"name": "bob", "sha256": hashlib.sha256(BOB.encode()).hexdigest(), "functions": ["count_words"]},
    {"name": "ops", "key": OPS, "admin": True},
]


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _make_client(redis: fakeredis.FakeRedis, **settings: Any) -> FlaskClient:
    return create_app(Settings(api_keys=json.dumps(KEYS), **settings), redis).test_client()


@pytest.fixture
def client(redis: fakeredis.FakeRedis) -> FlaskClient:
    return _make_client(redis)


@pytest.mark.parametrize("route", ["/check_status?job_id=x", "/get_result?job_id=x", "/functions", "/no/such/route"])
@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Bearer wrong",
        f"Basic {ALICE}",
        f"bearer  {ALICE}x",
        "Bearer \udcff",
        f"Bearer {KEYS[1]['sha256']}",
    ],
)
def test_auth_refuses_a_request_without_a_known_key(client: FlaskClient, route: str, header: str | None) -> None:
    answer = client.get(route, headers={"Authorization": header} if header else {})
    assert answer.status_code == 401
    assert answer.json
    assert answer.json["type"] == "/problems/unauthorized"
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_auth_refuses_an_enqueue_before_it_reads_the_body(client: FlaskClient, redis: fakeredis.FakeRedis) -> None:
    assert client.post("/enqueue", data=b"not json").status_code == 401
    assert redis.llen("rq:queue:default") == 0


@pytest.mark.parametrize("route", [*sorted(PUBLIC - {"/readyz"}), "/problems/job-not-found", "/docs/swagger-ui.css"])
def test_auth_needs_no_key_for_public_routes(client: FlaskClient, route: str) -> None:
    with client.get(route) as answer:
        assert answer.status_code == 200


def test_auth_accepts_a_key_given_as_a_hash(client: FlaskClient) -> None:
    assert client.get("/functions", headers=_bearer(BOB)).status_code == 200


def test_auth_forbids_functions_that_the_key_does_not_name(client: FlaskClient) -> None:
    answer = client.post("/enqueue/some_long_function", json=1, headers=_bearer(BOB))
    assert answer.status_code == 403
    assert answer.json
    assert answer.json["type"] == "/problems/forbidden"
    assert client.post("/enqueue/count_words", json={"text": "a"}, headers=_bearer(BOB)).status_code == 202
    batch = client.post("/enqueue_many/some_long_function", json=[1], headers=_bearer(BOB))
    problem_of(batch, 403, "forbidden")
    assert client.post("/enqueue_many/count_words", json=[{"text": "a"}], headers=_bearer(BOB)).status_code == 202


@pytest.mark.parametrize("route", ["/check_status", "/get_result"])
def test_auth_hides_the_jobs_of_others_even_after_they_expired(
    client: FlaskClient, redis: fakeredis.FakeRedis, route: str
) -> None:
    enqueued = client.post("/enqueue/echo", json=1, headers=_bearer(ALICE)).json
    assert enqueued
    path = f"{route}?job_id={enqueued['job_id']}"
    seen = {"/check_status": 200, "/get_result": 409}[route]
    statuses = [client.get(path, headers=_bearer(key)).status_code for key in (ALICE, BOB, OPS)]
    assert statuses == [seen, 404, seen]
    redis.delete(f"rq:job:{enqueued['job_id']}")
    statuses = [client.get(path, headers=_bearer(key)).status_code for key in (ALICE, BOB, OPS)]
    assert statuses == [410, 404, 410]


def test_auth_protects_every_route_that_is_not_public(client: FlaskClient) -> None:
    """The app lists its routes and their methods, so this covers new ones too."""
    rules = [rule for rule in client.application.url_map.iter_rules() if not is_public_rule(rule.rule)]
    assert len(rules) >= 15
    for rule in rules:
        path = re.sub("<[^>]+>", "x", rule.rule)
        for method in rule.methods or ():
            assert client.open(path, method=method).status_code == 401, (method, rule.rule)


def is_public_rule(rule: str) -> bool:
    return rule in PUBLIC or rule.startswith(PUBLIC_BELOW)


@pytest.mark.parametrize("is_expired", [False, True])
def test_auth_lets_no_route_show_or_control_the_jobs_of_others(
    client: FlaskClient, redis: fakeredis.FakeRedis, is_expired: bool
) -> None:
    """The OpenAPI document lists each route that takes the id of a job or a group."""
    job_id = json_of(client.post("/enqueue/echo", json=1, headers=_bearer(ALICE)))["job_id"]
    batch = json_of(client.post("/enqueue_many/echo", json=[1], headers=_bearer(ALICE)))
    if is_expired:
        for each in (job_id, *batch["job_ids"]):
            redis.delete(f"rq:job:{each}")
    ids = {"job_id": (job_id, "job-not-found"), "group_id": (batch["group_id"], "group-not-found")}
    seen = 0
    for path, operations in json_of(client.get("/openapi.json"))["paths"].items():
        for method, operation in operations.items():
            for name in {each["name"] for each in operation.get("parameters", ())} & ids.keys():
                found, problem = ids[name]
                answer = client.open(f"{path}?{name}={found}", method=method.upper(), headers=_bearer(BOB))
                problem_of(answer, 404, problem)
                seen += 1
    assert seen >= 9
    listed = json_of(client.get("/jobs", headers=_bearer(BOB)))["jobs"]
    assert listed == []


def test_auth_shows_up_in_the_openapi_document(client: FlaskClient) -> None:
    spec = client.get("/openapi.json").json
    assert spec
    assert spec["components"]["securitySchemes"] == {"ApiKey": {"type": "http", "scheme": "bearer"}}
    assert spec["paths"]["/enqueue/count_words"]["post"]["security"] == [{"ApiKey": []}]
    assert "security" not in spec["paths"]["/healthz"]["get"]


def test_auth_reads_keys_from_a_file(tmp_path: Path, redis: fakeredis.FakeRedis) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(KEYS))
    client = create_app(Settings(api_keys_file=file), redis).test_client()
    assert client.get("/functions").status_code == 401
    assert client.get("/functions", headers=_bearer(ALICE)).status_code == 200


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("nonsense", "API_KEYS is not valid: Invalid JSON"),
        ('{"name": "a"}', "API_KEYS is not valid"),
        ('[{"name": "a"}]', "either `key` or `sha256`"),
        ('[{"name": "a", "key": "0123456789abcdef", "sha256": "%s"}]' % ("0" * 64), "either `key` or `sha256`"),
        ('[{"name": "a", "key": "short"}]', "at least 16"),
        ('[{"name": "a b", "key": "0123456789abcdef"}]', "pattern"),
        ('[{"name": "a", "sha256": "xyz"}]', "pattern"),
        ('[{"name": "a", "key": "0123456789abcdef", "adm": true}]', "Extra inputs"),
        (json.dumps([KEYS[0], KEYS[0]]), "same name"),
        (json.dumps([KEYS[0], {**KEYS[0], "name": "other"}]), "are the same key"),
        (json.dumps([KEYS[1], {"name": "other", "key": BOB}]), "are the same key"),
        ("[]", "API_KEYS is an empty list"),
    ],
)
def test_auth_refuses_bad_keys_without_showing_them(keys: str, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(api_keys=keys)
    text = caught.value.errors()[0]["msg"]
    assert message in text
    assert "0123456789abcdef" not in text


def test_auth_refuses_a_key_for_unknown_functions(redis: fakeredis.FakeRedis) -> None:
    keys = [{**KEYS[1], "functions": ["count_words", "count_wrods"]}]
    with pytest.raises(SystemExit, match="'bob' use count_wrods, and there is no such"):
        create_app(Settings(api_keys=json.dumps(keys)), redis)


@pytest.mark.parametrize(("host", "is_refused"), [("0.0.0.0", True), ("10.0.0.1", True), ("::", True), ("::1", False)])
def test_without_keys_the_server_listens_on_loopback_only(host: str, is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(ValidationError, match="ALLOW_ANONYMOUS"):
            Settings(host=host)
    assert Settings(host=host, allow_anonymous=True).host == host
    assert Settings(host=host, api_keys=json.dumps(KEYS)).host == host


def test_rate_limit_is_counted_for_each_key_and_not_for_public_routes(redis: fakeredis.FakeRedis) -> None:
    client = _make_client(redis, rate_limit="3/hour")
    statuses = [client.get("/functions", headers=_bearer(ALICE)).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    refused = client.get("/functions", headers=_bearer(ALICE))
    assert refused.json
    assert refused.json["type"] == "/problems/too-many-requests"
    assert 1 <= int(refused.headers["Retry-After"]) <= 3601
    assert client.get("/functions", headers=_bearer(OPS)).status_code == 200
    assert {client.get("/").status_code for _ in range(5)} == {200}


def test_rate_limit_counts_addresses_where_there_are_no_keys(redis: fakeredis.FakeRedis) -> None:
    client = create_app(Settings(rate_limit="1/day"), redis).test_client()
    assert [client.get("/functions").status_code for _ in range(2)] == [200, 429]
    assert client.get("/functions", environ_base={"REMOTE_ADDR": "127.0.0.9"}).status_code == 200


@pytest.mark.parametrize(("address", "status"), [("127.0.0.1", 200), ("::1", 200), ("192.0.2.1", 403), ("", 200)])
def test_without_keys_the_app_serves_only_this_machine_under_any_server(
    redis: fakeredis.FakeRedis, address: str, status: int
) -> None:
    from_there = {"environ_base": {"REMOTE_ADDR": address}}
    assert create_app(Settings(), redis).test_client().get("/functions", **from_there).status_code == status
    assert create_app(Settings(), redis).test_client().get("/healthz", **from_there).status_code == 200
    open_to_all = create_app(Settings(allow_anonymous=True), redis).test_client()
    assert open_to_all.get("/functions", **from_there).status_code == 200


@pytest.mark.parametrize("key", ["a=key=with=signs=", "a key with spaces in it", "ein Schlüssel, länger als 16"])
def test_a_key_may_have_any_characters(redis: fakeredis.FakeRedis, key: str) -> None:
    settings = Settings(api_keys=json.dumps([{"name": "alice", "key": key}]))
    client = create_app(settings, redis).test_client()
    sent = f"Bearer {key}".encode().decode("latin-1")  # as WSGI passes it on
    for scheme in ("Bearer ", "bearer  "):
        answer = client.get("/functions", environ_overrides={"HTTP_AUTHORIZATION": sent.replace("Bearer ", scheme)})
        assert answer.status_code == 200
    assert client.get("/functions", headers={"Authorization": f"Bearer {key[:-1]}x".encode()}).status_code == 401
