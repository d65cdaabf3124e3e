"""The Redis client whose callers share round trips: each caller gets its own answer, even if another call fails."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import NoScriptError, ResponseError

from app.config import Settings
from app.core.connections import connect
from app.web.shared_round_trips import LARGE_ARGUMENT, PipelinedRedis


@pytest.fixture
def client(redis_url: str) -> Iterator[PipelinedRedis]:
    pool = connect(Settings(redis_url=redis_url)).connection_pool
    yield PipelinedRedis(connection_pool=pool)
    pool.disconnect()


def test_each_caller_gets_its_own_answer(client: PipelinedRedis, real_redis: Redis) -> None:
    for number in range(20):
        real_redis.hset(f"own:{number}", mapping={"a": number, "b": "x" * number})

    def ask(number: int) -> Any:
        return [client.hmget(f"own:{number}", ["a", "nope", "b"]) for _ in range(50)]

    with ThreadPoolExecutor(20) as pool:
        for number, answers in enumerate(pool.map(ask, range(20))):
            assert answers == [[b"%d" % number, None, b"x" * number]] * 50


def test_error_reaches_only_its_caller(client: PipelinedRedis, real_redis: Redis) -> None:
    real_redis.set("text", "1")
    real_redis.hset("hash", "a", 1)

    def ask(number: int) -> Any:
        try:
            if number % 3 == 0:
                return client.evalsha("0" * 40, 0)
            return client.hmget("text" if number % 3 == 1 else "hash", ["a"])
        except ResponseError as error:
            return type(error)

    with ThreadPoolExecutor(30) as pool:
        assert list(pool.map(ask, range(300))) == [NoScriptError, ResponseError, [b"1"]] * 100


def test_other_and_large_commands_share_no_round_trip(client: PipelinedRedis, real_redis: Redis) -> None:
    script = real_redis.script_load("return {KEYS[1], #ARGV[1]}")
    assert client.evalsha(script, 1, "key", b"x" * (LARGE_ARGUMENT + 1)) == [b"key", LARGE_ARGUMENT + 1]
    assert client.set("a", "b") is True  # with redis-py's reading of the answer
    assert client.config_get("maxmemory") == {"maxmemory": "0"}


#: A program for a process of its own, because gevent's monkey patching cannot be undone.
IN_GEVENT = """
from gevent import monkey
monkey.patch_all()
import json, sys, gevent
from app.config import Settings
from app.web.shared_round_trips import PipelinedRedis
from app.redis_resc import connect

client = PipelinedRedis(connection_pool=connect(Settings(redis_url=sys.argv[1])).connection_pool)
asking = [gevent.spawn(client.hmget, f"own:{number}", ["a"]) for number in range(20)]
if sys.argv[2] == "kill":
    gevent.spawn(asking[1].kill, block=False)
gevent.joinall(asking, timeout=20)
print(json.dumps([repr(each.exception or each.value) for each in asking]))
"""

#: redis-py's `repr` of the error.
OUTAGE = "network:ConnectionError"


def ask_in_gevent(url: str, what: str = "") -> list[str]:
    """The answers to twenty greenlets, each of which asks for its own hash."""
    command = [sys.executable, "-c", IN_GEVENT, url, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    answers: list[str] = json.loads(done.stdout)
    return answers


@pytest.fixture
def answers(real_redis: Redis) -> list[str]:
    for number in range(20):
        real_redis.hset(f"own:{number}", "a", number)
    return [f"[b'{number}']" for number in range(20)]


def connections_made(real_redis: Redis) -> int:
    made: Any = real_redis.info("stats")
    return int(made["total_connections_received"])


def test_greenlets_that_ask_together_share_a_connection(real_redis: Redis, redis_url: str, answers: list[str]) -> None:
    before = connections_made(real_redis)
    assert ask_in_gevent(redis_url) == answers
    assert connections_made(real_redis) == before + 2  # the first one was sent at once


def test_killed_caller_leaves_no_other_waiting(redis_url: str, answers: list[str]) -> None:
    alone, ended, *others = ask_in_gevent(redis_url, "kill")
    assert (alone, ended) == (answers[0], "GreenletExit()")
    assert all(found in (answer, OUTAGE) for found, answer in zip(others, answers[2:], strict=True))


def test_outage_reaches_all_callers() -> None:
    assert ask_in_gevent("redis://127.0.0.1:1/0") == [OUTAGE] * 20
