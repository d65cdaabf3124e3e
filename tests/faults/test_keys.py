"""Enqueues with an idempotency key: one job for each key, even if a connection or process between is cut."""

import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest
import requests

from tests.faults.conftest import Rounds, Row
from tests.faults.site import Clients, Site, ask_until_answered, port_of
from tests.processes import wait_until, web
from tests.test_stalled_redis import Proxy
from tests.test_worker import is_running

Answers = list[requests.Response]


def all_at_once(count: int, ask: Callable[[int], requests.Response]) -> Answers:
    """Send each request from a thread of its own, once all threads are ready."""
    barrier = threading.Barrier(count)

    def ask_together(number: int) -> requests.Response:
        barrier.wait(30)
        return ask(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(ask_together, range(count)))


def ids_of(answers: Answers) -> set[str]:
    return {answer.json()["job_id"] for answer in answers}


def firsts_of(answers: Answers) -> Answers:
    """The answers that were not replayed: each is the first one of its key."""
    return [answer for answer in answers if "Idempotent-Replayed" not in answer.headers]


@pytest.fixture
def key() -> str:
    return os.urandom(8).hex()


def patient_environment(site: Site, port: int, **settings: Any) -> dict[str, str]:
    """Settings of web processes that use Redis at this port, and wait for it as long as a busy machine may need."""
    url = f"redis://127.0.0.1:{port}/0?socket_timeout=20&socket_connect_timeout=20&timeout=20"
    return site.environment(**settings) | {"REDIS_URL": url}


@pytest.fixture
def patient_url(site: Site, tmp_path: Path) -> Iterator[str]:
    """Start web processes for hundreds of requests at once, each of which may take a second and more."""
    with web(patient_environment(site, site.redis_port, WEB_CONCURRENCY=2), tmp_path / "web.log") as url:
        yield url


@pytest.mark.fault("18", "identical enqueues at once with one key", timeout=600)
def test_identical_enqueues_at_once_with_one_key_make_one_job(
    clients: Clients, row: Row, long: bool, key: str, patient_url: str
) -> None:
    count = 100 if long else 40
    answers = all_at_once(count, lambda _: clients.enqueue(key=key, url=patient_url))
    assert {answer.status_code for answer in answers} == {202}
    assert len(ids_of(answers)) == 1
    assert len(firsts_of(answers)) == 1
    row.close(clients.ledger.settle(), note=f"{count} requests")


@pytest.mark.fault("18", "enqueues at once with different keys", timeout=600)
def test_enqueues_at_once_with_different_keys_make_a_job_each(
    clients: Clients, row: Row, long: bool, key: str, patient_url: str
) -> None:
    count = 1000 if long else 100
    answers = all_at_once(count, lambda number: clients.enqueue(key=f"{key}-{number}", url=patient_url))
    assert {answer.status_code for answer in answers} == {202}
    assert len(ids_of(answers)) == len(firsts_of(answers)) == count
    row.close(clients.ledger.settle(), note=f"{count} keys")


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """A proxy whose connections end with a reset."""
    proxy = Proxy(port)
    # Accepted sockets inherit this option.
    proxy._listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        yield proxy
    finally:
        proxy.close()


@pytest.mark.fault("9", "connection of the client reset after the enqueue, sent again", timeout=600, share=1)
def test_enqueue_whose_answer_is_lost_finds_its_job_when_sent_again(
    clients: Clients, row: Row, site: Site, rounds: Rounds, key: str
) -> None:
    slowest = 0.0
    with proxy_to(port_of(site.url)) as proxy:
        url = f"http://127.0.0.1:{proxy.port}"
        for number in rounds(200, 5):
            own = f"{key}-{number}"
            proxy.lose_answer_to = own.encode()
            with pytest.raises(requests.ConnectionError):
                clients.enqueue(key=own, url=url)
            start = time.monotonic()
            assert firsts_of([ask_until_answered(lambda own=own: clients.enqueue(key=own))]) == []  # type: ignore[misc]
            slowest = max(slowest, time.monotonic() - start)
        assert proxy.lost == rounds.begun
    tally = clients.ledger.settle()
    assert len(tally.jobs) == rounds.begun
    row.close(tally, slowest)


@pytest.mark.fault("9", "connection to Redis reset after the enqueue", timeout=600, share=1)
def test_enqueue_whose_answer_from_redis_is_lost_enqueues_once(
    clients: Clients, row: Row, site: Site, rounds: Rounds, key: str, tmp_path: Path
) -> None:
    with proxy_to(site.server.port) as proxy:
        with web(patient_environment(site, proxy.port), tmp_path / "web.log") as url:
            slowest = 0.0
            for number in rounds(200, 5):
                start = time.monotonic()
                own = f"{key}-{number}"
                proxy.lose_answer_to = b"EVALSHA"
                answers = [clients.enqueue(key=own, url=url) for _ in range(2)]
                assert [answer.status_code for answer in answers] == [202, 202]
                assert len(ids_of(answers)) == 1
                slowest = max(slowest, time.monotonic() - start)
        assert proxy.lost == rounds.begun
    tally = clients.ledger.settle()
    assert len(tally.jobs) == rounds.begun
    row.close(tally, slowest)


class Load:
    """Clients that enqueue until the block ends, with a new key each time. After the block all have their answers."""

    def __init__(self, clients: Clients, key: str) -> None:
        self._clients, self._key = clients, key
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(8)
        self.answers: Answers = []

    def _ask_on(self, client: int) -> None:
        number = 0
        while not self._is_over.is_set():
            self.answers.append(self._clients.enqueue_until_answered(f"{self._key}-{client}-{number}"))
            number += 1
            time.sleep(0.01)  # leaves processor time to the others

    def __enter__(self) -> Self:
        self._asking = [self._pool.submit(self._ask_on, client) for client in range(8)]
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._pool.shutdown()
        for each in self._asking:
            each.result()


def kill(pids: list[int]) -> None:
    """Kill the processes with SIGKILL, and wait until all are dead."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        wait_until(lambda pid=pid: not is_running(pid), what=f"the end of {pid}")  # type: ignore[misc]


def kill_behind_an_enqueue(site: Site) -> bool:
    """Kill the web processes if Redis has an unread enqueue of theirs. Redis executes it, and nobody answers."""
    if not site.stop_redis_behind_an_enqueue():
        return False
    try:
        kill(site.web_processes())
    finally:
        site.signal_redis(signal.SIGCONT)
    return True


@pytest.mark.fault("22", "web process killed between accepting and answering", timeout=1200, share=3)
def test_enqueue_whose_web_process_is_killed_finds_its_job_when_sent_again(
    clients: Clients, row: Row, site: Site, rounds: Rounds, key: str
) -> None:
    clients.enqueue_one()  # Redis has the script then, so a later enqueue is one command
    with Load(clients, key) as load:
        for _ in rounds(15):
            wait_until(lambda: len(site.web_processes()) == 2, what="gunicorn's new processes")
            wait_until(lambda: kill_behind_an_enqueue(site), what="an enqueue that is cut")
            wait_until(lambda: len(site.web_processes()) == 2, what="gunicorn's new processes")
            time.sleep(random.uniform(0, 0.3))
            kill([random.choice(site.web_processes())])
    wait_until(lambda: len(site.web_processes()) == 2, what="gunicorn's new processes")
    assert {answer.status_code for answer in load.answers} == {202}
    assert len(ids_of(load.answers)) == len(load.answers)
    # These enqueues were executed, and their process died before the answer.
    replayed = len(load.answers) - len(firsts_of(load.answers))
    assert replayed >= rounds.begun
    note = f"{clients.sent_again} sent again, {replayed} were done"
    row.close(clients.ledger.settle(), clients.slowest_recovery, note=note)
