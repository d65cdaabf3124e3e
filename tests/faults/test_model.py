"""A model check of the transitions: every interleaving of two workers, a client and faults, on a real server.

The test runs the scripts themselves, and no copy of them. From each state that can be reached (times aside), it takes
each step that any actor may take next, once. In every state it checks these rules:

- the job is in exactly one place, which its status names, and at most one run holds it;
- the job was taken as often as it was enqueued, raised, crashed, was given back and was retried, and not once more;
- an ended job stays as it is until the client retries it, and a job that was answered as canceled never finishes;
- a script that is sent twice, as after a lost answer, has the same effect as one that is sent once;
- a worker that is left alone brings the job to an end: the job is not stuck.
"""

import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import hiredis
import pytest
from redis.exceptions import ResponseError

from app.core import scripts, transitions
from app.core.scripts import TERMINAL, Failure, describe_failure
from app.core.transitions import Abandoned, Ending, Run
from tests.faults.conftest import Form, Row
from tests.processes import valkey_server

JOB, QUEUE, LEASE, MOST_CRASHES = "j", "default", 1000, 1
BOOM = describe_failure("ValueError", "boom")

#: The second answer has to be equal to the first one.
SAME = object()

#: Reads all keys except those that decide nothing: events, doorbell, metrics, minutes.
_SNAPSHOT = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  if not string.find(key, ':api:[edm][voei]') then
    found[#found + 1] = {key, redis.call('PTTL', key), redis.call('DUMP', key)}
  end
end
return found
"""
_READ = """
local read = {hash = 'HGETALL', list = 'LRANGE', set = 'SMEMBERS', zset = 'ZRANGE', stream = 'XLEN', string = 'GET'}
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  if not string.find(key, ':api:[edm][voei]') then
    local kind = redis.call('TYPE', key).ok
    local range = (kind == 'list' or kind == 'zset') and {0, -1} or {}
    found[#found + 1] = {key, kind, redis.call('TTL', key) < 0 and 1 or 0, redis.call(read[kind], key, unpack(range))}
  end
end
return found
"""
_RESTORE = """
redis.call('FLUSHALL')
for at = 1, #ARGV, 3 do redis.call('RESTORE', ARGV[at], math.max(0, tonumber(ARGV[at + 1])), ARGV[at + 2]) end
"""
#: Fields that may differ between two equal states: times, and the last worker.
_TIMES = re.compile(rb".*_at|last_heartbeat|total_working_time|.*_job_count|last_.*|birth|worker_name|state")


class WorkerState(NamedTuple):
    """The memory of one worker process; None if it is dead."""

    run: Run | None = None
    #: the previous run, whose end is on its way to Redis
    ending: Run | None = None
    #: runs that `recover` returned; the worker releases them one by one
    abandoned: tuple[Abandoned, ...] = ()


class State(NamedTuple):
    """The state of all actors. The content of Redis is kept beside it."""

    workers: tuple[WorkerState | None, ...] = (WorkerState(), WorkerState())
    is_enqueued: bool = False
    #: how often each limited step may still be taken, so that the exploration ends
    budget: tuple[tuple[str, int], ...] = ()
    #: how often the job began to wait, less how often it was taken, or canceled while it waited
    waits: int = 0
    #: the terminal status that a client got as the answer, until the job is retried
    answered: str = ""
    executions: int = 0


class Wire:
    """A connection that uses hiredis alone, because redis-py takes longer for a command than the server does."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._reader = hiredis.Reader(replyError=ResponseError)
        self._before: list[tuple[Any, ...]] = []

    def send_later(self, *command: Any) -> None:
        """Send a command together with the next one. Its answer is ignored."""
        self._before = [command]

    def execute(self, *command: Any) -> Any:
        """Execute a command; returns its answer."""
        commands, self._before = [*self._before, command], []
        self._socket.sendall(b"".join(map(hiredis.pack_command, commands)))
        answers = [self._read_answer() for _ in commands]
        for answer in answers:
            if isinstance(answer, ResponseError):
                raise answer
        return answers[-1]

    def _read_answer(self) -> Any:
        while (answer := self._reader.gets()) is False:
            self._reader.feed(self._socket.recv(2**16))
        return answer

    def close(self) -> None:
        self._socket.close()

    # Commands that `transitions` and the actors call

    def evalsha(self, digest: str, *arguments: Any) -> Any:
        return self.execute("EVALSHA", digest, *arguments)

    def hget(self, key: str, name: str) -> Any:
        return self.execute("HGET", key, name)

    def hset(self, key: str | bytes, name: str, value: str) -> Any:
        return self.execute("HSET", key, name, value)

    def keys(self, pattern: str) -> Any:
        return self.execute("KEYS", pattern)

    def zadd(self, key: str, member: str | bytes, score: int) -> Any:
        """Move an existing member."""
        return self.execute("ZADD", key, "XX", score, member)

    def zrange(self, key: str) -> Any:
        return self.execute("ZRANGE", key, 0, -1)


class World:
    """The server, and the steps that the actors may take on it."""

    def __init__(self, redis: Wire) -> None:
        self.redis: Any = redis
        own = _SNAPSHOT, _RESTORE, _READ
        every = (*scripts.SCRIPTS.values(), *own)
        self._snapshot, self._restore, self._read = [redis.execute("SCRIPT", "LOAD", text) for text in every][-3:]
        #: Whether to send each script twice, as if its answer had been lost.
        self.sends_twice = False

    def save(self) -> list[Any]:
        return [part for entry in self.redis.evalsha(self._snapshot, 0) for part in entry]

    def load(self, saved: list[Any]) -> None:
        self.redis.send_later("EVALSHA", self._restore, 0, *saved)

    def read(self) -> dict[str, Any]:
        """The content of Redis, without times: for each key whether it is kept for ever, and its value."""
        found: dict[str, Any] = {}
        for key, kind, is_kept, value in sorted(self.redis.evalsha(self._read, 0)):
            if kind == b"hash":
                pairs = dict(zip(value[::2], value[1::2], strict=True))
                is_due = pairs.pop(b"lease_until", b"9") == b"0"
                value = [*sorted(pair for pair in pairs.items() if not _TIMES.fullmatch(pair[0])), is_due]
            elif kind == b"set":
                value = sorted(value)
            elif kind == b"stream":  # the stream of results, of which some ten are kept
                value = value > 0
            found[key.decode()] = is_kept, value
        return found

    def look(self, state: State, found: dict[str, Any]) -> str:
        """A text that identifies this state. It ignores the names of executions and the order of the workers."""
        texts = []
        for order in ((0, 1), (1, 0)):
            workers = tuple(state.workers[number] for number in order)
            text = repr((state._replace(executions=0, workers=workers), found))
            if order == (1, 0):
                text = text.replace("w0", "w?").replace("w1", "w0").replace("w?", "w1")
            for number, name in enumerate(dict.fromkeys(re.findall(r"e\d+e", text))):
                text = text.replace(name, f"execution {number}")
            texts.append(text)
        return min(texts)

    # The steps of the actors

    def steps(self, state: State) -> Iterator[tuple[str, Callable[[], State]]]:
        """Each step that may be taken next, with its name."""
        if not state.is_enqueued:
            yield "enqueue", lambda: self._enqueue(state)
            return
        yield "promote", lambda: self._promote(state)
        if self._may(state, "cancel") and not state.answered:
            yield "cancel", lambda: self._cancel(self._spend(state, "cancel"))
        if self._may(state, "retry"):
            yield "retry", lambda: self._retry(self._spend(state, "retry"))
        if self._may(state, "expire"):
            for key in self.redis.keys(f"rq:execution:{JOB}:*"):
                yield f"expire {key}", lambda key=key: self._expire(self._spend(state, "expire"), key)  # type: ignore[misc]
        for number, worker in enumerate(state.workers):
            yield from self._steps_of(state, number, worker)

    def _steps_of(
        self, state: State, number: int, worker: WorkerState | None
    ) -> Iterator[tuple[str, Callable[[], State]]]:
        if worker is None:
            yield f"{number} starts", lambda: self._set(state, number, WorkerState())
            return
        if self._may(state, "die") and worker != WorkerState():
            yield f"{number} dies", lambda: self._set(self._spend(state, "die"), number, None)
        if worker.abandoned:
            yield f"{number} releases what another left", lambda: self._release_abandoned(state, number, worker)
            return
        yield f"{number} recovers", lambda: self._recover(state, number, worker)
        if worker.ending:
            yield f"{number} settles", lambda: self._settle(state, number, worker)
        if worker.run is None:
            if not worker.ending:
                yield f"{number} takes", lambda: self._take(state, number, worker)
            return
        yield f"{number} renews", lambda: self._renew(state, number, worker)
        if self._may(state, "ahead") and not worker.ending:
            ahead = WorkerState(ending=worker.run)
            yield f"{number} takes ahead", lambda: self._take(self._spend(state, "ahead"), number, ahead)
        for outcome in ("finished", "failed", "stopped"):
            yield f"{number} ends {outcome}", lambda outcome=outcome: self._finish(state, number, outcome)  # type: ignore[misc]
        yield f"{number} loses its work-horse", lambda: self._release(state, number, worker.run, crashed=True)
        if self._may(state, "shutdown"):
            spent = self._spend(state, "shutdown")
            yield f"{number} shuts down", lambda: self._release(spent, number, worker.run, crashed=False)

    def _may(self, state: State, what: str) -> bool:
        return dict(state.budget).get(what, 0) > 0

    def _spend(self, state: State, what: str) -> State:
        return state._replace(budget=tuple((name, left - (name == what)) for name, left in state.budget))

    def _set(self, state: State, number: int, worker: WorkerState | None) -> State:
        workers = list(state.workers)
        workers[number] = worker
        return state._replace(workers=tuple(workers))

    def _send(self, call: Callable[[], Any], second: object = None) -> Any:
        """Run a script; returns its answer. A second call must change nothing, and may have to answer `second`."""
        answer = call()
        if self.sends_twice:
            before = self.read()
            again = call()
            assert self.read() == before, (answer, again)
            assert again == (answer if second is SAME else second) or second is None, (answer, again)
        return answer

    def _enqueue(self, state: State) -> State:
        fields: dict[str, scripts.Argument] = {
            "origin": QUEUE,
            "data": "x",
            "owner": "",
            "retries_left": 1,
            "retries": 1,
            "retry_intervals": "[5]",
        }
        answer = self._send(lambda: transitions.enqueue(self.redis, QUEUE, {JOB: {}}, fields, limit=9))
        assert isinstance(answer, transitions.Created)
        return state._replace(is_enqueued=True, waits=1)

    def _promote(self, state: State) -> State:
        for job_id in self.redis.zrange(f"rq:scheduled:{QUEUE}"):
            self.redis.zadd(f"rq:scheduled:{QUEUE}", job_id, 1)
        promoted = self._send(lambda: transitions.promote(self.redis, [QUEUE])).jobs
        return state._replace(waits=state.waits + promoted)

    def _cancel(self, state: State) -> State:
        was = self.redis.hget(f"rq:job:{JOB}", "status")
        answer = self._send(lambda: transitions.cancel(self.redis, JOB, None, 1000))
        assert answer in {*TERMINAL, "started"}
        state = state._replace(waits=state.waits - (was == b"queued"))
        return state._replace(answered="stopped" if answer == "started" else answer)

    def _retry(self, state: State) -> State:
        answer = self._send(lambda: transitions.retry(self.redis, JOB, None, 9))
        if answer != "queued":
            return state
        return state._replace(waits=state.waits + 1, answered="")

    def _expire(self, state: State, key: bytes) -> State:
        """Let a lease expire: its worker is dead, was paused or is cut off."""
        self.redis.hset(key, "lease_until", "0")
        member = f"{JOB}:{key.decode().rpartition(':')[2]}"
        self.redis.zadd(f"rq:wip:{QUEUE}", member, 1)
        return state

    def _take(self, state: State, number: int, worker: WorkerState) -> State:
        execution = f"e{state.executions}e"
        state = state._replace(executions=state.executions + 1)
        # The second answer has the present fields of the job; the rest is equal.
        answer = self._send(lambda: transitions.take(self.redis, f"w{number}", execution, LEASE, [QUEUE])[:3], SAME)
        if answer[:2] != (QUEUE, JOB):  # a worker that took nothing ahead ends its run like any other
            return state
        run = Run(JOB, execution, QUEUE, f"w{number}")
        return self._set(state, number, worker._replace(run=run))._replace(waits=state.waits - 1)

    def _renew(self, state: State, number: int, worker: WorkerState) -> State:
        assert worker.run
        run = worker.run
        answer = self._send(lambda: transitions.renew(self.redis, run, LEASE))
        if answer == "lost":
            return self._set(state, number, worker._replace(run=None))
        assert float(self.redis.hget(f"rq:execution:{JOB}:{run.execution}", "lease_until")) > 0
        return self._finish(state, number, "stopped") if answer == "stop" else state

    def _finish(self, state: State, number: int, outcome: Literal["finished", "failed", "stopped"]) -> State:
        worker = state.workers[number]
        assert worker
        assert worker.run
        state = self._end(state, worker.run, outcome)
        return self._set(state, number, worker._replace(run=None))

    def _settle(self, state: State, number: int, worker: WorkerState) -> State:
        """The end that was sent behind a `take` arrives. Only an end that lets the job wait makes a difference here."""
        assert worker.ending
        state = self._end(state, worker.ending, "failed")
        return self._set(state, number, worker._replace(ending=None))

    def _end(self, state: State, run: Run, outcome: Literal["finished", "failed", "stopped"]) -> State:
        ending = Ending(outcome, 1000, 1000, failure=Failure() if outcome == "finished" else BOOM)
        answer = self._send(lambda: transitions.finish(self.redis, run, ending), "lost")
        if answer in TERMINAL:
            assert state.answered in ("", answer), (state, answer)
            state = state._replace(answered=answer)
        return state._replace(waits=state.waits + (answer == "queued"))

    def _release(self, state: State, number: int, run: Run | None, *, crashed: bool) -> State:
        assert run
        answer = self._send(
            lambda: transitions.release(
                self.redis, run, crashed=crashed, limit=MOST_CRASHES, failure=BOOM, failure_ttl=1000
            ),
            "lost",
        )
        if answer in TERMINAL:
            assert state.answered in ("", answer), (state, answer)
            state = state._replace(answered=answer)
        worker = state.workers[number]
        assert worker
        return self._set(state._replace(waits=state.waits + (answer == "queued")), number, worker._replace(run=None))

    def _recover(self, state: State, number: int, worker: WorkerState) -> State:
        found = tuple(self._send(lambda: transitions.recover(self.redis, [QUEUE]), SAME))
        for abandoned in found:
            assert self.redis.hget(f"rq:execution:{JOB}:{abandoned.run.execution}", "lease_until") in (b"0", None)
        return self._set(state, number, worker._replace(abandoned=found))

    def _release_abandoned(self, state: State, number: int, worker: WorkerState) -> State:
        first, *rest = worker.abandoned
        state = self._release(state, number, first.run, crashed=True)
        return self._set(state, number, worker._replace(abandoned=tuple(rest)))

    # The rules

    def check(self, state: State, found: dict[str, Any]) -> None:
        if not state.is_enqueued:
            return
        status = dict(found[f"rq:job:{JOB}"][1][:-1])[b"status"].decode()
        place = {"queued": "queue", "started": "wip", "stopped": "failed"}.get(status, status)
        for name in ("queue", "wip", "scheduled", "finished", "failed", "canceled"):
            _, members = found.get(f"rq:{name}:{QUEUE}", (True, []))
            assert len(members) == (name == place), (status, name, members)
        crashes = int(dict(found[f"rq:job:{JOB}"][1][:-1]).get(b"crashes", 0))
        assert crashes <= MOST_CRASHES + (status in ("failed", "stopped")), (status, crashes)
        indexed = [key for key, (_, members) in found.items() if key.startswith("rq:api:jobs:") and members]
        assert indexed == [f"rq:api:jobs::{status}"], (status, indexed)
        assert state.waits == (status == "queued"), (status, state)
        if status in TERMINAL or state.answered not in ("", "stopped"):
            assert status == state.answered, (status, state)
        # The keys of an ended job expire.
        if status in TERMINAL:
            kept = [key for key, (is_kept, _) in found.items() if is_kept and JOB in key.split(":")]
            assert not kept, kept

    def drain(self, state: State) -> None:
        """Check that one worker alone, without further faults, brings the job to an end."""
        if not state.is_enqueued:
            return
        for key in self.redis.keys(f"rq:execution:{JOB}:*"):
            if not any(worker and worker.run and worker.run.execution in key.decode() for worker in state.workers):
                self._expire(state, key)  # it expires, because nobody renews it
        for number, worker in enumerate(state.workers):
            if worker and worker.ending:
                state = self._settle(state, number, worker)
        for number, worker in enumerate(state.workers):
            if worker and worker.run:
                state = self._renew(state, number, worker)
                if (left := state.workers[number]) and left.run:
                    state = self._finish(state, number, "finished")
        for _ in range(6):
            if self.redis.hget(f"rq:job:{JOB}", "status").decode() in TERMINAL:
                return
            state = self._recover(self._set(state, 0, WorkerState()), 0, WorkerState())
            while (worker := state.workers[0]) and worker.abandoned:
                state = self._release_abandoned(state, 0, worker)
            state = self._take(self._promote(state), 0, WorkerState())
            if (worker := state.workers[0]) and worker.run:
                state = self._finish(state, 0, "finished")
        raise AssertionError(f"stuck: {state}")


def explore(world: World, start: State) -> tuple[int, int]:
    """Take each step of each state; returns the numbers of states and steps."""
    first = world.look(start, {})
    came_from: dict[str, tuple[str, str]] = {}
    pending: deque[tuple[str, State, list[Any]]] = deque([(first, start, [])])
    seen, steps = {first}, 0

    def path(place: str) -> list[str]:
        names: list[str] = []
        while place in came_from:
            place, name = came_from[place]
            names.insert(0, name)
        return names

    while pending:
        place, state, saved = pending.popleft()
        world.load(saved)
        for name, step in list(world.steps(state)):
            steps += 1
            try:
                world.load(saved)
                after = step()
                found = world.read()
                world.check(after, found)
                new = world.look(after, found)
                if new in seen:
                    continue
                seen.add(new)
                came_from[new] = place, name
                pending.append((new, after, world.save()))
                world.drain(after)
                world.load(saved)
                world.sends_twice = True
                step()
                world.sends_twice = False
            except AssertionError as error:
                raise AssertionError(f"after {[*path(place), name]}: {error}") from error
    return len(seen), steps


def check(name: str, takes: int, **budget: int) -> Any:
    """A check with a budget: how often each step may be taken. `takes` is its time in seconds."""
    text = "every interleaving of two workers, a client and faults between any two scripts"
    form = Form.SHORT if takes <= 5 else Form.BUDGET
    return pytest.param(budget, id=name, marks=pytest.mark.fault("3m", text, timeout=3000, takes=takes, form=form))


CHECKS = [
    check("a pause", 5, expire=1, ahead=2),
    check("a pause and a death", 15, expire=1, die=1, ahead=2),
    check("a cancel and a shutdown", 3, cancel=1, shutdown=1, ahead=1),
    check("a retry and a pause", 15, retry=1, expire=1, ahead=2),
    check("control", 7, cancel=1, retry=1, shutdown=1, ahead=1),
    check("deaths and pauses", 30, die=2, expire=2, ahead=1),
    # Jobs that are taken ahead multiply the states, so only the checks above have them.
    check("all of it", 500, cancel=1, retry=1, shutdown=1, die=2, expire=2),
]


@pytest.fixture(scope="module")
def wire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wire]:
    folder = tmp_path_factory.mktemp("model")
    with valkey_server(folder, unixsocket=folder / "redis"), closing(Wire(folder / "redis")) as connection:
        yield connection


@pytest.mark.parametrize("budget", CHECKS)
def test_no_interleaving_loses_doubles_or_strands_the_job(wire: Wire, row: Row, budget: dict[str, int]) -> None:
    states, steps = explore(World(wire), State(budget=tuple(budget.items())))
    row.note(f"{', '.join(f'{times} {what}' for what, times in budget.items())}: {states} states, {steps} steps")
    assert states > 100
