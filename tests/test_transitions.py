"""Call each Lua script through its typed function, on a fake and on a real server."""

import base64
import json
import re
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import fakeredis
import pytest
from redis.exceptions import NoScriptError, ResponseError
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from app.core import queries, scripts, transitions
from app.core.scripts import DOORBELL_KEY, EVENTS_KEY, Failure, describe_failure
from app.core.transitions import Abandoned, Again, Created, Ending, Exists, Fields, Full, Nothing, Run, Skipped, Taken
from tests.processes import just_set

#: A client. It is `Any`, because redis-py annotates each command with the union of all its possible answers.
Redis = Any
BOOM = describe_failure("ValueError", "boom")
MANY = 1000
#: A lease of -1 s: it has expired when it begins.
EXPIRED = -1

pytestmark = pytest.mark.parametrize("server", ["fake", "real"])


@pytest.fixture
def redis(server: str, request: pytest.FixtureRequest) -> Redis:
    if server == "real":
        return request.getfixturevalue("real_redis")
    return fakeredis.FakeRedis(server=fakeredis.FakeServer())


def add(
    redis: Any,
    job_id: str = "j",
    queue: str = "default",
    *,
    at_front: bool = False,
    ttl: int | None = None,
    limit: int = MANY,
    **fields: Any,
) -> Created | Exists | Full:
    fields = {"data": "[]", "origin": queue, "status": "created", **fields}
    return transitions.enqueue(redis, queue, {job_id: {}}, fields, at_front=at_front, ttl=ttl, limit=limit)


def take(redis: Any, *queues: str, lease: int = 30, worker: str = "w", execution: str = "") -> Any:
    return transitions.take(redis, worker, execution or uuid.uuid4().hex, lease, queues or ["default"])


def start(redis: Any, job_id: str = "j", lease: int = 30, worker: str = "w", **fields: Any) -> Run:
    """Enqueue a job and take it, so that it runs."""
    add(redis, job_id, **fields)
    return take_again(redis, lease=lease, worker=worker)


def take_again(redis: Any, lease: int = 30, worker: str = "w") -> Run:
    execution = uuid.uuid4().hex
    taken = take(redis, lease=lease, worker=worker, execution=execution)
    assert isinstance(taken, Taken), taken
    return Run(taken.job_id, execution, taken.queue, worker)


def ending(
    outcome: Literal["finished", "failed", "stopped"] = "finished", value: str = "", progress: str = ""
) -> Ending:
    failure = Failure() if outcome == "finished" else BOOM
    return Ending(outcome, 100, 200, base64.b64encode(value.encode()).decode(), failure, progress)


def finish(
    redis: Any,
    run: Run,
    outcome: Literal["finished", "failed", "stopped"] = "finished",
    value: str = "",
    progress: str = "",
) -> str:
    return transitions.finish(redis, run, ending(outcome, value, progress))


def release(redis: Any, run: Run, *, crashed: bool = False, limit: int = 3, failure: Failure = BOOM) -> str:
    return transitions.release(redis, run, crashed=crashed, limit=limit, failure=failure, failure_ttl=200)


def job_of(redis: Any, job_id: str = "j") -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in redis.hgetall(f"rq:job:{job_id}").items()}


def waiting(redis: Any, queue: str = "default") -> list[str]:
    return [job_id.decode() for job_id in redis.lrange(f"rq:queue:{queue}", 0, -1)]


def events(redis: Any) -> list[tuple[str, str]]:
    return [(event[b"job_id"].decode(), event[b"status"].decode()) for _, event in redis.xrange(EVENTS_KEY)]


def rung(redis: Any) -> bytes:
    (entry,) = redis.xrange(DOORBELL_KEY)
    return bytes(entry[0])


def dump(redis: Any) -> dict[bytes, Any]:
    """All keys in Redis. Two equal dumps mean that nothing was written between them."""
    read: dict[bytes, Callable[[bytes], Any]] = {
        b"hash": redis.hgetall,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"set": redis.smembers,
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
        b"stream": redis.xrange,
        b"string": redis.get,
    }
    return {key: read[redis.type(key)](key) for key in redis.scan_iter()}


def seconds_of(timestamp: str) -> float:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", timestamp)
    return datetime.fromisoformat(timestamp).timestamp()


@pytest.mark.parametrize(
    "moment",
    [
        "1970-01-01T00:00:00.000000Z",
        "2000-02-29T23:59:59.999999Z",
        "2024-02-29T12:00:00.500000Z",
        "2026-11-23T10:00:00.123456Z",
        "2026-12-31T23:59:59.000001Z",
        "2027-01-01T00:00:00.000000Z",
        "2028-03-01T00:00:00.000000Z",
        "2100-02-28T23:59:59.000000Z",
        "2100-03-01T00:00:00.000000Z",
    ],
)
def test_timestamp_agrees_with_the_calendar(redis: Any, moment: str) -> None:
    microseconds = round(seconds_of(moment) * 1e6)
    script = scripts._COMMON + "return timestamp(tonumber(ARGV[1]) / 1e6)"
    text = redis.eval(script, 0, microseconds).decode()
    # A double holds today's seconds to a quarter of a microsecond. Truncation may lose a whole one.
    assert abs(round(seconds_of(text) * 1e6) - microseconds) <= 1


def moment_since(before: float) -> Any:
    """A value that equals any time of the server's clock between `before` and now."""
    now = time.time()
    return pytest.approx((before + now) / 2, abs=(now - before) / 2 + 0.001)  # rounding takes a microsecond


# enqueue


def test_enqueue_makes_a_waiting_job_and_logs_it(redis: Any) -> None:
    before = time.time()
    enqueued = add(redis, "j", "high", function="echo", created_at="long ago")
    assert isinstance(enqueued, Created)
    assert before - 1 < seconds_of(enqueued.at) < time.time() + 1
    job = job_of(redis)
    assert job["status"] == "queued"
    assert job["function"] == "echo"
    assert job["created_at"] == job["enqueued_at"] == enqueued.at
    assert waiting(redis, "high") == ["j"]
    assert redis.smembers("rq:queues") == {b"rq:queue:high"}
    assert events(redis) == [("j", "queued")]
    assert rung(redis)
    assert redis.ttl("rq:job:j") == -1


def test_enqueue_sent_twice_enqueues_once(redis: Any) -> None:
    add(redis)
    before = dump(redis)
    assert add(redis, data="other") == Exists("")
    assert dump(redis) == before


@pytest.mark.parametrize("waits", [2, 3])
def test_enqueue_in_a_full_queue_writes_nothing(redis: Any, waits: int) -> None:
    for number in range(waits):
        add(redis, str(number))
    before = dump(redis)
    assert add(redis, limit=2) == Full()
    assert dump(redis) == before


def test_enqueue_of_a_known_job_in_a_full_queue_says_exists(redis: Any) -> None:
    add(redis)
    assert add(redis, limit=1) == Exists("")


def test_enqueue_limits_each_queue_by_itself(redis: Any) -> None:
    add(redis, "a", "low")
    assert isinstance(add(redis, "b", "high", limit=1), Created)


def test_enqueue_carries_any_number_of_fields(redis: Any) -> None:
    fields: dict[str, Any] = {f"field{number}": str(number) for number in range(1234)}
    add(redis, **fields)
    assert job_of(redis).items() >= fields.items()


def test_enqueue_at_front_puts_the_job_before_the_others(redis: Any) -> None:
    for job_id, at_front in [("1", False), ("2", False), ("3", True), ("4", True)]:
        add(redis, job_id, at_front=at_front)
    assert [take(redis).job_id for _ in range(4)] == ["4", "3", "1", "2"]


def test_enqueue_with_a_ttl_lets_the_waiting_job_expire(redis: Any) -> None:
    add(redis, ttl=50)
    assert 0 < redis.ttl("rq:job:j") <= 50


# take


def test_take_starts_the_job_under_a_lease(redis: Any) -> None:
    add(redis, function="echo", ttl=50, request_id="r")
    redis.hset("rq:job:j", mapping={"timeout": 9, "crashes": 1, "failure_callback_name": "os.system"})
    enqueued_at = job_of(redis)["enqueued_at"].encode()
    before = time.time()
    taken = take(redis, execution="e", lease=30)
    assert isinstance(taken, Taken)
    assert (taken.queue, taken.job_id) == ("default", "j")
    assert taken.fields == Fields(
        b"queued", b"[]", b"9", enqueued_at, b"1", b"echo", b"r", (None, b"os.system", None, None)
    )
    job = job_of(redis)
    assert (job["status"], job["worker_name"], job["started_at"]) == ("started", "w", taken.started_at)
    assert seconds_of(taken.started_at) == moment_since(before)
    assert redis.ttl("rq:job:j") == -1  # the ttl holds only while the job waits
    assert waiting(redis) == []
    run = redis.hgetall("rq:execution:j:e")
    assert (run[b"id"], run[b"job_id"], run[b"worker_name"]) == (b"e", b"j", b"w")
    assert float(run[b"lease_until"]) - 30 == moment_since(before)
    # RQ's own cleanup of the started registry must not act before `recover`.
    assert redis.zscore("rq:wip:default", "j:e") - 30 - 86400 == moment_since(before)
    assert redis.zscore("rq:executions:j", "e")
    assert redis.smembers("rq:worker:w:executions") == {b"j:e"}
    assert redis.hget("rq:worker:w", "state") == b"busy"
    for key in ("rq:execution:j:e", "rq:worker:w:executions"):
        assert redis.ttl(key) > 30
    assert events(redis) == [("j", "queued"), ("j", "started")]


def test_take_looks_at_the_queues_in_the_workers_order(redis: Any) -> None:
    for job_id, queue in [("1", "low"), ("2", "high"), ("3", "low"), ("4", "high"), ("5", "other")]:
        add(redis, job_id, queue)
    taken = [take(redis, "high", "low") for _ in range(5)]
    assert [one.job_id for one in taken[:4]] == ["2", "4", "1", "3"]
    assert [one.queue for one in taken[:4]] == ["high", "high", "low", "low"]
    assert isinstance(taken[4], Nothing)


def test_take_sent_twice_gives_the_same_job(redis: Any) -> None:
    add(redis, "1")
    add(redis, "2")
    first, again = (take(redis, execution="e") for _ in range(2))
    assert (again.queue, again.job_id, again.started_at) == (first.queue, first.job_id, first.started_at)
    assert again.fields.data == first.fields.data
    assert waiting(redis) == ["2"]
    assert redis.zcard("rq:wip:default") == 1


def test_take_sent_again_after_the_job_was_lost_takes_the_next(redis: Any) -> None:
    run = start(redis, "1")
    finish(redis, run)
    add(redis, "2")
    assert take(redis, execution=run.execution).job_id == "2"


def test_take_of_nothing_returns_the_doorbell_id_to_listen_from(redis: Any) -> None:
    assert take(redis) == Nothing("0-0")
    assert redis.hget("rq:worker:w", "state") == b"idle"
    add(redis)
    take(redis)
    assert take(redis) == Nothing(rung(redis).decode())


def test_take_of_nothing_misses_no_later_ring(redis: Any) -> None:
    nothing = take(redis)
    add(redis)
    assert redis.xread({DOORBELL_KEY: nothing.doorbell_id})
    assert redis.xlen(DOORBELL_KEY) == 1


def test_take_while_suspended_leaves_the_job(redis: Any) -> None:
    add(redis)
    redis.set("rq:suspended", 1)
    assert take(redis) == transitions.Suspended()
    assert waiting(redis) == ["j"]
    redis.delete("rq:suspended")
    assert take(redis).job_id == "j"


@pytest.mark.parametrize("status", ["started", "finished", "failed", "stopped", "canceled", "scheduled", "deferred"])
def test_take_skips_a_job_that_does_not_wait(redis: Any, status: str) -> None:
    add(redis, "settled")
    redis.hset("rq:job:settled", "status", status)
    add(redis, "good")
    assert take(redis).job_id == "good"
    assert job_of(redis, "settled")["status"] == status


def test_take_skips_a_job_whose_hash_is_gone(redis: Any) -> None:
    redis.rpush("rq:queue:default", "gone")
    add(redis, "good")
    assert take(redis).job_id == "good"
    assert not redis.exists("rq:job:gone")


@pytest.mark.parametrize("kind", ["string", "list", "set"])
def test_take_sets_a_key_of_another_type_aside(redis: Any, kind: str) -> None:
    write: dict[str, Callable[[str, str], Any]] = {"string": redis.set, "list": redis.rpush, "set": redis.sadd}
    write[kind]("rq:job:bad", "x")
    redis.rpush("rq:queue:default", "bad")
    add(redis, "good")
    skipped = take(redis)
    assert isinstance(skipped, Skipped)
    assert (skipped.queue, skipped.job_id) == ("default", "bad")
    assert "WRONGTYPE" in skipped.reason
    assert take(redis).job_id == "good"


@pytest.mark.parametrize("status", ["nonsense", "", "created"])
def test_take_returns_a_job_with_an_unknown_status_for_the_worker_to_fail(redis: Any, status: str) -> None:
    add(redis)
    redis.hset("rq:job:j", "status", status)
    taken = take(redis)
    assert (taken.job_id, taken.fields.status) == ("j", status.encode())


def test_take_corrects_the_origin_of_a_job_in_another_queue(redis: Any) -> None:
    add(redis, queue="low", origin="elsewhere")
    run = Run("j", "e", "low", "w")
    take(redis, "low", execution="e")
    assert job_of(redis)["origin"] == "low"
    assert finish(redis, run) == "finished"
    assert redis.zscore("rq:finished:low", "j")


# renew


def test_renew_extends_the_lease(redis: Any) -> None:
    run = start(redis, lease=3)
    score = redis.zscore("rq:wip:default", f"j:{run.execution}")
    before = time.time()
    assert transitions.renew(redis, run, 500) == "held"
    key = f"rq:execution:j:{run.execution}"
    assert float(redis.hget(key, "lease_until")) - 500 == moment_since(before)
    assert redis.zscore("rq:wip:default", f"j:{run.execution}") > score + 490
    assert redis.ttl(key) > 500
    assert events(redis)[-1] == ("j", "started")


def test_renew_restores_a_run_whose_keys_are_gone(redis: Any) -> None:
    run = start(redis)
    key = f"rq:execution:j:{run.execution}"
    before = redis.hkeys(key)
    redis.delete(key)
    assert transitions.renew(redis, run, 30) == "held"
    assert sorted(redis.hkeys(key)) == sorted(before)
    assert transitions.cancel(redis, "j", None, 100) == "started"


def test_renew_passes_progress_on(redis: Any) -> None:
    run = start(redis)
    for progress in ('{"done": 1}', '{"done": 2}'):
        assert transitions.renew(redis, run, 30, progress) == "held"
        assert job_of(redis)["progress"] == progress
    assert [status for _, status in events(redis)] == ["queued", "started", "started", "started"]


def lose_to_recover(redis: Any, run: Run) -> None:
    ((lost, *_),) = transitions.recover(redis, ["default"])
    assert lost == run
    assert release(redis, lost, crashed=True) == "queued"


def lose_to_another_worker(redis: Any, run: Run) -> None:
    lose_to_recover(redis, run)
    take_again(redis, worker="w2")


def lose_to_cancel(redis: Any, run: Run) -> None:
    # rq.job.Job.cancel() does the same.
    redis.hset("rq:job:j", "status", "canceled")
    redis.zrem("rq:wip:default", f"j:{run.execution}")


def lose_to_cancel_of_status_only(redis: Any, run: Run) -> None:
    redis.hset("rq:job:j", "status", "canceled")


def lose_to_delete(redis: Any, run: Run) -> None:
    redis.delete("rq:job:j")


LATE: list[Callable[[Redis, Run], Any]] = [
    lambda redis, run: transitions.renew(redis, run, 30, '{"done": 1}'),
    lambda redis, run: finish(redis, run, "finished", "1", '{"done": 1}'),
    lambda redis, run: finish(redis, run, "failed"),
    lambda redis, run: finish(redis, run, "stopped"),
    lambda redis, run: release(redis, run),
    lambda redis, run: release(redis, run, crashed=True, limit=0),
]


@pytest.mark.parametrize("late", LATE, ids=["renew", "finished", "failed", "stopped", "release", "crash"])
@pytest.mark.parametrize(
    "lose",
    [lose_to_recover, lose_to_another_worker, lose_to_cancel, lose_to_cancel_of_status_only, lose_to_delete],
)
def test_run_that_lost_its_job_changes_nothing(
    redis: Any, lose: Callable[[Redis, Run], None], late: Callable[[Redis, Run], Any]
) -> None:
    run = start(redis, lease=EXPIRED)
    lose(redis, run)
    # The run's own keys may be deleted: nobody reads them any more.
    own = {f"rq:execution:j:{run.execution}".encode(), b"rq:worker:w:executions", b"rq:executions:j", b"rq:wip:default"}
    before = {key: value for key, value in dump(redis).items() if key not in own}
    others = redis.zrange("rq:wip:default", 0, -1)
    assert late(redis, run) in (False, "lost")
    assert {key: value for key, value in dump(redis).items() if key not in own} == before
    kept = [member for member in others if member != f"j:{run.execution}".encode()]
    assert [member for member in redis.zrange("rq:wip:default", 0, -1) if member in kept] == kept


# finish


def test_finish_stores_the_result(redis: Any) -> None:
    run = start(redis)
    before = time.time()
    assert finish(redis, run, value='{"a": 1}', progress='{"done": 9}') == "finished"
    job = job_of(redis)
    assert (job["status"], job["progress"]) == ("finished", '{"done": 9}')
    assert seconds_of(job["ended_at"]) >= seconds_of(job["started_at"])
    ((_, result),) = redis.xrange("rq:results:j")
    assert result[b"type"] == b"1"
    assert json.loads(base64.b64decode(result[b"return_value"])) == {"a": 1}
    assert (result[b"worker_name"], result[b"execution_id"]) == (b"w", run.execution.encode())
    assert float(result[b"execution_ended_at"]) >= float(result[b"execution_started_at"])
    for key in ("rq:job:j", "rq:results:j"):
        assert redis.ttl(key) == just_set(100)
    assert redis.zscore("rq:finished:default", "j") - 100 == moment_since(before - 1)  # a whole second
    assert redis.keys("rq:execution*") == redis.keys("rq:wip*") == redis.keys("rq:worker:w:executions") == []
    assert events(redis)[-1] == ("j", "finished")


def test_finish_with_null_stores_a_result_without_a_value(redis: Any) -> None:
    finish(redis, start(redis))
    ((_, result),) = redis.xrange("rq:results:j")
    assert b"return_value" not in result


@pytest.mark.parametrize("outcome", ["failed", "stopped"])
def test_finish_stores_a_failure(redis: Any, outcome: Literal["failed", "stopped"]) -> None:
    run = start(redis)
    before = time.time()
    assert finish(redis, run, outcome) == outcome
    job = job_of(redis)
    assert (job["status"], job["error"]) == (outcome, BOOM.error)
    ((_, result),) = redis.xrange("rq:results:j")
    assert (result[b"type"], result[b"exc_string"]) == (b"2", BOOM.exception.encode())
    for key in ("rq:job:j", "rq:results:j"):
        assert redis.ttl(key) == just_set(200)
    assert redis.zscore("rq:failed:default", "j") - 200 == moment_since(before - 1)  # a whole second
    assert redis.keys("rq:execution*") == redis.keys("rq:wip*") == []
    assert events(redis)[-1] == ("j", outcome)


@pytest.mark.parametrize("outcome", ["finished", "failed", "stopped"])
def test_finish_sent_twice_writes_once(redis: Any, outcome: Literal["finished", "failed", "stopped"]) -> None:
    run = start(redis)
    finish(redis, run, outcome, "1")
    before = dump(redis)
    assert finish(redis, run, outcome, "1") == "lost"
    assert dump(redis) == before


def test_finish_does_not_recreate_the_key_of_a_forgotten_worker(redis: Any) -> None:
    run = start(redis)
    redis.delete("rq:worker:w")
    assert finish(redis, run) == "finished"
    assert not redis.exists("rq:worker:w")


@pytest.mark.parametrize(
    ("outcome", "own", "ttl"),
    [("finished", {"result_ttl": 7}, 7), ("failed", {"failure_ttl": 8}, 8), ("stopped", {"failure_ttl": 9}, 9)],
)
def test_finish_prefers_the_jobs_own_ttl(redis: Any, outcome: Any, own: dict[str, Any], ttl: int) -> None:
    finish(redis, start(redis, **own), outcome)
    assert 0 < redis.ttl("rq:job:j") <= ttl
    assert 0 < redis.ttl("rq:results:j") <= ttl


def test_finish_with_result_ttl_0_keeps_nothing(redis: Any) -> None:
    assert finish(redis, start(redis, result_ttl=0), value="1") == "finished"
    left = {key.decode() for key in redis.scan_iter() if not key.startswith((b"rq:api:metrics", b"rq:api:minute:"))}
    assert left <= {EVENTS_KEY, DOORBELL_KEY, "rq:queues", "rq:worker:w"}
    assert events(redis)[-1] == ("j", "finished")


@pytest.mark.parametrize(
    ("outcome", "own", "registry"),
    [("finished", {"result_ttl": -1}, "finished"), ("failed", {"failure_ttl": -1}, "failed")],
)
def test_finish_with_a_ttl_of_minus_1_keeps_the_job_for_ever(
    redis: Any, outcome: Any, own: dict[str, Any], registry: str
) -> None:
    assert finish(redis, start(redis, **own), outcome) == outcome
    assert job_of(redis)["status"] == outcome
    assert redis.ttl("rq:job:j") == redis.ttl("rq:results:j") == -1
    # RQ writes -1 for a failure. Its cleanup skips both values.
    assert redis.zscore(f"rq:{registry}:default", "j") in (float("inf"), -1)


@pytest.mark.parametrize(
    "fields",
    [{"repeats_left": "1"}, {"rate_limit_key": "k"}, {"webhooks": "[]"}],
    ids=lambda fields: next(iter(fields)),
)
@pytest.mark.parametrize("outcome", ["finished", "failed"])
def test_finish_leaves_jobs_that_only_rq_can_end_to_rq(redis: Any, outcome: Any, fields: dict[str, Any]) -> None:
    run = start(redis, **fields)
    before = dump(redis)
    assert finish(redis, run, outcome) == "rq"
    assert dump(redis) == before


def test_finish_leaves_a_job_with_dependents_to_rq(redis: Any) -> None:
    run = start(redis)
    redis.sadd("rq:job:j:dependents", "other")
    assert finish(redis, run) == "rq"
    assert transitions.renew(redis, run, 30) == "held"


#: Lua reads some of these as numbers; Redis reads none of them as a count of seconds.
BAD_NUMBERS = ["long", "", "1.5", "nan", "inf", "-inf", "1e30", "0x10"]
CORRUPT = [
    *(("retry_intervals", value) for value in ("{", '{"a": 1}', '"x"', "[null]", '["x"]', "[1.5]", "[1e400]", "[[]]")),
    *((field, value) for field in ("retries_left", "failure_ttl") for value in BAD_NUMBERS),
]


@pytest.mark.parametrize(("field", "value"), CORRUPT)
def test_finish_fails_a_job_whose_hash_is_corrupt(redis: Any, field: str, value: str) -> None:
    """If the script raised half-way, the run would have ended, and the job would stay started for ever."""
    fields = {"retries_left": "1" if field == "retry_intervals" else "0"}
    run = start(redis, **dict[str, Any](fields | {field: value}))
    assert finish(redis, run, "failed") in ("failed", "queued", "scheduled")
    assert job_of(redis)["status"] in ("failed", "queued", "scheduled")


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_finish_ends_a_job_whose_result_ttl_is_corrupt(redis: Any, value: str) -> None:
    run = start(redis, result_ttl=value)
    assert finish(redis, run, "finished", "1") == "finished"
    assert job_of(redis)["status"] == "finished"


def take_and_finish(client: Any, run: Run) -> Any:
    return transitions.take_and_finish(client, run, ending("finished", "1"), "e", 30, ["default", "low"])


def test_take_and_finish_does_both(redis: Any) -> None:
    run = start(redis, "1")
    add(redis, "2", "low")
    client = redis.client()
    assert finish(redis, Run("none", "e", "default", "w")) == "lost"  # loads the script
    taken = take_and_finish(client, run)
    assert isinstance(taken, Taken)
    assert (taken.queue, taken.job_id) == ("low", "2")
    assert transitions.read_finish(client) == "finished"
    assert job_of(redis, "1")["status"] == "finished"
    assert redis.smembers("rq:worker:w:executions") == {b"2:e"}
    assert take_and_finish(client, run)[:3] == taken[:3]  # sent again: the same answer, because the end was written
    assert transitions.read_finish(client) == "lost"


def test_take_and_finish_loads_no_script(redis: Any) -> None:
    run = start(redis)
    client = redis.client()
    redis.script_flush()
    assert take_and_finish(client, run) is None
    with pytest.raises(NoScriptError):
        transitions.read_finish(client)
    assert finish(redis, run) == "finished"


# retries


def test_finish_of_a_failed_run_with_retries_left_puts_the_job_back(redis: Any) -> None:
    add(redis, "other")
    redis.lrem("rq:queue:default", 0, "other")
    run = start(redis, retries_left=2)
    redis.rpush("rq:queue:default", "other")
    assert finish(redis, run, "failed", progress='{"done": 1}') == "queued"
    job = job_of(redis)
    assert (job["status"], job["retries_left"], job["started_at"], job["worker_name"]) == ("queued", "1", "", "")
    assert "progress" not in job
    assert "error" not in job
    assert waiting(redis) == ["other", "j"]
    assert not redis.exists("rq:results:j", "rq:failed:default", "rq:wip:default")
    assert events(redis)[-1] == ("j", "queued")


def test_finish_retries_at_the_front_if_the_job_says_so(redis: Any) -> None:
    run = start(redis, retries_left=1, enqueue_at_front_on_retry=1)
    add(redis, "other")
    assert finish(redis, run, "failed") == "queued"
    assert waiting(redis) == ["j", "other"]


def test_retries_are_limited(redis: Any) -> None:
    add(redis, retries_left=2)
    assert [finish(redis, take_again(redis), "failed") for _ in range(3)] == ["queued", "queued", "failed"]
    assert job_of(redis)["retries_left"] == "0"


def test_stopped_job_is_not_retried(redis: Any) -> None:
    assert finish(redis, start(redis, retries_left=2), "stopped") == "stopped"


def test_retries_pause_for_their_intervals(redis: Any) -> None:
    add(redis, retries_left=3, retry_intervals="[10, 20]")
    # If there are more retries than intervals, RQ uses the first interval more than once.
    for pause in (10, 10, 20):
        before = time.time()
        assert finish(redis, take_again(redis), "failed") == "scheduled"
        job = job_of(redis)
        assert (job["status"], job["started_at"], job["worker_name"]) == ("scheduled", "", "")
        assert events(redis)[-1] == ("j", "scheduled")
        assert transitions.promote(redis, ["default"]).jobs == 0
        assert waiting(redis) == []
        assert redis.zscore("rq:scheduled:default", "j") - pause == moment_since(before)
        redis.zadd("rq:scheduled:default", {"j": before - 1})
        assert transitions.promote(redis, ["default"]).jobs == 1
    assert finish(redis, take_again(redis), "failed") == "failed"


# promote


def schedule(redis: Any, job_id: str, when: float, queue: str = "default", **fields: Any) -> None:
    redis.hset(f"rq:job:{job_id}", mapping={"status": "scheduled", "origin": queue, **fields})
    redis.zadd(f"rq:scheduled:{queue}", {job_id: when})


def test_promote_puts_due_jobs_into_the_queue_in_order(redis: Any) -> None:
    now = time.time()
    for job_id, when in [("later", now + 60), ("2", now - 1), ("1", now - 2)]:
        schedule(redis, job_id, when)
    schedule(redis, "3", now - 3, "other")
    schedule(redis, "4", now - 3, "not mine")
    assert transitions.promote(redis, ["default", "other"]).jobs == 3
    assert (waiting(redis), waiting(redis, "other"), waiting(redis, "not mine")) == (["1", "2"], ["3"], [])
    assert job_of(redis, "1")["status"] == "queued"
    assert rung(redis)
    before = dump(redis)
    assert transitions.promote(redis, ["default", "other"]).jobs == 0
    assert dump(redis) == before


@pytest.mark.parametrize("field", ["enqueue_at_front", "enqueue_at_front_on_retry"])
def test_promote_puts_a_job_with_at_front_in_front(redis: Any, field: str) -> None:
    add(redis, "other")
    schedule(redis, "j", 1, **dict[str, Any]({field: 1}))
    transitions.promote(redis, ["default"])
    assert waiting(redis) == ["j", "other"]


@pytest.mark.parametrize("status", ["canceled", "finished", "queued"])
def test_promote_drops_jobs_that_are_not_scheduled_any_more(redis: Any, status: str) -> None:
    schedule(redis, "j", 1, status=status)
    redis.zadd("rq:scheduled:default", {"gone": 1})
    assert transitions.promote(redis, ["default"]).jobs == 0
    assert redis.zcard("rq:scheduled:default") == 0
    assert waiting(redis) == []
    assert not redis.exists("rq:job:gone")


def test_promote_is_not_held_up_by_poison(redis: Any) -> None:
    redis.set("rq:job:bad", "x")
    redis.zadd("rq:scheduled:default", {"bad": 1})
    schedule(redis, "good", 2)
    assert transitions.promote(redis, ["default"]).jobs == 1
    assert waiting(redis) == ["good"]


# release


def test_release_puts_the_job_in_front_of_its_queue(redis: Any) -> None:
    run = start(redis)
    transitions.renew(redis, run, 30, '{"done": 1}')
    add(redis, "other")
    assert release(redis, run) == "queued"
    assert waiting(redis) == ["j", "other"]
    job = job_of(redis)
    assert (job["status"], job["started_at"], job["worker_name"]) == ("queued", "", "")
    assert {"crashes", "progress"}.isdisjoint(job)
    assert redis.keys("rq:execution*") == redis.keys("rq:wip*") == []
    assert events(redis)[-1] == ("j", "queued")


def test_release_sent_twice_puts_the_job_back_once(redis: Any) -> None:
    run = start(redis)
    assert [release(redis, run), release(redis, run)] == ["queued", "lost"]
    assert waiting(redis) == ["j"]


def test_release_fails_a_job_that_crashed_too_often(redis: Any) -> None:
    add(redis)
    statuses = [release(redis, take_again(redis), crashed=True, limit=2) for _ in range(3)]
    assert statuses == ["queued", "queued", "failed"]
    job = job_of(redis)
    assert (job["status"], job["crashes"], job["error"]) == ("failed", "3", BOOM.error)
    ((_, result),) = redis.xrange("rq:results:j")
    assert (result[b"type"], result[b"exc_string"]) == (b"2", BOOM.exception.encode())
    assert 0 < redis.ttl("rq:job:j") <= 200
    assert redis.zscore("rq:failed:default", "j")
    assert waiting(redis) == []


def test_release_without_a_crash_does_not_count(redis: Any) -> None:
    add(redis)
    for _ in range(5):
        assert release(redis, take_again(redis), crashed=False, limit=0) == "queued"
    assert "crashes" not in job_of(redis)


def test_release_uses_no_retries(redis: Any) -> None:
    run = start(redis, retries_left=1)
    release(redis, run, crashed=True)
    assert job_of(redis)["retries_left"] == "1"


@pytest.mark.parametrize("field", ["crashes", "failure_ttl"])
@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_release_ends_a_job_whose_hash_is_corrupt(redis: Any, field: str, value: str) -> None:
    run = start(redis, **dict[str, Any]({field: value}))
    assert release(redis, run, crashed=True, limit=0) in ("failed", "queued")
    assert job_of(redis)["status"] in ("failed", "queued")


def test_take_pops_nothing_if_it_cannot_record_the_run(redis: Any) -> None:
    add(redis, "j")
    redis.set("rq:wip:default", "text")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        transitions.take(redis, "w", "e", 30, ["default"])
    assert redis.lrange("rq:queue:default", 0, -1) == [b"j"]
    redis.delete("rq:wip:default")
    assert isinstance(transitions.take(redis, "w", "e", 30, ["default"]), transitions.Taken)


# recover


def test_recover_returns_the_runs_whose_lease_expired(redis: Any) -> None:
    dead = start(redis, "dead", lease=EXPIRED, worker="gone", crashes=2)
    start(redis, "alive", lease=30)
    assert transitions.recover(redis, ["other"]) == []
    found = transitions.recover(redis, ["other", "default"])
    assert found == [Abandoned(dead, 2, None)]
    assert transitions.recover(redis, ["default"]) == found  # it changes nothing
    assert transitions.renew(redis, dead, EXPIRED, max_crashes=0) == "held"
    assert transitions.recover(redis, ["default"]) == [Abandoned(dead, 2, 0)]
    assert release(redis, dead, crashed=True) == "queued"
    assert transitions.recover(redis, ["default"]) == []
    assert (waiting(redis), job_of(redis, "dead")["crashes"]) == (["dead"], "3")


def test_recover_ignores_a_run_whose_lease_was_renewed(redis: Any) -> None:
    run = start(redis, lease=EXPIRED)
    transitions.renew(redis, run, 30)
    assert transitions.recover(redis, ["default"]) == []


def test_recover_ignores_a_run_of_a_stock_worker_until_rq_abandons_it(redis: Any) -> None:
    add(redis)
    redis.hset("rq:job:j", "status", "started")
    redis.hset("rq:execution:j:e", mapping={"id": "e", "worker_name": "stock"})
    redis.zadd("rq:wip:default", {"j:e": time.time() + 3600})
    assert transitions.recover(redis, ["default"]) == []
    redis.zadd("rq:wip:default", {"j:e": time.time() - 5})
    assert transitions.recover(redis, ["default"]) == [Abandoned(Run("j", "e", "default", "stock"), 0, None)]


@pytest.mark.parametrize("ours", ["just now", "yesterday"])
def test_recover_finds_a_run_behind_those_of_many_stock_workers(redis: Any, ours: str) -> None:
    """A stock worker's run is abandoned within 90 seconds; ours is abandoned a day before its score (GRACE)."""
    run = start(redis, lease=EXPIRED)
    redis.zadd("rq:wip:default", {f"stock:{number}": time.time() + 30 + number / 10 for number in range(300)})
    if ours == "yesterday":
        redis.zadd("rq:wip:default", {f"j:{run.execution}": time.time() - 1})
    assert transitions.recover(redis, ["default"]) == [Abandoned(run, 0, None)]


def test_recover_returns_a_run_whose_execution_has_expired(redis: Any) -> None:
    run = start(redis)
    redis.delete(f"rq:execution:j:{run.execution}")
    redis.zadd("rq:wip:default", {f"j:{run.execution}": time.time() - 1})
    ((found, *_),) = transitions.recover(redis, ["default"])
    assert found == run._replace(worker="")
    assert release(redis, found, crashed=True) == "queued"


def test_release_removes_the_rest_of_a_lost_run(redis: Any) -> None:
    run = start(redis, lease=EXPIRED)
    redis.delete("rq:job:j")
    ((found, *_),) = transitions.recover(redis, ["default"])
    assert release(redis, found, crashed=True) == "lost"
    assert redis.keys("rq:execution*") == redis.keys("rq:wip*") == []
    assert run.job_id not in waiting(redis)


def test_recover_drops_an_entry_that_is_no_run(redis: Any) -> None:
    redis.zadd("rq:wip:default", {"nonsense": 1})
    assert transitions.recover(redis, ["default"]) == []
    assert redis.zcard("rq:wip:default") == 0


def test_recover_is_not_held_up_by_a_job_of_the_wrong_type(redis: Any) -> None:
    good = start(redis, "good", lease=EXPIRED)
    redis.set("rq:job:bad", "x")
    redis.zadd("rq:wip:default", {"bad:e": 1})
    assert good in [run for run, *_ in transitions.recover(redis, ["default"])]


def test_release_of_a_job_of_the_wrong_type_ends_its_run(redis: Any) -> None:
    """If `release` raised, every worker would try it again for ever."""
    run = start(redis, lease=EXPIRED)
    redis.delete("rq:job:j")
    redis.set("rq:job:j", "x")
    assert release(redis, run, crashed=True) == "lost"
    assert redis.zcard("rq:wip:default") == 0


def test_recover_is_not_held_up_by_a_corrupt_lease(redis: Any) -> None:
    bad, good = (start(redis, name, lease=EXPIRED) for name in ("bad", "good"))
    redis.hset(f"rq:execution:bad:{bad.execution}", "lease_until", "long")
    assert good in [run for run, *_ in transitions.recover(redis, ["default"])]


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_recover_returns_a_run_of_a_job_with_a_corrupt_count(redis: Redis, value: str) -> None:
    run = start(redis, lease=EXPIRED, crashes=value)
    assert [abandoned.run for abandoned in transitions.recover(redis, ["default"])] == [run]


INTERMEDIATE = "rq:queue:default:intermediate"


def leave_in_intermediate(redis: Any, job_id: str = "j", seen: float | None = None) -> None:
    """Leave the job as a stock worker does that is killed after its BLMOVE (rq#2236). RQ first saw it at `seen`."""
    redis.lrem("rq:queue:default", 0, job_id)
    redis.lpush(INTERMEDIATE, job_id)
    if seen:
        redis.set(f"{INTERMEDIATE}:first_seen:{job_id}", seen)


def test_recover_puts_back_what_a_stock_worker_popped_a_minute_ago(redis: Any) -> None:
    add(redis)
    add(redis, "other")
    leave_in_intermediate(redis)
    before = time.time()
    assert transitions.recover(redis, ["default"]) == []
    assert waiting(redis) == ["other"]
    seen = float(redis.get(f"{INTERMEDIATE}:first_seen:j") or 0)
    assert seen == moment_since(before)
    transitions.recover(redis, ["default"])
    assert waiting(redis) == ["other"]
    redis.set(f"{INTERMEDIATE}:first_seen:j", seen - 61)
    assert transitions.recover(redis, ["default"]) == []
    assert (waiting(redis), redis.llen(INTERMEDIATE)) == (["j", "other"], 0)
    assert not redis.exists(f"{INTERMEDIATE}:first_seen:j")
    assert events(redis)[-1] == ("j", "queued")


@pytest.mark.parametrize(
    ("status", "left"), [("started", 1), ("finished", 0), ("failed", 0), ("canceled", 0), (None, 0)]
)
def test_recover_clears_stale_intermediate_entries(redis: Any, status: str | None, left: int) -> None:
    add(redis)
    leave_in_intermediate(redis, seen=1)
    if status:
        redis.hset("rq:job:j", "status", status)
    else:
        redis.delete("rq:job:j")
    transitions.recover(redis, ["default"])
    assert redis.llen(INTERMEDIATE) == left
    assert waiting(redis) == []
    assert job_of(redis).get("status") == status


@pytest.mark.parametrize("poison", ["wrong type", "corrupt time"])
def test_recover_is_not_held_up_by_an_intermediate_entry(redis: Any, poison: str) -> None:
    for name in ("good", "bad"):
        add(redis, name)
        leave_in_intermediate(redis, name, seen=1)
    if poison == "wrong type":
        redis.delete("rq:job:bad")
        redis.set("rq:job:bad", "x")
    else:
        redis.set(f"{INTERMEDIATE}:first_seen:bad", "long ago")
    transitions.recover(redis, ["default"])
    assert "good" in waiting(redis)


# enqueue: groups, delays, keys


def add_many(redis: Any, *job_ids: str, **options: Any) -> Created | Exists | Full:
    jobs = {job_id: {"data": job_id} for job_id in job_ids}
    return transitions.enqueue(redis, "default", jobs, {"origin": "default"}, **{"limit": MANY, **options})


def test_enqueue_of_a_group_makes_all_its_jobs(redis: Any) -> None:
    created = add_many(redis, "c", "a", "b", group="g", group_ttl=100)
    assert isinstance(created, Created)
    assert waiting(redis) == ["c", "a", "b"]
    assert [job_of(redis, job_id)["data"] for job_id in "cab"] == ["c", "a", "b"]
    assert queries.read_group(redis, "g") == (3, ["queued"] * 3)
    assert redis.smembers("rq:groups") == {b"g"}
    assert [redis.ttl(key) for key in ("rq:group:g", "rq:api:group:g")] == [just_set(100)] * 2
    before = dump(redis)
    assert add_many(redis, "d", "e", group="g", group_ttl=100) == Exists("")
    assert dump(redis) == before


def test_enqueue_of_a_group_is_all_or_none(redis: Any) -> None:
    add(redis, "first")
    before = dump(redis)
    assert add_many(redis, "a", "b", "c", group="g", group_ttl=100, limit=3) == Full()
    assert dump(redis) == before
    assert isinstance(add_many(redis, "a", "b", group="g", group_ttl=100, limit=3), Created)


def test_enqueue_takes_jobs_of_any_number_of_fields(redis: Any) -> None:
    many = {f"field{number}": number for number in range(450)}
    jobs: dict[str, dict[str, Any]] = {"a": {"data": "x", **many}, "b": {"data": "y"}}
    transitions.enqueue(redis, "default", jobs, {**many, "origin": "default"}, limit=MANY, group="g", group_ttl=9)
    assert (redis.hlen("rq:job:a"), redis.hget("rq:job:b", "data")) == (450 + 5, b"y")


def test_read_group_of_an_unknown_group_is_empty(redis: Any) -> None:
    assert queries.read_group(redis, "g") == (None, [])


@pytest.mark.parametrize("when", ["delay", "at"])
def test_enqueue_of_a_delayed_job_schedules_it(redis: Any, when: str) -> None:
    before = time.time()
    created = add_many(redis, "j", **{when: 100.25 + (before if when == "at" else 0)})
    assert isinstance(created, Created)
    assert created.status == "scheduled"
    assert redis.zscore("rq:scheduled:default", "j") - 100.25 == moment_since(before)
    assert waiting(redis) == []
    assert "enqueued_at" not in job_of(redis)
    assert events(redis) == [("j", "scheduled")]
    assert redis.smembers("rq:queues") == {b"rq:queue:default"}


def test_promote_returns_when_the_next_job_is_due(redis: Any) -> None:
    add_many(redis, "a", delay=100)
    before = time.time()
    add_many(redis, "b", delay=50)
    due = transitions.promote(redis, ["other", "default"]).due
    assert due is not None
    assert 50 - (time.time() - before) <= due <= 50
    assert transitions.promote(redis, ["other"]) == (0, None)


def test_promote_takes_a_bounded_number_and_says_that_there_is_more(redis: Any) -> None:
    redis.zadd("rq:scheduled:default", {str(number): 1 for number in range(1001)})
    assert transitions.promote(redis, ["default"]) == (0, 0)
    assert transitions.promote(redis, ["default"]) == (0, None)


@pytest.mark.parametrize("group", [None, "g"])
def test_enqueue_with_a_fingerprint_remembers_it(redis: Any, group: str | None) -> None:
    def send(fingerprint: str) -> Any:
        return add_many(
            redis, "j", group=group, group_ttl=300, key_id="k", fingerprint=fingerprint, key_ttl=200, limit=1
        )

    assert isinstance(send("one"), Created)
    assert redis.ttl("rq:api:key:k") == just_set(200)
    before = dump(redis)
    assert send("two") == Exists("one")  # a full queue changes nothing
    redis.delete("rq:job:j")
    assert send("one") == Exists("one")
    assert set(dump(redis)) == set(before) - {b"rq:job:j"}


# cancel


def cancel(redis: Any, job_id: str = "j", owner: str | None = "") -> str:
    return transitions.cancel(redis, job_id, owner, 300)


def stop_requested(redis: Any, run: Run) -> bool:
    return bool(redis.hexists(f"rq:job:{run.job_id}", "stop_requested"))


def test_cancel_takes_a_waiting_job_out_of_its_queue(redis: Any) -> None:
    add(redis)
    add(redis, "other")
    before = time.time()
    assert cancel(redis) == "canceled"
    assert waiting(redis) == ["other"]
    job = job_of(redis)
    assert job["status"] == "canceled"
    assert seconds_of(job["ended_at"]) == moment_since(before)
    assert redis.ttl("rq:job:j") == just_set(300)
    assert redis.zscore("rq:canceled:default", "j") - 300 == moment_since(before - 1)  # a whole second
    assert events(redis)[-1] == ("j", "canceled")
    settled = dump(redis)
    assert cancel(redis) == "canceled"
    assert dump(redis) == settled


def test_take_skips_a_canceled_job(redis: Any) -> None:
    add(redis)
    cancel(redis)
    redis.rpush("rq:queue:default", "j")
    assert isinstance(take(redis), Nothing)
    assert job_of(redis)["status"] == "canceled"


def test_take_passes_a_bounded_number_of_stale_entries_at_a_time(redis: Any) -> None:
    redis.rpush("rq:queue:default", *range(1500))
    add(redis, limit=2 * MANY)
    assert isinstance(take(redis), Again)
    assert take_again(redis).job_id == "j"


def test_cancel_asks_the_run_to_stop(redis: Any) -> None:
    run = start(redis)
    assert cancel(redis) == "started"
    assert stop_requested(redis, run)
    assert job_of(redis)["status"] == "started"
    assert transitions.renew(redis, run, 30) == "stop"


@pytest.mark.parametrize("outcome", ["finished", "failed", "stopped"])
def test_finish_of_a_canceled_run_ends_stopped(redis: Any, outcome: Any) -> None:
    run = start(redis, retries_left=3)
    cancel(redis)
    assert finish(redis, run, outcome, "1") == "stopped"
    job = job_of(redis)
    assert (job["status"], json.loads(job["error"])["type"]) == ("stopped", "JobStopped")
    (result,) = redis.xrange("rq:results:j")
    assert (result[1][b"type"], b"return_value" in result[1]) == (b"2", False)
    assert waiting(redis) == []
    assert redis.zcard("rq:scheduled:default") == 0


@pytest.mark.parametrize("crashed", [False, True])
def test_release_of_a_canceled_run_ends_stopped(redis: Any, crashed: bool) -> None:
    run = start(redis)
    cancel(redis)
    assert release(redis, run, crashed=crashed) == "stopped"
    assert (job_of(redis)["status"], waiting(redis)) == ("stopped", [])


def test_canceled_run_of_a_dead_worker_is_recovered_as_stopped(redis: Any) -> None:
    run = start(redis)
    cancel(redis)
    assert transitions.renew(redis, run, EXPIRED) == "stop"
    ((abandoned, *_),) = transitions.recover(redis, ["default"])
    assert abandoned == run
    assert release(redis, abandoned, crashed=True) == "stopped"


def forget(redis: Any, run: Run) -> None:
    """Let Redis drop the run's own key, as it does if no worker recovers the run in time."""
    redis.delete(f"rq:execution:{run.job_id}:{run.execution}")
    redis.zadd("rq:wip:default", {f"{run.job_id}:{run.execution}": time.time() - 1}, xx=True)


def test_rqs_own_cleanup_fails_no_job_while_all_workers_are_away(redis: Any) -> None:
    run = start(redis, lease=-3600)  # an hour ago; `rq info` cleans up like this
    StartedJobRegistry("default", connection=redis, serializer=JSONSerializer).cleanup()
    assert job_of(redis)["status"] == "started"
    assert [abandoned for abandoned, *_ in transitions.recover(redis, ["default"])] == [run]


def test_cancel_of_a_run_whose_lease_ran_out_ends_it_at_once(redis: Any) -> None:
    run = start(redis, lease=EXPIRED)
    assert cancel(redis) == "stopped"
    assert transitions.recover(redis, ["default"]) == []
    assert finish(redis, run) == "lost"


def test_stop_is_kept_until_the_run_of_a_dead_worker_is_recovered(redis: Any) -> None:
    run = start(redis)
    cancel(redis)
    forget(redis, run)
    ((abandoned, *_),) = transitions.recover(redis, ["default"])
    assert release(redis, abandoned, crashed=True) == "stopped"


def test_canceled_run_that_was_forgotten_cannot_change_the_next_run(redis: Any) -> None:
    run = start(redis)
    forget(redis, run)
    assert cancel(redis) == "stopped"
    assert transitions.retry(redis, "j", None, MANY) == "queued"
    again = take_again(redis)
    assert transitions.recover(redis, ["default"]) == []
    assert finish(redis, run, "finished", "1") == "lost"
    assert finish(redis, again) == "finished"


def test_entry_of_a_run_outlives_its_lease_by_a_day_for_cancel(redis: Any) -> None:
    run = start(redis)
    assert redis.ttl("rq:executions:j") > 86400
    finish(redis, run)
    assert not redis.exists("rq:executions:j")


def test_renew_of_a_lost_run_removes_its_keys(redis: Any) -> None:
    run = start(redis)
    redis.zrem("rq:wip:default", f"j:{run.execution}")  # as RQ's own code does
    assert transitions.renew(redis, run, 30) == "lost"
    assert not redis.keys("rq:execution*")
    assert not redis.smembers("rq:worker:w:executions")


def test_stop_does_not_outlive_its_run(redis: Any) -> None:
    run = start(redis)
    cancel(redis)
    finish(redis, run)
    redis.hset("rq:job:j", "status", "queued")  # as `rq requeue` does
    redis.rpush("rq:queue:default", "j")
    again = take_again(redis)
    assert transitions.renew(redis, again, 30) == "held"
    assert finish(redis, again) == "finished"


def test_cancel_of_an_ended_job_changes_nothing(redis: Any) -> None:
    finish(redis, start(redis))
    before = dump(redis)
    assert cancel(redis) == "finished"
    assert dump(redis) == before


@pytest.mark.parametrize(("owner", "answer"), [("", ""), ("bob", ""), ("alice", "canceled"), (None, "canceled")])
def test_cancel_and_retry_check_the_owner(redis: Any, owner: str | None, answer: str) -> None:
    add(redis, owner="alice")
    assert cancel(redis, owner=owner) == answer
    cancel(redis, owner="alice")
    assert transitions.retry(redis, "j", owner, MANY) == ("queued" if answer else "")


def test_finish_leaves_a_canceled_job_with_dependents_to_rq(redis: Any) -> None:
    run = start(redis)
    redis.sadd("rq:job:j:dependents", "other")
    cancel(redis)
    assert finish(redis, run) == "rq"
    assert release(redis, run) == "rq"


# retry


@pytest.mark.parametrize("status", ["failed", "stopped", "canceled"])
def test_retry_makes_the_job_wait_behind_the_others(redis: Any, status: Any) -> None:
    if status == "canceled":
        add(redis, retries_left=1, retries=2)
        cancel(redis)
    else:
        finish(redis, start(redis, retries_left=0, retries=2), status)
    add(redis, "other")
    redis.hset("rq:job:j", "crashes", 3)
    assert transitions.retry(redis, "j", "", MANY) == "queued"
    assert waiting(redis) == ["other", "j"]
    job = job_of(redis)
    assert (job["status"], job["retries_left"], redis.ttl("rq:job:j")) == ("queued", "2", -1)
    assert {"crashes", "error", "progress"}.isdisjoint(job)
    assert not redis.exists("rq:failed:default", "rq:canceled:default")
    assert events(redis)[-1] == ("j", "queued")
    before = dump(redis)
    assert transitions.retry(redis, "j", "", MANY) == "not queued"
    assert dump(redis) == before


def test_retry_into_a_full_queue_changes_nothing(redis: Any) -> None:
    finish(redis, start(redis), "failed")
    add(redis, "other")
    before = dump(redis)
    assert transitions.retry(redis, "j", "", 1) == "full"
    assert dump(redis) == before


# The index of /jobs


def index(redis: Any) -> dict[str, list[str]]:
    return {
        key.decode().removeprefix("rq:api:jobs:"): [job_id.decode() for job_id in redis.zrange(key, 0, -1)]
        for key in redis.scan_iter("rq:api:jobs:*")
    }


def test_index_follows_the_status(redis: Any) -> None:
    add(redis, owner="alice")
    seen = [index(redis)]

    def see(_: object) -> None:
        seen.append(index(redis))

    run = take_again(redis)
    see(run)
    see(release(redis, run))
    see(finish(redis, take_again(redis), "failed"))
    see(transitions.retry(redis, "j", None, MANY))
    see(cancel(redis, owner=None))
    see(transitions.retry(redis, "j", None, MANY))
    see(finish(redis, take_again(redis)))
    statuses = ["queued", "started", "queued", "failed", "queued", "canceled", "queued", "finished"]
    assert seen == [{f":{status}": ["j"], f"alice:{status}": ["j"]} for status in statuses]


def test_list_goes_through_all_statuses_newest_first(redis: Any) -> None:
    for number in range(6):
        add(redis, str(number))
    finish(redis, take_again(redis))
    finish(redis, take_again(redis), "failed")
    cancel(redis, "3")
    fields = ["status", "function", "origin", "owner", "created_at"]
    first = queries.list_jobs(redis, None, fields, limit=4, most=MANY)
    assert [(job_id, (values[0] or b"").decode()) for job_id, values in first.jobs] == [
        ("5", "queued"), ("4", "queued"), ("3", "canceled"), ("2", "queued"),
    ]  # fmt: skip
    second = queries.list_jobs(redis, None, fields, limit=4, most=MANY, cursor=first.next)
    assert ([job_id for job_id, _ in second.jobs], second.next) == (["1", "0"], None)
    filtered = queries.list_jobs(redis, None, fields, status="failed", limit=4, most=MANY)
    assert ([job_id for job_id, _ in filtered.jobs], filtered.next) == (["1"], None)


def test_list_looks_at_no_more_jobs_than_its_limit(redis: Any) -> None:
    for number in range(5):
        add(redis, str(number))
    page = queries.list_jobs(
        redis, None, ["status", "function", "origin", "owner", "created_at"], queue="other", limit=4, most=3
    )
    assert page.jobs == []
    assert page.next
    assert page.next.job_id == "2"


# All scripts


def test_scripts_work_after_a_script_flush(redis: Any) -> None:
    add(redis)
    redis.script_flush()
    run = take_again(redis)
    redis.script_flush()
    assert finish(redis, run) == "finished"


def test_scripts_work_with_a_client_that_decodes(redis: Any) -> None:
    redis.connection_pool.connection_kwargs["decode_responses"] = True
    try:
        redis.connection_pool.disconnect()
        assert isinstance(add(redis), Created)
        assert finish(redis, take_again(redis), value="1") == "finished"
    finally:
        redis.connection_pool.connection_kwargs["decode_responses"] = False
        redis.connection_pool.disconnect()


def test_event_log_is_bounded(redis: Any) -> None:
    # A tenth of the real bound shows it, too. The fake server would take ten seconds for the full one.
    script = scripts._COMMON.replace("EVENTS_KEPT = 10000", "EVENTS_KEPT = 1000")
    redis.eval(script + "for i = 1, 2500 do log_event('j', 'queued') end", 0)
    assert 1_000 <= redis.xlen(EVENTS_KEY) < 1_200
    assert "EVENTS_KEPT = 10000" in scripts._COMMON


def test_doorbell_rings_for_each_job_that_begins_to_wait(redis: Any) -> None:
    rings = []

    def ring_of(what: object) -> None:
        assert what
        rings.append(rung(redis))

    ring_of(add(redis, retries_left=1))
    ring_of(finish(redis, take_again(redis), "failed"))
    ring_of(release(redis, take_again(redis)))
    schedule(redis, "later", 1)
    ring_of(transitions.promote(redis, ["default"]).jobs)
    assert len(set(rings)) == 4
