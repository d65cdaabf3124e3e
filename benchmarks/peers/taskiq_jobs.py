"""Taskiq, with the broker that its documentation recommends. It acknowledges a job when its result is stored."""

import asyncio
import os
from typing import Any

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

results = RedisAsyncResultBackend(redis_url=os.environ["REDIS_URL"])
broker = RedisStreamBroker(url=os.environ["REDIS_URL"]).with_result_backend(results)
_loop = asyncio.new_event_loop()


@broker.task
async def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def enqueue(count: int) -> list[Any]:
    """Enqueue `count` jobs; returns their handles."""

    async def enqueue_all() -> list[Any]:
        await broker.startup()
        return [(await noop.kiq(number)).task_id for number in range(count)]

    return _loop.run_until_complete(enqueue_all())


def find_result(handle: Any) -> Any:
    """The return value of the job; None until there is one."""

    async def find() -> Any:
        if not await results.is_result_ready(handle):
            return None
        return (await results.get_result(handle)).return_value

    return _loop.run_until_complete(find())
