"""Enqueue jobs with the client of one task queue, and time their run: `python -m benchmarks.peers.client MODULE COUNT`.

What is timed is from the moment that the first job's result can be read to the moment that the last one's can. So
nothing of a worker's start is in it, and no queue has to be trusted to tell its own times.
"""

import importlib
import sys
import time
from typing import Any

#: Seconds between two looks for a result; each is one cheap command to Redis.
LOOK_EVERY = 0.01
#: Seconds that a result is waited for.
PATIENCE = 90.0


def main() -> None:
    """Enqueue, say so, wait, and print the jobs/s.

    Raises:
        SystemExit: a result is wrong or did not come.
    """
    module, count = importlib.import_module(sys.argv[1]), int(sys.argv[2])
    # The very first job is none of them: a starting SAQ worker may take it for one that hangs, and abort it.
    _, *jobs = module.enqueue(count + 1)
    print("enqueued", flush=True)

    def wait_for(job: Any) -> float:
        deadline = time.monotonic() + PATIENCE
        while module.find_result(job) is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"No result after {PATIENCE:.0f} s.")
            time.sleep(LOOK_EVERY)
        return time.perf_counter()

    first, last = wait_for(jobs[0]), wait_for(jobs[-1])
    results = [module.find_result(job) for job in jobs]
    if wrong := [number for number, result in enumerate(results, 1) if result != {"number": number}]:
        raise SystemExit(f"{len(wrong)} of {count} results are missing or wrong, the first that of job {wrong[0]}.")
    print((count - 1) / (last - first), flush=True)


if __name__ == "__main__":
    main()
