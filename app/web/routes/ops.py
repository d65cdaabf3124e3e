"""Operating the service: is it up, would a job run, how are the queues and the workers."""

from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from redis.exceptions import RedisError

from app.core.queries import read_overview
from app.core.transitions import PROBE_KEY, workers_key
from app.jobs import problems
from app.jobs.jobs import TRY_AGAIN, Jobs
from app.jobs.waiting import Waiting
from app.web.auth import want_admin
from app.web.metrics import render_metrics
from app.web.responses import json_answer

ops = APIBlueprint("ops", __name__, tag="Operating")


@ops.get("/healthz")
@ops.doc()
def healthz() -> Response:
    """Tell that the process serves, whatever Redis does."""
    return json_answer({"status": "ok"})


@ops.get("/readyz")
@ops.doc()
def readyz() -> Response:
    """Tell whether a job that is enqueued now would run.

    It would if Redis answers and takes writes, and every configured queue has a live worker.
    """
    jobs: Jobs = current_app.extensions["jobs"]
    waiting: Waiting = current_app.extensions["waiting"]
    checks = {"web": "draining"} if waiting.is_draining() else {}
    try:
        with jobs.connection.pipeline() as pipeline:
            pipeline.set(PROBE_KEY, 1, ex=60)
            for queue in jobs.settings.all_queues:
                pipeline.smembers(workers_key(queue))
            _, *workers = pipeline.execute()
            for members in workers:
                # A worker that died without a word is in the set, but its own key has run out.
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
    return json_answer({"status": "ready", "checks": checks})


@ops.get("/queues")
@ops.doc()
def queues() -> Response:
    """Tell how the queues and workers are."""
    want_admin()
    jobs: Jobs = current_app.extensions["jobs"]
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
    return json_answer({"queues": listed, "workers": workers}, headers={"Cache-Control": "private, no-cache"})


@ops.get("/metrics")
@ops.doc()
def metrics() -> Response:
    """Tell Prometheus how the service is."""
    want_admin()
    jobs: Jobs = current_app.extensions["jobs"]
    return Response(render_metrics(jobs.settings, jobs.connection), content_type=CONTENT_TYPE_PLAIN_0_0_4)
