"""The routes for operators: health, readiness, queues and workers, metrics."""

from typing import Any

from apiflask import APIBlueprint
from flask import Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from redis.exceptions import RedisError

from app.core.queries import read_overview
from app.core.scripts import PROBE_KEY, workers_key
from app.jobs import problems
from app.jobs.problems import TRY_AGAIN
from app.web.auth import require_admin
from app.web.metrics import render_metrics
from app.web.openapi import TEXT, Answer, answers
from app.web.requests import current_jobs, current_waiting
from app.web.responses import PRIVATE, json_response
from app.web.schemas import Health, Queues, Readiness

ops = APIBlueprint("ops", __name__, tag="Operating")


@ops.get("/healthz")
@answers({200: Answer("the process answers requests", Health, example=Health(status="ok"))})
def healthz() -> Response:
    """Say that the process answers requests. Redis may be down."""
    return json_response(Health(status="ok"))


@ops.get("/readyz")
@answers({200: Answer("Redis takes writes and every queue has a live worker", Readiness)}, problems=[problems.NotReady])
def readyz() -> Response:
    """Say whether a job that is enqueued now would run.

    It would if Redis answers and takes writes, and every configured queue has a live worker.
    """
    jobs = current_jobs()
    checks = {"web": "draining"} if current_waiting().is_draining() else {}
    try:
        with jobs.connection.pipeline() as pipeline:
            pipeline.set(PROBE_KEY, 1, ex=60)
            for queue in jobs.settings.all_queues:
                pipeline.smembers(workers_key(queue))
            _, *workers = pipeline.execute()
            for members in workers:
                # A worker that died suddenly is still in the set, but its own key has expired.
                pipeline.exists(*members or [PROBE_KEY + ":none"])
            alive: list[Any] = pipeline.execute()
    except RedisError as error:
        checks["redis"] = type(error).__name__
    else:
        checks["redis"] = "ok"
        for queue, count in zip(jobs.settings.all_queues, alive, strict=True):
            checks[f"queue {queue}"] = "ok" if count else "no live worker"
    if any(check != "ok" for check in checks.values()):
        failed = ", ".join(f"{name}: {check}" for name, check in checks.items() if check != "ok")
        raise problems.NotReady(f"Not ready: {failed}.", checks=checks, retry_after=TRY_AGAIN)
    return json_response(Readiness(status="ready", checks=checks))


@ops.get("/queues")
@answers({200: Answer("the queues and workers at this moment", Queues)}, problems=[problems.RedisUnavailable])
def queues() -> Response:
    """Describe the queues and workers."""
    require_admin()
    jobs = current_jobs()
    overview = read_overview(jobs.connection, jobs.settings.all_queues)
    listed = [
        {
            "name": queue.name,
            "jobs": queue.jobs,
            "workers": sum(queue.name in worker.queues for worker in overview.workers),
            "oldest_waiting_seconds": None if queue.oldest is None else round(queue.oldest, 3),
            "runs_per_minute": round(queue.runs / queue.since * 60, 3),
            "mean_run_seconds": round(queue.run_seconds / queue.runs, 6) if queue.runs else None,
        }
        for queue in overview.queues
    ]
    workers = [worker._asdict() for worker in sorted(overview.workers)]
    return json_response({"queues": listed, "workers": workers}, headers=PRIVATE)


@ops.get("/metrics")
@answers({200: Answer("Prometheus' text format", TEXT)})
def metrics() -> Response:
    """Return the metrics of the service for Prometheus."""
    require_admin()
    jobs = current_jobs()
    return Response(render_metrics(jobs.settings, jobs.connection), content_type=CONTENT_TYPE_PLAIN_0_0_4)
