"""Clients that send malformed, endless or slow bodies. Other clients must not notice."""

import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests

from tests.faults.conftest import Form, Rounds, Row
from tests.faults.ledger import RUNS_KEY
from tests.faults.site import Clients, Service, Site, port_of
from tests.processes import wait_until, watch_stalls
from tests.test_http_attacks import JSON, Reply, read_reply

CHUNKED = "Transfer-Encoding: chunked"
GIGABYTE = f"Content-Length: {10**9}"
#: The start of each request in this file.
HEAD = f"POST /enqueue/leave_trace HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{JSON}\r\n"
DEPTH = 100_000


class Bad(NamedTuple):
    """A body that the service must refuse: its header, the bytes that are sent, and the answer."""

    header: str
    sent: bytes
    status: int
    problem: str
    #: the client closes its side, so that the server knows that the body was cut
    is_cut: bool = False


def whole(body: bytes, status: int = 400, problem: str = "invalid-json") -> Bad:
    return Bad(f"Content-Length: {len(body)}", body, status, problem)


BAD = {
    "deep arrays": whole(b"[" * DEPTH + b"]" * DEPTH),
    "deep objects": whole(b'{"a":' * DEPTH + b"1" + b"}" * DEPTH),
    "deep without an end": whole(b"[" * DEPTH),
    "NaN": whole(b'{"trace_to": NaN}'),
    "Infinity": whole(b'{"trace_to": "x", "seconds": -Infinity}'),
    "huge number": whole(b'{"trace_to": "x", "seconds": 1e999}'),
    "lone surrogate": whole(rb'{"trace_to": "\ud800"}'),
    "not UTF-8": whole(b'{"trace_to": "\xff"}'),
    "surrogate in UTF-8": whole(b'{"trace_to": "\xed\xa0\x80"}'),
    "UTF-16": whole('{"trace_to": "x"}'.encode("utf-16")),
    "empty": whole(b""),
    "null": whole(b"null", 422, "invalid-request"),
    "gigabyte announced": Bad(GIGABYTE, b"", 413, "payload-too-large"),
    "gigabyte begun": Bad(GIGABYTE, b"[" * 100, 413, "payload-too-large"),
    "cut": Bad("Content-Length: 100", b'{"trace_to": "x"', 400, "bad-request", is_cut=True),
    "cut in a chunk": Bad(CHUNKED, b'ff\r\n{"trace_to": "x"}', 400, "bad-request", is_cut=True),
    "cut between chunks": Bad(CHUNKED, b'11\r\n{"trace_to": "x"}\r\n', 400, "bad-request", is_cut=True),
    "cut before any chunk": Bad(CHUNKED, b"", 400, "bad-request", is_cut=True),
}


def connect(site: Service) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(site.url)), timeout=30)


def send(site: Service, bad: Bad) -> Reply:
    with connect(site) as connection:
        connection.sendall(f"{HEAD}{bad.header}\r\n\r\n".encode() + bad.sent)
        if bad.is_cut:
            connection.shutdown(socket.SHUT_WR)
        return read_reply(connection)


def send_without_end(site: Service) -> Reply:
    """Send a chunked body until the server refuses more."""
    chunk, left = b"%x\r\n%s\r\n" % (2**20, b" " * 2**20), 1000
    with connect(site) as connection:
        connection.sendall(f"{HEAD}{CHUNKED}\r\n\r\n".encode())
        with suppress(ConnectionError):
            while left:
                connection.sendall(chunk)
                left -= 1
        assert left, "the server read a gigabyte"
        return read_reply(connection)


def send_to_each(site: Site, pids: list[int]) -> None:
    """Send an endless body to each web process while the others are stopped. Otherwise one process might get all."""
    for pid in pids:
        others = [psutil.Process(other) for other in pids if other != pid]
        try:
            for other in others:
                other.suspend()
            wait_until(lambda others=others: all(each.status() == psutil.STATUS_STOPPED for each in others))  # type: ignore[misc]
            assert send_without_end(site).status in (413, 0)
        finally:
            for other in others:
                other.resume()


def send_all(clients: Clients) -> None:
    """Send each bad body, then a good one."""
    for name, bad in BAD.items():
        reply = send(clients.site, bad)
        assert (reply.status, f'"/problems/{bad.problem}"' in reply.body) == (bad.status, True), (name, reply)
    reply = send_without_end(clients.site)
    assert reply.status in (413, 0), reply  # there is no answer if the reset of the connection overtakes it
    clients.enqueue_one()


def memory_of(pids: list[int]) -> dict[int, int]:
    """The resident memory of each process in bytes (proc_pid_statm(5))."""
    page = os.sysconf("SC_PAGE_SIZE")
    return {pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids}


@pytest.mark.fault("16", "bad bodies", timeout=600, share=1)
def test_bad_bodies_are_answered_as_the_contract_says_and_cost_no_memory(
    clients: Clients, row: Row, site: Site, long: bool, rounds: Rounds
) -> None:
    pids = site.web_processes()
    before = dict.fromkeys(pids, 0)
    for _ in range(40 if long else 10):  # so that both web processes have allocated what they keep
        send_all(clients)
        send_to_each(site, pids)
        # Take the maximum: after a body of 16 MB the allocator may keep the memory or give it back.
        before = {pid: max(before[pid], size) for pid, size in memory_of(pids).items()}
    for _ in rounds(300, 5):
        send_all(clients)
    assert site.web_processes() == pids
    after = memory_of(pids)
    growth = max(after[pid] - before[pid] for pid in pids)
    note = f"{rounds.begun} times {len(BAD) + 1}, {growth / 2**20:+.1f} MiB"
    row.close(clients.ledger.settle(), note=note)
    assert growth < 20 * 2**20


@pytest.mark.fault(
    "16b", "bodies that stop before their end while the connection stays open", timeout=600, takes=60, form=Form.BUDGET
)
def test_connection_of_a_client_that_stops_in_a_body_is_closed(clients: Clients, row: Row, site: Site) -> None:
    with ExitStack() as stack:
        start = time.monotonic()
        silent = []
        for bad in BAD.values():
            if bad.is_cut:
                silent.append(connection := stack.enter_context(connect(site)))
                connection.sendall(f"{HEAD}{bad.header}\r\n\r\n".encode() + bad.sent)
        for connection in silent:
            connection.settimeout(max(0.1, start + 60 - time.monotonic()))
            assert read_reply(connection).status in (0, 400, 408)
        seconds = time.monotonic() - start
    clients.enqueue_one()
    row.close(clients.ledger.settle(), seconds)


class SlowClient:
    """A client that sends a request byte by byte: all of it, or only its body."""

    def __init__(self, site: Site, *, is_slow_from_the_head: bool) -> None:
        self._site = site
        # It takes longer than any test.
        body = json.dumps({"trace_to": RUNS_KEY}).encode().ljust(300)
        head = f"{HEAD}Content-Length: {len(body)}\r\n\r\n".encode()
        self._begin, self._slowly = (b"", head + body) if is_slow_from_the_head else (head, body)
        #: How often the server has closed the connection.
        self.cut = -1
        self._connect()

    def _connect(self) -> None:
        self.cut += 1
        self._connection = connect(self._site)
        self._connection.sendall(self._begin)
        self._left = self._slowly

    def send_byte(self) -> None:
        """Send the next byte. If the connection was closed, send the first byte of a new request."""
        try:
            self._connection.sendall(self._left[:1])
            self._left = self._left[1:]
        except ConnectionError:
            self.close()
            self._connect()

    def send_rest(self) -> Reply:
        """Send the rest of the request at once."""
        self._connection.sendall(self._left)
        return read_reply(self._connection)

    def close(self) -> None:
        self._connection.close()


@contextmanager
def slow_clients(slow: list[SlowClient]) -> Iterator[None]:
    """Let each client send about a byte a second."""
    is_over = threading.Event()

    def send_on() -> None:
        while not is_over.is_set():
            for client in slow:
                client.send_byte()
                is_over.wait(1 / len(slow))

    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_on)
        try:
            yield
        finally:
            is_over.set()
            sending.result()


def ask_on(clients: Clients, count: int, end: float) -> list[float]:
    """Enqueue and poll until `end`, at least `count` times; returns the seconds that each request took."""
    took: list[float] = []
    while len(took) < count or time.monotonic() < end:
        start = time.monotonic()
        job_id = clients.enqueue_one()
        took.append(time.monotonic() - start)
        start = time.monotonic()
        answer = requests.get(f"{clients.site.url}/check_status", params={"job_id": job_id}, timeout=30)
        took.append(time.monotonic() - start)
        assert (answer.status_code, answer.json()["job_id"]) == (200, job_id)
    return took


@pytest.mark.fault("17", "clients that send a byte a second", timeout=600, takes=60)
def test_slow_clients_delay_no_other_client_and_get_their_answers(
    clients: Clients, row: Row, site: Site, long: bool
) -> None:
    count, seconds = (500, 30) if long else (100, 2)
    slow: list[SlowClient] = []
    with ExitStack() as stack:
        for number in range(count):
            slow.append(SlowClient(site, is_slow_from_the_head=number % 2 == 0))
            stack.callback(slow[-1].close)
        with watch_stalls() as stalls, slow_clients(slow), ThreadPoolExecutor(4) as pool:
            end = time.monotonic() + seconds
            # With this many requests, the four that once wait for the disk together are less than a hundredth.
            asked = [pool.submit(ask_on, clients, 125, end) for _ in range(4)]
            took = [each for asking in asked for each in asking.result()]
        p99 = statistics.quantiles(took, n=100)[-1]
        # Send them at the same time: a body may take a minute in all, and half of it is over.
        with ThreadPoolExecutor(20) as pool:
            replies = list(pool.map(SlowClient.send_rest, slow[1::2]))
        for client, reply in zip(slow[1::2], replies, strict=True):
            assert (reply.status, client.cut) == (202, 0), reply
            clients.ledger.acknowledge(json.loads(reply.body)["job_id"])
    cut = sum(client.cut for client in slow)
    row.close(
        clients.ledger.settle(), note=f"{count}, {cut} times cut, p99 {p99 * 1000:.0f} ms of {len(took)} requests"
    )
    assert len(took) >= 500
    assert p99 < 1 + stalls.within(p99)


@pytest.mark.fault("17b", "a body that comes a byte a second, for ever", timeout=600, takes=75, form=Form.BUDGET)
def test_connection_of_a_client_that_is_too_slow_with_a_body_is_closed(clients: Clients, row: Row, site: Site) -> None:
    slow = SlowClient(site, is_slow_from_the_head=False)
    start = time.monotonic()
    with slow_clients([slow]):
        wait_until(lambda: slow.cut > 0, 90)
    slow.close()
    clients.enqueue_one()
    row.close(clients.ledger.settle(), time.monotonic() - start)


@pytest.mark.fault("17c", "a large answer that is read at 100 kB/s", timeout=600, takes=80, form=Form.BUDGET)
def test_large_answer_reaches_a_slow_client_completely(clients: Clients, row: Row, site: Site) -> None:
    size, rate = 8_000_000, 100_000
    job_id = clients.enqueue_one(payload={"padding": "x" * size})
    start, received = time.monotonic(), 0
    with connect(site) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.sendall(
            f"GET /get_payload?job_id={job_id} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        )
        while data := connection.recv(32768):
            received += len(data)
            time.sleep(max(0, start + received / rate - time.monotonic()))
    assert received > size
    row.close(clients.ledger.settle(), time.monotonic() - start)
