"""A payload is enqueued, run, and read back as the result. Any JSON comes back unchanged."""

import base64
import json
import socket
import zlib
from collections.abc import Iterator
from typing import Any

import fakeredis
import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from redis import Redis

from app.config import Settings
from app.core import transitions
from app.job_function import FUNCTIONS
from app.main import create_app
from app.worker.channel import Channel
from app.worker.work_horse import run_job
from tests.processes import json_of, take_job

texts = st.text(st.characters(exclude_categories=["Cs"]))
numbers = st.integers(-(10**308), 10**308) | st.floats(allow_nan=False, allow_infinity=False) | st.integers()
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda children: st.lists(children, max_size=5) | st.dictionaries(texts, children, max_size=5),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def parts() -> Iterator[tuple[Any, "Redis", Channel, Channel]]:
    redis = fakeredis.FakeRedis(server=fakeredis.FakeServer())
    worker_end, horse_end = map(Channel, socket.socketpair())
    yield create_app(Settings(), redis).test_client(), redis, worker_end, horse_end
    worker_end.close()
    horse_end.close()


def run_through(parts: tuple[Any, "Redis", Channel, Channel], body: bytes) -> bytes:
    """Enqueue the body for `echo`, run it as worker and work-horse do, and fetch the result."""
    client, redis, worker_end, horse_end = parts
    enqueued = client.post("/enqueue/echo", data=body, content_type="application/json")
    assert enqueued.status_code == 202, enqueued.text
    run = take_job(redis)
    header = {
        "job_id": run.job_id,
        "queue": run.queue,
        "worker": run.worker,
        "request_id": "r",
        "timeout": -1,
        "enqueued_at": "",
        "started_at": json_of(enqueued)["enqueued_at"],
    }
    data = redis.hget(f"rq:job:{run.job_id}", "data")
    assert isinstance(data, bytes)
    run_job(header, _unpacked(data), {function.path: function for function in FUNCTIONS.values()}, horse_end)
    frame = worker_end.receive(5)
    assert frame
    assert frame[0]["outcome"] == "finished", frame
    ending = transitions.Ending("finished", 100, 100, return_value=_packed(frame[1]))
    assert transitions.finish(redis, run, ending) == "finished"
    found = client.get("/get_result", query_string={"job_id": run.job_id})
    assert found.status_code == 200
    text: bytes = found.data
    return text


def _unpacked(data: bytes) -> bytes:
    return zlib.decompress(data)


def _packed(text: bytes) -> str:
    return "" if text == b"null" else base64.b64encode(text).decode()


def canonical(value: Any) -> Any:
    """A text that is equal only if each number has the same type: 1 is not 1.0, nor True."""
    return json.dumps(value, sort_keys=True)


@hypothesis.settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(value=values)
@hypothesis.example(value="\x00")
@hypothesis.example(value="\U0001d518\u2028\ufeff\ufffe")
@hypothesis.example(value={"": {"\x00": []}, "__proto__": None})
@hypothesis.example(value=[0.1, -0.0, 5e-324, 1.7976931348623157e308, 2**53 + 1, 2**64, -(10**308)])
@hypothesis.example(value=[True, 1, 1.0, "1", None, False, 0, "", [], {}])
@hypothesis.example(value="NaN Infinity")
@pytest.mark.parametrize("ascii_only", [True, False])
def test_get_result_of_echo_is_what_was_enqueued(
    parts: tuple[Any, "Redis", Channel, Channel], ascii_only: bool, value: Any
) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    found = run_through(parts, body)
    assert canonical(json.loads(found)) == canonical(value)
    assert found.decode()  # UTF-8


@pytest.mark.parametrize(("depth", "opening", "closing"), [(100, "[", "]"), (100, '{"a":', "}")])
def test_get_result_of_echo_at_the_greatest_depth(
    parts: tuple[Any, "Redis", Channel, Channel], depth: int, opening: str, closing: str
) -> None:
    body = (opening * depth + ("1" if opening != "[" else "") + closing * depth).encode()
    assert run_through(parts, body) == body
