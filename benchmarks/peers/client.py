"""Enqueue jobs with the client of one task queue, and time their run: `python -m benchmarks.peers.client MODULE COUNT`.

The time is that from the moment at which the first job's result can be read to the same moment of the last job. So it
does not include the worker's start, and it does not rely on times that a queue reports itself.
"""

import importlib
import sys
import time
from typing import Any

#: Seconds between two checks for a result. Each is one cheap command to Redis.
LOOK_EVERY = 0.01
#: The longest wait for a result, in seconds.
PATIENCE = 90.0


def main() -> None:
    """Enqueue, print that it is done, wait, and print the jobs/s.

    Raises:
        SystemExit: a result is wrong or did not come.
    """
    module, count = importlib.import_module(sys.argv[1]), int(sys.argv[2])
    # Do not count the very first job: a starting SAQ worker may think that it hangs, and abort it.
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
