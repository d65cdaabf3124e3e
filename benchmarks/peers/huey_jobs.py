"""Huey, which removes a job from its queue before the job runs."""

import os
from typing import Any

from huey import RedisHuey

huey = RedisHuey("benchmark", url=os.environ["REDIS_URL"])


@huey.task()
def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def enqueue(count: int) -> list[Any]:
    """Enqueue `count` jobs; returns their handles."""
    return [noop(number).id for number in range(count)]


def find_result(handle: Any) -> Any:
    """The return value of the job; None until there is one."""
    return huey.result(handle, preserve=True)
