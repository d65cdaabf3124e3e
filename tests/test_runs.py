"""One run as the worker sees it, with a work-horse that the test plays, and the loop around it."""

import json
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from app.config import Settings
from app.core import transitions
from app.core.queue import Queue
from app.core.scripts import Failure
from app.core.transitions import Fields, Run, Taken
from app.worker import outcomes
from app.worker import run as runs
from app.worker.channel import Channel, wait_for_any
from app.worker.horses import WorkHorseHandle
from app.worker.outcomes import Crashed, Crashes, Failed, Finished, Lost, PutBack, Stopped, TimedOut
from app.worker.run import JobRun
from app.worker.take_ahead import NextJob
from app.worker.worker import Worker

CALL = b'["tests.job_functions.echo", null, [1], {}]'


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """The worker's end of a channel, and the work-horse's."""
    ours, its = socket.socketpair()
    with closing(Channel(ours)) as worker_end, closing(Channel(its)) as horse_end:
        yield worker_end, horse_end


def handle(channel: Channel) -> Any:
    horse = Mock(spec=WorkHorseHandle, channel=channel, crash_limits={}, fresh=frozenset(), is_spent=False, jobs=0)
    horse.has_died.return_value = False
    return horse


@pytest.fixture
def begun(ends: tuple[Channel, Channel]) -> JobRun:
    """A run that has begun on that work-horse."""
    worker = Mock(settings=Settings())
    worker.is_backing_off.return_value = False
    worker.renew.return_value = "held"
    horses = Mock()
    horses.get_ready.return_value = horses.horse = handle(ends[0])
    horses.is_over_memory.return_value = False
    fields = Fields(b"queued", CALL, None, None, None, b"echo", None, (None,) * 4)
    taken = Taken("default", "j", "2026-11-28T10:00:00.000000Z", fields)
    run = JobRun(worker, horses, NextJob(Run("j", "e", "default", "w"), taken, time.monotonic()))
    assert run.begin(Mock()) is None
    assert ends[1].receive(0)
    return run


def test_outcome_that_was_read_behind_much_progress_is_seen_at_once(
    begun: JobRun, ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket is empty by then: the frame is in the channel's buffer."""
    monkeypatch.setattr(runs, "PROGRESS_EVERY", -1.0)  # the worker stops reading after each report
    for done in range(3):
        ends[1].send({"progress": {"done": done, "total": 3, "message": ""}, "job_id": "j"})
    ends[1].send({"outcome": "finished"}, b"1")
    assert begun.react() is None
    monkeypatch.setattr("app.worker.channel.select.poll", Mock(side_effect=AssertionError("it would wait")))
    outcome = None
    while outcome is None:
        wait_for_any([begun.channel], 30)
        outcome = begun.react()
    assert isinstance(outcome, Finished)


def test_frame_of_which_a_part_is_there_is_no_sign_that_the_job_is_long(
    begun: JobRun, ends: tuple[Channel, Channel]
) -> None:
    frame = b"".join((struct.pack("!II", 23, 1), json.dumps({"outcome": "finished"}).encode(), b"1"))
    ends[1]._socket.sendall(frame[:20])
    assert begun.react() is None
    assert not begun._worker.log.info.called  # type: ignore[attr-defined]  # a mock
    ends[1]._socket.sendall(frame[20:])
    assert begun.react() == Finished("MQ==")


@pytest.mark.parametrize(("execution", "stops"), [(None, True), ("e", True), ("another", False)])
def test_stop_is_for_the_run_that_it_names(begun: JobRun, execution: str | None, stops: bool) -> None:
    assert begun.stop(execution) is stops
    assert begun._horses.kill.called is stops  # type: ignore[attr-defined]  # a mock


def test_run_that_was_stopped_ends_so_however_its_work_horse_died(begun: JobRun, ends: tuple[Channel, Channel]) -> None:
    begun.stop(None)
    ends[1].close()
    assert begun.react() == Stopped()
    assert not begun.stop(None)


@pytest.mark.parametrize(
    ("held", "outcome"), [("lost", Lost()), ("stop", Stopped())], ids=["the lease is lost", "the job is canceled"]
)
def test_run_that_a_renewal_ends_has_no_work_horse_any_more(
    begun: JobRun, monkeypatch: pytest.MonkeyPatch, held: Any, outcome: Any
) -> None:
    monkeypatch.setattr(runs, "TICK", -1.0)
    monkeypatch.setattr(begun._worker, "renew", Mock(return_value=held))
    assert begun.react() == outcome
    assert begun._horses.reap.called  # type: ignore[attr-defined]  # a mock


@pytest.mark.parametrize("limit", [0, 1])
def test_run_that_must_not_run_twice_is_not_put_back_once_it_has_begun(begun: JobRun, limit: int) -> None:
    begun.crashes = Crashes(0, limit)
    assert begun.put_back("x") == (PutBack("x") if limit else Crashed("x"))


OUTCOMES = {
    Finished("MQ==", "{}"): "finished",
    Failed(Failure(), after=-1): "failed",
    TimedOut(3): "failed",
    Stopped(): "stopped",
}


@pytest.mark.parametrize(("outcome", "status"), OUTCOMES.items(), ids=lambda value: type(value).__name__)
def test_finish_writes_how_a_run_ended(outcome: Any, status: str) -> None:
    ending = outcomes.choose_transition(outcome, Crashes(), Settings())
    assert isinstance(ending, transitions.Ending)
    assert (ending.outcome, ending.result_ttl) == (status, Settings().result_ttl)


@pytest.mark.parametrize("is_crash", [True, False])
@pytest.mark.parametrize("limit", [None, 0, 7])
def test_release_gives_back_what_did_not_end(is_crash: bool, limit: int | None) -> None:
    outcome = Crashed("signal 9") if is_crash else PutBack("a deploy")
    release = outcomes.choose_transition(outcome, Crashes(2, limit), Settings())
    assert isinstance(release, outcomes.Release)
    assert (release.is_crash, release.limit) == (is_crash, Settings().max_crashes if limit is None else limit)
    assert "died 3 times" in release.failure.error


def test_nothing_is_written_of_a_run_that_is_lost() -> None:
    assert outcomes.choose_transition(Lost(), Crashes(), Settings()) is None


def test_each_outcome_is_true() -> None:
    """The loop asks `if outcome`, and one without members could be as false as an empty tuple."""
    assert all(OUTCOMES)
    assert all((Lost(), Crashed(""), PutBack("")))


@pytest.fixture
def busy(real_redis: "Redis", ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker with that work-horse."""
    worker = Worker(["default"], connection=real_redis)
    worker._horses.horse = handle(ends[0])
    monkeypatch.setattr(worker._horses, "get_ready", lambda *_, **__: worker._horses.horse)
    return worker


def test_no_job_is_taken_once_a_signal_came_as_the_last_end_was_confirmed(
    real_redis: "Redis", busy: Worker, ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis refuses that end for a while; the signal comes at the third try."""
    queue = Queue("default", connection=real_redis)
    job_ids = [queue.enqueue("tests.job_functions.echo", number).id for number in range(3)]
    first, second, third = job_ids
    taken = busy.dequeue_job_and_maintain_ttl(300)
    assert taken
    ends[1].send({"outcome": "finished"}, b"1")
    busy.execute_job(*taken)
    taken = busy.dequeue_job_and_maintain_ttl(300)
    assert taken
    ends[1].send({"outcome": "finished"}, b"2")
    finish = transitions.finish
    tries: list[str] = []

    def refuse(connection: "Redis", run: Run, ending: transitions.Ending) -> str:
        tries.append(run.job_id)
        if len(tries) > 3:
            return finish(connection, run, ending)
        if len(tries) == 3:
            busy.request_stop(signal.SIGTERM, None)
        raise ResponseError("OOM command not allowed")

    monkeypatch.setattr(transitions, "finish", refuse)
    monkeypatch.setattr(transitions, "read_finish", Mock(side_effect=ResponseError("OOM command not allowed")))
    busy.execute_job(*taken)
    assert tries == [first, first, first, first, second]
    assert real_redis.hget(f"rq:job:{third}", "status") == b"queued"
    assert real_redis.lrange("rq:queue:default", 0, -1) == [third.encode()]


@pytest.mark.parametrize("members", [{}, {"execution_id": ""}, {"execution": None}])
def test_stop_command_without_an_execution_stops_the_run_in_hand(
    real_redis: "Redis", busy: Worker, members: dict[str, Any]
) -> None:
    """RQ's own handler takes an empty id for none, too."""
    Queue("default", connection=real_redis).enqueue("tests.job_functions.echo", 1)
    assert busy.dequeue_job_and_maintain_ttl(None)
    (run,) = busy._runs
    assert run.begin(Mock()) is None
    command = {"command": "stop-job", "job_id": run.id.job_id, **members}
    busy.handle_payload({"data": json.dumps(command).encode()})
    assert run.refuse_stops()
