"""Random sequences of requests and of workers' steps. Each is compared with a small model of the contract."""

import base64
import json
import time
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode

import fakeredis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from werkzeug.test import TestResponse

from app.config import Settings
from app.core import transitions
from app.core.scripts import EVENTS_KEY, TERMINAL, describe_failure
from app.core.transitions import Ending, Nothing, Run, TakeAnswer, Taken
from app.main import create_app
from tests.processes import STATES, json_of, problem_of

ADMIN = "ops"
OWNERS = ("alice", "bob", ADMIN)
QUEUES = ("default", "low")
WORKERS = {"w1": QUEUES, "w2": QUEUES[::-1]}
FUNCTIONS = ("some_long_function", "echo", "fail_with_retries")
#: RQ's registry for each status. Waiting jobs are in the queue's list instead.
REGISTRIES = {name: name for name in ("scheduled", "finished", "failed", "canceled")} | {"stopped": "failed"}
PLACES = ("rq:api:jobs:", "rq:wip:", *(f"rq:{name}:" for name in REGISTRIES))
#: Few jobs, so that several steps of a sequence use the same job, and a queue can be full.
MOST_JOBS, MOST_IN_QUEUE, MOST_CRASHES = 5, 4, 1
LONG = 9999
#: A lease of -1 s: it has expired when it begins.
EXPIRED = -1


# The model


@dataclass(eq=False)
class Job:
    """The state of a job by the contract. `expired` is a status here."""

    job_id: str
    group_id: str | None
    owner: str
    function: str
    queue: str
    at_front: bool
    ttl: int | None
    retries: int | None
    status: str = ""
    retries_left: int | None = None
    crashes: int = 0
    run: Run | None = None
    lease: Literal["held", "out", "forgotten"] = "held"
    due: int | None = None
    is_to_stop: bool = False
    is_canceled: bool = False
    was_taken: bool = False
    value: int | None = None
    progress: Any = None
    error: str | None = None

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"<{self.job_id[:8]}, {self.status}>")

    @property
    def may_expire(self) -> bool:
        return self.status in TERMINAL or (self.ttl is not None and not self.was_taken)


class Model:
    """All jobs, oldest first, and the queues' entries. An expired job stays in its queue until a worker meets it."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.waiting: dict[str, list[Job]] = {queue: [] for queue in QUEUES}
        self.scheduled: dict[str, list[Job]] = {queue: [] for queue in QUEUES}

    def has_room(self, queue: str, count: int = 1) -> bool:
        return len(self.waiting[queue]) + len(self.scheduled[queue]) + count <= MOST_IN_QUEUE

    def add(self, jobs: list[Job], *, is_delayed: bool) -> None:
        self.jobs += jobs
        for job in jobs:
            job.retries_left = job.retries
            if is_delayed:
                self.schedule(job)
        if not is_delayed:
            self.wait(jobs, at_front=jobs[0].at_front)

    def wait(self, jobs: list[Job], *, at_front: bool) -> None:
        for job in jobs:
            job.status, job.run, job.progress, job.error = "queued", None, None, None
        waiting = self.waiting[jobs[0].queue]
        waiting[:] = jobs + waiting if at_front else waiting + jobs

    def schedule(self, job: Job) -> None:
        job.status, job.run, job.due, job.progress = "scheduled", None, None, None
        self.scheduled[job.queue].append(job)

    def promote(self) -> int:
        due = sorted((job.due, job) for jobs in self.scheduled.values() for job in jobs if job.due)
        for _, job in due:
            self.scheduled[job.queue].remove(job)
        ready = [job for _, job in due if job.status == "scheduled"]
        # Of the jobs for the front, the one that is due first goes first.
        for job in [*(job for job in ready if not job.at_front), *(job for job in ready[::-1] if job.at_front)]:
            self.wait([job], at_front=job.at_front)
        return len(ready)

    def take(self, queues: tuple[str, ...]) -> Job | None:
        for queue in queues:
            while self.waiting[queue]:
                job = self.waiting[queue].pop(0)
                if job.status == "queued":
                    job.status, job.lease, job.was_taken = "started", "held", True
                    return job
        return None

    def end(self, job: Job, status: str, error: str | None = None, value: int | None = None) -> str:
        if job.is_to_stop:
            status, error, value = "stopped", "JobStopped", None
        job.status, job.run, job.error, job.value = status, None, error, value
        return status

    def finish(self, job: Job, outcome: str, value: int) -> str:
        if outcome == "failed" and job.retries_left and not job.is_to_stop:
            job.retries_left -= 1
            self.schedule(job)
            return job.status
        return self.end(job, "finished", None, value) if outcome == "finished" else self.end(job, outcome, "ValueError")

    def release(self, job: Job, *, crashed: bool) -> str:
        job.crashes += crashed
        if job.is_to_stop or (crashed and job.crashes > MOST_CRASHES):
            return self.end(job, "failed", "WorkHorseDied")
        self.wait([job], at_front=True)
        return job.status

    def cancel(self, job: Job) -> int:
        if job.status in ("finished", "failed"):
            return 409
        job.is_canceled = True
        if job.status == "started":
            job.is_to_stop = True
            if job.lease == "held":
                return 202
            self.end(job, "stopped")
        elif job.status not in TERMINAL:
            (self.waiting if job.status == "queued" else self.scheduled)[job.queue].remove(job)
            self.end(job, "canceled")
        return 200

    def retry(self, job: Job) -> int:
        if job.status not in ("failed", "stopped", "canceled"):
            return 409
        if not self.has_room(job.queue):
            return 503
        job.retries_left, job.crashes, job.was_taken = job.retries, 0, False
        job.is_to_stop = job.is_canceled = False
        self.wait([job], at_front=False)
        return 202


# The service beside it


redis: Any = fakeredis.FakeRedis(server=fakeredis.FakeServer())
keys = json.dumps([{"name": name, "key": f"the long key of {name}", "admin": name == ADMIN} for name in OWNERS])
# No response is closed here, and each would hold its place among the open requests.
app = create_app(Settings(api_keys=keys, queues=QUEUES, max_queue_length=MOST_IN_QUEUE, max_waiting=100_000), redis)
client = app.test_client()


def ask(who: str, method: str, route: str, key: str | None = None, body: Any = None, **query: Any) -> TestResponse:
    headers = {"Authorization": f"Bearer the long key of {who}"} | ({"Idempotency-Key": key} if key else {})
    data: dict[str, Any] = {"data": json.dumps(body), "content_type": "application/json"} if body is not None else {}
    arguments: dict[str, Any] = {"method": method, "headers": headers, "query_string": query or None}
    return client.open(route, **arguments, **data)


def assert_shows(job: Job, shown: dict[str, Any]) -> None:
    assert (shown["job_id"], shown["function"], shown["queue"]) == (job.job_id, job.function, job.queue)
    assert shown["job_status"] == job.status
    assert (shown["retries_left"], shown["progress"]) == (job.retries_left, job.progress)
    assert (shown["error"] and shown["error"]["type"]) == job.error
    assert (shown["started_at"] is not None) == (job.status in ("started", "finished", "failed", "stopped"))
    assert (shown["ended_at"] is not None) == (job.status in TERMINAL)
    assert not (job.is_canceled and job.status == "finished")


def ending(outcome: Any, value: int = 0, progress: str = "") -> Ending:
    encoded = base64.b64encode(str(value).encode()).decode() if outcome == "finished" else ""
    return Ending(outcome, LONG, LONG, encoded, describe_failure("ValueError", "boom"), progress)


def release(run: Run, how: str) -> str:
    failure, crashed = describe_failure("WorkHorseDied", "killed"), how == "crash"
    return transitions.release(redis, run, crashed=crashed, limit=MOST_CRASHES, failure=failure, failure_ttl=LONG)


def snapshot() -> dict[bytes, bytes]:
    """All keys in Redis, except the workers' lists of runs."""
    return {key: redis.dump(key) for key in redis.scan_iter() if not key.endswith(b":executions")}


# The steps


class Request(NamedTuple):
    """A request to `/enqueue` or `/enqueue_many`."""

    owner: str
    is_many: bool
    function: str
    payloads: tuple[str, ...]
    options: dict[str, Any]


some, flags = st.sampled_from, st.booleans()
LATE = ["finished", "failed", "crash", "shutdown", "renew"]
# fmt: off
OPTIONS = {"queue": some(QUEUES), "at_front": st.just("true"), "delay": some([0, LONG]), "retries": some([0, 1, 2]),
           "ttl": st.just(LONG)}
FILTERS = {"status": some(STATES), "queue": some(QUEUES), "function": some(FUNCTIONS)}
# fmt: on


@st.composite
def requests(draw: st.DrawFn) -> Request:
    is_many = draw(flags)
    payloads = ("a", "b", "c")[: draw(st.integers(1, 3)) if is_many else 1]
    options = draw(st.fixed_dictionaries({}, optional=OPTIONS))
    return Request(draw(some(OWNERS)), is_many, draw(some(FUNCTIONS)), payloads, options)


@st.composite
def next_steps(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """All steps are one rule: of several rules hypothesis leaves half out of a sequence, and most need another one."""
    machine = draw(st.runner())
    kept, running = machine.kept, machine.running
    lively = kept + 3 * running
    # fmt: off
    possible: dict[str, Any] = {
        "enqueue": len(kept) < MOST_JOBS and {
            "request": requests(), "key": some([None, None, "key", '"key"', "other"])
        },
        "enqueue_with_a_known_key": machine.sent and {
            "slot": some(list(machine.sent)), "change": some(["", "", "is_many", "payloads", "function", "options"])
        },
        "control": kept and {"job": some(lively), "route": some(["/cancel", "/retry"]), "as_admin": flags},
        "look_at": machine.jobs and {"job": some(machine.jobs), "who": some(OWNERS)},
        "list_jobs": {
            "who": some(OWNERS), "limit": st.integers(1, 4), "filters": st.fixed_dictionaries({}, optional=FILTERS)
        },
        "take": any(machine.model.waiting.values()) and {"worker": some(sorted(WORKERS))},
        "work": running and {
            "job": some(running), "how": some([*LATE, "failed", "stopped"]), "reports": flags, "takes_next": flags
        },
        "come_too_late": machine.stale_runs and {"run": some(machine.stale_runs), "how": some(LATE)},
        "time_passes": kept and {"job": some(lively)},
        "tick": kept and {"times": some([1, 2])},
    }
    # fmt: on
    oftener = ["control", "work", "time_passes"]
    name = draw(some([name for name in (*possible, *oftener) if possible[name]]))
    return name, draw(st.fixed_dictionaries(possible[name]))


class Service(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        redis.flushall()
        self.model = Model()
        self.jobs = self.model.jobs
        self.stale_runs: list[Run] = []
        #: the first request and its answer, by owner and idempotency key
        self.sent: dict[tuple[str, str], tuple[Request, Any]] = {}
        self.count = 0

    @property
    def kept(self) -> list[Job]:
        return [job for job in self.jobs if job.status != "expired"]

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.status == "started"]

    @rule(step=next_steps())
    def go(self, step: tuple[str, dict[str, Any]]) -> None:
        self.count += 1
        getattr(self, step[0])(**step[1])

    def enqueue(self, request: Request, key: str | None) -> None:
        owner, is_many, function, payloads, options = request
        route = f"/enqueue_many/{function}" if is_many else f"/enqueue/{function}"
        answer = ask(owner, "POST", route, key, payloads if is_many else payloads[0], **options)
        content, queue, slot = json_of(answer), options.get("queue", "default"), (owner, (key or "").strip('"'))
        if key and slot in self.sent:
            self.check_replay(request, answer, *self.sent[slot])
        elif not self.model.has_room(queue, len(payloads)):
            problem_of(answer, 503, "queue-full")
        else:
            assert (answer.status_code, "Idempotent-Replayed" in answer.headers) == (202, False), answer.text
            if key:
                self.sent[slot] = request, content
            retries = options.get("retries", 2 if function == "fail_with_retries" else 0) or None
            common = content.get("group_id"), owner, function, queue, "at_front" in options, options.get("ttl"), retries
            new = [Job(job_id, *common) for job_id in (content["job_ids"] if is_many else [content["job_id"]])]
            assert len(new) == len(payloads)
            self.model.add(new, is_delayed=bool(options.get("delay")))

    def check_replay(self, request: Request, answer: TestResponse, first: Request, first_content: Any) -> None:
        if request != first:
            problem_of(answer, 422, "idempotency-key-reused")
            return
        if request.is_many:
            assert json_of(answer) == first_content
        else:
            (job,) = (job for job in self.jobs if job.job_id == first_content["job_id"])
            if job.status == "expired":
                problem_of(answer, 410, "result-expired")
                return
            assert_shows(job, json_of(answer))
        assert (answer.status_code, answer.headers["Idempotent-Replayed"]) == (202, "true")

    def enqueue_with_a_known_key(self, slot: tuple[str, str], change: str) -> None:
        request = self.sent[slot][0]
        changed: dict[str, Any] = {
            "is_many": not request.is_many,
            "payloads": ("d",),
            "function": FUNCTIONS[request.function == FUNCTIONS[0]],
            "options": request.options | {"timeout": 7},
        }
        self.enqueue(request._replace(**{change: changed[change]} if change else {}), slot[1])

    def control(self, job: Job, route: str, as_admin: bool) -> None:
        was, run = job.status, job.run
        expected = self.model.cancel(job) if route == "/cancel" else self.model.retry(job)
        answer = ask(ADMIN if as_admin else job.owner, "POST", route, job_id=job.job_id)
        match expected:
            case 409:
                name = "job-already-ended" if route == "/cancel" else "job-not-retryable"
                assert problem_of(answer, 409, name)["job_status"] == was
            case 503:
                problem_of(answer, 503, "queue-full")
            case _:
                assert answer.status_code == expected, answer.text
                assert_shows(job, json_of(answer))
        if run and not job.run:
            self.stale_runs.append(run)

    def look_at(self, job: Job, who: str) -> None:
        status = ask(who, "GET", "/check_status", job_id=job.job_id, wait=0)
        result = ask(who, "GET", "/get_result", job_id=job.job_id)
        group = ask(who, "GET", "/check_group", group_id=job.group_id or "none")
        is_visible = who in (job.owner, ADMIN)
        if not is_visible or job.status == "expired":
            cancel, retry = (ask(who, "POST", route, job_id=job.job_id) for route in ("/cancel", "/retry"))
            for answer in (status, result, cancel, retry):
                problem_of(answer, *((410, "result-expired") if is_visible else (404, "job-not-found")))
        else:
            shown = json_of(status)
            assert_shows(job, shown)
            if job.status != "finished":
                problem = problem_of(result, 409, f"job-{job.status}" if job.status in TERMINAL else "result-not-ready")
                assert (problem["job_status"], problem.get("error")) == (job.status, shown["error"])
        if is_visible and job.group_id:
            statuses = [other.status for other in self.jobs if other.group_id == job.group_id]
            assert json_of(group) == {"group_id": job.group_id, "total": len(statuses), "counts": Counter(statuses)}
        else:
            problem_of(group, 404, "group-not-found")

    def list_jobs(self, who: str, limit: int, filters: dict[str, str]) -> None:
        expected = {
            job.job_id: job
            for job in reversed(self.kept)
            if who in (job.owner, ADMIN) and all(getattr(job, name) == value for name, value in filters.items())
        }
        listed, following = [], "/jobs?" + urlencode({"limit": limit, **filters})
        while following:
            page = json_of(ask(who, "GET", following))
            assert len(page["jobs"]) <= limit
            for shown in page["jobs"]:
                assert_shows(expected[shown["job_id"]], shown)
                listed.append(shown["job_id"])
            following = page["next"]
            if "status" not in filters:  # jobs that move between two pages are neither missed nor listed twice
                self.tick()
        assert listed == list(expected)

    def take(self, worker: str) -> None:
        # The second call is the same call again, as after a lost answer.
        execution = uuid.uuid4().hex
        taken, again = (transitions.take(redis, worker, execution, LONG, WORKERS[worker]) for _ in range(2))
        self.check_taken(taken, worker, execution)
        assert again[:3] == taken[:3]

    def check_taken(self, taken: TakeAnswer, worker: str, execution: str) -> None:
        if job := self.model.take(WORKERS[worker]):
            assert isinstance(taken, Taken), taken
            assert (taken.queue, taken.job_id) == (job.queue, job.job_id)
            job.run = Run(job.job_id, execution, job.queue, worker)
        else:
            assert isinstance(taken, Nothing), taken

    def work(self, job: Job, how: str, reports: bool, takes_next: bool) -> None:
        assert job.run
        run, progress = job.run, ""
        if reports and how not in ("crash", "shutdown"):
            job.progress = {"done": self.count, "total": LONG, "message": ""}
            progress = json.dumps(job.progress)
        if how == "renew":
            job.lease = "held"
            assert transitions.renew(redis, run, LONG, progress) == ("stop" if job.is_to_stop else "held")
            return
        self.stale_runs.append(run)
        if how in ("crash", "shutdown"):
            assert release(run, how) == self.model.release(job, crashed=how == "crash")
            return
        if takes_next:
            execution = uuid.uuid4().hex
            taken = transitions.take(redis, run.worker, execution, LONG, WORKERS[run.worker])
            self.check_taken(taken, run.worker, execution)
        expected = self.model.finish(job, how, self.count)
        status = transitions.finish(redis, run, ending(how, self.count, progress))
        assert status == expected
        if status == "scheduled":  # the pause ends here, and not by the clock of a slow machine
            assert redis.zadd(f"rq:scheduled:{job.queue}", {job.job_id: time.time() + LONG}, xx=True, ch=True)

    def come_too_late(self, run: Run, how: str) -> None:
        before = snapshot()
        if how in ("crash", "shutdown"):
            assert release(run, how) == "lost"
        elif how == "renew":
            assert transitions.renew(redis, run, LONG, "{}") == "lost"
        else:
            assert transitions.finish(redis, run, ending(how, progress="{}")) == "lost"
        assert snapshot() == before

    def tick(self, times: int = 1) -> None:
        """The work that each worker does once a second."""
        for _ in range(times):
            out = {job.run.execution: job for job in self.running if job.run and job.lease != "held"}
            abandoned = transitions.recover(redis, QUEUES)
            assert {run.execution: crashes for run, crashes, _limit in abandoned} == {
                key: out[key].crashes for key in out
            }
            for run, *_ in abandoned:
                self.stale_runs.append(run)
                assert release(run, "crash") == self.model.release(out[run.execution], crashed=True)
            expected, promoted = self.model.promote(), transitions.promote(redis, QUEUES)
            assert (promoted.jobs, promoted.due is not None) == (expected, any(self.model.scheduled.values()))
            transitions.sweep(redis)
            redis.delete("rq:api:swept")  # a second has passed
            indexed = {entry.decode() for key in redis.keys("rq:api:jobs:*") for entry in redis.zrange(key, 0, -1)}
            assert indexed == {job.job_id for job in self.kept}

    def time_passes(self, job: Job) -> None:
        """Let time pass until the next change of this job."""
        if job.run and job.lease == "held":
            job.lease = "out"
            transitions.renew(redis, job.run, EXPIRED)
        elif job.run and job.lease == "out":
            # No worker recovered the run before Redis dropped its key.
            job.lease = "forgotten"
            redis.delete(f"rq:execution:{job.job_id}:{job.run.execution}")
            redis.zadd(f"rq:wip:{job.queue}", {f"{job.job_id}:{job.run.execution}": time.time() - 1})
        elif job.status == "scheduled" and not job.due:
            job.due = self.count
            redis.zadd(f"rq:scheduled:{job.queue}", {job.job_id: job.due})
        elif job.may_expire:
            job.status = "expired"
            redis.delete(f"rq:job:{job.job_id}", f"rq:results:{job.job_id}")

    @invariant()
    def answers_match_the_model(self) -> None:
        for job in self.kept:
            assert_shows(job, json_of(ask(job.owner, "GET", "/check_status", job_id=job.job_id)))
            if job.status == "finished":
                assert json_of(ask(job.owner, "GET", "/get_result", job_id=job.job_id)) == job.value

    @invariant()
    def each_job_is_only_where_its_status_says(self) -> None:
        kept = {job.job_id: job.status for job in self.kept}
        expected = defaultdict(set)
        for job_id, job in zip(kept, self.kept, strict=True):
            for scope in ("", job.owner):
                expected[f"rq:api:jobs:{scope}:{job.status}"].add(job_id)
            if job.status in REGISTRIES:
                expected[f"rq:{REGISTRIES[job.status]}:{job.queue}"].add(job_id)
            if job.run:
                expected[f"rq:wip:{job.queue}"].add(f"{job_id}:{job.run.execution}")
            assert (redis.ttl(f"rq:job:{job_id}") >= 0) == job.may_expire
        stored = [key.decode() for key in redis.scan_iter()]
        assert {key for key in stored if key.startswith("rq:job:")} == {f"rq:job:{job_id}" for job_id in kept}
        found = {
            key: {entry.decode() for entry in redis.zrange(key, 0, -1)} for key in stored if key.startswith(PLACES)
        }
        # The entry of an expired job stays until somebody meets it.
        found = {key: {i for i in found[key] if i in kept or "wip" in key} for key in found}
        assert {key: entries for key, entries in found.items() if entries} == expected
        for queue in QUEUES:
            waiting = [job_id.decode() for job_id in redis.lrange(f"rq:queue:{queue}", 0, -1)]
            assert waiting == [job.job_id for job in self.model.waiting[queue]]
        logged = {event[b"job_id"].decode(): event[b"status"].decode() for _, event in redis.xrange(EVENTS_KEY)}
        assert logged.items() >= kept.items()


TestService = Service.TestCase
TestService.settings = settings(
    max_examples=15, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
