"""`GET /metrics`: the counts in Redis and in each web process. Dashboard, alerts and docs name only real metrics."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import requests
import yaml  # type: ignore[import-untyped]  # it comes with pre-commit
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from rq.utils import utcformat

from app.core import transitions
from app.core.scripts import TIME_BOUNDS, Failure
from tests.processes import (
    ROOT,
    Process,
    end_run,
    enqueue_echo,
    environment,
    gunicorn,
    job_in_state,
    take_job,
    wait_until,
    worker,
)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def samples_of(client: FlaskClient) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type == "text/plain; version=0.0.4; charset=utf-8"
    return read(answer.text)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def total(samples: Samples, name: str, **labels: str) -> float:
    """The sum of all samples that have these labels; they may have others, too."""
    return sum(
        number for (found, has), number in samples.items() if found == name and labels.items() <= dict(has).items()
    )


ECHO = {"queue": "default", "function": "echo"}


@pytest.mark.parametrize("state", ["finished", "failed", "stopped", "canceled"])
def test_metrics_counts_how_jobs_ended(client: FlaskClient, redis: "Redis", state: str) -> None:
    for _ in range(3):
        job_in_state(client, redis, state)
    samples = samples_of(client)
    assert value(samples, "jobs_enqueued_total", **ECHO) == 3
    assert value(samples, "jobs_ended_total", **ECHO, status=state) == 3
    assert total(samples, "jobs_ended_total") == 3


def test_metrics_counts_each_job_of_a_batch(client: FlaskClient) -> None:
    client.post("/enqueue_many/echo", json=[1, 2, 3])
    samples = samples_of(client)
    assert value(samples, "jobs_enqueued_total", **ECHO) == 3
    assert value(samples, "jobs", queue="default", status="queued") == 3


def test_metrics_counts_a_request_that_is_sent_twice_once(client: FlaskClient) -> None:
    for _ in range(2):
        client.post("/enqueue/echo", json=1, headers={"Idempotency-Key": "k"})
    assert value(samples_of(client), "jobs_enqueued_total", **ECHO) == 1


def test_metrics_counts_retries_of_both_kinds(client: FlaskClient, redis: "Redis") -> None:
    job_in_state(client, redis, "scheduled")  # failed once, and is tried again
    assert total(samples_of(client), "jobs_retried_total", function="fail_with_retries") == 1
    client.post(f"/retry?job_id={job_in_state(client, redis, 'failed')}")
    assert value(samples_of(client), "jobs_retried_total", **ECHO) == 1
    assert total(samples_of(client), "jobs_ended_total", function="fail_with_retries") == 0


def test_metrics_counts_crashes(client: FlaskClient, redis: "Redis") -> None:
    enqueue_echo(client)
    for crashed in (True, False, True):
        transitions.release(redis, take_job(redis), crashed=crashed, limit=1, failure=Failure("x", "{}"), failure_ttl=9)
    samples = samples_of(client)
    assert value(samples, "jobs_crashed_total", **ECHO) == 2
    assert value(samples, "jobs_ended_total", **ECHO, status="failed") == 1


@pytest.mark.parametrize("seconds", [0.2, 4, 100_000])
def test_metrics_has_histograms_of_wait_and_run_by_function(
    client: FlaskClient, redis: "Redis", seconds: float
) -> None:
    job_id = enqueue_echo(client)

    def read_clock() -> float:
        whole, microseconds = redis.time()
        return float(whole + microseconds / 1e6)

    now = read_clock()
    stamp = _stamp(now - seconds)
    redis.hset(f"rq:job:{job_id}", "enqueued_at", stamp)
    run = take_job(redis)
    redis.hset(f"rq:execution:{job_id}:{run.execution}", "created_at", now - seconds)
    end_run(redis, run)
    after = read_clock()
    samples = samples_of(client)
    for name in ("jobs_wait_seconds", "jobs_run_seconds"):
        assert value(samples, f"{name}_count", function="echo") == 1
        taken = value(samples, f"{name}_sum", function="echo")
        assert seconds - 0.001 <= taken <= seconds + (after - now) + 0.001
        counts = {
            bound: value(samples, f"{name}_bucket", function="echo", le=str(float(bound))) for bound in TIME_BOUNDS
        }
        assert counts == {bound: float(bound >= taken) for bound in TIME_BOUNDS}
        assert value(samples, f"{name}_bucket", function="echo", le="+Inf") == 1


def _stamp(seconds: float) -> str:
    return utcformat(datetime.fromtimestamp(seconds, UTC))


def test_metrics_reports_a_redis_that_is_away(client: FlaskClient, redis: "Redis") -> None:
    assert value(samples_of(client), "redis_up") == 1
    assert 0 < value(samples_of(client), "redis_round_trip_seconds") < 5
    with patch.object(type(redis), "execute_command", side_effect=RedisConnectionError("down")):
        samples = samples_of(client)
    assert value(samples, "redis_up") == 0
    assert ("jobs", frozenset({("queue", "default"), ("status", "queued")})) not in samples


def test_metrics_takes_two_round_trips(client: FlaskClient, redis: "Redis") -> None:
    with patch.object(type(redis), "execute_command", side_effect=redis.execute_command) as execute:
        assert client.get("/metrics").status_code == 200
    assert [call.args[0] for call in execute.call_args_list if call.args[0] != "EVAL"] == ["PING", "EVALSHA"]


def test_metrics_has_the_duration_of_requests_by_route(client: FlaskClient) -> None:
    before = samples_of(client)
    client.get("/check_status?job_id=x")
    client.get("/no/such/thing")
    client.open("/", method="BREW")
    client.get("/problems/job-not-found")
    after = samples_of(client)
    for labels in (
        {"method": "GET", "route": "/check_status", "status": "404", "waits": "no"},
        {"method": "GET", "route": "none", "status": "404", "waits": "no"},
        {"method": "other", "route": "none", "status": "405", "waits": "no"},
        {"method": "GET", "route": "/problems/<name>", "status": "200", "waits": "no"},
    ):
        counted = "http_request_duration_seconds_count"
        assert value(after, counted, **labels) - total(before, counted, **labels) == 1


# Real processes


@pytest.fixture
def two_processes(redis_url: str, tmp_path: Path) -> Iterator[tuple[str, Process]]:
    env = environment(redis_url, WORKER_SHUTDOWN_SECONDS=0)
    with (
        gunicorn(env, tmp_path / "web.log", "app.main:app", "--workers", "2") as (url, process),
        worker(env, tmp_path / "worker.log"),
    ):
        yield url, process


@pytest.mark.slow
def test_metrics_covers_all_web_processes(two_processes: tuple[str, Process], real_redis: "Redis") -> None:
    url, _ = two_processes
    session = requests.Session()

    def scrape() -> Samples:
        return read(session.get(f"{url}/metrics", timeout=10).text)

    for _ in range(40):  # each opens a connection, so both processes get some
        assert requests.get(f"{url}/functions", timeout=10).ok
    labels = {"method": "GET", "route": "/functions", "status": "200", "waits": "no"}
    assert value(scrape(), "http_request_duration_seconds_count", **labels) == 40

    with ThreadPoolExecutor(4) as pool:
        real_redis.set("rq:suspended", 1)  # as `rq suspend` does
        answers = [pool.submit(requests.post, f"{url}/enqueue/echo?wait=60", json=3, timeout=90) for _ in range(4)]
        try:
            wait_until(lambda: value(scrape(), "http_waiting_requests") == 4)
        finally:
            real_redis.delete("rq:suspended")
        assert {answer.result().status_code for answer in answers} <= {200}
    assert value(scrape(), "http_waiting_requests") == 0
    waited = {"method": "POST", "route": "/enqueue/<function>", "status": "200", "waits": "yes"}
    assert value(scrape(), "http_request_duration_seconds_count", **waited) == 4
    assert total(scrape(), "jobs_ended_total", function="echo", status="finished") == 4
    assert value(scrape(), "workers", state="idle") + value(scrape(), "workers", state="busy") == 1


@pytest.mark.slow
def test_metrics_of_a_dead_process_keep_its_requests_and_drop_its_waiters(
    two_processes: tuple[str, Process],
) -> None:
    url, process = two_processes
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(requests.post, f"{url}/enqueue/sleep_for?wait=20", json=30, timeout=40)
        wait_until(lambda: value(read(requests.get(f"{url}/metrics", timeout=10).text), "http_waiting_requests") == 4)
        for child in psutil.Process(process.popen.pid).children():
            child.kill()

        def is_forgotten() -> bool:
            try:
                text = requests.get(f"{url}/metrics", timeout=10).text
            except requests.RequestException:  # the new processes are still loading
                return False
            return total(read(text), "http_waiting_requests") == 0

        wait_until(is_forgotten, 60)


@pytest.mark.slow
def test_gunicorn_leaves_no_measurements_behind(redis_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    env = environment(redis_url, TMPDIR=folder)
    with gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, process):
        assert requests.get(f"{url}/metrics", timeout=10).ok
        assert list(folder.glob("metrics-*/*.db"))
        assert process.stop() == 0
    assert list(folder.glob("metrics-*")) == []


# Where metrics are named


def names_of(client: FlaskClient, redis: "Redis") -> set[str]:
    """The names of all samples, once everything has happened."""
    for state in ("finished", "scheduled"):
        job_in_state(client, redis, state)
    enqueue_echo(client)
    transitions.release(redis, take_job(redis), crashed=True, limit=1, failure=Failure("x", "{}"), failure_ttl=9)
    client.get("/metrics")
    return {name for name, _ in samples_of(client) if not name.endswith("_created")}


def test_operations_document_lists_each_metric(client: FlaskClient, redis: "Redis") -> None:
    families = {re.sub("_(bucket|count|sum)$", "", name) for name in names_of(client, redis)}
    table = (ROOT / "docs/operations.md").read_text().partition("| metric |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == families


def _queries() -> list[str]:
    """Each PromQL query in deploy/."""
    board = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    alerts = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return queries + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


def test_deploy_uses_only_metrics_that_exist(client: FlaskClient, redis: "Redis") -> None:
    known = names_of(client, redis)
    words = {"sum", "max", "min", "by", "rate", "increase", "absent", "histogram_quantile"}
    unused = {re.sub("_(bucket|count|sum)$", "", name) for name in known}
    for query in _queries():
        plain = re.sub(r"\{[^}]*\}|\[[^]]*\]|\bby \([^)]*\)", " ", query)
        used = set(re.findall(r"[a-z_]{2,}", plain)) - words
        assert used
        assert used <= known, query
        unused -= {re.sub("_(bucket|count|sum)$", "", name) for name in used}
    assert unused == set()


def test_operations_document_lists_each_alert() -> None:
    alerts = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())
    names = [rule["alert"] for group in alerts["groups"] for rule in group["rules"]]
    text = (ROOT / "docs/operations.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text.partition("## Alerts")[2], re.MULTILINE) == names
