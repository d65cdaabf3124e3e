"""Operating the service: is it up, would a job run."""

from typing import Any

from apiflask import APIBlueprint
from flask import Response, current_app
from redis.exceptions import RedisError

from app import problems
from app.answers import json_answer
from app.jobs import TRY_AGAIN, Jobs
from app.transitions import PROBE_KEY, workers_key

ops = APIBlueprint("ops", __name__)


@ops.get("/healthz")
@ops.doc(tags=["Operating"])
def healthz() -> Response:
    """Tell that the process serves, whatever Redis does."""
    return json_answer({"status": "ok"})


@ops.get("/readyz")
@ops.doc(tags=["Operating"])
def readyz() -> Response:
    """Tell whether a job that is enqueued now would run.

    It would if Redis answers and takes writes, and every configured queue has a live worker.
    """
    jobs: Jobs = current_app.extensions["jobs"]
    checks: dict[str, str] = {}
    try:
        with jobs.connection.pipeline() as pipeline:
            pipeline.set(PROBE_KEY, 1, ex=60)
            for queue in jobs.settings.queues:
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
        for queue, count in zip(jobs.settings.queues, alive, strict=True):
            checks[f"queue {queue}"] = "ok" if count else "no live worker"
    if any(check != "ok" for check in checks.values()):
        failed = ", ".join(f"{name}: {check}" for name, check in checks.items() if check != "ok")
        raise problems.NotReady(f"Not ready: {failed}.", checks=checks, retry_after=TRY_AGAIN)
    return json_answer({"status": "ready", "checks": checks})
