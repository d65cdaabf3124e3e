"""`.ci/run` and `.ci/nightly` fail if one of their parts fails. Stand-ins for their commands write down each call."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, wait_until
from tests.test_worker import is_running

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Debian")

PARTS = {
    "run pre-commit": "hooks",
    "run test": "tests",
    "run test-slow": "slow tests",
    "run faults --seed": "faults, once",
    "run faults --budget": "faults, newman, fuzz",
    "run python -m tests.newman.run": "faults, newman, fuzz",
    "run fuzz": "faults, newman, fuzz",
}


class Scripts:
    """A folder of stand-ins for the commands that the scripts call."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._calls = folder, folder / "calls"
        self._calls.touch()
        for tool in ("pip", "npm", "faketime", "ip", "chromium", "openssl", "ps", "curl"):
            self.write(tool, "exit 0")
        self.write("git", "echo c0ffee")
        self.write("apt-get", "exit 1")
        self.write("pipenv", f'echo "$*" >>{self._calls}')

    def write(self, command: str, text: str) -> None:
        file = self._folder / command
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def let_fail(self, call: str) -> None:
        """Let this call of pipenv fail with the exit code 3."""
        self.write("pipenv", f'echo "$*" >>{self._calls}\ncase "$*" in "{call}"|"{call} "*) exit 3;; esac')

    def run(self, script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PATH": f"{self._folder}:{os.environ['PATH']}"} | settings
        return subprocess.run(
            ["bash", str(ROOT / script), *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines()


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def test_run_does_each_part_and_says_how_long_it_took(scripts: Scripts) -> None:
    done = scripts.run(".ci/run")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = scripts.calls()
    assert all(any(call.startswith(part) for call in calls) for part in PARTS)
    assert "run faults --budget 480 --seed c0ffee" in calls
    for name in ("tools", "project", *PARTS.values()):
        assert f" s  {name}\n" in done.stdout


@pytest.mark.parametrize("call", PARTS)
def test_run_fails_with_any_part_and_says_which(scripts: Scripts, call: str) -> None:
    scripts.let_fail(call)
    done = scripts.run(".ci/run")
    assert done.returncode == 3
    assert f"{PARTS[call]}: FAILED" in done.stdout
    later = list(PARTS.values())[list(PARTS).index(call) + 1 :]
    assert not [name for name in later if name != PARTS[call] and f"=== {name}" in done.stdout]


def test_nightly_goes_on_after_a_part_that_failed_and_fails_in_the_end(scripts: Scripts) -> None:
    scripts.let_fail("run test-all")
    done = scripts.run(".ci/nightly", "load", "faults", ROUNDS="3")
    assert done.returncode == 1
    assert "3 rounds of the suite under load: FAILED" in done.stdout
    calls = scripts.calls()
    assert calls.count("run test-all -q") == 1  # the round that failed is the last one
    assert [call.partition(" --seed")[0] for call in calls if "faults" in call] == [
        "run faults --long",
        "run faults --long",
    ]


def test_nightly_does_each_round_and_ends_its_load(scripts: Scripts, tmp_path: Path) -> None:
    hogs = tmp_path / "hogs"
    hogs.touch()
    scripts.write("python3", f"echo $$ >>{hogs}\nexec sleep 60")
    both_run = f'until [ "$(wc -l <{hogs})" = 2 ]; do sleep 0.05; done'
    scripts.write("pipenv", f'echo "$*" >>{tmp_path}/calls\ncase "$*" in *test-all*) {both_run};; esac')
    assert scripts.run(".ci/nightly", "load", ROUNDS="3").returncode == 0
    assert scripts.calls().count("run test-all -q") == 3
    pids = hogs.read_text().split()
    wait_until(lambda: not any(is_running(int(pid)) for pid in pids), what="the end of the loops")


def test_nightly_refuses_an_unknown_part(scripts: Scripts) -> None:
    done = scripts.run(".ci/nightly", "load", "everything")
    assert (done.returncode, done.stderr) == (2, "There is no part 'everything'.\n")
    assert scripts.calls() == []
