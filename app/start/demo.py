"""`pipenv run demo`: one job, with its progress as a bar, and its result."""

import json
import time
import urllib.error
import urllib.request
from typing import Any


def call(url: str, payload: Any = None) -> Any:
    """GET a JSON document, or POST one and read the answer."""
    body = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310  # our own address
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310  # as above
        return json.load(answer)


def run_demo(url: str) -> None:
    """Enqueue one job, draw its progress as a bar, and print its result."""
    status = call(f"{url}/enqueue/estimate_pi", {"samples": 5_000_000, "seed": 1})
    print(f"POST {url}/enqueue/estimate_pi -> job {status['job_id']}")
    while True:
        progress = status["progress"] or {"done": 0, "total": 1, "message": "waiting"}
        share = progress["done"] / progress["total"]
        bar = "#" * round(40 * share)
        print(f"\r[{bar:<40}] {share:4.0%}  {progress['message']:<30}", end="", flush=True)
        if status["ended_at"]:
            break
        time.sleep(0.1)
        status = call(url + status["links"]["check_status"])
    print(f"\nGET {url}{status['links']['get_result']} ->")
    print(json.dumps(call(url + status["links"]["get_result"]), indent=2), flush=True)
