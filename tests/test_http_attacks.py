import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import pytest
import requests

from app.config import LARGE
from tests.conftest import Service

JSON = "Content-Type: application/json"
Answer = TypeVar("Answer")

#: MAX_PAYLOAD_BYTES of the fixture `service`.
LIMIT = 200_000


class Reply(NamedTuple):
    """An answer as it came over the wire; status 0 if the connection was closed without one."""

    status: int
    head: str
    body: str


def connect(service: Service, timeout: float = 15) -> socket.socket:
    parts = urlsplit(service.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=timeout)


def read_reply(connection: socket.socket) -> Reply:
    """Read until the server closes the connection. Every request here asks for that or causes it."""
    received = b""
    while True:
        try:
            data = connection.recv(1 << 16)
        except ConnectionError:
            break
        if not data:
            break
        received += data
    head, _, body = received.decode("latin-1").partition("\r\n\r\n")
    if head.startswith("HTTP/1.1 100 "):
        head, _, body = body.partition("\r\n\r\n")
    return Reply(int(head.split()[1]) if head else 0, head, body)


def send(service: Service, *lines: str, body: bytes = b"", half_close: bool = False) -> Reply:
    head = "\r\n".join((lines[0], "Host: x", "Connection: close", *lines[1:])) + "\r\n\r\n"
    with connect(service) as connection:
        connection.sendall(head.encode("latin-1") + body)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return read_reply(connection)


def jobs_waiting_or_run(service: Service) -> set[bytes]:
    return set(service.redis.scan_iter("rq:job:*", count=1000))


def attack_while_others_ask(service: Service, attack: Callable[[], Answer], attackers: int) -> set[Answer]:
    """Return the outcomes of an attack, and check that other clients get answers during it.

    Repeat the attack a few times: the machine may have stopped the others, or the server, until an attack was over.
    """
    outcomes: set[Answer] = set()
    for _ in range(5):
        answers = 0
        with ThreadPoolExecutor(attackers) as pool:
            attacking = [pool.submit(attack) for _ in range(attackers)]
            while not all(each.done() for each in attacking):
                assert requests.get(f"{service.url}/healthz", timeout=10).status_code == 200
                answers += 1
        outcomes |= {each.result() for each in attacking}
        if answers > 5:
            return outcomes
    pytest.fail("the attack held up the other clients")


@pytest.fixture(autouse=True)
def still_answers(service: Service) -> Iterator[None]:
    """The service still answers after each test."""
    yield
    answer = requests.post(f"{service.url}/enqueue/echo?wait=20", json={"still": "there"}, timeout=30)
    assert answer.json()["result"] == {"still": "there"}


# Bodies


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param(["Transfer-Encoding: chunked"], b"3\r\n[1,", id="chunk without its end"),
        pytest.param(["Transfer-Encoding: chunked"], b"3\r\n[1]\r\n", id="no last chunk"),
        pytest.param(["Transfer-Encoding: chunked"], b"ff\r\n[1]\r\n0\r\n\r\n", id="chunk shorter than its size"),
        pytest.param(["Transfer-Encoding: chunked"], b"1\r\n[1]\r\n0\r\n\r\n", id="chunk longer than its size"),
        pytest.param(["Transfer-Encoding: chunked"], b"zz\r\n[1]\r\n0\r\n\r\n", id="chunk size that is no number"),
        pytest.param(["Transfer-Encoding: chunked"], b"-3\r\n[1]\r\n0\r\n\r\n", id="negative chunk size"),
        pytest.param(["Transfer-Encoding: chunked"], b"\r\n\r\n", id="no chunk size"),
        pytest.param(["Transfer-Encoding: chunked"], b"f" * 20 + b"\r\n[1]\r\n0\r\n\r\n", id="huge chunk size"),
        pytest.param(["Transfer-Encoding: chunked"], b"", id="no chunks at all"),
        pytest.param(["Content-Length: 100"], b"[1]", id="fewer bytes than announced"),
        pytest.param(["Content-Length: 3"], b"", id="no bytes at all"),
        pytest.param(["Content-Length: 3", "Content-Length: 5"], b"[1]  ", id="two lengths"),
        pytest.param(["Content-Length: 3, 5"], b"[1]  ", id="two lengths in one"),
        pytest.param(["Content-Length: -1"], b"[1]", id="negative length"),
        pytest.param(["Content-Length: x"], b"[1]", id="length that is no number"),
        pytest.param(["Content-Length: +3"], b"[1]", id="length with a sign"),
        pytest.param(["Content-Length: 0x3"], b"[1]", id="hexadecimal length"),
        pytest.param(["Content-Length: 3", "Transfer-Encoding: chunked"], b"1\r\n1\r\n0\r\n\r\n", id="both"),
        pytest.param(["Transfer-Encoding: chunked, identity"], b"1\r\n1\r\n0\r\n\r\n", id="unknown encoding"),
        pytest.param(["Transfer-Encoding: gzip"], b"[1]", id="gzip"),
        pytest.param(["Transfer-Encoding: gzip, chunked"], b"3\r\n[1]\r\n0\r\n\r\n", id="gzip in chunks"),
        pytest.param([], b"[1]", id="no length"),
    ],
)
def test_enqueue_refuses_a_body_that_is_not_whole(service: Service, headers: list[str], body: bytes) -> None:
    before = jobs_waiting_or_run(service)
    reply = send(service, "POST /enqueue/echo HTTP/1.1", JSON, *headers, body=body, half_close=True)
    assert reply.status in {0, 400, 411, 501}, reply
    assert jobs_waiting_or_run(service) == before


def test_enqueue_takes_a_well_formed_chunked_body(service: Service) -> None:
    chunks = b"2;x=y\r\n[1\r\n1\r\n]\r\n0\r\nX-Checksum: 1\r\n\r\n"
    reply = send(service, "POST /enqueue/echo?wait=20 HTTP/1.1", JSON, "Transfer-Encoding: chunked", body=chunks)
    assert reply.status == 200, reply
    assert '"result":[1]' in reply.body


def test_enqueue_answers_a_client_that_announces_a_gigabyte_without_reading_it(service: Service) -> None:
    start = time.monotonic()
    reply = send(service, "POST /enqueue/echo HTTP/1.1", JSON, f"Content-Length: {10**9}", body=b"[")
    assert time.monotonic() - start < 15  # a wait for the rest takes twice as long
    assert reply.status == 413
    assert f'"limit_bytes":{LIMIT}' in reply.body
    assert "application/problem+json" in reply.head


def test_enqueue_stops_reading_a_chunked_body_without_end(service: Service) -> None:
    before = jobs_waiting_or_run(service)
    head = (
        f"POST /enqueue/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{JSON}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    sent = 0
    with connect(service) as connection:
        connection.sendall(head.encode() + b"2\r\n[]\r\n")
        try:
            while sent < 50 * LIMIT:
                connection.sendall(chunk)
                sent += 10_000
        except OSError:
            pass  # the server closed it, as it should
        reply = read_reply(connection)
    assert sent < 50 * LIMIT
    assert reply.status in {0, 413}, reply
    assert jobs_waiting_or_run(service) == before


@pytest.mark.parametrize("extra", [0, 1])
def test_enqueue_limits_a_chunked_body(service: Service, extra: int) -> None:
    body = b'"' + b"x" * (LIMIT - 2 + extra) + b'"'
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    reply = send(service, "POST /enqueue/echo HTTP/1.1", JSON, "Transfer-Encoding: chunked", body=chunks)
    assert reply.status == (413 if extra else 202), reply
    assert "limit_bytes" in reply.body or not extra


def test_enqueue_does_not_cut_a_chunked_body_off_at_the_limit(service: Service) -> None:
    before = jobs_waiting_or_run(service)
    body = b"[1]" + b" " * (LIMIT - 3) + b"and what else the client sent"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    reply = send(service, "POST /enqueue/echo HTTP/1.1", JSON, "Transfer-Encoding: chunked", body=chunks)
    assert reply.status == 413, reply
    assert jobs_waiting_or_run(service) == before


def test_enqueue_does_not_read_a_second_request_from_a_refused_body(service: Service) -> None:
    before = jobs_waiting_or_run(service)
    inner = f"POST /enqueue/echo HTTP/1.1\r\nHost: x\r\n{JSON}\r\nContent-Length: 1\r\n\r\n1".encode()
    # The server refuses the request before it reads the body. It must not take the body for the next request.
    for path, content_type in (
        ("/enqueue/echo", "text/plain"),
        ("/enqueue/nope", "application/json"),
        ("/nope", "x/y"),
    ):
        with connect(service) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"
            connection.sendall(f"{head}Content-Length: {len(inner)}\r\n\r\n".encode() + inner)
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            reply = read_reply(connection)
        assert reply.status in {404, 415}
        assert " 202 " not in reply.head + reply.body
    assert jobs_waiting_or_run(service) == before


# Addresses and headers


@pytest.mark.parametrize(
    ("target", "statuses"),
    [
        ("/check_status?job_id=a%0d%0aX-Injected:%20yes", {404}),
        ("/check_status?job_id=a%0aX-Injected:%20yes%0a%0a<script>", {404}),
        ("/get_result?job_id=%0d%0a%0d%0aX-Injected:%20yes", {404}),
        ("/check_status?job_id=%E5%98%8A%E5%98%8DX-Injected:yes", {404}),
        ("/problems/a%0d%0aX-Injected:%20yes", {404}),
        ("/docs/a%0d%0aX-Injected:%20yes", {404}),
        ("/check_status?job_id=%00", {404}),
        ("/check_status?job_id=%FF%FE", {404}),
        ("/check_status?job_id=%", {404}),
        ("/check_status?job_id=a&job_id=b", {404, 422}),
        ("/check_status?job_id=a&wait=0&wait=60", {404, 422}),
        ("/check_status?wait=&job_id=", {422}),
        ("/check_status?" + "a=1&" * 5000, {400, 414, 422}),
        ("/check_status?job_id=" + "x" * 3000, {404}),
        ("/check_status?job_id=" + "x" * 100_000, {400, 404, 414}),
        ("/" + "x" * 100_000, {400, 404, 414}),
        ("/" + "a/" * 1500, {404}),
        ("//check_status?job_id=a", {301, 308, 404}),
        ("//evil.example/check_status", {404}),
        ("///", {200, 301, 308, 404}),
        ("/..", {404}),
        ("/../../../../etc/passwd", {404}),
        ("/docs/../../../../etc/passwd", {404}),
        ("/docs/%2e%2e/%2e%2e/%2e%2e/etc/passwd", {404}),
        ("/docs/..%2f..%2f..%2fetc%2fpasswd", {404}),
        ("/docs//etc/passwd", {301, 308, 404}),
        ("/docs/%00", {404}),
        ("/%00", {404}),
        ("/problems/%00", {404}),
        ("/%2e%2e%2f", {404}),
        ("/check_status%3Fjob_id=a", {404}),
        ("/healthz/", {404}),
        ("http://evil.example/healthz", {200, 400, 404}),
        ("*", {400, 404}),
        ("healthz", {400, 404}),
        ("/healthz#fragment", {200, 400, 404}),
        ("/é", {400, 404}),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_get_of_a_hostile_address_is_an_ordinary_answer(service: Service, target: str, statuses: set[int]) -> None:
    reply = send(service, f"GET {target} HTTP/1.1")
    assert reply.status in statuses, reply
    assert "x-injected" not in reply.head.lower()
    assert "root:" not in reply.body
    assert "evil.example" not in reply.head
    if reply.status in {404, 422}:
        assert "application/problem+json" in reply.head


@pytest.mark.parametrize(
    "name",
    ["echo%0d%0aX-Injected:%20yes", "%0d%0a%0d%0a", "%00", "..", "..%2f", "echo%00", "x" * 3000, "%F0%9F%92%A9",
     "echo;x", "echo%20", "<script>", "__class__", "%25"],
)  # fmt: skip
def test_enqueue_of_a_hostile_name_is_an_unknown_function(service: Service, name: str) -> None:
    before = jobs_waiting_or_run(service)
    reply = send(service, f"POST /enqueue/{name} HTTP/1.1", JSON, "Content-Length: 1", body=b"1")
    assert reply.status in {404, 405}, reply
    assert "x-injected" not in reply.head.lower()
    assert "application/problem+json" in reply.head
    assert jobs_waiting_or_run(service) == before


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param(["X: " + "x" * 100_000], id="long header"),
        pytest.param([f"X-{number}: 1" for number in range(500)], id="many headers"),
        pytest.param(["Host: other"], id="second host"),
        pytest.param(["If-None-Match: " + '"a",' * 1000], id="many tags"),
        pytest.param(["Prefer: " + "wait=1," * 1000], id="many preferences"),
        pytest.param(["Prefer: wait=" + "9" * 5000], id="huge preference"),
        pytest.param(["Expect: 100-continue"], id="expect"),
        pytest.param(["Expect: a miracle"], id="unknown expectation"),
        pytest.param(["Upgrade: h2c"], id="upgrade"),
        pytest.param(["Range: bytes=0-0,1-1,2-2"], id="ranges"),
        pytest.param(["Cookie: \xff\xfe"], id="bytes in a cookie"),
        pytest.param(["bad header"], id="no colon"),
        pytest.param(["a b: c"], id="space in a name"),
        pytest.param([": x"], id="no name"),
        pytest.param([" folded: x"], id="folded"),
        pytest.param(["X: a\x00b"], id="NUL"),
    ],
)
def test_get_with_hostile_headers_is_an_ordinary_answer(service: Service, headers: list[str]) -> None:
    reply = send(service, "GET /check_status?job_id=a HTTP/1.1", *headers)
    assert reply.status in {0, 400, 404, 417, 431}, reply


@pytest.mark.parametrize(
    "line",
    ["", "GET", "GET /", "GET / HTTP/9.9", "GET / HTTP/1.1 x", "GET  / HTTP/1.1", "\x16\x03\x01\x02", "get / HTTP/1.1",
     "G@T / HTTP/1.1", "PRI * HTTP/2.0", "x" * 100_000],
)  # fmt: skip
def test_malformed_request_line_is_refused(service: Service, line: str) -> None:
    with connect(service) as connection:
        with contextlib.suppress(OSError):  # the server may refuse the line and close before the end is sent
            connection.sendall(line.encode("latin-1") + b"\r\nHost: x\r\nConnection: close\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
        reply = read_reply(connection)
    assert reply.status in {0, 400, 405, 414, 501, 505}, reply


# Methods

ROUTES = [
    "/",
    "/enqueue",
    "/enqueue/echo",
    "/check_status",
    "/get_result",
    "/functions",
    "/healthz",
    "/readyz",
    "/docs",
]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "PROPFIND", "BREW", "LINK"])
def test_unknown_method_is_refused(service: Service, path: str, method: str) -> None:
    reply = send(service, f"{method} {path} HTTP/1.1")
    assert reply.status in {400, 405, 501}, reply
    if reply.status == 405:
        assert "allow:" in reply.head.lower()
        assert "application/problem+json" in reply.head


@pytest.mark.parametrize("path", ROUTES)
def test_options_names_the_methods(service: Service, path: str) -> None:
    reply = send(service, f"OPTIONS {path} HTTP/1.1")
    assert reply.status == 200
    assert f"{'POST' if 'enqueue' in path else 'GET'}" in reply.head.lower().partition("allow:")[2].upper()


@pytest.mark.parametrize("path", ROUTES)
def test_head_has_no_body(service: Service, path: str) -> None:
    reply = send(service, f"HEAD {path} HTTP/1.1")
    expected = {"/enqueue": 405, "/enqueue/echo": 405, "/check_status": 422, "/get_result": 422}
    assert (reply.status, reply.body) == (expected.get(path, 200), "")


# Slow clients


def test_slow_clients_hold_up_nobody(service: Service) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(service)) for _ in range(200)]
        for connection in slow[::2]:
            connection.sendall(b"POST /enqueue/echo HTTP/1.1\r\nHost: x\r\n")
        for connection in slow[::4]:
            connection.sendall(f"{JSON}\r\nContent-Length: 100\r\n\r\n[".encode())
        for _ in range(5):
            start = time.monotonic()
            answer = requests.post(f"{service.url}/enqueue/echo?wait=20", json=1, timeout=30)
            assert (answer.status_code, answer.json()["result"]) == (200, 1)
            assert time.monotonic() - start < 15  # silent clients have twice as long


def test_enqueue_accepts_every_request_of_a_burst(service: Service) -> None:
    with ThreadPoolExecutor(300) as pool:
        answers = list(pool.map(lambda n: requests.post(f"{service.url}/enqueue/echo", json=n, timeout=30), range(300)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job_id"] for answer in answers}) == 300


@pytest.mark.slow
def test_a_refused_body_that_comes_fast_holds_up_nobody(service: Service) -> None:
    def pump() -> str:
        with connect(service) as connection:
            connection.sendall(
                f"POST /enqueue/echo HTTP/1.1\r\nHost: x\r\n{JSON}\r\nContent-Length: {10**12}\r\n\r\n".encode()
            )
            deadline = time.monotonic() + 25
            try:
                while time.monotonic() < deadline:
                    connection.sendall(b"a" * 2**16)
            except OSError:
                return "the server hung up"
        return "the server read on"

    assert attack_while_others_ask(service, pump, 1) == {"the server hung up"}


def test_large_bodies_that_come_together_hold_up_nobody(service: Service) -> None:
    body = json.dumps({f"a-key-{key}": key for key in range(9_000)}).encode()
    assert LARGE < len(body) < LIMIT
    headers = {"Content-Type": "application/json"}

    def enqueue() -> int:
        return requests.post(f"{service.url}/enqueue/echo", body, headers=headers, timeout=60).status_code

    assert attack_while_others_ask(service, enqueue, 40) == {202}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain"])
def test_tiny_chunks_hold_up_nobody_and_are_refused(service: Service, content_type: str) -> None:
    """Gunicorn takes 10 µs for each chunk, and lets no other request run meanwhile."""
    head = f"POST /enqueue/echo HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\n"

    def pump() -> int:
        with connect(service, timeout=30) as connection:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            with contextlib.suppress(OSError):  # the server hung up
                for _ in range(200):
                    connection.sendall(b"1\r\n1\r\n" * 1000)
            return read_reply(connection).status

    assert attack_while_others_ask(service, pump, 10) <= {0, 400, 415}


def test_small_chunks_are_accepted_if_they_are_not_too_many(service: Service) -> None:
    for body, size in ((b"[" + b"1," * 5000 + b"1]", 1), (b"[" + b"1," * 40_000 + b"1]", 20)):
        pieces = [body[at : at + size] for at in range(0, len(body), size)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
        reply = send(service, "POST /enqueue/echo HTTP/1.1", JSON, "Transfer-Encoding: chunked", body=chunks)
        assert reply.status == 202, reply


def test_head_of_many_headers_is_refused(service: Service) -> None:
    assert send(service, "GET / HTTP/1.1", *(f"X-{number}: 1" for number in range(50))).status == 200
    assert send(service, "GET / HTTP/1.1", *(f"X-{number}: 1" for number in range(70))).status == 431
    assert send(service, "GET / HTTP/1.1", "X-Long: " + "x" * 5000).status == 431
