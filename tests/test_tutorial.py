"""The steps of any Flask and RQ tutorial, with three processes that are started by hand."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.processes import environment, free_port, python, running, wait_until, worker


def _curl(*args: str) -> Any:
    done = subprocess.run(["curl", "-sS", *args], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("server", ["flask run", "gunicorn app.main:app"])
def test_tutorial_works_word_for_word(redis_url: str, tmp_path: Path, server: str) -> None:
    port = str(free_port())
    env = environment(redis_url, SOME_LONG_FUNCTION_SECONDS=1, PORT=port, FLASK_RUN_PORT=port)
    # A newcomer's .env has only the shipped functions.
    env["FUNCTION_MODULES"] = "app.functions"
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return requests.get(url, timeout=5).text == "Running!"
        except (requests.ConnectionError, requests.Timeout):
            return False

    with running(python(*server.split()), env, tmp_path / "web.log"), ExitStack() as stack:
        wait_until(answers, 60)
        header = ["-H", "Content-Type: application/json"]
        job = _curl("-X", "POST", *header, "-d", '{"hello":"world"}', f"{url}/enqueue")
        status = _curl(f"{url}/check_status?job_id={job['job_id']}")
        assert status["job_status"] == "queued"
        stack.enter_context(worker(env, tmp_path / "worker.log"))
        wait_until(lambda: _curl(f"{url}/check_status?job_id={job['job_id']}")["job_status"] == "finished")
        result = _curl(f"{url}/get_result?job_id={job['job_id']}")
    assert list(result) == ["job_id", "job_enqueued_at", "job_started_at", "input", "result"]
    assert (result["job_id"], result["input"]) == (job["job_id"], {"hello": "world"})
