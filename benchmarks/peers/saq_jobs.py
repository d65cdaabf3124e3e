"""SAQ, one job at a time. It removes a job from its queue's active jobs after the run."""

import asyncio
import os
from typing import Any

from saq import Queue

queue = Queue.from_url(os.environ["REDIS_URL"])
_loop = asyncio.new_event_loop()


async def noop(context: Any, *, number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


settings = {"queue": queue, "functions": [noop], "concurrency": 1}


def enqueue(count: int) -> list[Any]:
    """Enqueue `count` jobs; returns their handles."""

    async def enqueue_all() -> list[Any]:
        await queue.connect()
        jobs = [await queue.enqueue("noop", number=number) for number in range(count)]
        return [job.key for job in jobs]

    return _loop.run_until_complete(enqueue_all())


def find_result(handle: Any) -> Any:
    """The return value of the job; None until there is one."""
    return _loop.run_until_complete(queue.job(handle)).result
