"""Huey; it takes a job off its queue before the job runs."""

import os
from typing import Any

from huey import RedisHuey

huey = RedisHuey("benchmark", url=os.environ["REDIS_URL"])


@huey.task()
def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def enqueue(count: int) -> list[Any]:
    """So many new jobs."""
    return [noop(number).id for number in range(count)]


def find_result(handle: Any) -> Any:
    """What the job returned; None while there is nothing."""
    return huey.result(handle, preserve=True)
