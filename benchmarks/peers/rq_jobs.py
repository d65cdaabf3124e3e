"""Plain RQ, with its JSON serializer. Its work-horse imports this module for each job, so the module is small."""

import os
from typing import Any

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer


def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def enqueue(count: int) -> list[Any]:
    """Enqueue `count` jobs; returns their handles."""
    queue = Queue(connection=Redis.from_url(os.environ["REDIS_URL"]), serializer=JSONSerializer)
    return [queue.enqueue(noop, number) for number in range(count)]


def find_result(handle: Any) -> Any:
    """The return value of the job; None until there is one."""
    return handle.return_value(refresh=True)
