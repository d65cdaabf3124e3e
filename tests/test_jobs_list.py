"""`GET /jobs`."""

import itertools
import json
import time
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue as PlainQueue
from rq.job import Job
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer

from app.config import Settings
from app.core import transitions
from app.jobs.enqueue import Enqueuer, Origin
from app.jobs.jobs import Jobs
from app.main import create_app
from tests.processes import STATES, end_run, enqueue_echo, job_in_state, json_of, problem_of, run_stock_worker, take_job


def list_page(client: FlaskClient, **query: Any) -> Any:
    answer = client.get("/jobs", query_string=query)
    assert answer.status_code == 200, answer.text
    return json_of(answer)


def ids_of(page: Any) -> list[str]:
    return [status["job_id"] for status in page["jobs"]]


def all_pages(client: FlaskClient, **query: Any) -> list[list[str]]:
    page = list_page(client, **query)
    pages = [ids_of(page)]
    while page["next"]:
        page = json_of(client.get(page["next"]))
        pages.append(ids_of(page))
    return pages


def enqueue_batch(client: FlaskClient, number: int, **options: Any) -> list[str]:
    answer = client.post("/enqueue_many/echo", json=list(range(number)), query_string=options)
    job_ids: list[str] = json_of(answer)["job_ids"]
    return job_ids


@pytest.fixture
def settings() -> Settings:
    return Settings(queues=("default", "low"))


def test_jobs_of_an_empty_service(client: FlaskClient) -> None:
    assert list_page(client) == {"jobs": [], "next": None}


def test_jobs_come_newest_first_as_their_status_objects(client: FlaskClient) -> None:
    job_ids = [enqueue_echo(client, number) for number in range(3)]
    page = list_page(client)
    assert ids_of(page) == job_ids[::-1]
    assert page["jobs"] == [json_of(client.get(f"/check_status?job_id={job_id}")) for job_id in job_ids[::-1]]
    assert page["next"] is None


@pytest.mark.parametrize("limit", [1, 3, 7, 10, 11])
def test_pages_hold_every_job_once(client: FlaskClient, limit: int) -> None:
    job_ids = [*enqueue_batch(client, 5), *enqueue_batch(client, 5)]
    pages = all_pages(client, limit=limit)
    assert list(itertools.chain(*pages)) == job_ids[::-1]
    assert [len(page) for page in pages] == [limit] * (10 // limit) + ([10 % limit] if 10 % limit else [])


def test_page_has_twenty_jobs_by_default_and_a_hundred_at_most(client: FlaskClient) -> None:
    enqueue_batch(client, 120)
    assert (len(ids_of(list_page(client))), len(ids_of(list_page(client, limit=100)))) == (20, 100)


def test_pages_repeat_and_skip_no_job_while_jobs_are_added_and_move(client: FlaskClient, redis: "Redis") -> None:
    job_ids = enqueue_batch(client, 12)
    seen: list[str] = []
    page = list_page(client, limit=2)
    moves = itertools.cycle(["finished", "failed", "stopped"])
    while True:
        seen += ids_of(page)
        enqueue_batch(client, 3)
        end_run(redis, take_job(redis), next(moves))  # type: ignore[arg-type]  # one of the outcomes
        if not page["next"]:
            break
        page = json_of(client.get(page["next"]))
    assert seen == job_ids[::-1]


def test_jobs_of_the_same_microsecond_are_each_listed_once(client: FlaskClient, redis: "Redis") -> None:
    job_ids = enqueue_batch(client, 30)
    redis.zadd("rq:api:jobs::queued", dict.fromkeys(job_ids, 1_700_000_000_000_000))
    for limit in (1, 7, 100):
        assert list(itertools.chain(*all_pages(client, limit=limit))) == sorted(job_ids, reverse=True)


def test_retried_job_keeps_its_place(client: FlaskClient, redis: "Redis") -> None:
    job_id = job_in_state(client, redis, "failed")
    newer = enqueue_echo(client)
    client.post(f"/retry?job_id={job_id}")
    assert ids_of(list_page(client)) == [newer, job_id]


# Filters


@pytest.mark.parametrize("state", STATES)
def test_jobs_can_be_filtered_by_status(client: FlaskClient, redis: "Redis", state: str) -> None:
    job_id = job_in_state(client, redis, state)
    others = [other for other in STATES if other not in (state, "deferred")]
    if state == "deferred":  # only RQ's own code makes such jobs, and the sweep adds them to the index
        transitions.sweep(redis)
    for other in others:
        assert ids_of(list_page(client, status=other)) == []
    assert ids_of(list_page(client, status=state)) == [job_id]
    assert ids_of(list_page(client)) == [job_id]


def test_jobs_can_be_filtered_by_queue_and_function(client: FlaskClient) -> None:
    low = enqueue_echo(client, queue="low")
    typed = json_of(client.post("/enqueue/count_words", json={"text": "a"}))["job_id"]
    plain = enqueue_echo(client)
    assert ids_of(list_page(client, queue="low")) == [low]
    assert ids_of(list_page(client, queue="default")) == [plain, typed]
    assert ids_of(list_page(client, function="count_words")) == [typed]
    assert ids_of(list_page(client, function="echo", queue="low", status="queued")) == [low]
    assert ids_of(list_page(client, function="echo", queue="low", status="finished")) == []
    assert ids_of(list_page(client, function="unknown")) == []


def test_next_keeps_the_filters(client: FlaskClient) -> None:
    job_ids = enqueue_batch(client, 5, queue="low")
    enqueue_batch(client, 5)
    page = list_page(client, queue="low", function="echo", status="queued", limit=2)
    query = parse_qs(urlsplit(page["next"]).query)
    assert {name: query[name] for name in ("queue", "function", "status", "limit")} == {
        "queue": ["low"], "function": ["echo"], "status": ["queued"], "limit": ["2"],
    }  # fmt: skip
    assert list(itertools.chain(*all_pages(client, queue="low", limit=2))) == job_ids[::-1]


def test_page_looks_at_a_bounded_number_of_jobs(client: FlaskClient) -> None:
    old = enqueue_echo(client, queue="low")
    for _ in range(2):
        enqueue_batch(client, 1000)
    pages = all_pages(client, queue="low", limit=100)
    assert pages == [[], [], [old]]


# Cost


def commands_of_a_page(redis: Any, client: FlaskClient, **query: Any) -> int:
    redis.config_resetstat()
    list_page(client, **query)
    # The commands of the script count too. Most of them read the fields of a job.
    return sum(int(stat["calls"]) for name, stat in redis.info("commandstats").items() if "config" not in name)


@pytest.mark.parametrize("query", [{}, {"status": "queued"}, {"status": "failed"}, {"limit": 100}])
def test_cost_of_a_page_does_not_grow_with_the_number_of_jobs(real_redis: "Redis", query: dict[str, Any]) -> None:
    client = create_app(Settings(), real_redis).test_client()
    for _ in range(10):
        enqueue_echo(client)
    client.get("/jobs")
    enqueue_batch(client, 100)
    few = commands_of_a_page(real_redis, client, **query)
    for _ in range(10):
        enqueue_batch(client, 1000)
    assert commands_of_a_page(real_redis, client, **query) == few <= 2 * query.get("limit", 20) + 20


# Owners


@pytest.fixture
def as_key(redis: "Redis") -> Any:
    keys = [
        {"name": name, "key": f"the long key of {name}", "admin": name == "ops"} for name in ("alice", "bob", "ops")
    ]
    app = create_app(Settings(api_keys=json.dumps(keys)), redis)

    def client_of(name: str) -> FlaskClient:
        client = app.test_client()
        client.environ_base["HTTP_AUTHORIZATION"] = f"Bearer the long key of {name}"
        return client

    return client_of


def test_owners_see_their_own_jobs_and_an_admin_sees_all(as_key: Any) -> None:
    alices, bobs = enqueue_echo(as_key("alice")), enqueue_echo(as_key("bob"))
    assert ids_of(list_page(as_key("alice"))) == [alices]
    assert ids_of(list_page(as_key("bob"), status="queued")) == [bobs]
    assert ids_of(list_page(as_key("ops"))) == [bobs, alices]


def test_cursor_of_another_owner_shows_nothing_of_theirs(as_key: Any) -> None:
    alices = [enqueue_echo(as_key("alice")) for _ in range(3)]
    enqueue_echo(as_key("bob"))
    following = list_page(as_key("alice"), limit=1)["next"]
    assert ids_of(json_of(as_key("bob").get(following))) == []
    assert ids_of(json_of(as_key("alice").get(following))) == [alices[1]]


def test_service_without_keys_does_not_list_jobs_made_with_keys(as_key: Any, client: FlaskClient) -> None:
    enqueue_echo(as_key("alice"))
    anybodys = enqueue_echo(client)
    assert ids_of(list_page(client)) == [anybodys]


@pytest.mark.parametrize("route", ["/cancel", "/retry"])
def test_control_of_somebody_elses_job_is_404(as_key: Any, redis: "Redis", route: str) -> None:
    job_id = enqueue_echo(as_key("alice"))
    if route == "/retry":
        as_key("alice").post(f"/cancel?job_id={job_id}")
    before = redis.hgetall(f"rq:job:{job_id}")
    problem_of(as_key("bob").post(f"{route}?job_id={job_id}"), 404, "job-not-found")
    assert redis.hgetall(f"rq:job:{job_id}") == before
    assert as_key("ops").post(f"{route}?job_id={job_id}").status_code in (200, 202)


def test_group_of_somebody_else_is_404(as_key: Any, redis: "Redis") -> None:
    group_id = json_of(as_key("alice").post("/enqueue_many/echo", json=[1]))["group_id"]
    problem_of(as_key("bob").get(f"/check_group?group_id={group_id}"), 404, "group-not-found")
    for name in ("alice", "ops"):
        assert json_of(as_key(name).get(f"/check_group?group_id={group_id}"))["total"] == 1
    redis.sadd("rq:group:theirs", "a")
    problem_of(as_key("bob").get("/check_group?group_id=theirs"), 404, "group-not-found")
    assert json_of(as_key("ops").get("/check_group?group_id=theirs"))["total"] == 1


def test_key_that_may_not_use_a_function_may_not_retry_or_enqueue_many_of_it(redis: "Redis") -> None:
    keys = [{"name": "bob", "key": "the long key of bob", "functions": ["count_words"]}]
    client = create_app(Settings(api_keys=json.dumps(keys)), redis).test_client()
    client.environ_base["HTTP_AUTHORIZATION"] = "Bearer the long key of bob"
    problem_of(client.post("/enqueue_many/echo", json=[1]), 403, "forbidden")
    job_id = json_of(client.post("/enqueue/count_words", json={"text": "a"}))["job_id"]
    client.post(f"/cancel?job_id={job_id}")
    assert client.post(f"/retry?job_id={job_id}").status_code == 202
    client.post(f"/cancel?job_id={job_id}")
    redis.hset(f"rq:job:{job_id}", "function", "echo")  # as if enqueued while the key was allowed to
    problem_of(client.post(f"/retry?job_id={job_id}"), 403, "forbidden")


# Bad input


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0}, {"limit": 101}, {"limit": -1}, {"limit": "x"}, {"limit": 1.5}, {"limit": ""},
        {"status": "nope"}, {"status": ""}, {"status": "FINISHED"}, {"queue": ""}, {"queue": "a b"}, {"queue": "*"},
        {"function": "x" * 65}, {"function": "\x00"}, {"cursor": ""}, {"cursor": "x"}, {"cursor": "é"},
        {"cursor": "MTc"}, {"cursor": "A" * 3000}, {"cursor": "eCB5"}, {"cursor": "MSA"}, {"cursor": "2aHZotmjIHg"},
        {"x": 1}, {"page": 2},
    ],
)  # fmt: skip
def test_jobs_with_a_bad_query_is_422(client: FlaskClient, query: dict[str, Any]) -> None:
    problem = problem_of(client.get("/jobs", query_string=query), 422, "invalid-request")
    assert problem["errors"][0]["loc"] == ["query", next(iter(query))]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_jobs_wants_get(client: FlaskClient, method: str) -> None:
    problem_of(client.open("/jobs", method=method), 405, "method-not-allowed")


# The sweep


def sweep(redis: "Redis") -> int:
    redis.delete("rq:api:swept")
    return transitions.sweep(redis)


def test_jobs_that_are_gone_are_not_listed_and_leave_the_index(client: FlaskClient, redis: "Redis") -> None:
    gone, kept = enqueue_echo(client), enqueue_echo(client)
    redis.delete(f"rq:job:{gone}")
    assert sweep(redis) == 1
    assert ids_of(list_page(client)) == [kept]
    assert redis.zrange("rq:api:jobs::queued", 0, -1) == [kept.encode()]


def test_list_takes_jobs_that_are_gone_out_of_the_index(client: FlaskClient, redis: "Redis") -> None:
    kept = enqueue_batch(client, 500)
    redis.delete(*[f"rq:job:{job_id}" for job_id in [*enqueue_batch(client, 1000), *enqueue_batch(client, 500)]])
    assert ids_of(list_page(client)) == []
    assert ids_of(list_page(client, limit=100)) == kept[:399:-1]
    assert redis.zcard("rq:api:jobs::queued") == 500


def test_job_that_rqs_own_code_moved_is_listed_once_and_in_its_place(client: FlaskClient, redis: "Redis") -> None:
    older, job_id, newer = enqueue_echo(client), enqueue_echo(client, delay=100), enqueue_echo(client)
    redis.zadd("rq:scheduled:default", {job_id: 1})
    scheduler: Any = RQScheduler(["default"], redis)
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    for run in [take_job(redis) for _ in range(3)]:
        assert sorted(ids_of(list_page(client))) == sorted([older, job_id, newer])
        end_run(redis, run)
    assert ids_of(list_page(client)) == [newer, job_id, older]


def test_sweep_looks_at_a_bounded_number_of_jobs_at_a_time(redis: "Redis") -> None:
    redis.sadd("rq:api:owners", "alice")
    for scope in ("", "alice"):
        for state in ("finished", "failed"):
            redis.zadd(f"rq:api:jobs:{scope}:{state}", {f"gone-{number}": number for number in range(2500)})
    # One bound is for all jobs, another for the jobs of owners. The sweep always looks at the first hundred of a set.
    assert [sweep(redis) for _ in range(3)] == [6000, 4000, 0]
    assert not redis.exists("rq:api:owners", "rq:api:sweep")


def test_sweep_is_done_once_a_second_for_all_callers(client: FlaskClient, redis: "Redis") -> None:
    redis.delete(f"rq:job:{enqueue_echo(client)}")
    start = time.monotonic()
    assert transitions.sweep(redis) == 1
    left = redis.pttl("rq:api:swept")
    assert 0 < left <= 1000 or (left == -2 and time.monotonic() - start >= 1)  # on a busy machine it may have expired
    redis.set("rq:api:swept", 1, ex=60)  # stay in the same second, even on a slow machine
    redis.delete(f"rq:job:{enqueue_echo(client)}")
    assert transitions.sweep(redis) == 0
    redis.delete("rq:api:swept")
    assert transitions.sweep(redis) == 1


@pytest.mark.parametrize("number", [99, 100, 101, 250])
def test_sweep_reaches_all_jobs(client: FlaskClient, redis: "Redis", number: int) -> None:
    job_ids = enqueue_batch(client, number)
    assert sum(sweep(redis) for _ in range(5)) == 0
    redis.delete(*[f"rq:job:{job_id}" for job_id in job_ids[:: max(1, number // 10)]])
    assert sum(sweep(redis) for _ in range(5)) == len(job_ids[:: max(1, number // 10)])


def test_sweep_takes_many_at_once_when_many_are_gone(client: FlaskClient, redis: "Redis") -> None:
    redis.delete(*[f"rq:job:{job_id}" for job_id in enqueue_batch(client, 1000)])
    assert sweep(redis) == 1000
    assert not redis.exists("rq:api:jobs::queued", "rq:api:sweep")


def test_sweep_corrects_the_index_of_jobs_that_rqs_own_code_moved(client: FlaskClient, redis: "Redis") -> None:
    canceled = enqueue_echo(client)
    Job.fetch(canceled, connection=redis, serializer=JSONSerializer).cancel()
    finished = enqueue_echo(client, 5)
    run_stock_worker(redis)
    assert [status["job_status"] for status in list_page(client)["jobs"]] == ["finished", "canceled"]
    assert ids_of(list_page(client, status="queued")) == []
    sweep(redis)
    assert ids_of(list_page(client, status="canceled")) == [canceled]
    assert ids_of(list_page(client, status="finished")) == [finished]


def test_sweep_forgets_owners_that_have_no_jobs_left(as_key: Any, redis: "Redis") -> None:
    job_id = enqueue_echo(as_key("alice"))
    assert redis.smembers("rq:api:owners") == {b"alice"}
    redis.delete(f"rq:job:{job_id}")
    sweep(redis)
    assert not redis.exists("rq:api:owners", "rq:api:jobs:alice:queued", "rq:api:jobs::queued")


def test_sweep_looks_at_a_bounded_number_of_owners_at_a_time(enqueuer: Enqueuer, redis: "Redis") -> None:
    for number in range(50):
        receipt = enqueuer.enqueue(enqueuer.find_function("echo"), b"%d" % number, {}, Origin(f"owner-{number}"))
        redis.delete(f"rq:job:{receipt.job_id}")
    swept = [sweep(redis) for _ in range(13)]
    assert swept[0] == 50 + 4  # the index of all jobs, and the indexes of some owners
    assert sum(swept) == 2 * 50
    assert not redis.exists("rq:api:owners")


def test_job_that_keeps_no_result_leaves_the_index_at_once(redis: "Redis", jobs: Jobs) -> None:
    client = create_app(Settings(), redis).test_client()
    job_id = enqueue_echo(client)
    redis.hset(f"rq:job:{job_id}", "result_ttl", 0)
    assert end_run(redis, take_job(redis)) == "finished"
    assert not redis.exists(*[f"rq:api:jobs::{state}" for state in STATES])


def test_job_that_plain_rq_enqueued_is_listed_once_our_worker_takes_it(client: FlaskClient, redis: "Redis") -> None:
    job = PlainQueue("default", connection=redis, serializer=JSONSerializer).enqueue("tests.job_functions.echo", 1)
    assert ids_of(list_page(client)) == []
    run = take_job(redis)
    assert ids_of(list_page(client, status="started")) == [job.id]
    end_run(redis, run)
    (status,) = list_page(client)["jobs"]
    # Only RQ's own pickle of the call holds the function, and a list does not read it.
    assert (status["job_id"], status["job_status"], status["function"]) == (job.id, "finished", None)
