"""RQ as it comes, with its JSON serializer. Its work-horse imports this module anew for each job, so it is small."""

import os
from typing import Any

from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer


def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def enqueue(count: int) -> list[Any]:
    """So many new jobs."""
    queue = Queue(connection=Redis.from_url(os.environ["REDIS_URL"]), serializer=JSONSerializer)
    return [queue.enqueue(noop, number) for number in range(count)]


def find_result(handle: Any) -> Any:
    """What the job returned; None while there is nothing."""
    return handle.return_value(refresh=True)
