"""RQ's own tools still read our Redis: rq-dashboard here, `rq info` in test_rq_parity.py."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import rq_dashboard.web  # type: ignore[import-untyped]  # it has no types
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from rq.serializers import JSONSerializer

from app.config import Settings
from app.main import create_app
from tests.processes import enqueue_echo, environment, job_in_state, web, worker


@pytest.fixture
def dashboard(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlaskClient]:
    """rq-dashboard as its README embeds it, with `--json`."""
    monkeypatch.setattr(rq_dashboard.web.config, "serializer", JSONSerializer)
    app = Flask(__name__)
    app.config.update(RQ_DASHBOARD_REDIS_URL=redis_url)
    rq_dashboard.web.setup_rq_connection(app)
    app.register_blueprint(rq_dashboard.blueprint)
    with app.test_client() as client:
        yield client


def read(dashboard: FlaskClient, path: str) -> Any:
    answer = dashboard.get(f"/0/data/{path}.json")
    assert answer.status_code == 200, answer.text
    return answer.json


def test_rq_dashboard_shows_our_queues_and_jobs(dashboard: FlaskClient, real_redis: "Redis") -> None:
    client = create_app(Settings(), real_redis).test_client()
    states = {"finished": {"a": [1]}, "failed": None, "stopped": None, "canceled": None}
    jobs = {state: job_in_state(client, real_redis, state, value) for state, value in states.items()}
    jobs["scheduled"] = enqueue_echo(client, 1, delay=100)
    jobs["queued"] = enqueue_echo(client, 2)

    (queue,) = read(dashboard, "queues")["queues"]
    wanted = {"started": 0, "failed": 2, "scheduled": 1, "finished": 1, "canceled": 1}
    assert {name: queue[f"{name}_job_registry_count"] for name in wanted} == wanted
    assert (queue["name"], queue["count"]) == ("default", 1)
    for registry, states_there in {
        "queued": ["queued"], "failed": ["failed", "stopped"], "scheduled": ["scheduled"], "finished": ["finished"],
        "canceled": ["canceled"],
    }.items():  # fmt: skip
        listed = read(dashboard, f"jobs/default/{registry}/10/asc/1")["jobs"]
        assert {job["id"] for job in listed} == {jobs[state] for state in states_there}
        assert dashboard.get(f"/0/view/jobs/default/{registry}/10/asc/1").status_code == 200

    for state, job_id in jobs.items():
        job = read(dashboard, f"job/{job_id}")
        assert (job["status"], job["origin"]) == (state, "default")
        assert dashboard.get(f"/0/view/job/{job_id}").status_code == 200
    assert read(dashboard, f"job/{jobs['finished']}")["result"] == {"a": [1]}
    assert "ValueError: boom" in read(dashboard, f"job/{jobs['failed']}")["exc_info"]


def test_rq_dashboard_shows_our_workers_and_sends_a_job_back(
    dashboard: FlaskClient, real_redis: "Redis", redis_url: str, tmp_path: Path
) -> None:
    """Idle workers only: rq-dashboard 0.9.0 reads running jobs with pickle, even with `--json`."""
    env = environment(redis_url, WORKER_SHUTDOWN_SECONDS=1)
    with web(env, tmp_path / "web.log") as url, worker(env, tmp_path / "worker.log"):
        failed = requests.post(f"{url}/enqueue/fail?wait=30", json="boom", timeout=40).json()
        (shown,) = read(dashboard, "workers")["workers"]
        assert (shown["queues"], shown["state"], shown["current_job"]) == (["default"], "idle", "idle")
        assert dashboard.get("/0/view/workers").status_code == 200
        assert dashboard.post(f"/job/{failed['job_id']}/requeue").status_code == 200
        status = requests.get(f"{url}/check_status?job_id={failed['job_id']}&wait=30", timeout=40).json()
        assert (status["job_status"], status["error"]["message"]) == ("failed", "boom")
        assert status["ended_at"] > failed["ended_at"]
