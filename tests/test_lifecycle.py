"""`docs/lifecycle.md` and the table of keys in `common.lua` say what the scripts do, as seen on a real server."""

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from types import ModuleType
from typing import Any, Literal, NamedTuple

import pytest
import rq
from redis import Redis
from rq.defaults import RQ_KEY_PREFIX
from rq.executions import Execution
from rq.group import Group
from rq.job import Job, JobStatus
from rq.registry import ReadyJobRegistry
from rq.repeat import Repeat
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.utils import now as utc_now
from rq.worker_registration import REDIS_WORKER_KEYS

from app.core import scripts, transitions
from app.core.queue import Queue
from app.core.scripts import Failure, describe_failure
from app.core.transitions import Created, Ending, Run, Taken
from tests.processes import ROOT, valkey_server

PAGE = (ROOT / "docs/lifecycle.md").read_text()
COMMON = (ROOT / "app/core/lua/common.lua").read_text()
QUEUE, JOB, GONE = "default", "j", "gone"
#: The labels of edges that no script takes.
RQ, TTL = "RQ", "TTL"
BOOM = describe_failure("ValueError", "boom")
#: The seconds that a worker's hash lives after a heartbeat, as in app/worker/rq_worker.py.
ALIVE = 35
LEASE, EXPIRED = 30, -1

_NAMES = {digest: name for name, digest in scripts.DIGESTS.items()}
#: A job's hash, and the seconds that it is kept.
_LOOK = "return {redis.call('HGETALL', ARGV[1]), redis.call('TTL', ARGV[1])}"
_KEYS = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  found[#found + 1] = {key, redis.call('TYPE', key).ok, redis.call('TTL', key)}
end
return found
"""


class Edge(NamedTuple):
    before: str
    label: str
    after: str


class Key(NamedTuple):
    """A key that was seen in Redis."""

    name: str
    kind: str
    ttl: int


class Row(NamedTuple):
    """A row of the table of keys."""

    pattern: str
    kind: str
    ttl: str
    writers: tuple[str, ...]


class Observer:
    """A connection that notes each change that a script makes to one job, and which keys there are then."""

    def __init__(self, wire: Any) -> None:
        self._wire = wire
        self._look, self._list_keys = [wire.execute("SCRIPT", "LOAD", text) for text in (_LOOK, _KEYS)]
        for text in scripts.SCRIPTS.values():
            wire.execute("SCRIPT", "LOAD", text)
        self.job_id = JOB
        self.notes_keys = False
        self.seen_edges: set[Edge] = set()
        self.seen_keys: set[Key] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)

    def evalsha(self, digest: str, *arguments: Any) -> Any:
        if digest not in _NAMES:  # one of the model's own
            return self._wire.evalsha(digest, *arguments)
        with self.watch(_NAMES[digest]):
            return self._wire.evalsha(digest, *arguments)

    @contextmanager
    def watch(self, label: str) -> Iterator[None]:
        """Note what happens in the block as an edge with this label, if it changes the job's hash."""
        before, _ = self._read()
        yield
        after, ttl = self._read()
        if before != after:
            self.seen_edges.add(Edge(_status_of(before), label, _status_of(after)))
        if ttl >= 0:
            self.seen_edges.add(Edge(_status_of(after), TTL, GONE))
        if self.notes_keys:
            found = self._wire.evalsha(self._list_keys, 0)
            self.seen_keys |= {Key(name.decode(), kind.decode(), ttl) for name, kind, ttl in found}

    def _read(self) -> tuple[dict[bytes, bytes], int]:
        flat, ttl = self._wire.evalsha(self._look, 0, scripts.job_key(self.job_id))
        return dict(zip(flat[::2], flat[1::2], strict=True)), ttl


def _status_of(fields: dict[bytes, bytes]) -> str:
    return fields[b"status"].decode() if fields else GONE


# What happens to a job that the model does not have


class Life:
    """One server, with what clients and workers do there."""

    def __init__(self, observer: Any, redis: Redis) -> None:
        self.observer = observer
        self.redis: Any = redis
        self.queue = Queue(QUEUE, connection=redis)
        self._executions = 0

    def begin(self) -> None:
        """Forget all jobs. A worker has sent its heartbeat."""
        self.redis.flushall()
        self.observer.job_id = JOB
        self.redis.hset("rq:worker:w", "birth", "now")
        self.redis.expire("rq:worker:w", ALIVE)

    def enqueue(self, fields: dict[str, Any] | None = None, **options: Any) -> None:
        shared = {"origin": QUEUE, "data": "x", "owner": "alice", **(fields or {})}
        created = transitions.enqueue(self.observer, QUEUE, {JOB: {}}, shared, limit=9, **options)
        assert isinstance(created, Created)

    def take(self, queue: str = QUEUE, lease: int = LEASE) -> Run:
        self._executions += 1
        execution = f"e{self._executions}"
        taken = transitions.take(self.observer, "w", execution, lease, [queue])
        assert isinstance(taken, Taken)
        return Run(taken.job_id, execution, queue, "w")

    def finish(
        self,
        run: Run,
        outcome: Literal["finished", "failed", "stopped"] = "finished",
        after: float | None = None,
        result_ttl: int = 100,
    ) -> str:
        failure = Failure() if outcome == "finished" else BOOM
        return transitions.finish(self.observer, run, Ending(outcome, result_ttl, 200, "", failure, "", after=after))

    def cancel(self, job_id: str = JOB) -> str:
        return transitions.cancel(self.observer, job_id, None, 100)

    def enqueue_as_rq(self, job_id: str = JOB, **options: Any) -> None:
        with self.observer.watch(RQ):
            self.queue.enqueue("app.functions.count_words", job_id=job_id, **options)

    def end_as_rq(self, run: Run, *, failed: bool = False, stopped: bool = False) -> None:
        """Have RQ end the run, as the worker does where `finish` answers `rq`."""
        worker: Any = rq.Worker([self.queue], name="w", connection=self.redis, serializer=JSONSerializer)
        job = Job.fetch(run.job_id, connection=self.redis, serializer=JSONSerializer)
        job.ended_at = utc_now()
        execution = Execution(run.execution, run.job_id, self.redis, run.worker)
        with self.observer.watch(RQ):
            if failed or stopped:
                worker._stopped_job_id = job.id if stopped else None
                worker.handle_job_failure(job, self.queue, exc_string="boom", execution=execution)
            else:
                worker.handle_job_success(job, self.queue, self.queue.started_job_registry, execution)


def life_of_a_job_that_nobody_takes(life: Life) -> None:
    life.enqueue(ttl=50, key_id="k", fingerprint="f", key_ttl=300)


def life_of_a_delayed_job(life: Life) -> None:
    life.enqueue(delay=100, ttl=50)


def life_of_a_job_that_is_tried_again_at_once(life: Life) -> None:
    life.enqueue({"retries_left": 1})
    assert life.finish(life.take(), "failed") == "queued"


def life_of_a_job_whose_result_nobody_wants(life: Life) -> None:
    life.enqueue()
    assert life.finish(life.take(), result_ttl=0) == "finished"


def life_of_a_job_that_is_canceled_after_its_lease_ran_out(life: Life) -> None:
    life.enqueue()
    life.take(lease=EXPIRED)
    assert life.cancel() == "stopped"


def life_of_a_job_that_a_stock_worker_popped(life: Life) -> None:
    life.enqueue()
    intermediate = life.queue.intermediate_queue
    life.redis.lmove(life.queue.key, intermediate.key, "LEFT", "RIGHT")
    transitions.recover(life.observer, [QUEUE])
    life.redis.set(intermediate.get_first_seen_key(JOB), 1, keepttl=True)  # long ago
    transitions.recover(life.observer, [QUEUE])
    assert life.redis.lrange(life.queue.key, 0, -1) == [JOB.encode()]


def life_of_a_message_to_a_webhook(life: Life) -> None:
    life.enqueue({"notify": "https://example.com/"})
    assert life.finish(life.take()) == "finished"
    (message,) = life.redis.lrange(scripts.deliveries_key(JOB), 0, -1)
    life.observer.job_id = message.decode()

    def try_again() -> Run:
        assert transitions.redeliver(life.observer, JOB, 9) == "queued"
        return life.take(scripts.WEBHOOKS)

    assert life.finish(life.take(scripts.WEBHOOKS), "failed") == "scheduled"
    assert life.finish(try_again()) == "finished"
    assert life.finish(try_again(), "failed", after=-1) == "failed"
    assert life.finish(try_again(), "stopped") == "stopped"
    transitions.redeliver(life.observer, JOB, 9)
    assert life.cancel(life.observer.job_id) == "canceled"
    transitions.redeliver(life.observer, JOB, 9)


def life_of_a_group(life: Life) -> None:
    jobs = {f"{JOB}{number}": {"data": "x"} for number in range(150)}  # more than `sweep` looks at in one call
    created = transitions.enqueue(
        life.observer, QUEUE, jobs, {"origin": QUEUE, "owner": "alice"}, limit=999, group="g", group_ttl=300
    )
    assert isinstance(created, Created)
    transitions.sweep(life.observer)


def life_of_a_job_that_rq_enqueued(life: Life) -> None:
    life.enqueue_as_rq()
    life.end_as_rq(life.take())


def life_of_a_job_that_rq_scheduled(life: Life) -> None:
    with life.observer.watch(RQ):
        life.queue.enqueue_in(timedelta(seconds=100), "app.functions.count_words", job_id=JOB)


def life_of_a_job_that_waits_for_another(life: Life) -> None:
    life.enqueue_as_rq("first")
    life.enqueue_as_rq(depends_on="first", ttl=50)
    first = life.take()
    assert life.finish(first) == "rq"
    life.end_as_rq(first)
    assert life.take().job_id == JOB


def life_of_a_job_that_is_canceled_as_it_waits_for_another(life: Life) -> None:
    life.enqueue_as_rq("first")
    life.enqueue_as_rq(depends_on="first")
    assert life.cancel() == "canceled"


def life_of_a_job_that_fails_as_rq_does_it(life: Life) -> None:
    life.enqueue_as_rq()
    life.end_as_rq(life.take(), failed=True)
    transitions.notify(life.observer, JOB)


def life_of_a_job_that_is_stopped_as_rq_does_it(life: Life) -> None:
    life.enqueue_as_rq()
    life.end_as_rq(life.take(), stopped=True)


def life_of_a_job_that_rq_repeats_at_once(life: Life) -> None:
    life.enqueue_as_rq(repeat=Repeat(times=1))
    life.end_as_rq(life.take())


def life_of_a_job_that_rq_repeats_later(life: Life) -> None:
    life.enqueue_as_rq(repeat=Repeat(times=1, interval=100))
    life.end_as_rq(life.take())


def life_of_a_job_of_rq_whose_result_nobody_wants(life: Life) -> None:
    life.enqueue_as_rq(result_ttl=0)
    life.end_as_rq(life.take())


LIVES: list[Callable[[Life], None]] = [story for name, story in list(globals().items()) if name.startswith("life_of_")]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> ModuleType:
    """The fault suite's model, whose marker only its own conftest makes known."""
    request.config.addinivalue_line("markers", "fault: a row of the fault suite's table")
    return importlib.import_module("tests.faults.test_model")


@pytest.fixture(scope="module")
def observer(model: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observer]:
    """A connection that has seen each of the lives above."""
    folder = tmp_path_factory.mktemp("lifecycle")
    with (
        valkey_server(folder, unixsocket=folder / "redis") as server,
        closing(model.Wire(folder / "redis")) as wire,
        Redis(port=server.port) as redis,
    ):
        found = Observer(wire)
        life = Life(found, redis)
        found.notes_keys = True
        for live in LIVES:
            life.begin()
            live(life)
        found.notes_keys = False
        found.job_id = JOB
        yield found


# The diagram


def read_diagram() -> list[Edge]:
    found = re.search(r"```mermaid\nstateDiagram-v2\n(.*?)```", PAGE, flags=re.DOTALL)
    assert found
    edges = []
    for line in found[1].splitlines():
        edge = re.fullmatch(r"    (\[\*\]|\w+) --> (\w+): (.+)", line)
        assert edge, f"not an edge: {line!r}"
        edges += [Edge(edge[1].replace("[*]", GONE), label, edge[2]) for label in edge[3].split(", ")]
    return edges


DRAWN = read_diagram()


def _describe(edges: set[Edge]) -> str:
    return "; ".join(f"{before} --> {after}: {label}" for before, label, after in sorted(edges)) or "none"


def test_diagram_has_each_edge_that_is_taken_and_no_other(observer: Observer, model: ModuleType) -> None:
    model.explore(model.World(observer), model.State(budget=(("cancel", 1), ("retry", 1))))
    seen, drawn = observer.seen_edges, set(DRAWN)
    assert seen == drawn, (
        f"seen, but not in the diagram: {_describe(seen - drawn)}. "
        f"In the diagram, but not seen: {_describe(drawn - seen)}."
    )


def test_diagram_has_no_edge_twice() -> None:
    assert len(DRAWN) == len(set(DRAWN))


def test_diagram_has_the_statuses_of_rq_that_last() -> None:
    statuses = {str(status.value) for status in JobStatus}
    brief = {"created", "ready_to_enqueue", "rate_limited"}
    assert {edge.before for edge in DRAWN} | {edge.after for edge in DRAWN} == statuses - brief | {GONE}
    assert all(f"`{status}`" in PAGE for status in brief)


def _sections() -> dict[str, str]:
    parts = re.split(r"^##+ (.+)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("status", sorted({edge.after for edge in DRAWN}))
def test_section_of_a_status_names_who_enters_and_who_leaves_it(status: str) -> None:
    section = _sections()[status]
    for edge in DRAWN:
        if status in (edge.before, edge.after) and not (status == GONE and edge.before == GONE):
            label = edge.label if edge.label in (RQ, TTL) else f"`{edge.label}`"
            assert label in section, edge


def test_page_names_each_script() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert set(scripts.SCRIPTS) <= named


def test_members_of_the_messages_to_the_work_horse_are_in_the_code() -> None:
    table = _sections()["What worker and work-horse say to each other"]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row[2])}
    trees = [ast.parse(path.read_text()) for path in (ROOT / "app/worker").glob("*.py")]
    written = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert len(named) > 15
    # `Progress`, a class of app/job_function.py, has two members; the last one is an option of a job function.
    assert named - written <= {"done", "total", "max_crashes"}


# The table of keys


def read_table() -> list[Row]:
    found = re.search(r"^-- key  .*\n((?:-- \S.*\n)+)", COMMON, flags=re.MULTILINE)
    assert found
    rows = []
    for line in found[1].splitlines():
        pattern, kind, ttl, text = re.split(r" {2,}", line.removeprefix("-- "))
        rows.append(Row(f"{RQ_KEY_PREFIX}:{pattern}", kind, ttl, tuple(text.partition(":")[0].split(", "))))
    return rows


TABLE = read_table()


def rows_of(name: str) -> list[Row]:
    """The rows for a key. What stands in angle brackets is any text without a colon."""
    return [row for row in TABLE if re.fullmatch(re.sub(r"<.*?>", "[^:]*", row.pattern), name)]


def _fits(ttl: int, row: Row) -> bool:
    match row.ttl.split():
        case ["none"]:
            return ttl == -1
        case ["(1)"]:
            return True
        case ["(2)"]:
            return LEASE < ttl <= 86400 + LEASE + 60  # GRACE is a day
        case ["`group_ttl`" | "`key_ttl`"]:
            return 0 <= ttl <= 300
        case [number, unit]:
            return 0 <= ttl <= int(number) * {"s": 1, "day": 86400, "days": 86400}[unit]
    raise AssertionError(row)


def test_table_has_each_key_that_the_scripts_write(observer: Observer) -> None:
    for key in observer.seen_keys:
        rows = rows_of(key.name)
        assert len(rows) == 1, (key, rows)
        assert rows[0].kind == key.kind, (key, rows)
        assert _fits(key.ttl, rows[0]), (key, rows)


def test_scripts_write_each_key_of_theirs_in_the_table(observer: Observer) -> None:
    seen = {row for key in observer.seen_keys for row in rows_of(key.name)}
    theirs = {row for row in TABLE if {"scripts", *scripts.SCRIPTS} & set(row.writers)}
    assert theirs - seen == set()


def test_table_has_each_key_that_a_script_names() -> None:
    """Also those in branches that no test takes."""
    for path in (ROOT / "app/core/lua").glob("*.lua"):
        for name in re.findall(r"RQ \.\. '(:[a-z:_]+)'", path.read_text()):
            is_channel = name == ":pubsub:"
            assert is_channel or any(row.pattern.startswith(RQ_KEY_PREFIX + name) for row in TABLE), (path.name, name)


@pytest.mark.parametrize(
    "name",
    [
        scripts.EVENTS_KEY,
        scripts.DOORBELL_KEY,
        scripts.SECRET_KEY,
        scripts.PROBE_KEY,
        scripts.job_key("j"),
        scripts.results_key("j"),
        scripts.deliveries_key("j"),
        scripts.tries_key("m"),
        scripts.workers_key("q"),
        WORKERS_SUSPENDED,
        REDIS_WORKER_KEYS,
        ReadyJobRegistry("q", connection=Redis()).key,
        rq.Queue("q", connection=Redis()).registry_cleaning_key,
        Group.REDIS_GROUP_CLEANING_KEY,
    ],
)
def test_table_has_the_keys_that_other_modules_name(name: str) -> None:
    assert len(rows_of(name)) == 1


def test_table_names_writers_that_there_are() -> None:
    for row in TABLE:
        for writer in row.writers:
            is_module = writer.endswith(".py") and (ROOT / "app" / writer).is_file()
            assert is_module or writer in {"scripts", "RQ", *scripts.SCRIPTS}, row
