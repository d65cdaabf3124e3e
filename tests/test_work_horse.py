"""The work-horse, run in this process: its frames, the jobs it runs, and the results it accepts as JSON."""

import json
import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from rq import get_current_job

from app.functions import PiPayload, WordsPayload, count_words, estimate_pi, some_long_function
from app.job_function import FUNCTIONS, JobFunction, job_function, load_functions, report_progress, send_progress_to
from app.worker.channel import Channel
from app.worker.results import ResultNotJSON, ResultTooLarge, dump_result
from app.worker.work_horse import run_job
from tests import job_functions

load_functions(["app.functions", "tests.job_functions"])
BY_PATH = {function.path: function for function in FUNCTIONS.values()}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = (Channel(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


# Frames


def test_channel_keeps_messages_apart(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    bodies = [b"", b"x" * 1_000_000, b"\x00\xff"]

    def send() -> None:
        for number, body in enumerate(bodies):
            one.send({"number": number}, body)

    sender = threading.Thread(target=send)
    sender.start()
    assert [other.receive(10) for _ in bodies] == [({"number": n}, body) for n, body in enumerate(bodies)]
    sender.join()


def test_channel_completes_a_frame_that_was_half_received(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    sent, taken = socket.socketpair()
    recorder = Channel(sent)
    recorder.send({"a": 1}, b"body")
    frame = taken.recv(1000)
    sent.close()
    taken.close()
    for part in (frame[:3], frame[3:10], frame[10:-1]):
        one._socket.sendall(part)
        assert other.receive(0.02) is None
    one._socket.sendall(frame[-1:])
    assert other.receive(5) == ({"a": 1}, b"body")


def test_channel_notices_that_the_other_end_is_closed(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one._socket.sendall(b"\x00")
    one.close()
    with pytest.raises(EOFError):
        other.receive(5)
    with pytest.raises(OSError, match="pipe"):
        other.send({}, b"x" * 1_000_000)


# Results


@given(json_values)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
def test_dump_result_keeps_any_json_as_it_is(value: Any) -> None:
    assert json.loads(dump_result(value, 10**9)) == value


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("nan", "$.a[1] is nan"),
        ("infinity", "$ is inf"),
        ("datetime", "$.when is a datetime"),
        ("bytes", "$ is a bytes"),
        ("set", "$.a is a set"),
        ("int key", "$.a has the key 1, which is not a string"),
        ("surrogate", "$[0] has a lone surrogate"),
        ("surrogate key", "a key of $ has a lone surrogate"),
        ("object", "$ is a object"),
        ("huge integer", "Exceeds the limit"),
        ("cycle", "nested too deeply, or contains itself"),
    ],
)
def test_dump_result_names_the_value_that_is_not_json_and_its_place(kind: str, place: str) -> None:
    with pytest.raises(ResultNotJSON) as caught:
        dump_result(job_functions.return_unjsonable(kind), 10**9)
    assert place in str(caught.value)


def test_dump_result_writes_tuples_as_arrays_and_counts_bytes() -> None:
    assert dump_result(("é", 1), 8) == '["é",1]'.encode()
    with pytest.raises(ResultTooLarge, match=r"has 8 bytes as JSON; 7 are allowed"):
        dump_result(("é", 1), 7)


# Jobs


def _run(ends: tuple[Channel, Channel], path: str, *args: Any, **more: Any) -> list[tuple[dict[str, Any], bytes]]:
    """Run a job; returns all that the work-horse sends for it, the outcome last."""
    worker, horse = ends
    header = {
        "job_id": "j", "request_id": "r", "queue": "q", "worker": "w", "timeout": more.pop("timeout", 10),
        "enqueued_at": more.pop("enqueued_at", "2026-11-23T10:00:00.000001Z"), "started_at": "2026-11-23T10:00:01.5Z",
    }  # fmt: skip
    data = more["data"] if "data" in more else json.dumps([path, None, list(args), more]).encode()
    run_job(header, data, BY_PATH, horse)
    frames: list[tuple[dict[str, Any], bytes]] = []
    while not frames or "outcome" not in frames[-1][0]:
        frame = worker.receive(5)
        assert frame
        frames.append(frame)
    return frames


def _failure(ends: tuple[Channel, Channel], path: str, *args: Any, **more: Any) -> tuple[str, str]:
    header, trace = _run(ends, path, *args, **more)[-1]
    assert header["outcome"] == "failed"
    assert header["error"]["type"] in trace.decode()
    return header["error"]["type"], header["error"]["message"]


@pytest.mark.parametrize(
    ("payload", "after"), [({"how": "give up"}, -1), ({"how": "again"}, None), ({"how": "again", "after": -5}, 0)]
)
def test_run_job_sends_an_expected_failure_without_a_traceback(
    ends: tuple[Channel, Channel], payload: dict[str, Any], after: float | None
) -> None:
    header, trace = _run(ends, "tests.job_functions.foresee", payload)[-1]
    assert (header["outcome"], header["is_foreseen"], header["after"]) == ("failed", True, after)
    assert "Traceback" not in trace.decode()
    assert trace.decode().count("\n") == 1


def test_run_job_sends_progress_and_the_return_value(ends: tuple[Channel, Channel]) -> None:
    frames = _run(ends, "tests.job_functions.report", {"done": 1, "total": 4, "message": "a"})
    assert frames == [
        ({"progress": {"done": 1, "total": 4, "message": "a"}, "job_id": "j"}, b""),
        ({"outcome": "finished"}, b'"reported"'),
    ]


def test_run_job_runs_coroutines_and_keyword_payloads(ends: tuple[Channel, Channel]) -> None:
    assert _run(ends, "tests.job_functions.sleep_async", [1])[-1] == ({"outcome": "finished"}, b"[1]")
    assert _run(ends, "tests.job_functions.echo", payload=2)[-1] == ({"outcome": "finished"}, b"2")


def test_run_job_gives_the_function_its_current_job(ends: tuple[Channel, Channel]) -> None:
    _, text = _run(ends, "tests.job_functions.current_job", 7)[-1]
    func = "tests.job_functions.current_job"
    assert json.loads(text) == {"id": "j", "origin": "q", "timeout": 10, "args": [7], "func": func}
    assert get_current_job() is None


def test_run_job_converts_the_payload_to_the_type_hint(ends: tuple[Channel, Channel]) -> None:
    _, text = _run(ends, "tests.job_functions.use_types", {"day": "2026-11-23", "tags": ["b", "a"]})[-1]
    assert json.loads(text) == {"type": "date", "year": 2026, "tags": ["a", "b"]}


def test_run_job_without_a_limit(ends: tuple[Channel, Channel]) -> None:
    assert _run(ends, "tests.job_functions.echo", 1, timeout=-1, enqueued_at="")[-1][1] == b"1"


@pytest.mark.parametrize(
    ("path", "argument", "expected"),
    [
        ("tests.job_functions.fail", "no such image", ("ValueError", "no such image")),
        ("tests.job_functions.fail", "x" * 9999, ("ValueError", "x" * 2000)),
        ("tests.job_functions.die", {"how": "sys.exit"}, ("SystemExit", "3")),
        ("tests.job_functions.return_bytes_of", 20_000_000, ("ResultTooLarge", "The return value has 20000002 bytes")),
        ("tests.job_functions.return_unjsonable", "nan", ("ResultNotJSON", "The return value is not JSON: $.a[1]")),
        ("tests.job_functions.report", {"done": math.nan, "total": 1}, ("ValueError", "Progress must be finite")),
        ("app.functions.estimate_pi", {"samples": 0}, ("ValidationError", "1 validation error")),
        ("os.system", "true", ("UnknownFunction", "'os.system' is not a job function here")),
        ("builtins.eval", "1", ("UnknownFunction", "'builtins.eval' is not a job function here")),
        ("tests.job_functions.json.dumps", "1", ("UnknownFunction", "'tests.job_functions.json.dumps'")),
    ],
)
def test_run_job_sends_the_failure(
    ends: tuple[Channel, Channel], path: str, argument: Any, expected: tuple[str, str]
) -> None:
    kind, message = _failure(ends, path, argument)
    assert kind == expected[0]
    assert message.startswith(expected[1])


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\x80\x05.", b'["echo"]', b"[[1],null,[],{}]", b"1"])
def test_run_job_fails_a_job_that_it_cannot_read(ends: tuple[Channel, Channel], data: bytes) -> None:
    kind, _ = _failure(ends, "", data=data)
    assert kind in {"UnreadablePayload", "UnknownFunction", "TypeError"}


def test_run_job_fails_a_job_with_other_arguments(ends: tuple[Channel, Channel]) -> None:
    assert _failure(ends, "tests.job_functions.echo", 1, 2)[0] == "TypeError"
    assert _failure(ends, "tests.job_functions.echo")[0] == "TypeError"


def test_run_job_survives_an_exception_without_a_text(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def call(payload: Any) -> None:
        raise Unprintable

    echo = FUNCTIONS["echo"]
    broken = JobFunction(echo.name, call, None, echo.defaults, echo.signature)
    monkeypatch.setitem(BY_PATH, "broken", broken)
    kind, message = _failure(ends, "broken", 1)
    assert kind.endswith("Unprintable")
    assert message == "(its text cannot be read)"


# Job functions


def test_job_function_leaves_the_callable_as_it_is_and_keeps_its_defaults() -> None:
    def resize(image: dict[str, Any]) -> None:
        """Resize an image."""

    try:
        assert job_function(queue="slow", timeout=9, retries=1, result_ttl=8)(resize) is resize
        found = FUNCTIONS["resize"]
        assert found.defaults == {"queue": "slow", "timeout": 9, "retries": 1, "result_ttl": 8}
        assert (found.description, found.payload_schema["type"]) == ("Resize an image.", "object")

        def other(image: Any) -> None: ...

        other.__name__ = "resize"
        with pytest.raises(ValueError, match="Two job functions are named resize"):
            job_function()(other)
    finally:
        del FUNCTIONS["resize"]


@pytest.mark.parametrize("limit", [-1, True, 1.0, "1"])
def test_job_function_requires_a_count_for_max_crashes(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_crashes must be an integer of 0 or more"):
        job_function(max_crashes=limit)


def test_job_function_requires_exactly_one_argument() -> None:
    for call in (lambda: None, lambda a, b: None, lambda *, a: None, lambda *a: None):
        with pytest.raises(TypeError, match="must take one argument"):
            job_function()(call)


@pytest.mark.parametrize("hint", [dict, Any, object, None])
def test_job_function_without_a_usable_hint_accepts_any_json(hint: Any) -> None:
    def take(payload: Any) -> Any:
        return payload

    take.__annotations__ = {} if hint is None else {"payload": hint}
    try:
        job_function()(take)
        assert FUNCTIONS["take"].payload_schema == {}
        assert FUNCTIONS["take"].validate([1]) == [1]
    finally:
        del FUNCTIONS["take"]


def test_load_functions_names_a_missing_module() -> None:
    with pytest.raises(SystemExit, match=r"FUNCTION_MODULES: there is no module 'tests\.nowhere'"):
        load_functions(["tests.nowhere"])


def test_report_progress_outside_of_a_job_does_nothing() -> None:
    report_progress(1, 2)
    seen: list[Any] = []
    with send_progress_to(seen.append):
        report_progress(1, 2, "x")
    report_progress(2, 2)
    assert seen == [{"done": 1, "total": 2, "message": "x"}]


# The shipped functions


def test_some_long_function_returns_its_input_and_reports_ten_steps() -> None:
    seen: list[Any] = []
    with send_progress_to(seen.append):
        result = some_long_function({"hello": "world"})
    assert result == {
        "job_id": None, "job_enqueued_at": None, "job_started_at": None,
        "input": {"hello": "world"}, "result": {"hello": "world"},
    }  # fmt: skip
    assert [step["done"] for step in seen] == list(range(1, 11))


def test_estimate_pi_is_near_pi_and_repeatable() -> None:
    seen: list[Any] = []
    with send_progress_to(seen.append):
        first = estimate_pi(PiPayload(samples=20_050, seed=1))
    assert abs(first["pi"] - math.pi) < 0.05
    assert first["samples"] == seen[-1]["done"] == 20_050
    assert first == estimate_pi(PiPayload(samples=20_050, seed=1)) != estimate_pi(PiPayload(samples=20_050, seed=2))
    assert estimate_pi(PiPayload(samples=1))["pi"] in (0, 4)


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ("the cat and The dog", 2, {"words": [["the", 2], ["and", 1]], "total": 5}),
        ("", 10, {"words": [], "total": 0}),
        ("don't DON'T – naïve\n" * 1001, 2, {"words": [["don't", 2002], ["naïve", 1001]], "total": 3003}),
    ],
)
def test_count_words_counts(text: str, n: int, expected: dict[str, Any]) -> None:
    assert count_words(WordsPayload(text=text, n=n)) == expected


@pytest.mark.parametrize(
    "payload", [{"text": 1}, {"text": "a", "n": 0}, {"text": "a", "n": 1001}, {}, {"text": "a", "m": 1}]
)
def test_count_words_refuses_other_payloads(payload: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FUNCTIONS["count_words"].validate(payload)
