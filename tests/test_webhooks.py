"""Webhooks: which URLs are allowed, which messages are sent and when, and that each end of a job sends one."""

import base64
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

import pytest
import requests
from flask.testing import FlaskClient
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from rq.utils import import_attribute
from standardwebhooks import Webhook, WebhookVerificationError

import app.webhooks
from app.config import Settings
from app.core import scripts, transitions
from app.core.scripts import WEBHOOKS
from app.job_function import GiveUp, TryAgain
from app.main import create_app
from app.webhooks import addresses
from app.webhooks import delivery as webhooks
from tests.processes import (
    end_run,
    enqueue_echo,
    environment,
    job_in_state,
    json_of,
    just_set,
    problem_of,
    take_job,
    valkey_server,
    wait_until,
    web,
    worker,
)
from tests.test_auth import ALICE, BOB, KEYS, _bearer

SECRET, OLD_SECRET = (f"whsec_{base64.b64encode(bytes([number] * 24)).decode()}" for number in (1, 2))
URL = "http://93.184.215.14/hook"


class Delivery(NamedTuple):
    """A request that the receiver got."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Any:
        return json.loads(self.body)


class Receiver:
    """A webhook receiver. The test sets its answers; it repeats the last one."""

    def __init__(self) -> None:
        self.received: list[Delivery] = []
        self.answers: list[tuple[int, dict[str, str]]] = [(204, {})]
        self.is_slow = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the library's name
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, more = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                outer.received.append(Delivery(self.path, headers, body))
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # the library's name
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?for=test"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.02,))
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


class Api(NamedTuple):
    """The service with webhooks, its one worker, and a client of its Redis."""

    url: str
    redis: Any
    log: Path

    def enqueue(self, function: str, payload: Any, receiver: Receiver, **options: Any) -> str:
        query = {"webhook": receiver.url} | options
        answer = requests.post(f"{self.url}/enqueue/{function}", json=payload, params=query, timeout=30)
        assert answer.status_code in (200, 202), answer.text
        job_id: str = answer.json()["job_id"]
        return job_id

    def messages(self, job_id: str) -> Any:
        return requests.get(f"{self.url}/webhooks?job_id={job_id}", timeout=10).json()["messages"]

    def next_try(self, webhook_id: str) -> None:
        """End the pause before the next try."""
        # The pause may end by itself between these two calls; then there is nothing to change.
        wait_until(lambda: (self.redis.zscore("rq:scheduled:webhooks", webhook_id) or 0) > 1)
        self.redis.zadd("rq:scheduled:webhooks", {webhook_id: 1}, xx=True)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    folder = tmp_path_factory.mktemp("webhooks")
    with valkey_server(folder / "valkey") as server:
        env = environment(
            f"redis://127.0.0.1:{server.port}/0",
            WEBHOOK_SECRETS=f"{SECRET},{OLD_SECRET}",
            WEBHOOK_ALLOW_PRIVATE="true",
        )
        with (
            web(env, folder / "web.log") as url,
            worker(env, folder / "worker.log"),
            Redis(port=server.port) as connection,
        ):
            yield Api(url, connection, folder / "worker.log")


@pytest.fixture
def settings() -> Settings:
    return Settings(webhook_secrets=(SECRET,))


def only_message(client: FlaskClient, job_id: str, **headers: Any) -> Any:
    answer = json_of(client.get(f"/webhooks?job_id={job_id}", headers=headers))
    assert answer["job_id"] == job_id
    (message,) = answer["messages"]
    return message


# Messages


def test_webhook_is_verified_by_the_official_library(api: Api, receiver: Receiver) -> None:
    job_id = api.enqueue("echo", {"text": "å"}, receiver)
    wait_until(lambda: receiver.received)
    (delivery,) = receiver.received
    assert delivery.path == "/hook?for=test"
    assert delivery.headers["content-type"] == "application/json"
    assert delivery.headers["host"] == f"127.0.0.1:{receiver.server.server_port}"
    for secret in (SECRET, OLD_SECRET):  # a new secret replaces the old one, so both sign
        assert Webhook(secret).verify(delivery.body, delivery.headers) == delivery.event
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(delivery.body.replace(b"finished", b"failed"), delivery.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(f"whsec_{base64.b64encode(b'another').decode()}").verify(delivery.body, delivery.headers)

    status = requests.get(f"{api.url}/check_status?job_id={job_id}", timeout=10).json()
    assert delivery.event == {"type": "job.finished", "timestamp": status["ended_at"], "data": status}
    message = wait_until(lambda: [found for found in api.messages(job_id) if found["status"] == "finished"])[0]
    assert message["webhook_id"] == delivery.headers["webhook-id"]
    assert (message["type"], message["next_try_at"]) == ("job.finished", None)
    (tried,) = message["tries"]
    assert (tried["status_code"], tried["error"]) == (204, None)
    assert 0 <= tried["seconds"] < 10
    assert SECRET not in api.log.read_text()


def test_webhook_is_sent_for_canceled_failed_and_stopped_jobs(api: Api, receiver: Receiver) -> None:
    canceled = api.enqueue("echo", 1, receiver, delay=100)
    assert requests.post(f"{api.url}/cancel?job_id={canceled}", timeout=10).status_code == 200
    failed = api.enqueue("fail", "no paper", receiver)
    stopped = api.enqueue("sleep_for", 60, receiver)
    wait_until(lambda: requests.get(f"{api.url}/check_status?job_id={stopped}", timeout=10).json()["started_at"])
    requests.post(f"{api.url}/cancel?job_id={stopped}", timeout=10)
    wait_until(lambda: len(receiver.received) == 3)
    events = {delivery.event["data"]["job_id"]: delivery.event for delivery in receiver.received}
    types = {job_id: event["type"] for job_id, event in events.items()}
    assert types == {canceled: "job.canceled", failed: "job.failed", stopped: "job.stopped"}
    for job_id, event in events.items():
        assert event["data"] == requests.get(f"{api.url}/check_status?job_id={job_id}", timeout=10).json()
    assert events[failed]["data"]["error"]["message"] == "no paper"
    assert b"Traceback" not in b"".join(each.body for each in receiver.received)


def test_webhook_is_sent_for_each_job_of_a_batch_and_outlives_the_job(api: Api, receiver: Receiver) -> None:
    query: dict[str, Any] = {"webhook": receiver.url, "result_ttl": 1}
    answer = requests.post(f"{api.url}/enqueue_many/echo", json=[1, 2, 3], params=query, timeout=10).json()
    wait_until(lambda: len(receiver.received) == 3)
    assert {delivery.event["data"]["job_id"] for delivery in receiver.received} == set(answer["job_ids"])
    wait_until(lambda: not api.redis.exists(f"rq:job:{answer['job_ids'][0]}"))
    (message,) = api.messages(answer["job_ids"][0])  # it outlives its job
    assert message["tries"][0]["status_code"] == 204


def test_webhook_is_sent_for_a_job_that_rqs_own_code_ends(api: Api, receiver: Receiver) -> None:
    job_id = api.enqueue("echo", 1, receiver, delay=100)
    queue = Queue("default", connection=api.redis, serializer=JSONSerializer)
    dependent = queue.enqueue("tests.job_functions.echo", 2, depends_on=job_id)
    api.redis.zadd("rq:scheduled:default", {job_id: 1})
    wait_until(lambda: receiver.received)
    assert receiver.received[0].event["data"]["job_id"] == job_id
    assert receiver.received[0].event["type"] == "job.finished"
    wait_until(lambda: dependent.get_status() == "finished")
    assert len(api.messages(job_id)) == 1


# Further tries


def test_webhook_that_is_refused_is_tried_again_as_the_same_message(api: Api, receiver: Receiver) -> None:
    receiver.answers = [(500, {}), (302, {"Location": receiver.url}), (204, {})]
    job_id = api.enqueue("echo", 1, receiver)
    message = wait_until(lambda: [found for found in api.messages(job_id) if found["next_try_at"]])[0]
    assert (message["status"], message["tries"][0]["status_code"]) == ("scheduled", 500)
    for _ in range(2):
        api.next_try(message["webhook_id"])
    (message,) = wait_until(lambda: [found for found in api.messages(job_id) if found["status"] == "finished"])
    assert [tried["status_code"] for tried in message["tries"]] == [500, 302, 204]
    assert len(receiver.received) == 3  # the redirect was not followed
    assert {delivery.headers["webhook-id"] for delivery in receiver.received} == {message["webhook_id"]}
    assert len({delivery.body for delivery in receiver.received}) == 1
    for delivery in receiver.received:
        Webhook(SECRET).verify(delivery.body, delivery.headers)


def test_webhook_answered_with_410_is_not_tried_again_but_can_be_redelivered(api: Api, receiver: Receiver) -> None:
    receiver.answers = [(410, {}), (200, {})]
    job_id = api.enqueue("echo", 1, receiver)
    (message,) = wait_until(lambda: [found for found in api.messages(job_id) if found["status"] == "failed"])
    assert api.redis.zscore("rq:scheduled:webhooks", message["webhook_id"]) is None
    answer = requests.post(f"{api.url}/webhooks/redeliver?job_id={job_id}", timeout=10)
    assert (answer.status_code, len(answer.json()["messages"])) == (202, 1)
    (message,) = wait_until(lambda: [found for found in api.messages(job_id) if found["status"] == "finished"])
    assert [tried["status_code"] for tried in message["tries"]] == [410, 200]
    first, second = receiver.received
    assert first.headers["webhook-id"] == second.headers["webhook-id"]


def test_webhook_is_tried_again_after_the_receivers_retry_after(api: Api, receiver: Receiver) -> None:
    receiver.answers = [(503, {"Retry-After": "3000"})]
    job_id = api.enqueue("echo", 1, receiver)
    message = wait_until(lambda: [found for found in api.messages(job_id) if found["next_try_at"]])[0]
    due = api.redis.zscore("rq:scheduled:webhooks", message["webhook_id"])
    assert 2900 < due - time.time() <= 3001


def test_webhook_to_a_closed_port_or_a_silent_receiver_fails(
    api: Api, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        receiver.url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    job_id = api.enqueue("echo", 1, receiver)
    message = wait_until(lambda: [found for found in api.messages(job_id) if found["tries"]])[0]
    assert message["tries"][0]["error"].startswith("ConnectionRefusedError: ")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(webhooks, "RECEIVER_TIMEOUT", 0.05)
        with pytest.raises(TimeoutError):
            webhooks._post(f"http://127.0.0.1:{silent.getsockname()[1]}/", b"", {}, allow_private=True)


@pytest.mark.slow
def test_webhook_survives_a_worker_that_is_killed_during_the_delivery(
    real_redis: "Redis", redis_url: str, tmp_path: Path, receiver: Receiver
) -> None:
    env = environment(redis_url, WEBHOOK_SECRETS=SECRET, WEBHOOK_ALLOW_PRIVATE="true", WORKER_LEASE=3)
    with web(env, tmp_path / "web.log") as url, socket.create_server(("127.0.0.1", 0)) as silent:
        api = Api(url, real_redis, tmp_path / "worker.log")
        port = silent.getsockname()[1]
        receiver.url = f"http://127.0.0.1:{port}/"
        with worker(env, tmp_path / "worker.log", "default"):
            job_id = api.enqueue("echo", 1, receiver, wait=25)
        assert real_redis.llen("rq:queue:webhooks") == 1  # the message waits
        with worker(env, tmp_path / "killed.log", WEBHOOKS) as killed:
            connection, _ = silent.accept()  # the delivery has begun
            killed.kill()
            connection.close()
        silent.close()
        with (
            socket.create_server(("127.0.0.1", port)) as again,
            worker(env, tmp_path / "next.log", WEBHOOKS),
        ):
            connection, _ = again.accept()
            with connection:
                request = b""
                while not request.endswith(b"}}}"):  # read all: a close with unread data would reset the connection
                    request += connection.recv(65536)
                assert request.startswith(b"POST / HTTP/1.1\r\n")
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            wait_until(lambda: api.messages(job_id)[0]["status"] == "finished")


# The scripts


@pytest.mark.parametrize("state", ["finished", "failed", "stopped", "canceled"])
def test_each_end_of_a_job_enqueues_its_message(client: FlaskClient, redis: "Redis", state: str) -> None:
    job_id = enqueue_echo(client, webhook=URL)
    match state:
        case "canceled":
            client.post(f"/cancel?job_id={job_id}")
        case "finished" | "failed" | "stopped":
            end_run(redis, take_job(redis), state)
    message = only_message(client, job_id)
    assert (message["type"], message["status"], message["tries"]) == (f"job.{state}", "queued", [])
    assert redis.lrange("rq:queue:webhooks", 0, -1) == [message["webhook_id"].encode()]


def test_job_that_crashed_too_often_enqueues_its_message(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, webhook=URL)
    run = take_job(redis)
    failure = scripts.describe_failure("WorkHorseDied", "killed by signal 9")
    assert transitions.release(redis, run, crashed=True, limit=0, failure=failure, failure_ttl=100) == "failed"
    assert only_message(client, job_id)["type"] == "job.failed"


def test_job_without_a_webhook_or_with_a_retry_enqueues_no_message(client: FlaskClient, redis: "Redis") -> None:
    again = enqueue_echo(client, webhook=URL, retries=1)
    assert end_run(redis, take_job(redis), "failed") == "scheduled"
    silent = job_in_state(client, redis, "finished")
    for job_id in (again, silent):
        assert json_of(client.get(f"/webhooks?job_id={job_id}"))["messages"] == []
        problem_of(client.post(f"/webhooks/redeliver?job_id={job_id}"), 404, "webhook-not-found")
    assert not redis.exists("rq:queue:webhooks")


def test_job_that_ends_twice_has_two_messages(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, webhook=URL)
    end_run(redis, take_job(redis), "failed")
    assert client.post(f"/retry?job_id={job_id}").status_code == 202
    end_run(redis, take_job(redis), "finished")
    messages = json_of(client.get(f"/webhooks?job_id={job_id}"))["messages"]
    assert [message["type"] for message in messages] == ["job.failed", "job.finished"]
    assert len({message["webhook_id"] for message in messages}) == 2


def test_messages_are_not_shown_as_jobs(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, webhook=URL)
    end_run(redis, take_job(redis))
    webhook_id = only_message(client, job_id)["webhook_id"]
    end_run(redis, take_job(redis, WEBHOOKS), "failed")
    assert [job["job_id"] for job in json_of(client.get("/jobs"))["jobs"]] == [job_id]
    for path in ("/check_status", "/get_result", "/webhooks"):
        problem_of(client.get(f"{path}?job_id={webhook_id}"), 404, "job-not-found")
    for path in ("/cancel", "/retry", "/webhooks/redeliver"):
        problem_of(client.post(f"{path}?job_id={webhook_id}"), 404, "job-not-found")
    for name in ("deliver", "deliver_webhook", "app.webhooks.deliver"):
        problem_of(client.post(f"/enqueue/{name}", json={}), 404, "function-not-found")
    problem_of(client.post("/enqueue/echo?queue=webhooks", json={}), 422, "invalid-request")


def test_full_queue_of_messages_accepts_the_end_of_a_job_but_no_redelivery(redis: "Redis") -> None:
    client = create_app(Settings(webhook_secrets=(SECRET,), max_queue_length=1), redis).test_client()
    first = enqueue_echo(client, webhook=URL)
    end_run(redis, take_job(redis))
    end_run(redis, take_job(redis, WEBHOOKS), "finished")
    for _ in range(2):
        enqueue_echo(client, webhook=URL)
        assert end_run(redis, take_job(redis)) == "finished"
    assert redis.llen("rq:queue:webhooks") == 2
    problem_of(client.post(f"/webhooks/redeliver?job_id={first}"), 503, "queue-full")


@pytest.mark.parametrize("times", [1, 2])
def test_redelivery_has_all_tries_again(client: FlaskClient, redis: "Redis", times: int) -> None:
    job_id = enqueue_echo(client, webhook=URL)
    end_run(redis, take_job(redis))
    webhook_id = only_message(client, job_id)["webhook_id"]
    run = take_job(redis, WEBHOOKS)
    ending = transitions.Ending("failed", 100, 100, failure=scripts.describe_failure("GiveUp", "410"), after=-1)
    assert transitions.finish(redis, run, ending) == "failed"
    for _ in range(times):  # the second redelivery finds the message waiting
        assert client.post(f"/webhooks/redeliver?job_id={job_id}").status_code == 202
    assert redis.lrange("rq:queue:webhooks", 0, -1) == [webhook_id.encode()]
    assert redis.zcard("rq:failed:webhooks") == 0
    assert redis.ttl(f"rq:job:{webhook_id}") == -1
    pauses = []
    for _ in range(9):
        start = time.time()
        assert end_run(redis, take_job(redis, WEBHOOKS), "failed") == "scheduled"
        due = redis.zscore("rq:scheduled:webhooks", webhook_id) or 0
        pauses.append((due - start, due - time.time()))  # the most and the least that it can be
        redis.zadd("rq:scheduled:webhooks", {webhook_id: 1})
        transitions.promote(redis, [WEBHOOKS])
    # Standard Webhooks, "Deliverability and reliability"; a tenth more or less.
    wanted = [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]
    for (most, least), each in zip(pauses, wanted, strict=True):
        assert 0.89 * each - 1 < most, pauses
        assert least < 1.11 * each + 1, pauses
    assert end_run(redis, take_job(redis, WEBHOOKS), "failed") == "failed"


# Allowed addresses, owners and secrets


def test_messages_are_visible_to_their_owner_only(redis: "Redis") -> None:
    client = create_app(Settings(webhook_secrets=(SECRET,), api_keys=json.dumps(KEYS)), redis).test_client()
    alice, bob = _bearer(ALICE), _bearer(BOB)
    job_id = json_of(client.post("/enqueue/echo", json=1, query_string={"webhook": URL}, headers=alice))["job_id"]
    end_run(redis, take_job(redis))
    assert only_message(client, job_id, **alice)["type"] == "job.finished"
    problem_of(client.get(f"/webhooks?job_id={job_id}", headers=bob), 404, "job-not-found")
    problem_of(client.post(f"/webhooks/redeliver?job_id={job_id}", headers=bob), 404, "job-not-found")
    problem_of(client.get(f"/webhooks?job_id={job_id}"), 401, "unauthorized")


def test_webhooks_without_secrets_are_refused(redis: "Redis") -> None:
    client = create_app(Settings(), redis).test_client()
    problem = problem_of(client.post("/enqueue/echo", json=1, query_string={"webhook": URL}), 422, "invalid-request")
    assert "WEBHOOK_SECRETS" in problem["errors"][0]["msg"]
    assert redis.keys("rq:*queue*") == []


REFUSED = [
    "http://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/", "http://0/",
    "http://localhost/", "http://LOCALHOST./", "http://10.0.0.1/", "http://172.16.0.1/", "http://192.168.0.1/",
    "http://169.254.169.254/latest/meta-data/", "http://100.64.0.1/", "http://192.0.0.1/", "http://198.18.0.1/",
    "http://192.0.2.1/", "http://224.0.0.1/", "http://240.0.0.1/", "http://255.255.255.255/",
    "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/", "http://[64:ff9b::a9fe:a9fe]/", "http://[2002:7f00:1::]/", "http://[fe80::1]/",
    "http://[fe80::1%25lo]/", "http://[fc00::1]/", "http://[ff02::1]/", "http://[2001:db8::1]/",
    "http://[2001:0:7f00:1::80ff:fffe]/", "http://[64:ff9b:1::7f00:1]/", "http://192.0.0.192/", "http://192.0.0.9/",
    "http://192.88.99.1/", "http://168.63.129.16/", "http://[::ffff:192.0.0.192]/", "http://[fec0::1]:6379/",
    "http://[feff::1]/", "http://[3fff::1]/", "http://[5f00::1]/", "http://[64:ff9b::a83f:8110]/",
    "ftp://93.184.215.14/", "file:///etc/passwd", "gopher://93.184.215.14/", "//93.184.215.14/", "93.184.215.14", "",
    "http://", "http:///x", "http://:80/", "http://93.184.215.14:0/", "http://93.184.215.14:99999/", "http://[::1/",
    "http://user@93.184.215.14/", "http://user:secret@93.184.215.14/", "http://93.184.215.14\\@127.0.0.1/",
    "http://93.184.215.14/\r\nX: y", "http://93.184.215.14/ x", "http://93.184.215.14/å", "http://nobody.invalid/",
    "http://93.184.215.14/" + "x" * 2000, "http://" + "a" * 300 + "/", "http://a..b/", "http://１２７.0.0.1/",
]  # fmt: skip


@pytest.mark.parametrize("url", REFUSED)
def test_webhook_to_an_address_that_is_not_public_is_refused(client: FlaskClient, redis: "Redis", url: str) -> None:
    for path in ("/enqueue/echo", "/enqueue_many/echo"):
        problem = problem_of(client.post(path, json=[1], query_string={"webhook": url}), 422, "invalid-request")
        assert problem["errors"][0]["loc"] == ["query", "webhook"]
    assert not redis.exists("rq:queue:default")
    with pytest.raises((addresses.Refused, OSError)):
        webhooks._post(url, b"", {}, allow_private=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/", "http://[::1]/", "http://localhost/x?y=1"])
def test_webhook_to_a_private_address_is_sent_if_the_setting_allows_it(redis: "Redis", url: str) -> None:
    settings = Settings(webhook_secrets=(SECRET,), webhook_allow_private=True)
    client = create_app(settings, redis).test_client()
    assert client.post("/enqueue/echo", json=1, query_string={"webhook": url}).status_code == 202


def _resolves_to(*addresses: str) -> Any:
    original = socket.getaddrinfo

    def resolve(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host.endswith(".example"):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
        return original(host, port, *args, **options)

    return patch.object(socket, "getaddrinfo", side_effect=resolve)


def test_webhook_to_a_name_with_one_private_address_is_refused(client: FlaskClient) -> None:
    with _resolves_to("93.184.215.14", "10.0.0.1"):
        answer = client.post("/enqueue/echo", json=1, query_string={"webhook": "http://two.example/"})
    problem_of(answer, 422, "invalid-request")


def test_webhook_to_a_name_that_changes_is_refused_at_the_delivery(
    receiver: Receiver,
) -> None:
    """DNS rebinding: each try resolves the name once, and connects to the address that was checked."""
    url = f"http://rebound.example:{receiver.server.server_port}/"
    with _resolves_to("127.0.0.1"), pytest.raises(addresses.Refused):
        webhooks._post(url, b"{}", {}, allow_private=False)
    assert receiver.received == []
    with _resolves_to("127.0.0.1") as resolve:
        answer = webhooks._post(url, b"{}", {}, allow_private=True)
        names = [call.args[0] for call in resolve.call_args_list]
    assert answer.status == 204
    assert names.count("rebound.example") == 1
    assert receiver.received[0].headers["host"] == f"rebound.example:{receiver.server.server_port}"


@pytest.mark.parametrize(
    ("answer", "raised", "after"),
    [
        ((200, {}), None, None), ((204, {}), None, None), ((410, {}), GiveUp, None), ((500, {}), TryAgain, None),
        ((301, {"Location": "/"}), TryAgain, None), ((429, {"Retry-After": "7"}), TryAgain, 7), (None, TryAgain, None),
    ],
)  # fmt: skip
def test_answer_of_the_receiver_decides_about_another_try(
    client: FlaskClient,
    redis: "Redis",
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    answer: tuple[int, dict[str, str]] | None,
    raised: type[Exception] | None,
    after: float | None,
) -> None:
    """One try in this process, as a work-horse makes it, with a message that a script made."""
    job_id = enqueue_echo(client, webhook=URL)
    end_run(redis, take_job(redis))
    message = only_message(client, job_id)["webhook_id"]
    _, _, (payload,), _ = json.loads(redis.hget(f"rq:job:{message}", "data") or b"")
    monkeypatch.setattr(webhooks, "get_current_job", lambda: Mock(id=message, connection=redis))
    monkeypatch.setattr(
        webhooks, "get_settings", lambda: Settings(webhook_secrets=(SECRET,), webhook_allow_private=answer is not None)
    )
    receiver.answers = [answer or (200, {})]
    payload["url"] = receiver.url
    if raised is None:
        assert webhooks.deliver(payload) == {"status_code": receiver.answers[0][0]}
    else:
        with pytest.raises(raised) as error:
            webhooks.deliver(payload)
        assert getattr(error.value, "after", None) == after
    (tried,) = only_message(client, job_id)["tries"]
    assert (tried["status_code"], tried["error"]) == (
        (answer[0], None) if answer else (None, "Refused: the host '127.0.0.1' has an address that is not public")
    )
    ttl = 24 * 3600 if raised is None else 11 * 24 * 3600
    keys = scripts.tries_key(message), scripts.deliveries_key(job_id)
    assert [redis.ttl(key) for key in keys] == [just_set(ttl)] * 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7), (" 0 ", 0), ("99999999", 86400), ("-1", None), ("soon", None), ("1.5", None), ("", None),
        (None, None),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0), ("Fri, 31 Dec 2100 23:59:59 GMT", 86400), ("9" * 400, None),
        ("Mon, 01 Jan 2027 00:00:00 +99999999999999", None), ("Mon, 1 Jan 99999999999999999999 00:00:00", None),
        ("Mon, 99999999999999999999 Jan 2027 00:00:00", None),
    ],
)  # fmt: skip
def test_retry_after_is_read(text: str | None, seconds: float | None) -> None:
    assert webhooks._read_retry_after(text) == seconds


@pytest.mark.parametrize("answer", [b"", b"x" * 70000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200, b"\x16\x03\x01"])
def test_answer_that_is_not_http_is_no_success(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                with suppress(OSError):  # the client closes early
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises((HTTPException, OSError)):
            webhooks._post(f"http://127.0.0.1:{server.getsockname()[1]}/", b"{}", {}, allow_private=True)
        thread.join()


@pytest.mark.parametrize(
    "secrets", ["secret", "whsec_", "whsec_short", f"{SECRET},{SECRET}", f"{SECRET} {OLD_SECRET}", "whsec_" + "ä" * 40]
)
def test_bad_secrets_are_refused_and_not_shown(secrets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.config import get_settings

    monkeypatch.setenv("WEBHOOK_SECRETS", secrets)
    get_settings.cache_clear()
    try:
        with pytest.raises(SystemExit) as error:
            get_settings()
    finally:
        monkeypatch.undo()
        get_settings.cache_clear()
    assert "WEBHOOK_SECRETS" in str(error.value)
    assert len(secrets) < 7 or secrets not in str(error.value)


def test_secrets_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text(f"{SECRET}, {OLD_SECRET}\n")
    assert Settings(webhook_secrets_file=file).webhook_secrets == (SECRET, OLD_SECRET)


def test_corrupt_log_of_tries_is_ignored(client: FlaskClient, redis: "Redis") -> None:
    job_id = enqueue_echo(client, webhook=URL)
    end_run(redis, take_job(redis))
    webhook_id = only_message(client, job_id)["webhook_id"]
    redis.rpush(scripts.tries_key(webhook_id), "{", "[]", '{"at": "x"}', b"\xff")
    assert only_message(client, job_id)["tries"] == [{"at": "x", "status_code": None, "error": None, "seconds": None}]


def test_delivery_function_keeps_its_name() -> None:
    """Jobs in Redis have this name. RQ's own worker would import the function by it; ours does not."""
    assert import_attribute(scripts.DELIVER) is webhooks.deliver
    assert not hasattr(app.webhooks, "nope")
