"""Job functions that only benchmarks run: FUNCTION_MODULES names this module."""

import time

from app.job_function import job_function, report_progress


@job_function()
def noop(number: int) -> dict[str, int]:
    """Return the number."""
    return {"number": number}


@job_function()
def noop_with_progress(number: int) -> dict[str, int]:
    """Report ten steps, and return the number."""
    for step in range(1, 11):
        report_progress(step, 10, f"step {step}")
    return {"number": number}


@job_function()
def compute(seconds: float) -> float:
    """Use the processor for these seconds, by the process's own clock, and return the seconds used."""
    start = time.process_time()
    while (used := time.process_time() - start) < seconds:
        pass
    return used
