"""The cost of a page of `/jobs`, a job and an idempotency key: `pipenv run bench lists` (minutes, 2 GB).

It runs two servers, one with a hundred jobs and one with a million, and asks both for the same page in turns. So
other load of the machine affects both. Only the ratio is claimed.
"""

import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from redis import Redis

from app.config import Settings
from app.core import scripts, transitions
from app.functions import count_words
from app.job_function import FUNCTIONS
from app.jobs.enqueue import Enqueuer, Origin
from app.jobs.jobs import Jobs
from app.main import create_app
from benchmarks.measure import spread
from benchmarks.report import Section
from tests.processes import valkey_server

FUNCTION = FUNCTIONS[count_words.__name__]
PAYLOAD = {"text": "a word or two"}
JOBS, BATCH, ROUNDS, PAGES_A_ROUND = 1_000_000, 100, 9, 200

#: The filters of each page, and whether it begins in the middle of all jobs instead of at the newest one.
PAGES: dict[str, tuple[dict[str, str], bool]] = {
    "the newest 20": ({}, False),
    "20 from the middle": ({}, True),
    "20 that failed, where one in a hundred did": ({"status": "failed"}, False),
    "20 of one queue and function": ({"queue": "default", "function": FUNCTION.name}, False),
}


class Store(NamedTuple):
    """The jobs of one server, and the cursor at which the older half of them begins."""

    jobs: Jobs
    enqueuer: Enqueuer
    middle: str | None

    def page(self, filters: dict[str, str], from_middle: bool) -> float:
        """The seconds of one page, from the call to the status objects."""
        start = time.perf_counter()
        listed, _ = self.jobs.list_jobs(filters, 20, self.middle if from_middle else None)
        seconds = time.perf_counter() - start
        assert len(listed) == 20
        return seconds

    def memory(self) -> int:
        """The server's memory in bytes."""
        return int(self.jobs.connection.info("memory")["used_memory"])


def fill(jobs: Jobs, enqueuer: Enqueuer, count: int) -> str | None:
    """Make `count` jobs: a page of them failed, then one of each batch. Returns the cursor at their middle."""
    ending = transitions.Ending("failed", 9999, 9999, failure=scripts.describe_failure("ValueError", "boom"))
    middle = None
    for made in range(0, count, BATCH):
        enqueuer.enqueue_many(FUNCTION, json.dumps([PAYLOAD] * BATCH).encode(), {})
        for number in range(made, made + (20 if made == 0 else 1)):  # first enough for a page, then few among many
            taken = transitions.take(jobs.connection, "bench", str(number), 60, ["default"])
            assert isinstance(taken, transitions.Taken)
            run = transitions.Run(taken.job_id, str(number), taken.queue, "bench")
            assert transitions.finish(jobs.connection, run, ending) == "failed"
        if middle is None and made >= count // 2 - BATCH:
            _, middle = jobs.list_jobs({}, 1, None)
    return middle


def compare_pages(few: Store, many: Store) -> list[tuple[str, ...]]:
    """A row for each kind of page: medians of the rounds' medians, and the median and spread of their ratios."""
    rows: list[tuple[str, ...]] = []
    for name, page in PAGES.items():
        medians: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(PAGES_A_ROUND):
                for store, taken in zip((few, many), times, strict=True):
                    taken.append(store.page(*page))
            for found, taken in zip(medians, times, strict=True):
                found.append(statistics.median(taken) * 1000)
        ratios = [theirs / ours for ours, theirs in zip(*medians, strict=True)]
        one, other = map(statistics.median, medians)
        rows.append((name, f"{one:.2f}", f"{other:.2f}", spread(ratios)))
    return rows


def bytes_of_keys(store: Store, count: int) -> float:
    """The bytes that an idempotency key adds to a job."""
    before = store.memory()
    for _ in range(count):
        store.enqueuer.enqueue(FUNCTION, json.dumps(PAYLOAD).encode(), {})
    between = store.memory()
    for number in range(count):
        store.enqueuer.enqueue(FUNCTION, json.dumps(PAYLOAD).encode(), {}, Origin(key=f"order-{number:08}"))
    return (store.memory() - between - (between - before)) / count


def bytes_of_index(store: Store, count: int) -> tuple[float, float]:
    """The bytes of one job in all, and of its entry in the index. This deletes the index."""
    before = store.memory()
    store.jobs.connection.delete(*store.jobs.connection.scan_iter("rq:api:jobs:*"))
    return before / count, (before - store.memory()) / count


def run() -> Section:
    """Measure."""
    with ExitStack() as stack:
        stores = []
        for number in (BATCH, JOBS):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(valkey_server(folder, lazyfree_lazy_user_del="no", save=""))
            connection = stack.enter_context(Redis(port=server.port))
            parts = create_app(Settings(max_queue_length=10**9), connection).extensions
            jobs, enqueuer = parts["jobs"], parts["enqueuer"]
            stores.append(Store(jobs, enqueuer, fill(jobs, enqueuer, number)))
        few, many = stores
        version = many.jobs.connection.info("server").get("valkey_version", "?")
        pages = compare_pages(few, many)
        key = bytes_of_keys(few, 20_000)
        all_bytes, index = bytes_of_index(many, JOBS)
    return Section(
        title="Lists, and what a job takes in Redis",
        text=f"A page of `/jobs`, from the call of `Jobs.list_jobs` to its status objects: ms with {BATCH} and with "
        f"{JOBS} jobs in Redis, asked in turns; medians of {ROUNDS} rounds of {PAGES_A_ROUND} pages.",
        tables=[
            [("page", f"ms, {BATCH} jobs", f"ms, {JOBS} jobs", "ratio"), *pages],
            [
                ("bytes of Redis", "a job"),
                (f"a waiting job of {FUNCTION.name} with a payload of a few words, in all", f"{all_bytes:.0f}"),
                ("its entry in the index of `/jobs`, one more with an API key", f"{index:.0f}"),
                ("its idempotency key", f"{key:.0f}"),
                ("telling `410` from `404`", "0"),
            ],
        ],
        versions={"Valkey": version},
    )
