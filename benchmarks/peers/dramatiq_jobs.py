"""Dramatiq, with its middleware for results. It acknowledges a job after its run."""

import os
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import ResultMissing, Results
from dramatiq.results.backends import RedisBackend

broker = RedisBroker(url=os.environ["REDIS_URL"])
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["REDIS_URL"])))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


def enqueue(count: int) -> list[Any]:
    """Enqueue `count` jobs; returns their handles."""
    return [noop.send(number) for number in range(count)]


def find_result(handle: Any) -> Any:
    """The return value of the job; None until there is one."""
    try:
        return handle.get_result()
    except ResultMissing:
        return None
