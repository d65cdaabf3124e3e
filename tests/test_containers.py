"""Dockerfile and compose.yaml agree with the code and each other, and their commands run. No engine is needed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml  # type: ignore[import-untyped]  # it comes with pre-commit
from redis import Redis

from app.config import Settings
from tests.processes import ROOT, Process, free_port, valkey_server, wait_until

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def _instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, each with its arguments on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def _final_stage() -> list[tuple[str, str]]:
    instructions = _instructions()
    last = max(number for number, (word, _) in enumerate(instructions) if word == "FROM")
    return instructions[last:]


def _image_environment() -> dict[str, str]:
    pairs = [pair for word, text in _final_stage() if word == "ENV" for pair in shlex.split(text)]
    return dict(pair.split("=", 1) for pair in pairs)


def test_image_is_built_from_the_lock_and_has_no_build_tools() -> None:
    stages = [text for word, text in _instructions() if word == "FROM"]
    assert len(stages) == 2
    assert all(re.match(r"python:3\.\d+-slim", stage) for stage in stages)
    assert ("RUN", "pipenv sync") in _instructions()
    assert not [text for word, text in _final_stage() if word == "RUN"]


def test_image_runs_as_a_user_without_rights() -> None:
    (user,) = [text for word, text in _final_stage() if word == "USER"]
    assert all(int(part) >= 1000 for part in user.split(":"))
    words = [word for word, _ in _final_stage()]
    assert words.index("USER") < words.index("CMD")
    assert words.index("USER") > max(number for number, word in enumerate(words) if word == "COPY")


def test_image_starts_its_process_itself_so_that_signals_reach_it() -> None:
    (command,) = [text for word, text in _final_stage() if word == "CMD"]
    assert json.loads(command)[0] == "gunicorn"
    (check,) = [text for word, text in _final_stage() if word == "HEALTHCHECK"]
    assert json.loads(check.partition("CMD ")[2])[0] == "python"


def test_image_build_gets_the_files_that_it_copies_and_no_others() -> None:
    """No key, no data and no history goes to the builder."""
    ignored, *kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored == "*"
    sources = {
        source
        for word, text in _instructions()
        if word == "COPY" and not text.startswith("--from")
        for source in text.split()[:-1]
    }
    assert {line[1:] for line in kept if line.startswith("!")} == sources
    assert all((ROOT / source).exists() for source in sources)


def test_image_sets_the_variables_of_the_env_file() -> None:
    lines = (ROOT / ".env").read_text().splitlines()
    defaults = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert defaults.items() <= _image_environment().items()


def test_environment_names_only_existing_settings() -> None:
    known = {name.upper() for name in Settings.model_fields}
    known |= {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "FLASK_APP"}
    known |= {"RQ_WORKER_CLASS", "RQ_QUEUE_CLASS", "RQ_CONFIG"}
    assert _image_environment().keys() <= known
    for service in ("web", "worker"):
        assert SERVICES[service]["environment"].keys() <= known


def test_compose_publishes_nothing_but_the_web_port() -> None:
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"web"}
    assert COMPOSE["networks"]["back"]["internal"] is True
    assert SERVICES["valkey"]["networks"] == ["back"]


@pytest.mark.parametrize("name", SERVICES)
def test_compose_gives_no_container_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "always"
    assert "privileged" not in service
    assert name == "valkey" or "user" not in service  # the image's own user has no rights
    # `--scale` works with neither.
    assert not {"container_name", "hostname"} & service.keys()
    for secret in service["secrets"]:
        assert secret in COMPOSE["secrets"]
    for network in service["networks"]:
        assert network in COMPOSE["networks"]


def test_compose_keeps_secrets_out_of_environment_and_arguments() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not re.search("PASSWORD|KEY", name) or str(value).startswith("/run/secrets/")
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "secrets/" in ignored
    for secret in COMPOSE["secrets"].values():
        assert secret["file"].startswith("./secrets/")


def test_compose_gives_processes_enough_time_to_end() -> None:
    settings = Settings()

    def seconds(service: str) -> int:
        return int(SERVICES[service]["stop_grace_period"].removesuffix("s"))

    assert seconds("web") >= settings.max_wait + 5 + settings.drain_seconds
    assert seconds("worker") >= settings.worker_shutdown_seconds + 5


def _shell(text: str) -> str:
    """The text that the container's shell gets: Compose turns two dollars into one."""
    return text.replace("$$", "$")


@pytest.mark.slow
def test_containers_commands_run_as_written(tmp_path: Path) -> None:
    """Run the command, the secrets and the health check of each service, in a folder with only the image's files."""
    service, secrets, data = tmp_path / "service", tmp_path / "secrets", tmp_path / "data"
    for folder in (service, secrets, data):
        folder.mkdir()
    for word, text in _final_stage():
        if word == "COPY" and not text.startswith("--from"):
            *sources, target = text.split()
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, service / (target if target != "./" else source))
    (secrets / "redis_password").write_text("a-password\n")
    (secrets / "api_keys").write_text('[{"name": "alice", "key": "alice\'s long key", "admin": true}]')

    port, redis_port = free_port(), free_port()
    image = {name: value for name, value in _image_environment().items() if name != "PATH"}
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "REDIS_PORT": str(redis_port)}

    def environment(name: str) -> dict[str, str]:
        own = {key: str(value) for key, value in SERVICES[name].get("environment", {}).items()}
        env = {**image, **own, **paths, "REDIS_HOST": "127.0.0.1"}
        return {key: value.replace("/run/secrets", str(secrets)) for key, value in env.items()}

    # Valkey's image has this binary on its path.
    with valkey_server(tmp_path / "other") as other:
        binary = Path(f"/proc/{other._process.pid}/exe").resolve()
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "valkey-server").symlink_to(binary)
    shell, flag, script = SERVICES["valkey"]["command"]
    script = _shell(script).replace("/run/secrets", str(secrets)).replace("/data", f"{data} --port {redis_port}")
    env = {"PATH": f"{binaries}:{os.environ['PATH']}"}
    processes = [Process([shell, flag, script], env, tmp_path / "valkey.log", data)]
    try:
        redis = Redis(port=redis_port, password="a-password")
        processes[0].wait_for_log("Ready to accept connections")
        assert redis.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
        assert redis.config_get("appendonly")["appendonly"] == "yes"
        assert "a-password" not in Path(f"/proc/{processes[0].popen.pid}/cmdline").read_text()

        (web,) = [json.loads(text.replace(":8000", f":{port}")) for word, text in _final_stage() if word == "CMD"]
        processes.append(Process(web, environment("web"), tmp_path / "web.log", service))
        processes.append(
            Process(SERVICES["worker"]["command"], environment("worker"), tmp_path / "worker.log", service)
        )
        url = f"http://127.0.0.1:{port}"

        def is_ready() -> bool:
            assert [process.popen.poll() for process in processes] == [None] * 3, [each.log for each in processes]
            try:
                return requests.get(f"{url}/readyz", timeout=5).ok
            except (requests.ConnectionError, requests.Timeout):
                return False

        wait_until(is_ready, 60)
        headers = {"Authorization": "Bearer alice's long key"}
        body = {"text": "a b a"}
        done = requests.post(f"{url}/enqueue/count_words?wait=20", json=body, headers=headers, timeout=30)
        assert done.json()["result"]["total"] == 3

        (check,) = [text for word, text in _final_stage() if word == "HEALTHCHECK"]
        web_check = [part.replace(":8000", f":{port}") for part in json.loads(check.partition("CMD ")[2])]
        worker_check = [_shell(part) for part in SERVICES["worker"]["healthcheck"]["test"][1:]]

        def codes() -> list[int]:
            return [
                subprocess.run(command, env=environment(name), cwd=service, capture_output=True, check=False).returncode
                for command, name in ((web_check, "web"), (worker_check, "worker"))
            ]

        wait_until(
            lambda: codes() == [0, 0], 60, "healthy services"
        )  # Docker repeats a check too, and gives it some seconds
        for process in processes[:0:-1]:
            assert process.stop() == 0
        assert codes() == [1, 1]
        assert all(json.loads(line) for process in processes[1:] for line in process.log.splitlines())
        assert processes[0].stop() == 0
    finally:
        for process in processes:
            process.kill()
