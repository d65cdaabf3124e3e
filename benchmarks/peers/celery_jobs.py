"""Celery, which acknowledges a job after its run. It takes one job at a time, as its user guide says ("Optimizing")."""

import os
from typing import Any

from celery import Celery

app = Celery("benchmark", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
app.conf.update(task_acks_late=True, worker_prefetch_multiplier=1)


@app.task
def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def enqueue(count: int) -> list[Any]:
    """Enqueue `count` jobs; returns their handles."""
    return [noop.delay(number).id for number in range(count)]


def find_result(handle: Any) -> Any:
    """The return value of the job; None until there is one."""
    return app.AsyncResult(handle).result
