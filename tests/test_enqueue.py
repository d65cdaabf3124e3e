import dataclasses
import io
import json
from typing import Any

import pytest
from apiflask import APIFlask
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue
from rq.job import Job
from rq.serializers import JSONSerializer

from app.config import Settings
from app.job_function import FUNCTIONS
from app.main import create_app
from tests.processes import end_run, enqueue_echo, json_of, just_set, problem_of, take_job

JSON = "application/json"


def post(client: FlaskClient, body: bytes, path: str = "/enqueue/echo", content_type: str | None = JSON) -> Any:
    return client.post(path, data=body, content_type=content_type)


def waiting(redis: "Redis", queue: str = "default") -> list[str]:
    return Queue(queue, connection=redis).job_ids


def stored_job(redis: "Redis", job_id: str) -> Job:
    return Job.fetch(job_id, connection=redis, serializer=JSONSerializer)


# Success


@pytest.mark.parametrize(
    ("path", "function"),
    [
        ("/enqueue", "some_long_function"),
        ("/enqueue/some_long_function", "some_long_function"),
        ("/enqueue/echo", "echo"),
    ],
)
def test_enqueue_answers_the_status_of_the_new_job(
    client: FlaskClient, redis: "Redis", path: str, function: str
) -> None:
    answer = client.post(path, json={"secret": "payload"})
    status = json_of(answer)
    job_id = status["job_id"]
    assert answer.status_code == 202
    assert answer.mimetype == JSON
    assert answer.headers["Location"] == f"/check_status?job_id={job_id}"
    assert int(answer.headers["Retry-After"]) >= 1
    assert list(status)[:2] == ["job_id", "job_status"]
    assert (status["job_status"], status["function"], status["queue"]) == ("queued", function, "default")
    assert [status[name] for name in ("started_at", "ended_at", "progress", "retries_left", "error")] == [None] * 5
    assert (
        status["links"].items()
        >= {
            "check_status": f"/check_status?job_id={job_id}",
            "get_result": f"/get_result?job_id={job_id}",
        }.items()
    )
    assert "payload" not in answer.text
    assert waiting(redis) == [job_id]
    assert list(stored_job(redis, job_id).args) == [{"secret": "payload"}]


def test_enqueue_answers_the_same_as_check_status(client: FlaskClient) -> None:
    answer = client.post("/enqueue/echo", json=1)
    assert client.get(answer.headers["Location"]).json == answer.json


def test_enqueue_gives_every_job_its_own_id(client: FlaskClient, redis: "Redis") -> None:
    ids = [enqueue_echo(client, 1) for _ in range(20)]
    assert len(set(ids)) == 20
    assert waiting(redis) == ids


@pytest.mark.parametrize("payload", [None, 0, "", [], {}, False, "\x00", "\U0001d518", {"job_id": "x", "timeout": 1}])
def test_enqueue_takes_any_json_as_the_payload(client: FlaskClient, redis: "Redis", payload: Any) -> None:
    assert list(stored_job(redis, enqueue_echo(client, payload)).args) == [payload]


@pytest.mark.parametrize("content_type", [JSON, "Application/JSON; charset=utf-8", "application/vnd.x+json"])
def test_enqueue_accepts_every_json_type(client: FlaskClient, content_type: str) -> None:
    assert post(client, b"1", content_type=content_type).status_code == 202


# Options


@pytest.fixture
def settings() -> Settings:
    return Settings(
        queues=("default", "low"), max_payload_bytes=400_000, max_payload_values=100_100, max_queue_length=50
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"timeout": 7}, {"timeout": 7}),
        ({"timeout": 86400}, {"timeout": 86400}),
        ({"result_ttl": 8}, {"result_ttl": 8}),
        ({"failure_ttl": 9}, {"failure_ttl": 9}),
        ({"ttl": 10}, {"ttl": 10}),
        ({"queue": "low"}, {"origin": "low"}),
        ({}, {"timeout": 180, "result_ttl": 86400, "failure_ttl": 604800, "ttl": None, "origin": "default"}),
    ],
)
def test_enqueue_writes_its_options_into_the_job(
    client: FlaskClient, redis: "Redis", options: dict[str, Any], expected: dict[str, Any]
) -> None:
    job_id = enqueue_echo(client, 1, **options)
    job = stored_job(redis, job_id)
    assert {name: getattr(job, name) for name in expected} == expected
    assert waiting(redis, expected.get("origin", "default")) == [job_id]


def test_enqueue_overrides_the_defaults_of_the_function(client: FlaskClient, redis: "Redis") -> None:
    def timeout(**options: int) -> Any:
        answer = client.post("/enqueue/estimate_pi", json={"samples": 1}, query_string=options)
        return stored_job(redis, json_of(answer)["job_id"]).timeout

    assert (timeout(), timeout(timeout=5)) == (3600, 5)


def test_enqueue_shows_the_retries_that_the_function_declares(client: FlaskClient) -> None:
    assert json_of(client.post("/enqueue/fail_with_retries", json="x"))["retries_left"] == 2


def test_enqueue_puts_a_job_in_front(client: FlaskClient, redis: "Redis") -> None:
    first, second = enqueue_echo(client), enqueue_echo(client, at_front="false")
    urgent = enqueue_echo(client, at_front="true")
    assert waiting(redis) == [urgent, first, second]


def test_enqueue_with_ttl_drops_the_job_if_nobody_takes_it(client: FlaskClient, redis: "Redis") -> None:
    dropped, kept = enqueue_echo(client, ttl=100), enqueue_echo(client)
    assert redis.ttl(f"rq:job:{dropped}") == just_set(100)
    redis.delete(f"rq:job:{dropped}")  # as its ttl does
    assert take_job(redis).job_id == kept


def test_enqueue_with_ttl_does_not_drop_a_job_that_was_taken(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, ttl=100)
    take_job(redis)
    assert redis.ttl(f"rq:job:{job_id}") == -1


def test_enqueue_with_result_ttl_keeps_the_result_that_long(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, result_ttl=70)
    end_run(redis, take_job(redis), value=1, ttl=1000)
    assert [redis.ttl(f"rq:{kind}:{job_id}") for kind in ("job", "results")] == [just_set(70)] * 2


def test_enqueue_with_failure_ttl_keeps_the_failure_that_long(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, failure_ttl=80)
    end_run(redis, take_job(redis), "failed", ttl=1000)
    assert [redis.ttl(f"rq:{kind}:{job_id}") for kind in ("job", "results")] == [just_set(80)] * 2


@pytest.mark.parametrize(
    "query",
    [
        "timeout=0", "timeout=-1", "timeout=86401", "timeout=1.5", "timeout=x", "timeout=", "timeout=nan",
        "timeout=99999999999999999999", "result_ttl=0", "result_ttl=-1", "result_ttl=2592001", "failure_ttl=0",
        "failure_ttl=2592001", "ttl=0", "ttl=2592001", "ttl=inf", "queue=nope", "queue=", "queue=default%00",
        "queue=DEFAULT", "at_front=maybe", "at_front=", "wait=-1", "wait=61", "wait=nan", "wait=inf", "wait=x", "wait=",
        "tiemout=5", "job_id=abc", "%00=1", "a.b=1",
    ],
)  # fmt: skip
def test_enqueue_refuses_an_option_and_names_it(client: FlaskClient, redis: "Redis", query: str) -> None:
    name = query.partition("=")[0].replace("%00", "\x00")
    problem = problem_of(client.post(f"/enqueue/echo?{query}", json=1), 422, "invalid-request")
    assert [error["loc"] for error in problem["errors"]] == [["query", name]]
    assert all(error["msg"] for error in problem["errors"])
    assert waiting(redis) == []


def test_enqueue_names_every_bad_option(client: FlaskClient) -> None:
    problem = problem_of(client.post("/enqueue/echo?timeout=0&ttl=x&y=1", json=1), 422, "invalid-request")
    assert sorted(error["loc"][1] for error in problem["errors"]) == ["timeout", "ttl", "y"]


# Payloads that do not fit


@pytest.mark.parametrize(
    ("function", "payload", "places"),
    [
        ("estimate_pi", {}, [["body", "samples"]]),
        ("estimate_pi", {"samples": 0}, [["body", "samples"]]),
        ("estimate_pi", {"samples": 1, "seeds": 2}, [["body", "seeds"]]),
        ("estimate_pi", {"samples": "many", "seed": []}, [["body", "samples"], ["body", "seed"]]),
        ("estimate_pi", [1], [["body"]]),
        ("count_words", None, [["body"]]),
        ("count_words", {"text": "a", "n": 1001}, [["body", "n"]]),
        ("sleep_for", -1, [["body"]]),
        ("use_types", {"day": "2026-13-01"}, [["body", "day"]]),
        ("use_types", {"day": "2026-11-23", "tags": ["a", 1]}, [["body", "tags", 1]]),
    ],
)
def test_enqueue_refuses_a_payload_that_does_not_fit_the_function(
    client: FlaskClient, redis: "Redis", function: str, payload: Any, places: list[list[str | int]]
) -> None:
    problem = problem_of(post(client, json.dumps(payload).encode(), f"/enqueue/{function}"), 422, "invalid-request")
    assert [error["loc"] for error in problem["errors"]] == places
    assert all(error["msg"] for error in problem["errors"])
    assert waiting(redis) == []


def test_enqueue_accepts_a_date_for_a_strict_model(client: FlaskClient, redis: "Redis") -> None:
    answer = client.post("/enqueue/use_types", json={"day": "2026-11-23", "tags": ["a"]})
    assert answer.status_code == 202
    assert list(stored_job(redis, json_of(answer)["job_id"]).args) == [{"day": "2026-11-23", "tags": ["a"]}]


# Bodies that are not JSON

HUGE = b"1" + b"0" * 400


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]", inner: bytes = b"") -> bytes:
    return opening * depth + inner + closing * depth


@pytest.mark.parametrize(
    ("body", "place"),
    [
        pytest.param(b"", (1, 0), id="empty"),
        pytest.param(b" \n ", (2, 1), id="blank"),
        pytest.param(b"NaN", (1, 1), id="NaN"),
        pytest.param(b'{"a": NaN}', (1, 7), id="NaN inside"),
        pytest.param(b"Infinity", (1, 1), id="Infinity"),
        pytest.param(b"[-Infinity]", (1, 3), id="-Infinity"),
        pytest.param(b"[1,\n 2,\n]", (3, 1), id="trailing comma"),
        pytest.param(b'{"a": 1,}', (1, 9), id="trailing comma in an object"),
        pytest.param(b"1 2", (1, 3), id="two values"),
        pytest.param(b"'a'", (1, 1), id="single quotes"),
        pytest.param(b"{a: 1}", (1, 2), id="bare key"),
        pytest.param(b"01", (1, 2), id="leading zero"),
        pytest.param(b"0x10", (1, 2), id="hexadecimal"),
        pytest.param(b"[1] // x", (1, 5), id="comment"),
        pytest.param(b'"\t"', (1, 2), id="tab in a string"),
        pytest.param(b'{"a": "x', (1, 8), id="unterminated"),
        pytest.param(b"\xef\xbb\xbf1", (1, 1), id="BOM"),
        pytest.param(b'"\xff"', (1, 2), id="not UTF-8"),
        pytest.param('"é"'.encode("latin-1"), (1, 3), id="latin-1"),
        pytest.param('"a"'.encode("utf-16"), (1, 1), id="UTF-16"),
        pytest.param(b'"\xed\xa0\x80"', (1, 2), id="surrogate in UTF-8"),
        pytest.param(b'"\xc0\x80"', (1, 2), id="overlong NUL"),
        pytest.param(b'"\\ud800"', (1, 8), id="lone leading surrogate"),
        pytest.param(b'["\\udfff x"]', (1, 8), id="lone trailing surrogate"),
        pytest.param(b'{"\\ud800\\u0041": 1}', (1, 14), id="lone surrogate in a key"),
        pytest.param(b"1e400", None, id="1e400"),
        pytest.param(b"-1e400", None, id="-1e400"),
        pytest.param(b'{"a": [1E+0400]}', None, id="1E+0400 inside"),
        pytest.param(b"[0.1e310]", None, id="0.1e310"),
        pytest.param(HUGE[:251] + b"e99", None, id="many digits and a short exponent"),
        pytest.param(HUGE[:290] + b".5e30", None, id="many digits, a point and a short exponent"),
        pytest.param(HUGE, None, id="integer of 401 digits"),
        pytest.param(b'{"a": -' + HUGE + b"}", None, id="negative integer of 401 digits"),
        pytest.param(b"1" * 5000, None, id="integer of 5000 digits"),
        pytest.param(nested(101), None, id="101 levels"),
        pytest.param(nested(101, b'{"a":', b"}", b"1"), None, id="101 levels of objects"),
        pytest.param(b'[1, {"a":' + nested(99) + b"}]", None, id="101 levels beside others"),
        pytest.param(nested(100_000), None, id="100000 levels"),
        pytest.param(b"[" * 100_000, None, id="100000 levels, unclosed"),
        pytest.param(b'{"a":' * 50_000, None, id="50000 levels of objects, unclosed"),
    ],
)
def test_enqueue_refuses_a_body_that_is_not_json(
    client: FlaskClient, redis: "Redis", body: bytes, place: tuple[int, int] | None
) -> None:
    problem = problem_of(post(client, body), 400, "invalid-json")
    if place:
        line, column = place
        # Parsers may stop at different columns inside an escape or a literal.
        assert problem["line"] == line
        assert abs(problem["column"] - column) <= 2
    assert "line" not in problem or problem["line"] >= 1
    assert waiting(redis) == []


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(nested(100), id="100 levels"),
        pytest.param(nested(100, b'{"a":', b"}", b"1"), id="100 levels of objects"),
        pytest.param(nested(99, inner=b'"' + b"[{" * 200 + b'"'), id="brackets in a string"),
        pytest.param(b"[" + b",".join([b"[]"] * 500) + b"]", id="many arrays side by side"),
        pytest.param(b"1.7976931348623157e308", id="largest double"),
        pytest.param(b"-1.7976931348623157E+308", id="smallest double"),
        pytest.param(b"[1e-400, 5e-324]", id="tiny numbers"),
        pytest.param(b"0." + b"1" * 400, id="400 decimals"),
        pytest.param(b'"1e400"', id="1e400 as a string"),
        pytest.param(b'"' + b"1" * 400 + b'"', id="400 digits as a string"),
        pytest.param(b"1" + b"0" * 308, id="integer of 309 digits"),
        pytest.param(b"0e999", id="zero with a large exponent"),
        pytest.param(b'"\\ud835\\udd18 \\u0000"', id="surrogate pair and NUL"),
        pytest.param(b" \t\r\n1\n ", id="whitespace around"),
    ],
)
def test_enqueue_accepts_json_at_the_limits(client: FlaskClient, redis: "Redis", body: bytes) -> None:
    answer = post(client, body)
    assert answer.status_code == 202, answer.text
    assert list(stored_job(redis, json_of(answer)["job_id"]).args) == [json.loads(body)]


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json",
     "application/jsonx", "application/json-patch", "image/json"],
)  # fmt: skip
def test_enqueue_refuses_other_content_types(client: FlaskClient, redis: "Redis", content_type: str | None) -> None:
    problem_of(post(client, b"1", content_type=content_type), 415, "unsupported-media-type")
    assert waiting(redis) == []


# Limits


def chunked(body: bytes) -> dict[str, Any]:
    """A body without an announced length, as gunicorn passes it on."""
    return {
        "input_stream": io.BytesIO(body),
        "environ_overrides": {"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
    }


def test_enqueue_refuses_a_body_over_the_limit(client: FlaskClient, redis: "Redis") -> None:
    problem = problem_of(post(client, b'"' + b"x" * 399_999 + b'"'), 413, "payload-too-large")
    assert problem["limit_bytes"] == 400_000
    assert waiting(redis) == []


def test_enqueue_accepts_a_body_of_exactly_the_limit(client: FlaskClient) -> None:
    assert post(client, b'"' + b"x" * 399_998 + b'"').status_code == 202


def test_enqueue_refuses_a_body_that_it_cannot_read_to_its_end(client: FlaskClient, redis: "Redis") -> None:
    class Stalled(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise TimeoutError

        readinto = read  # type: ignore[assignment]

    for given in ({**chunked(b""), "input_stream": Stalled()}, {"input_stream": Stalled(b"[1]"), "content_length": 3}):
        problem = problem_of(client.post("/enqueue/echo", content_type=JSON, **given), 400, "bad-request")
        assert problem["detail"] == "The body could not be read to its end."
    assert waiting(redis) == []


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_enqueue_limits_a_chunked_body(client: FlaskClient, extra: int) -> None:
    body = b'"' + b"x" * (399_998 + extra) + b'"'
    answer = client.post("/enqueue/echo", content_type=JSON, **chunked(body))
    if extra > 0:
        assert problem_of(answer, 413, "payload-too-large")["limit_bytes"] == 400_000
    else:
        assert answer.status_code == 202


def test_enqueue_refuses_a_huge_announced_body_unread(client: FlaskClient) -> None:
    class Unread:
        def read(self, *_: int) -> bytes:
            raise AssertionError("the body was read")

        readline = readlines = __iter__ = read

    answer = client.post(
        "/enqueue/echo",
        content_type=JSON,
        environ_overrides={"CONTENT_LENGTH": str(10**12), "wsgi.input": Unread()},
    )
    assert problem_of(answer, 413, "payload-too-large")["limit_bytes"] == 400_000


@pytest.mark.parametrize(
    ("item", "count"),
    [
        (b"[]", 2),
        (b"{}", 2),
        (b"1", 1),
        (b'""', 1),
        (b'{"":1}', 2),
        (b'["\\""]', 2),
        (b'["[,"]', 2),
        (b"[[[[[1]]]]]", 6),
    ],
)
def test_enqueue_limits_the_values_of_a_body(client: FlaskClient, redis: "Redis", item: bytes, count: int) -> None:
    """An empty array or object counts like one with an item, because the count does not look inside."""
    most = (100_100 - 1) // count
    assert post(client, b"[" + b",".join([item] * most) + b"]").status_code == 202
    before = waiting(redis)
    problem = problem_of(post(client, b"[" + b",".join([item] * (most + 1)) + b"]"), 413, "payload-too-large")
    assert problem["limit_values"] == 100_100
    assert waiting(redis) == before


@pytest.mark.parametrize("text", ["," * 300_000, "[{" * 150_000, '\\",' * 60_000, "a, " * 100_000])
def test_enqueue_counts_nothing_in_a_string(client: FlaskClient, text: str) -> None:
    for payload in (text, [text], {text: 1}):
        assert post(client, json.dumps(payload).encode()).status_code == 202


def test_enqueue_names_the_first_places_of_a_payload_that_does_not_fit(client: FlaskClient) -> None:
    body = b"{" + b",".join(b'"%d":1' % number for number in range(30_000)) + b"}"
    problem = problem_of(post(client, body, path="/enqueue/count_words"), 422, "invalid-request")
    assert [error["loc"] for error in problem["errors"][:2]] == [["body", "text"], ["body", "0"]]
    assert len(problem["errors"]) == 100


def test_enqueue_refuses_a_job_over_the_limit_of_the_queue(client: FlaskClient, redis: "Redis") -> None:
    jobs = [enqueue_echo(client) for _ in range(50)]
    answer = client.post("/enqueue/echo", json=1)
    assert problem_of(answer, 503, "queue-full")["queue"] == "default"
    assert int(answer.headers["Retry-After"]) >= 1
    assert waiting(redis) == jobs
    assert len(list(redis.scan_iter("rq:job:*"))) == 50


def test_enqueue_takes_jobs_again_once_the_queue_is_not_full(client: FlaskClient, redis: "Redis") -> None:
    for _ in range(50):
        enqueue_echo(client)
    take_job(redis)
    assert client.post("/enqueue/echo", json=1).status_code == 202
    assert client.post("/enqueue/echo", json=1).status_code == 503
    assert client.post("/enqueue/echo?queue=low", json=1).status_code == 202


# No such function, no such method


def allowed(answer: Any) -> set[str]:
    return set(answer.headers["Allow"].split(", "))


@pytest.mark.parametrize("name", ["nope", "Echo", "app.functions.some_long_function", "os.system", "__import__", "%00"])
def test_enqueue_knows_only_job_functions(client: FlaskClient, redis: "Redis", app: APIFlask, name: str) -> None:
    problem = problem_of(client.post(f"/enqueue/{name}", json=1), 404, "function-not-found")
    assert problem["known"] == sorted(app.extensions["enqueuer"].functions)
    assert waiting(redis) == []


@pytest.mark.parametrize("path", ["/enqueue", "/enqueue/echo", "/enqueue/nope"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE"])
def test_enqueue_refuses_other_methods(client: FlaskClient, redis: "Redis", path: str, method: str) -> None:
    answer = client.open(path, method=method, json=1)
    assert answer.status_code == 405
    assert allowed(answer) == {"OPTIONS", "POST"}
    if method != "HEAD":
        problem_of(answer, 405, "method-not-allowed")
    assert waiting(redis) == []


@pytest.mark.parametrize("path", ["/enqueue/", "/enqueue/echo/", "/enqueue/a/b"])
def test_enqueue_has_no_other_paths(client: FlaskClient, path: str) -> None:
    problem_of(client.post(path, json=1), 404, "not-found")


def test_enqueue_options_names_the_methods_and_enqueues_nothing(client: FlaskClient, redis: "Redis") -> None:
    answer = client.options("/enqueue", json=1)
    assert (answer.status_code, allowed(answer)) == (200, {"OPTIONS", "POST"})
    assert waiting(redis) == []


def test_enqueue_refuses_to_start_with_a_function_on_an_unknown_queue(redis: "Redis") -> None:
    # `create_app` reads the registry. A function on another queue stands for a typo in QUEUES.
    FUNCTIONS["lost"] = dataclasses.replace(FUNCTIONS["echo"], name="lost", defaults={"queue": "gpu"})
    try:
        with pytest.raises(SystemExit, match="lost has the default queue='gpu'"):
            create_app(Settings(), redis)
    finally:
        del FUNCTIONS["lost"]


def test_enqueue_refuses_an_option_given_twice(client: FlaskClient, redis: "Redis") -> None:
    answer = client.post("/enqueue/echo?queue=default&queue=default", json=1)
    assert problem_of(answer, 422, "invalid-request")["errors"] == [
        {"loc": ["query", "queue"], "msg": "The option is given more than once."}
    ]
    assert redis.llen("rq:queue:default") == 0
