"""The queues and the job functions of this service. The jobs are spread over the queues in their order."""

import os
from typing import Any

from app.redis_resc import queues, settings
from benchmarks import job_functions


def enqueue(count: int) -> list[Any]:
    """Enqueue `count` jobs of the function that BENCHMARK_FUNCTION names; returns their handles."""
    function = getattr(job_functions, os.environ["BENCHMARK_FUNCTION"])
    names = [settings.queues[number * len(settings.queues) // count] for number in range(count)]
    return [queues[name].enqueue(function, number) for number, name in enumerate(names)]


def find_result(handle: Any) -> Any:
    """The return value of the job; None until there is one."""
    return handle.return_value(refresh=True)
