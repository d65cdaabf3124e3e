"""Celery, which acknowledges a job when it has run; one at a time, as its user guide has it ("Optimizing")."""

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
    """So many new jobs."""
    return [noop.delay(number).id for number in range(count)]


def find_result(handle: Any) -> Any:
    """What the job returned; None while there is nothing."""
    return app.AsyncResult(handle).result
