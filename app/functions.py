"""The job functions. This is the only file to edit. Each takes a payload, returns JSON data, and raises on failure."""

import random
import re
import time
from collections import Counter
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from rq import get_current_job

from app.config import get_settings
from app.job_function import job_function, report_progress


@job_function()
def some_long_function(data: Any) -> dict[str, Any]:
    """Work for about ten seconds, report each of ten steps, and return the input with the job's times."""
    job = get_current_job()
    steps = 10
    for step in range(1, steps + 1):
        time.sleep(get_settings().some_long_function_seconds / steps)
        report_progress(step, steps, f"step {step}")
    return {
        "job_id": job.id if job else None,
        "job_enqueued_at": job.enqueued_at.isoformat() if job and job.enqueued_at else None,
        "job_started_at": job.started_at.isoformat() if job and job.started_at else None,
        "input": data,
        "result": data,
    }


class PiPayload(BaseModel):
    """How many random points to draw, and from which seed."""

    model_config = ConfigDict(extra="forbid")

    samples: Annotated[int, Field(ge=1, le=10**9, description="number of random points")]
    seed: Annotated[int | None, Field(description="makes the estimate repeatable")] = None


@job_function(timeout=3600)
def estimate_pi(payload: PiPayload) -> dict[str, Any]:
    """Estimate pi by the Monte Carlo method: the share of random points of a square that lie in its circle."""
    uniform = random.Random(payload.seed).random  # noqa: S311  # not for secrets
    inside = 0
    batch = max(1, payload.samples // 100)
    for start in range(0, payload.samples, batch):
        end = min(start + batch, payload.samples)
        inside += sum(uniform() ** 2 + uniform() ** 2 <= 1 for _ in range(start, end))
        report_progress(end, payload.samples, f"pi is about {4 * inside / end:.4f}")
    return {"pi": 4 * inside / payload.samples, "samples": payload.samples}


class WordsPayload(BaseModel):
    """A text, and how many of its most frequent words to return."""

    model_config = ConfigDict(extra="forbid")

    text: str
    n: Annotated[int, Field(ge=1, le=1000, description="number of words to return")] = 10


@job_function()
def count_words(payload: WordsPayload) -> dict[str, Any]:
    """Count the words of a text, upper and lower case alike, and return the most frequent ones."""
    counts: Counter[str] = Counter()
    lines = payload.text.splitlines()
    for number, line in enumerate(lines, start=1):
        counts.update(re.findall(r"\w+(?:['’]\w+)*", line.lower()))
        if number % 1000 == 0:
            report_progress(number, len(lines), f"{len(counts)} different words")
    report_progress(len(lines), len(lines), f"{len(counts)} different words")
    most_frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: payload.n]
    return {"words": [list(item) for item in most_frequent], "total": counts.total()}
